"""Asynchronous rollout: while step s is learned, the episodes of later steps are already being played.

With a staleness of k, step s learns from episodes that the weights after step max(0, s - 1 - k) played: always exactly
those, however fast either side happens to be. So the results do not depend on timing, and a checkpoint that holds the
weights of the last k steps resumes bit for bit. One thread plays, in order of steps; it alone touches the engine.

Episodes of older weights are corrected by truncated importance weights (Ionides 2008; for language models Yao et al.
2025):

    w_t = min(cap, pi_old(a_t | s_t) / mu(a_t | s_t))

with mu the engine's own probability at sampling time and pi_old the learner's at the beginning of the step. The weight
multiplies the token's advantage; the clipped surrogate's ratio stays pi / pi_old. On-policy, mu is pi_old and no weight
is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch

Played = TypeVar("Played")
Answer = TypeVar("Answer")
Weights = Mapping[str, torch.Tensor]


IMPORTANCE_CAP = 2.0
"""Largest importance weight of a token that older weights sampled."""


def importance_weights(old_M: np.ndarray, sampler_M: np.ndarray, cap: float) -> np.ndarray:
    """Truncated importance weight of each sampled token: min(cap, pi_old / mu).

    Args:
        old_M: log-probs under the weights that learn, before the step.
        sampler_M: log-probs that the tokens were sampled with.
        cap: largest weight.
    """
    return np.asarray(np.exp(np.minimum(old_M - sampler_M, np.log(cap))))


def correction_metrics(weight_M: np.ndarray, cap: float, lag: int) -> dict[str, float]:
    """How stale the episodes were and how much was corrected."""
    return {
        "staleness/steps": float(lag),
        "staleness/weight_mean": float(weight_M.mean()),
        "staleness/weight_min": float(weight_M.min()),
        "staleness/truncated": float((weight_M >= cap).mean()),
    }


def version_of(step: int, staleness: int) -> int:
    """After which step the weights were taken that play the episodes of ``step`` (0: the initial ones)."""
    return max(0, step - 1 - staleness)


def correct(
    advantage_M: np.ndarray, old_M: np.ndarray, sampler_M: np.ndarray, *, step: int, staleness: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages of a step's tokens, weighted where older weights sampled them, and the numbers that say so.

    Args:
        advantage_M: advantages.
        old_M: log-probs under the weights that learn, before the step.
        sampler_M: log-probs that the tokens were sampled with.
        step: training step, from 1.
        staleness: of the run; at 0 nothing is weighted.
    """
    if not staleness:
        return advantage_M, {}
    weight_M = importance_weights(old_M, sampler_M, IMPORTANCE_CAP)
    lag = step - 1 - version_of(step, staleness)
    return advantage_M * weight_M, correction_metrics(weight_M, IMPORTANCE_CAP, lag)


class AsyncRollout(Generic[Played]):
    """Plays the episodes of later steps in a thread of its own.

    Args:
        staleness: how many steps the weights lag behind those of an on-policy run; at least 1.
        steps: the last step.
        play: plays a step's episodes with given weights; told how to ask whether it should stop.
        threads: of the numerical library, for the playing thread.
    """

    def __init__(
        self,
        staleness: int,
        steps: int,
        play: Callable[[int, int, Weights, Callable[[], None]], Played],
        threads: int,
    ) -> None:
        self.staleness, self.steps = staleness, steps
        self._play = play
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="rollout", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._pending: dict[int, Future[Played]] = {}
        self.kept: dict[int, dict[str, torch.Tensor]] = {}
        self._stopping = False

    def begin(self, done: int, current: Weights, kept: Mapping[int, Weights]) -> None:
        """Start the steps whose weights exist already.

        Args:
            done: the last step that was learned.
            current: the weights after it.
            kept: weights of earlier steps, from :meth:`kept_weights` of a checkpoint.
        """
        self.kept = {int(version): dict(weights) for version, weights in kept.items()}
        self.kept[done] = _copy(current)
        for step in range(done + 1, min(done + 1 + self.staleness, self.steps) + 1):
            self._submit(step)

    def learned(self, step: int, current: Weights) -> None:
        """The weights after ``step`` exist: start the step that they play."""
        self.kept[step] = _copy(current)
        following = step + 1 + self.staleness
        if following <= self.steps:
            self._submit(following)

    def take(self, step: int) -> Played:
        """Wait for a step's episodes. Whatever went wrong while they were played is raised here."""
        played = self._pending.pop(step).result()
        oldest = version_of(step + 1, self.staleness)
        self.kept = {version: weights for version, weights in self.kept.items() if version >= oldest}
        return played

    def call(self, work: Callable[[], Answer]) -> Answer:
        """Have the playing thread do something with the engine between two steps, and wait for it.

        Where a step that was played meanwhile failed, that is raised here: the engine is then left in the middle of it.
        """

        def after_them() -> Answer:
            for played in self._pending.values():
                if played.done():
                    played.result()
            return work()

        return self._thread.submit(after_them).result()

    def kept_weights(self, done: int) -> dict[int, dict[str, torch.Tensor]]:
        """The weights, older than those after step ``done``, that steps not yet learned are played with."""
        oldest = version_of(done + 1, self.staleness)
        return {version: weights for version, weights in self.kept.items() if oldest <= version < done}

    def close(self) -> None:
        """Stop playing; episodes under way are given up."""
        self._stopping = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> None:
        version = version_of(step, self.staleness)
        self._pending[step] = self._thread.submit(self._play, step, version, self.kept[version], self._ask)

    def _ask(self) -> None:
        if self._stopping:
            raise _Stopped


class _Stopped(BaseException):
    """The run ends; these episodes are not needed."""


def _copy(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
