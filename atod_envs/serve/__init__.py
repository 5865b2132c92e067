"""Environments over HTTP and WebSocket: ``python -m atod_envs.serve``, and a client that is an environment itself.

The invariant: a remote episode equals a local one byte for byte, texts and ``info`` alike; a client chooses among what
the operator offers (environments, splits, task ids, a turn limit, a seed) and can name nothing else, no path above all.
"""
