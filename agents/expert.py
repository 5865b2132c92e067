"""The scripted experts of the environments, behind the one ``Agent`` protocol.

An expert knows what the agent has been shown and nothing else; it can be asked for its advice in any state that another
agent's actions have led to, which is what learning from corrections needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym

from agents.base import Decision
from atod_envs import ENVIRONMENTS, ROOMS
from atod_envs.errors import UnknownName
from atod_envs.experts import Script
from atod_envs.text_env import TextEnv

EXPERTS = {
    room: ENVIRONMENTS[env_id].replace(".env:", ".expert:").removesuffix("Env") + "Expert"
    for room, env_id in ROOMS.items()
}
"""Environment key -> scripted expert of an environment of this project: the class ``...Expert`` in its ``expert.py``.
An environment from elsewhere names its own in ``TextEnv.expert``."""


class ExpertAgent:
    """An environment's scripted expert as an agent.

    Args:
        script: the expert of the environment's room.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._observation = ""
        self._admissible: Sequence[str] = ()

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin an episode."""
        self._observation, self._admissible = observation, info["admissible"]
        self._script.reset(info["task"], observation, info["admissible"])

    def act(self) -> Decision:
        """Ask for the next action and the sub-goal behind it."""
        move = self._script.act(self._observation, self._admissible)
        return Decision(move.action, move.thought)

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Note what an action led to, whichever agent took it."""
        self._observation, self._admissible = observation, info["admissible"]
        self._script.observe(action, observation, info["admissible"])


def expert_for(env: gym.Env[str, str], *, brief: bool = False) -> ExpertAgent:
    """The scripted expert of an environment.

    Args:
        env: the environment, wrapped or not.
        brief: prefer actions that are short to say, for demonstrations; matters where the expert has a choice
            (WebShop).

    Raises:
        UnknownName: the environment has none.
    """
    world = cast("TextEnv", env.unwrapped)
    key = world.env_key
    place = getattr(world, "expert", "") or EXPERTS.get(key)
    if place is None:
        raise UnknownName("scripted expert", key, EXPERTS)
    module, name = place.split(":")
    script = getattr(importlib.import_module(module), name)
    return ExpertAgent(script.for_env(world, brief=brief) if hasattr(script, "for_env") else script())


def expert_solution(env: gym.Env[str, str], task_id: str, seed: int) -> tuple[Decision, ...]:
    """What the scripted expert does in one episode.

    Plays the episode on the raw environment, below all wrappers; reset the environment before it is used again.

    Args:
        env: the environment, wrapped or not.
        task_id: the task.
        seed: of the episode.

    Returns:
        The expert's decisions if they solve the task, none otherwise.

    Raises:
        UnknownName: the environment has no expert.
    """
    world, expert = env.unwrapped, expert_for(env)
    observation, info = world.reset(seed=seed, options={"task_id": task_id})
    expert.reset(observation, info)
    decisions: list[Decision] = []
    while True:
        decision = expert.act()
        decisions.append(decision)
        observation, _, terminated, truncated, info = world.step(decision.action)
        if terminated or truncated:
            return tuple(decisions) if info["success"] else ()
        expert.observe(decision.action, observation, info)
