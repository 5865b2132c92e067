"""TurnOPD's loss: from a mean over an episode's tokens to a mean over its turns (arXiv 2607.05804).

A mean over tokens lets a turn speak as long as it talks. Early that is what teaches most; later the short turns that
decide are hardly heard. The loss moves from one mean to the other as training goes on.

Objective
    Delta_t = log pi_T - log pi_old                                    on tokens that the student sampled
    p(s)    = min(s / T, 1)                                            training step s counts from 1
    w_t    = (1 - p) + p (N / K) / n_k(t)                            N tokens and K turns in the episode, n_k in turn k
    A_t     = w_t Delta_t                                              detached
    L       = the clipped surrogate with A_t, averaged over the tokens of an episode, then over episodes

The mean of w_t over an episode's tokens is 1 at every step: the loss is (1 - p) times a mean over tokens, plus p times
a mean over turns of means over their tokens. Turns without a token are none.

Differences: public accounts say that the loss moves progressively to a turn-balanced one. That it moves in a line, and
T = 80 as in ATOD's annealing, are our choices. The paper's other half is left out: rollouts cut at a depth that probes
of the divergence by turn choose, for which limits would have to see earlier steps. ``--balance-steps 0`` is balanced
from the start, which is ``--loss-agg turn_mean`` up to how episodes of different lengths are averaged. ``--gap exact``
weighs the reverse KL by w_t.

    python -m atod_algos.signals.turn_opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atod_algos.advantages import turn_mean
from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class TurnOPD(Algorithm):
    """On-policy distillation, balanced between turns as training goes on."""

    name: ClassVar[str] = "turn_opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    balance_steps: int = 80
    """T: steps after which every turn weighs alike (our choice); 0 from the start."""

    def __post_init__(self) -> None:
        if self.balance_steps < 0:
            raise AtodError(f"--balance-steps {self.balance_steps}: a number of steps, at least 0")

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = w_t Delta_t."""
        progress = min(step / self.balance_steps, 1.0) if self.balance_steps else 1.0
        n, spoken_K = len(batch.group_N), batch.n_K > 0
        tokens_N = np.bincount(batch.trajectory_M, minlength=n)
        turns_N = np.bincount(batch.trajectory_K[spoken_K], minlength=n)
        per_turn_M = (tokens_N / np.maximum(turns_N, 1))[batch.trajectory_M]
        weight_M = (1 - progress) + progress * per_turn_M / batch.n_K[batch.turn_M]
        return Advantages(
            distillation_M=weight_M * (scores.require("teacher") - scores.student_M),
            teacher_weight_M=weight_M,
            turn_weight_K=turn_mean(weight_M, batch.turn_M, len(batch.trajectory_K)),
            coefficients={"balance": progress},
            notes={"weight_spread": np.abs(weight_M - 1)},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(TurnOPD)
