"""TIP: on-policy distillation on the important tokens only (arXiv 2604.14084).

A token is worth learning from where the student is unsure, or where teacher and student disagree. ATOD's turn weights
are the same idea at the level of turns, from sampled tokens; TIP looks at whole distributions.

Objective
    h_t = H(pi_S(. | s_t)) / log |V|            entropy of the student over the vocabulary
    d_t = KL(pi_S(. | s_t) || pi_T(. | s_t))    over the vocabulary
    s_t = h~_t + d~_t - h~_t d~_t            Soft-OR; h cut at its 0.98 quantile, both min-max normalised over the batch
    A_t = (log pi_T - log pi_old) M / |kept|    on the share rho of all M tokens with the largest s_t; 0 on the others
    L   = the clipped surrogate of OPD with A_t, averaged over tokens: the mean over the kept ones

Differences: the paper averages the divergence of the kept tokens; this is its sampled form (one token's reverse-KL
policy gradient, the same gradient in expectation), as OPD and ATOD have it. Among equal scores the earlier token is
kept, so that exactly ceil(rho M) are. The published share is not known to us; 0.5 is our choice. Scores come from the
weights that rolled out. Where padded vocabularies differ in size, distributions are compared over the ids that both
models have.

    python -m atod_algos.tip --env atod/ALFWorld-v0 --keep 0.2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from atod_algos.advantages import importance
from atod_algos.algorithm import RELEASED, Advantages, Algorithm, Objective
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class TIP(Algorithm):
    """On-policy distillation on important tokens."""

    name: ClassVar[str] = "tip"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "divergence"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    objective: Objective = field(default_factory=lambda: Objective(loss_agg="token_mean"))
    keep: float = 0.5
    """rho: share of the batch's tokens that is learned from, in (0, 1]; 1 is OPD (our choice, see above)."""
    entropy_quantile: float = 0.98
    """Entropies above this quantile of the batch are cut to it (paper: the top 2 %)."""

    def __post_init__(self) -> None:
        if not (0 < self.keep <= 1 and 0 < self.entropy_quantile <= 1):
            raise AtodError(
                f"--keep {self.keep} and --entropy-quantile {self.entropy_quantile}: both are shares above 0 and at most 1"
            )

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The teacher's gap on the kept tokens."""
        kl_M, entropy_M = scores.require("reverse_kl"), scores.require("entropy") / math.log(scores.vocabulary)
        score_M = importance(kl_M, entropy_M, self.entropy_quantile)
        kept_M = largest(score_M, self.keep)
        delta_M = scores.require("teacher") - scores.student_M
        return Advantages(
            distillation_M=delta_M * kept_M / kept_M.mean(),
            notes={
                "kept_ratio": kept_M,
                "score_mean": score_M,
                "kl_mean": kl_M,
                "kept_kl_mean": kl_M[kept_M],
                "normalised_entropy_mean": entropy_M,
            },
        )


def largest(score_M: np.ndarray, share: float) -> np.ndarray:
    """Booleans that mark the given share of the largest scores, rounded up; among equals the first."""
    # A share of 0.3 of 10 is 3, although 0.3 * 10 > 3 in floating point.
    count = math.ceil(round(share * len(score_M), 9))
    kept_M = np.zeros(len(score_M), dtype=bool)
    kept_M[np.argsort(-score_M, kind="stable")[:count]] = True
    return kept_M


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(TIP)
