"""A run from start to end: settings, the training loop, checkpoints, the run folder, the command line."""
