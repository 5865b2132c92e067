"""Playing episodes: one turn loop, and the pools that run it here, on several ranks or on Ray."""

from atod_algos import foreign_agents

if problem := foreign_agents():
    raise ImportError(problem)
