"""IW-OPD: on-policy distillation weighted by how far the episode has drifted (arXiv 2606.22600): weights by position.

The teacher's gap on a token is worth less, the less probable the tokens before it were for the teacher. This is an
alternative to ATOD's weights. Both lower the weight of a part of the episode: this one by the disagreement so far,
ATOD's by turn.

Objective
    Delta_t = log pi_T - log pi_old                                      on tokens that the student sampled
    F_t  = sum_{j < t} |Delta_j| / sum_j |Delta_j|                share of the episode's disagreement that lies before t
    w_t  = 1 + gamma (1 - F_t)                                  from 1 + gamma at the start down towards 1 (Algorithm 1)
    A_t     = w_t Delta_t                                                detached, the weight too
    L       = the clipped surrogate with A_t

gamma = 0.5 (appendix C.3, the authors' code: a largest weight of 1.5). The sums run over the sampled tokens of an
episode, in order.

Differences: the paper's rollouts are single responses. Here an episode has many turns; ``--over turn`` begins again
with each of them. ``--mean-preserve`` divides by the mean of an episode's weights, so that weights of different
methods are compared at equal strength. The paper also derives weights as importance ratios of prefixes; the
accumulated |Delta| is its practical form, in the authors' code and in TRL's. ``--rules released`` presets OPD's token
mean, dual clip and entropy bonus. Its dual clip of 3 is the paper's number, too; ``--rules paper`` has none, as for
every method here, so that rows of the study differ in the signal alone. ``--gap exact`` weighs the reverse KL by w_t.

    python -m atod_algos.signals.iw_opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import turn_mean
from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class IWOPD(Algorithm):
    """On-policy distillation weighted by accumulated disagreement."""

    name: ClassVar[str] = "iw_opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    iw_gamma: float = 0.5
    """gamma: what the first token weighs above the last (paper, appendix C.3)."""
    over: Literal["trajectory", "turn"] = "trajectory"
    """What disagreement accumulates over: the whole episode, or each turn anew."""
    mean_preserve: bool = False
    """Divide by the mean weight of an episode's tokens, so that the term is as strong as OPD's."""

    def __post_init__(self) -> None:
        if self.iw_gamma < 0:
            raise AtodError(f"--iw-gamma {self.iw_gamma}: it raises the weight of early tokens, so it is at least 0")

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = w_t Delta_t."""
        delta_M = scores.require("teacher") - scores.student_M
        unit_M = batch.turn_M if self.over == "turn" else batch.trajectory_M
        weight_M = 1 + self.iw_gamma * (1 - share_before(np.abs(delta_M), unit_M))
        if self.mean_preserve:
            weight_M = weight_M / turn_mean(weight_M, batch.trajectory_M, len(batch.group_N))[batch.trajectory_M]
        return Advantages(
            distillation_M=weight_M * delta_M,
            teacher_weight_M=weight_M,
            turn_weight_K=turn_mean(weight_M, batch.turn_M, len(batch.trajectory_K)),
            notes={"weight_mean": weight_M},
        )


def share_before(value_M: np.ndarray, unit_M: np.ndarray) -> np.ndarray:
    """Share of each unit's sum that lies before a token, F_t; 0 where the sum is 0.

    Args:
        value_M: what accumulates, at least 0.
        unit_M: unit of each token; the tokens of a unit stand together.
    """
    total_M = np.bincount(unit_M, value_M)[unit_M]
    first_M = np.searchsorted(unit_M, unit_M)
    before_M = np.cumsum(value_M) - value_M
    return np.asarray(
        np.divide(before_M - before_M[first_M], total_M, out=np.zeros_like(total_M), where=total_M > 0).clip(0, 1)
    )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(IWOPD)
