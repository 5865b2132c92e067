"""OPD: on-policy distillation (Agarwal et al. 2024; ATOD paper section 3.3).

Objective
    Delta_t = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)         on tokens that the student sampled          (eq 6)
    A_t     = Delta_t                                             detached; no reward, no normalisation       (eq 7)
    L       = the clipped surrogate of eq 4 with A_t

Differences from the paper: eq 5 writes the current log pi_theta inside the gap; differentiated through both factors it
adds a score term of zero mean, so the detached gap is used, as in the released code. ``--rules released`` adds its
token mean, dual clip and entropy bonus. The gap is teacher minus student; some code bases negate both. ``--gap exact``
takes the expectation of the gap over all tokens in place of the sampled one: the reverse KL KL(pi_theta || pi_T) as a
loss, without ratio or clip. ``--baseline kl`` adds KL(pi_old || pi_T) to the gap, which is vOPD (signals/vopd.py): the
same gradient in expectation, with less noise. Where ``--gap-clip`` cuts gaps, it takes the mean of the cut gaps away.

    python -m atod_algos.opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class OPD(Algorithm):
    """On-policy distillation, teacher only."""

    name: ClassVar[str] = "opd"
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    opd_coef: float = 1.0
    """Multiplies the gap (released code: 1)."""
    baseline: Literal["none", "kl"] = "none"
    """What is subtracted from the sampled gap: 'none' (paper), or 'kl', its exact mean, which is -KL(pi_old || pi_T)
    where --gap-clip cuts nothing (vOPD)."""

    def __post_init__(self) -> None:
        require_range(self, "opd_coef", low=0)

    @property
    def scores(self) -> frozenset[str]:
        """The teacher; whole distributions where the baseline needs them."""
        return frozenset({"teacher", "divergence"} if self.baseline == "kl" else {"teacher"})

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = Delta_t (eq 7)."""
        weight_M = np.full(batch.n_tokens, self.opd_coef)
        delta_M = scores.require("teacher") - scores.student_M
        if self.baseline == "kl":
            delta_M = delta_M - scores.require("gap_mean")
        return Advantages(distillation_M=weight_M * delta_M, teacher_weight_M=weight_M)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(OPD)
