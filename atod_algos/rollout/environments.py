"""The environments of a run, and what is to be known about them: asked once, and handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import gymnasium as gym

import atod_envs
from atod_algos.training.config import RunConfig
from atod_envs.options import read_options, refuse_settings, require_splits
from atod_envs.prompting import named_style
from atod_envs.styles import PromptStyle
from atod_envs.tasks import TaskSet
from atod_envs.text_env import TextEnv


def make_env(config: RunConfig, split: str | None = None) -> gym.Env[str, str]:
    """Make the raw environment of a run.

    Args:
        config: its settings, those of one environment where there are several.
        split: which tasks; by default the environment's own first choice, its training split.

    Raises:
        UnknownName: no environment of that id is registered.
    """
    options = read_options(config.option, split)
    refuse_settings(options, {"max_turns": "--max-turns", "split": "the data's own splits (--data)"})
    options["max_turns"] = config.max_turns
    if config.data is not None:  # an environment without files need not take it
        refuse_settings(options, {"data": "--data alone"})
        options["data"] = config.data
    if split is not None:
        options["split"] = split
    return atod_envs.make(config.env, **options)


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """What a run needs to know about its environment.

    Attributes:
        env_key: its short name (``"alfworld"``).
        splits: by purpose: to train on, to choose on, to report on.
        data_version: what the tasks are made of.
        style: the prompt style that was asked for.
    """

    env_key: str
    splits: tuple[str, str, str]
    data_version: str
    style: PromptStyle
    _open: Callable[[str | None], gym.Env[str, str]] = field(repr=False)
    _tasks: dict[str, TaskSet] = field(default_factory=dict, repr=False)

    def tasks(self, split: str) -> TaskSet:
        """The tasks of a split; its data is read the first time."""
        if split not in self._tasks:
            self._tasks[split] = _tasks(self._open(split))
        return self._tasks[split]


def describe(config: RunConfig) -> EnvironmentFacts:
    """Open one training environment and note what is to be known about it.

    Raises:
        UnknownName: no such environment, or it has no prompt style or split of that name.
    """
    env = make_env(config)
    world = cast("TextEnv", env.unwrapped)
    require_splits(config.option, world.splits)
    facts = EnvironmentFacts(
        world.env_key,
        world.splits,
        world.data_version,
        named_style(world, config.style),
        lambda split: make_env(config, split),
        {world.splits[0]: world.tasks},
    )
    env.close()
    return facts


def _tasks(env: gym.Env[str, str]) -> TaskSet:
    env.close()
    return cast("TextEnv", env.unwrapped).tasks
