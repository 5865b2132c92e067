"""Many episodes at once: in this process or in worker processes, all together or any subset.

The invariant: an environment's episode depends on its own seeds, options and actions alone. Neither the number of
workers nor the order in which environments are stepped changes anything: the same seeds give the same episodes.

Two ways to drive it:

- Gymnasium's vector interface (:meth:`TextVectorEnv.reset`, :meth:`TextVectorEnv.step`) moves all environments
  together; observations are tuples of strings, ``infos`` follow Gymnasium's convention, autoreset as in its
  ``autoreset_mode``.
- :meth:`TextVectorEnv.reset_at` and :meth:`TextVectorEnv.step_at` move any subset and wait for that subset alone;
  :meth:`TextVectorEnv.submit_reset`, :meth:`TextVectorEnv.submit_step` and :meth:`TextVectorEnv.collect` do not even
  wait for that, and none waits for the slowest.

Example:
    >>> envs = gym.make_vec("atod/ALFWorld-v0", num_envs=64, workers=2, split="train")
    >>> first = envs.reset_at([3, 8], seeds=[1, 2])
    >>> turns = envs.step_at([8], ["go to fridge 1"])
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from atod_envs import ROOMS
from atod_envs.errors import EpisodeError
from atod_envs.workers import LocalPool, Maker, Outcome, Request, WorkerPool

Infos: TypeAlias = dict[str, Any]


class Reset(NamedTuple):
    """How an episode begins: what ``reset`` of a single environment returns."""

    observation: str
    info: dict[str, Any]


class VectorTurn(NamedTuple):
    """What an action leads to: what ``step`` of a single environment returns."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class TextVectorEnv(VectorEnv[tuple[str, ...], Sequence[str], NDArray[Any]]):
    """``num_envs`` copies of a text environment.

    Args:
        env: a registered id, or something importable that returns an environment.
        num_envs: how many copies.
        workers: worker processes that share them; 0 keeps them all in this process.
        autoreset_mode: what :meth:`step` does with finished episodes; as in Gymnasium.
        **env_kwargs: for every copy.

    Raises:
        ValueError: a number that makes no sense.
        WorkerError: ``env`` or its arguments cannot be sent to a worker process.
    """

    def __init__(
        self,
        env: Maker,
        num_envs: int = 1,
        *,
        workers: int = 0,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **env_kwargs: Any,
    ) -> None:
        super().__init__()
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}; expected at least 1")
        if not 0 <= workers <= num_envs:
            raise ValueError(f"workers={workers}; expected 0 (this process) to num_envs={num_envs}")
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self._done: dict[int, tuple[str, Outcome]] = {}
        self._under_way: dict[int, str] = {}
        self._finished = np.zeros(num_envs, dtype=np.bool_)
        self._observations = [""] * num_envs
        self.pool: LocalPool | WorkerPool = (
            WorkerPool(env, env_kwargs, num_envs, workers) if workers else LocalPool(env, env_kwargs, num_envs)
        )
        (metadata,) = self._ask([0], "get:metadata")
        self.metadata = {**metadata, "autoreset_mode": self.autoreset_mode}
        (self.render_mode,) = self._ask([0], "get:render_mode")
        (self.single_observation_space,) = self._ask([0], "get:observation_space")
        (self.single_action_space,) = self._ask([0], "get:action_space")
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    # ---- any subset ----

    def reset_at(
        self,
        indices: Sequence[int],
        *,
        seeds: Sequence[int | None] | None = None,
        task_ids: Sequence[str | None] | None = None,
    ) -> list[Reset]:
        """Begin episodes in some environments, and wait for them.

        Args:
            indices: which environments.
            seeds: a seed for each of them.
            task_ids: a task for each of them.

        Returns:
            How each episode begins, in the order of ``indices``.
        """
        self.submit_reset(indices, seeds=seeds, task_ids=task_ids)
        return [outcome for outcome in self._wait_for(indices) if isinstance(outcome, Reset)]

    def step_at(self, indices: Sequence[int], actions: Sequence[str]) -> list[VectorTurn]:
        """Act in some environments, and wait for them.

        Nothing is reset by itself here: an environment whose episode is over has to be reset first.

        Args:
            indices: which environments.
            actions: an action for each of them.

        Returns:
            What each action leads to, in the order of ``indices``.

        Raises:
            EpisodeError: an environment has not been reset, or its episode is over.
        """
        self.submit_step(indices, actions)
        return [outcome for outcome in self._wait_for(indices) if isinstance(outcome, VectorTurn)]

    def submit_reset(
        self,
        indices: Sequence[int],
        *,
        seeds: Sequence[int | None] | None = None,
        task_ids: Sequence[str | None] | None = None,
    ) -> None:
        """Like :meth:`reset_at`, without waiting; take the outcome from :meth:`collect`."""
        self._check_lengths(indices, seeds=seeds, task_ids=task_ids)
        calls = []
        for position, index in enumerate(indices):
            task_id = None if task_ids is None else task_ids[position]
            options = None if task_id is None else {"task_id": task_id}
            seed = None if seeds is None else seeds[position]
            calls.append((index, "reset", (), {"seed": seed, "options": options}))
        self._submit(calls)

    def submit_step(self, indices: Sequence[int], actions: Sequence[str]) -> None:
        """Like :meth:`step_at`, without waiting; take the outcome from :meth:`collect`."""
        self._check_lengths(indices, actions=actions)
        self._submit([(index, "step", (action,), {}) for index, action in zip(indices, actions, strict=True)])

    def collect(self, timeout: float | None = None) -> dict[int, Reset | VectorTurn]:
        """Whatever has been submitted and is finished by now, by environment.

        Args:
            timeout: seconds to wait if nothing is finished; ``None`` waits until something is.

        Returns:
            Outcomes; empty if nothing was submitted, or nothing finished in time.

        Raises:
            WorkerError: a worker process died.
            Exception: what one of the environments raised.
        """
        if not self._done and self._under_way:
            self._receive(timeout)
        shown: dict[int, Reset | VectorTurn] = {}
        for index in sorted(self._done):
            name, outcome = self._done[index]
            if outcome.error is not None and shown:
                break  # first what went well; the error comes with the next call
            del self._done[index]
            shown[index] = self._shown(index, name, outcome)
        return shown

    # ---- all together: Gymnasium's interface ----

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], Infos]:
        """Begin episodes everywhere.

        Args:
            seed: a number ``s`` seeds the environments with ``s, s + 1, ...``; or one seed for each.
            options: ``task_id`` for all, or ``task_ids`` with one for each; ``reset_mask``, a boolean array, limits the
                reset to some environments.

        Returns:
            Observations and infos; infos hold entries for the environments that were reset.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        task_ids = options.pop("task_ids", None)
        if "task_id" in options:
            task_ids = [options.pop("task_id")] * self.num_envs
        if options:
            raise ValueError(
                f"unknown reset option {sorted(options)[0]!r}; expected 'task_id', 'task_ids' or 'reset_mask'"
            )
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + number for number in range(self.num_envs)]
        self._check_lengths(range(self.num_envs), seeds=seed, task_ids=task_ids)
        if mask is not None and (not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or not mask.any()):
            raise ValueError(f"reset_mask={mask!r}; expected a boolean array of length {self.num_envs}, with a True")
        chosen = list(range(self.num_envs)) if mask is None else [int(index) for index in np.flatnonzero(mask)]
        self._outcomes(
            index for index in chosen if index in self._under_way or index in self._done
        )  # of a step that failed
        begun = self.reset_at(
            chosen,
            seeds=None if seed is None else [seed[index] for index in chosen],
            task_ids=None if task_ids is None else [task_ids[index] for index in chosen],
        )
        infos: Infos = {}
        for index, episode in zip(chosen, begun, strict=True):
            infos = self._add_info(infos, episode.info, index)
        return tuple(self._observations), infos

    def step(
        self, actions: Sequence[str]
    ) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Infos]:
        """Act everywhere.

        Args:
            actions: one for each environment; ignored where an episode is begun instead (next-step autoreset).

        Returns:
            Observations, rewards, terminations, truncations (arrays of length ``num_envs``), infos.

        Raises:
            EpisodeError: an episode is over, and ``autoreset_mode`` is ``DISABLED``.
        """
        everyone = range(self.num_envs)
        self._check_lengths(everyone, actions=actions)
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations, truncations = np.zeros_like(self._finished), np.zeros_like(self._finished)
        infos: Infos = {}
        afresh = [
            index for index in everyone if self.autoreset_mode is AutoresetMode.NEXT_STEP and self._finished[index]
        ]
        acting = [index for index in everyone if index not in set(afresh)]
        self.submit_reset(afresh)
        self.submit_step(acting, [actions[index] for index in acting])
        # Together: where one raises, the answers of the others are collected all the same.
        answers = dict(zip([*afresh, *acting], self._wait_for([*afresh, *acting]), strict=True))
        again = []
        for index, turn in answers.items():
            if not isinstance(turn, VectorTurn):
                continue
            rewards[index], terminations[index], truncations[index] = turn.reward, turn.terminated, turn.truncated
            if self.autoreset_mode is AutoresetMode.SAME_STEP and self._finished[index]:
                infos = self._add_info(infos, {"final_obs": turn.observation, "final_info": turn.info}, index)
                again.append(index)
                self.submit_reset([index])
            else:
                infos = self._add_info(infos, turn.info, index)
        answers |= zip(again, self._wait_for(again), strict=True)
        for index in (*afresh, *again):
            infos = self._add_info(infos, answers[index].info, index)
        return tuple(self._observations), rewards, terminations, truncations, infos

    def render(self) -> tuple[Any, ...] | None:
        """What each environment shows; ``None`` without a render mode."""
        return None if self.render_mode is None else tuple(self._ask(range(self.num_envs), "render"))

    def call(self, name: str, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or read an attribute that is none, as Gymnasium's own do."""
        return tuple(self._ask(range(self.num_envs), name, *arguments, **keywords))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment."""
        return tuple(self._ask(range(self.num_envs), f"get:{name}"))

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment, e.g. ``max_turns`` for the episodes to come.

        Args:
            name: of the attribute.
            values: one for all; a list or tuple has one for each.
        """
        everyone = range(self.num_envs)
        given = values if isinstance(values, list | tuple) else [values] * self.num_envs
        self._check_lengths(everyone, values=given)
        self._submit([(index, f"set:{name}", (value,), {}) for index, value in zip(everyone, given, strict=True)])
        for _, outcome in self._outcomes(everyone):
            outcome.unwrap()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments and end the worker processes."""
        del kwargs
        if hasattr(self, "pool"):
            self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- requests and outcomes ----

    def _submit(self, calls: Sequence[Request]) -> None:
        if self.closed:
            raise EpisodeError("this vector environment has been closed; make a new one")
        seen: set[int] = set()
        for index, _, _, _ in calls:
            if not 0 <= index < self.num_envs:
                raise IndexError(f"environment {index}; expected 0 to {self.num_envs - 1}")
            if index in self._under_way or index in self._done or index in seen:
                raise EpisodeError(f"environment {index} has a request that is not collected yet; collect() it first")
            seen.add(index)
        self._under_way.update((index, name) for index, name, _, _ in calls)
        self.pool.submit(calls)

    def _receive(self, timeout: float | None) -> None:
        for index, outcome in self.pool.collect(timeout).items():
            self._done[index] = (self._under_way.pop(index), outcome)

    def _outcomes(self, indices: Iterable[int]) -> list[tuple[str, Outcome]]:
        wanted = list(indices)
        while not all(index in self._done for index in wanted):
            self._receive(None)
        return [self._done.pop(index) for index in wanted]

    def _wait_for(self, indices: Sequence[int]) -> list[Reset | VectorTurn]:
        outcomes = list(zip(indices, self._outcomes(indices), strict=True))
        for index, outcome in sorted(outcomes, key=lambda pair: pair[1][1].error is not None):  # errors last
            self._shown(index, *outcome)
        return [self._shown(index, *outcome) for index, outcome in outcomes]

    def _shown(self, index: int, name: str, outcome: Outcome) -> Reset | VectorTurn:
        value = outcome.unwrap()
        shown = Reset(*value) if name == "reset" else VectorTurn(*value)
        self._observations[index] = shown.observation
        self._finished[index] = isinstance(shown, VectorTurn) and (shown.terminated or shown.truncated)
        return shown

    def _ask(self, indices: Sequence[int], name: str, *arguments: Any, **keywords: Any) -> list[Any]:
        self._submit([(index, name, arguments, keywords) for index in indices])
        return [outcome.unwrap() for _, outcome in self._outcomes(indices)]

    def _check_lengths(self, indices: Sequence[int], **given: Sequence[Any] | None) -> None:
        for name, values in given.items():
            if isinstance(values, str):
                raise ValueError(
                    f"{name} is a str; expected a list of {len(indices)} strings, one for each environment"
                )
            if values is not None and len(values) != len(indices):
                raise ValueError(f"{name} has {len(values)} entries for {len(indices)} environments; expected one each")


def __getattr__(name: str) -> Any:
    """``make_alfworld`` and so on: what ``gym.make_vec`` calls, one for each environment of this project."""
    env_id = ROOMS.get(name.removeprefix("make_"))
    if env_id is None or not name.startswith("make_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(TextVectorEnv, env_id)
