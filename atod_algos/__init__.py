"""Who learns: groups of episodes are sampled, scored, turned into per-token advantages, and learned from."""

from atod_envs.command import foreign_agents

if problem := foreign_agents():
    raise ImportError(problem)
