"""The published engine, in a worker process of its own."""
