"""Snapshots: a moment of an episode that can be kept, sent to another process, and gone on from any number of times.

A tree search wants to try several actions from one moment. ``state = env.unwrapped.snapshot()`` takes the moment, and
``env.unwrapped.restore(state)`` goes back to it, in this environment or in another one over the same data. Around
wrappers that remember turns (``Prompted``, ``RecordTurns``) :func:`snapshot` and :func:`restore` take the whole chain.
The invariant: after a restore, everything that the environment returns is what it would have returned the first time.

Example:
    >>> env = prompted(gym.make("atod/ALFWorld-v0"))
    >>> _ = env.reset(seed=1)
    >>> here = snapshot(env)
    >>> outcomes = [(restore(env, here), env.step(response))[1] for response in candidates]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from atod_envs.errors import EpisodeError

if TYPE_CHECKING:
    from collections.abc import Callable

_TRANSPARENT = (OrderEnforcing, PassiveEnvChecker)
"""Gymnasium's wrappers that hold nothing of an episode but that it has begun."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of an episode; picklable, and unchanged by whatever the environment does afterwards.

    Attributes:
        env_key: the environment's key.
        data_version: the data whose task this is.
        split: the split of the task.
        task_id: the task that is played.
        task: its instruction.
        seed: the episode's seed.
        actions: what was done so far; one text stands for every action that was too long to be read.
        frame: what the world showed last.
        over: the episode has ended.
        max_turns: the turn limit in force.
        generator: state of the environment's random generator.
        state: what else the environment needs; see ``TextEnv.save_state``.
    """

    env_key: str
    data_version: str
    split: str
    task_id: str
    task: str
    seed: int
    actions: tuple[str, ...]
    frame: Any
    over: bool
    max_turns: int
    generator: Mapping[str, Any]
    state: Any


def snapshot(env: gym.Env[Any, Any]) -> Any:
    """The present moment of an environment and of the wrappers around it.

    Args:
        env: a text environment, raw, prompted or recorded.

    Returns:
        A picklable state for :func:`restore` on the same chain of wrappers.

    Raises:
        EpisodeError: no episode has begun, or a wrapper keeps something of the episode and has no ``snapshot()``.
    """
    return _method(env, "snapshot")()


def restore(env: gym.Env[Any, Any], state: Any) -> tuple[Any, dict[str, Any]]:
    """Go back to a moment.

    Args:
        env: the environment that the state is from, or another one that was made in the same way.
        state: what :func:`snapshot` gave.

    Returns:
        The observation and ``info`` of that moment.

    Raises:
        EpisodeError: the state is of another environment, of other data, or of other wrappers.
    """
    return cast("tuple[Any, dict[str, Any]]", _method(env, "restore")(state))


def _method(env: gym.Env[Any, Any], name: str) -> Callable[..., Any]:
    while not hasattr(env, name):
        if not isinstance(env, gym.Wrapper):
            raise EpisodeError(f"{type(env).__name__} has no {name}(); expected a TextEnv inside the wrappers")
        if not isinstance(env, _TRANSPARENT):
            raise EpisodeError(
                f"the wrapper {type(env).__name__} has no {name}(), and what it remembers of the episode would be lost; "
                f"give it {name}(), or use env.unwrapped.{name}() without it"
            )
        if isinstance(env, OrderEnforcing) and name == "restore":
            env._has_reset = True  # a restored episode has begun
        env = env.env
    return cast("Callable[..., Any]", getattr(env, name))
