"""The ALFWorld engine: game files compiled to Python functions, and one episode of a game."""
