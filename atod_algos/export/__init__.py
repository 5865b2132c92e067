"""A run's model out again: a folder that other programs read, checked against the model that was trained.

    atod export runs/atod-ALFWorld-v0-seed0 --to models/agent --card
    atod export runs/lora --checkpoint best --to models/agent --merge

The invariant: a folder is there whole, and gives the trained model's log-probs, or it is not there.
"""
