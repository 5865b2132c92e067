"""SAGE-OPD's weights: a turn counts by the teacher's confidence, and by whether it needs help (arXiv 2606.19659).

In states that it does not know a teacher is unsure, and its gap on a token is worth little there.

Objective
    Delta_t = log pi_T - log pi_old                                     on tokens that the student sampled
    c_k   = mean_t max_v pi_T(v | s_t)                              the teacher's confidence, over the tokens of turn k
    u_k     = 1 strong, alpha weak, 0 skip                              whether to intervene in turn k
    w_t    = u_k c_k N / sum_j u_k(j) c_k(j)                          N tokens in the batch                     (eq 12)
    A_t     = w_t Delta_t                                               detached
    L       = the clipped surrogate with A_t

The weights sum to the number of tokens, so the loss has OPD's size under ``--loss-agg token_mean``, and about that
under the default, the mean over trajectories.

Differences: the paper takes u_k from the environment's feedback and from the teacher, asked in words whether to skip,
weak or strong. A teacher here gives log-probs and writes nothing, so the judgement is left out: ``--intervene all`` is
u_k = 1 everywhere, confidence alone; ``--intervene invalid`` is 1 on turns that the environment did not understand and
alpha = ``--weak`` on the others, which is what feedback alone says. The paper's loss is the divergence over the
vocabulary, this its sampled form; ``--gap exact`` is the divergence itself, the reverse KL, weighted by w_t. Formulae
are from a public re-implementation from the paper. ``--rules released`` presets OPD's token mean, dual clip and entropy
bonus. A teacher on vLLM or behind a server gives its most likely token as well.

    python -m atod_algos.signals.sage_opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import turn_mean
from atod_algos.algorithm import RELEASED, ActsWith, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class SageOPD(Algorithm):
    """On-policy distillation weighted by the teacher's confidence."""

    name: ClassVar[str] = "sage_opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "support"})
    support: ClassVar[int] = 1
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}
    acts_with: ClassVar[ActsWith] = {"weak": ("intervene", ("invalid",))}

    intervene: Literal["all", "invalid"] = "all"
    """Where the teacher speaks: 'all' turns alike, or fully on turns that were 'invalid' and weakly on the others."""
    weak: float = 0.5
    """alpha: weight of a weak intervention, in [0, 1); 0 skips valid turns."""

    def __post_init__(self) -> None:
        if not 0 <= self.weak < 1:
            raise AtodError(f"--weak {self.weak}: a share of a strong intervention, from 0 to below 1")

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = w_t Delta_t."""
        # The top token alone, or under --gap exact all that is kept, in any order.
        confidence_M = np.exp(scores.require("teacher_support").max(axis=1).astype(np.float64))
        confidence_K = turn_mean(confidence_M, batch.turn_M, len(batch.trajectory_K))
        help_K = np.where(batch.valid_K, self.weak, 1.0) if self.intervene == "invalid" else np.ones(len(confidence_K))
        weight_K = help_K * confidence_K
        total = weight_K[batch.turn_M].sum()
        weight_K = weight_K * (batch.n_tokens / total if total > 0 else 0.0)
        weight_M = weight_K[batch.turn_M]
        return Advantages(
            distillation_M=weight_M * (scores.require("teacher") - scores.student_M),
            teacher_weight_M=weight_M,
            turn_weight_K=weight_K,
            notes={"confidence_mean": confidence_M, "help_mean": help_K[batch.turn_M]},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(SageOPD)
