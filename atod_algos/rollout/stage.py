"""An environment as a rollout plays it: its prompts, the limits of the student there, and the idle copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import gymnasium as gym

from agents.policy import Policy
from atod_algos.algorithm import RolloutLimits
from atod_envs.prompting import Prompted
from atod_envs.recording import RecordTurns
from atod_envs.styles import PromptStyle
from atod_envs.text_env import TextEnv


@dataclass(frozen=True)
class Stage:
    """One environment of a rollout.

    Attributes:
        make_env: makes a raw environment; called once for each episode that runs at the same time.
        style: the prompt style, by name or as an object; None leaves the environment raw (for agents).
        policy: the student, who answers here with at most so many tokens; None where it plays no turn.
        teacher: the teacher, who answers turns that a plan gives to it; None where it plays none.
        idle: environments that play no episode at present.
    """

    make_env: Callable[[], gym.Env[str, str]]
    style: str | PromptStyle | None
    policy: Policy | None = None
    teacher: Policy | None = None
    idle: list[RecordTurns] = field(default_factory=list)

    def take(self, limits: RolloutLimits) -> RecordTurns:
        """An environment that plays no episode at present, under these limits."""
        if self.idle:
            env = self.idle.pop()
        else:
            raw = self.make_env()
            env = RecordTurns(raw if self.style is None else Prompted(raw, self.style))
        text_env = cast("TextEnv", env.unwrapped)
        own = text_env.configured_max_turns
        text_env.max_turns = own if limits.max_turns is None else min(own, limits.max_turns)
        return env

    def close(self) -> None:
        """Close the idle environments."""
        for env in self.idle:
            env.close()
        self.idle.clear()
