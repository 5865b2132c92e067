"""vOPD: on-policy distillation with a control variate (arXiv 2605.07865): the sampled gap less its exact mean.

OPD's advantage of a sampled token is a draw whose mean over the tokens that could have been drawn is minus the reverse
KL. That mean does not depend on the draw, so taking it away leaves the gradient's expectation as it is and removes
much of its noise. Where ``--gap-clip`` cuts the gap, it is the mean of the cut gaps, of all tokens at the same limit.

Objective
    Delta_t = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)          the reward of a token, as in opd.py
    V_t   = E_{a ~ pi_old} Delta_t = -KL(pi_old(. | s_t) || pi_T(. | s_t))   its value, in closed form     (eqs 9 to 15)
    A_t     = Delta_t - V_t = Delta_t + KL(pi_old || pi_T)         detached, the baseline too
    L       = the clipped surrogate with A_t

What to watch: ``vopd/advantage_rms`` against ``vopd/teacher_student_gap_std`` says how much of the size is gone;
``vopd/advantage_mean`` is an average of zeros in expectation.

Differences: equation numbers are from public accounts of the paper; the formula is that of the authors' code. The
paper's cheaper baseline, the KL over the student's top k made to sum to 1, is left out: whole distributions are
compared in bounded memory here. There is one reward a token, without a sum over those to come, as in the paper's
experiments. V_t of cut gaps is ours. ``opd --baseline kl`` uses the same A_t; ``atod --baseline kl`` weighs it by turn
(atod.py says what that costs). ``--rules released`` presets OPD's token mean, dual clip and entropy bonus. The teacher
must be a model in this process.

    python -m atod_algos.signals.vopd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class VOPD(Algorithm):
    """On-policy distillation with the reverse KL as its value baseline."""

    name: ClassVar[str] = "vopd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "divergence"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = Delta_t - V_t."""
        value_M = scores.require("gap_mean")
        advantage_M = scores.require("teacher") - scores.student_M - value_M
        return Advantages(
            distillation_M=advantage_M,
            coefficients={"advantage_rms": float(np.sqrt(np.mean(advantage_M**2)))},
            notes={"baseline_mean": value_M, "advantage_mean": advantage_M},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(VOPD)
