"""Generated rooms and tasks: the built-in world and fresh games."""
