"""G-OPD: on-policy distillation with an extrapolated reward, "ExOPD" (arXiv 2602.12125).

Distillation seen as reinforcement learning: what the teacher learned, log pi_T - log pi_base against the model it was before, is a reward for
each token, and the KL to that base model keeps the student near it. With lambda above 1 the student goes further than the teacher did.

Objective
    max  E[ lambda (log pi_T - log pi_base) ] - KL(pi_theta || pi_base)
    A_t = lambda (log pi_T - log pi_base) - (log pi_old - log pi_base)          on tokens that the student sampled, detached
    L   = the clipped surrogate of OPD with A_t
lambda = 1 is OPD: the base model cancels. lambda = 0 pulls the student back to the base.

Differences: the paper's base is the teacher before its own reinforcement learning (give it with ``--base``), or the student as it
was, which is the default here. The released code caps the importance weight between sampler and trainer at 5; here the old
log-probs are recomputed by the learner's model and the clip of eq 4 bounds the ratio. Its learning rate of 1e-5 and batch
of 1024 are left to ``--lr`` and ``--tasks-per-step``. ``--gap-clip`` bounds log pi_T - log pi_old before anything else is made
of it. ``--rules released`` presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.gopd --env atod/ALFWorld-v0 --extrapolation 1.25
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
from atod_algos.opd import OPD
from atod_algos.rollout.episodes import RolloutLimits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GOPD:
    """On-policy distillation with reward extrapolation."""

    name: ClassVar[str] = "gopd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "base"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = OPD.rules

    objective: Objective = field(default_factory=Objective)
    extrapolation: float = 1.25
    """lambda: 1 is OPD, 1.25 the released scripts' extrapolation."""

    def limits(self, step: int) -> RolloutLimits:
        """No limit of its own."""
        return RolloutLimits()

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """Reported only; G-OPD does not learn from it."""
        return task_reward(batch, GroupOptions())

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """Lambda times the teacher's gain over the base, less the student's."""
        base_M = scores.base_M
        if base_M is None:
            raise ValueError("G-OPD needs a base model's log-probs")
        gain_M = scores.require_teacher() - base_M
        drift_M = scores.student_M - base_M
        metrics = {"gopd/teacher_gain_mean": float(gain_M.mean()), "gopd/student_drift_mean": float(drift_M.mean())}
        return Advantages(self.extrapolation * gain_M - drift_M, metrics | teacher_metrics(batch, scores, self.name))

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """None."""
        return None


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GOPD)
