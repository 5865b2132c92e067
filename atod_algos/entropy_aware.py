"""Entropy-aware OPD: the teacher's whole distribution where the teacher itself hesitates (arXiv 2603.07079).

Reverse KL makes a student settle on one of the teacher's choices. Where the teacher has several, this adds the forward
KL, which asks for all of them.

Objective
    A_t = log pi_T - log pi_old                                         on every sampled token, as in OPD
    F_t = 1[H(pi_T) > tau] sum_v p_T(v) (log p_T(v) - log p_theta(v))   v over the teacher's top-k tokens
    L   = clipped surrogate(A_t) + alpha mean_t F_t
The gradient of F_t goes through the student's whole distribution (log p_theta is normalised over the vocabulary) and
not through a ratio. Only k numbers a token are kept of the teacher, so no tensor of rows x positions x vocabulary
exists.

What is uncertain: of the paper we know the abstract; that the two terms are added (rather than switched), the threshold
of 0.8 nats on the entropy over the whole vocabulary, k = 16, alpha = 1, and that the truncated teacher is not made to
sum to 1, come from other people's accounts of the authors' code, which agree with each other but were not checked
against it. Without the rest of the teacher's mass F_t can be a little below 0; its gradient is that of the
cross-entropy with the kept part. The mean (``--loss-agg``) is over all tokens, marked or not. ``--rules released``
presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.entropy_aware --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EntropyAware(Algorithm):
    """On-policy distillation with forward KL where the teacher's entropy is high."""

    name: ClassVar[str] = "entropy_aware"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "divergence", "support"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    entropy_threshold: float = 0.8
    """tau in nats: tokens with a larger teacher entropy get the forward KL (0.8, second-hand)."""
    forward_coef: float = 1.0
    """alpha: weight of the forward KL (1, second-hand)."""
    support: int = 16
    """k: the forward KL sums over the teacher's top-k tokens (16, second-hand)."""

    def __post_init__(self) -> None:
        require_range(self, "forward_coef", low=0)
        if self.support < 1:
            raise AtodError(f"--support {self.support}: at least one of the teacher's tokens; use opd for none")

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = Delta_t on every token, as in OPD."""
        entropy_M = scores.require("teacher_entropy")
        return Advantages(
            distillation_M=scores.require("teacher") - scores.student_M,
            notes={
                "forward_ratio": entropy_M > self.entropy_threshold,
                "teacher_entropy_mean": entropy_M,
                "support_mass_mean": np.exp(scores.require("teacher_support")).sum(1),
            },
        )

    def support_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """Alpha F_t."""
        teacher = logprobs.new_tensor(scores.require("teacher_support")[index_M])
        marked = logprobs.new_tensor(scores.require("teacher_entropy")[index_M] > self.entropy_threshold)
        return self.forward_coef * marked * (teacher.exp() * (teacher - logprobs)).sum(-1)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(EntropyAware)
