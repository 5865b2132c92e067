"""G-OPD: on-policy distillation with an extrapolated reward, "ExOPD" (arXiv 2602.12125).

Distillation seen as reinforcement learning: what the teacher learned, log pi_T - log pi_base against the model it was
before, is a reward for each token, and the KL to that base model keeps the student near it. With lambda above 1 the
student goes further than the teacher did.

Objective
    max  E[ lambda (log pi_T - log pi_base) ] - KL(pi_theta || pi_base)
    A_t = lambda (log pi_T - log pi_base) - (log pi_old - log pi_base)      on tokens that the student sampled, detached
    L   = the clipped surrogate of OPD with A_t
lambda = 1 is OPD: the base model cancels. lambda = 0 pulls the student back to the base.

Differences: the paper's base is the teacher before its own reinforcement learning (give it with ``--base``), or the
student as it was, which is the default here. The released code caps the importance weight between sampler and trainer
at 5; here the old log-probs are recomputed by the learner's model and the clip of eq 4 bounds the ratio. Its learning
rate of 1e-5 and batch of 1024 are left to ``--lr`` and ``--tasks-per-step``. ``--gap-clip`` bounds log pi_T - log
pi_old before anything else is made of it. ``--rules released`` presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.gopd --env atod/ALFWorld-v0 --extrapolation 1.25
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class GOPD(Algorithm):
    """On-policy distillation with reward extrapolation."""

    name: ClassVar[str] = "gopd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "base"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    extrapolation: float = 1.25
    """lambda: 1 is OPD, 1.25 the released scripts' extrapolation."""
    base: str | None = None
    """The teacher before its own training: a folder or a hub id; by default the initial student."""

    @property
    def base_model(self) -> str | None:
        """What ``--base`` names."""
        return self.base

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """Lambda times the teacher's gain over the base, less the student's."""
        gain_M = scores.require("teacher") - scores.require("base")
        drift_M = scores.student_M - scores.require("base")
        return Advantages(
            distillation_M=self.extrapolation * gain_M - drift_M,
            notes={"teacher_gain_mean": gain_M, "student_drift_mean": drift_M},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GOPD)
