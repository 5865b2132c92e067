"""OPD: on-policy distillation (Agarwal et al. 2024; ATOD paper section 3.3).

Objective
    Delta_t = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)         on tokens that the student sampled          (eq 6)
    A_t     = Delta_t                                             detached; no reward, no normalisation       (eq 7)
    L       = the clipped surrogate of eq 4 with A_t

Differences from the paper: eq 5 writes the current log pi_theta inside the gap; differentiated through both factors it
adds a score term of zero mean, so the detached gap is used, as in the released code. ``--rules released`` adds its
token mean, dual clip and entropy bonus. The gap is teacher minus student; some code bases negate both. ``--gap exact``
takes the expectation of the gap over all tokens in place of the sampled one: the reverse KL KL(pi_theta || pi_T) as a
loss, without ratio or clip.

    python -m atod_algos.opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class OPD(Algorithm):
    """On-policy distillation, teacher only."""

    name: ClassVar[str] = "opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    opd_coef: float = 1.0
    """Multiplies the gap (released code: 1)."""

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = Delta_t (eq 7)."""
        weight_M = np.full(batch.n_tokens, self.opd_coef)
        return Advantages(
            distillation_M=weight_M * (scores.require("teacher") - scores.student_M), teacher_weight_M=weight_M
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(OPD)
