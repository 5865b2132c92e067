"""Updating weights: the clipped surrogate, log-probs in bounded memory, packing, optimizer, ranks."""
