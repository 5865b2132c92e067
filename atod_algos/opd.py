"""OPD: on-policy distillation (Agarwal et al. 2024; ATOD paper section 3.3).

Objective
    Delta_t = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)         on tokens that the student sampled          (eq 6)
    A_t     = Delta_t                                             detached; no reward, no normalisation       (eq 7)
    L       = the clipped surrogate of eq 4 with A_t

Differences from the paper: eq 5 writes the current log pi_theta inside the gap; differentiated through both factors it adds a
score term of zero mean, so the detached gap is used, as in the released code. ``--rules released`` adds its token mean,
dual clip and entropy bonus. The gap is teacher minus student; some code bases negate both.

    python -m atod_algos.opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Advantages
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import task_reward
from atod_algos.learner.learner import Objective
from atod_algos.metrics import teacher_metrics
from atod_algos.rollout.episodes import RolloutLimits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OPD:
    """On-policy distillation, teacher only."""

    name: ClassVar[str] = "opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {"objective": {"dual_clip": 3.0, "loss_agg": "token_mean", "entropy_coef": 0.001}},
    }

    objective: Objective = field(default_factory=Objective)
    opd_coef: float = 1.0
    """Multiplies the gap (released code: 1)."""

    def limits(self, step: int) -> RolloutLimits:
        """No limit of its own."""
        return RolloutLimits()

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """Reported only; OPD does not learn from it."""
        return task_reward(batch, GroupOptions())

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = Delta_t (eq 7)."""
        delta_M = scores.require_teacher() - scores.student_M
        return Advantages(self.opd_coef * delta_M, teacher_metrics(batch, scores, self.name))

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """None."""
        return None


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(OPD)
