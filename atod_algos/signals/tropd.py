"""TrOPD: the sampled gap where the teacher can be believed, forward KL elsewhere (arXiv 2606.01249).

A token that the teacher thinks all but impossible gives OPD a gap without bound, and one such token outshouts a batch.
The paper keeps the gap with the probability that speculative decoding would accept the token, and for the others lets
the teacher say what it would have said instead.

Objective
    Delta_t = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)
    P_t     = min(pi_T / pi_old, 1) = min(exp(Delta_t), 1)               how far the teacher can be believed of a_t
    A_t     = P_t Delta_t                                                bounded below by -1/e
    F_t     = sum over the teacher's top k tokens of pi_T (log pi_T - log pi_theta), k = 64     the current student
    L       = the clipped surrogate with A_t, plus coef (1 - P_t) F_t

Differences: the paper tosses a coin with P_t for each token; this is what it gives on average, with less noise and
nothing random. Its third term, imitation of prefixes that the teacher wrote (a weight of 0.001, falling to 0), is left
out, as are its variants that mask or clip outliers. F_t sums over k tokens without a tail, as published: where the
teacher's top k hold little of its mass it can be below 0, and the student's mass elsewhere is seen by no term.
``--tail`` adds all other tokens as one more, as gkd.py does, which makes it a divergence. Formulae and k are from
public accounts of the paper; no code was out. ``--gap-clip`` bounds log pi_T - log pi_old before P_t is made of it: at
3, the built-in models' default, P_t is at least e^-3, so that no token is left out altogether; ``--gap-clip 0`` is the
paper's. A teacher on vLLM or behind a server gives its top k as well.

    python -m atod_algos.signals.tropd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.algorithm import RELEASED, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrOPD(Algorithm):
    """On-policy distillation within the teacher's trust region, forward KL outside."""

    name: ClassVar[str] = "tropd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "support"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    outlier_coef: float = 1.0
    """Weight of the forward KL outside the trust region; 0 leaves outliers alone (the paper's masking, on average)."""
    support: int = 64
    """k: how many of the teacher's top tokens the forward KL sums over (paper: 64)."""
    tail: bool = False
    """Whether all other tokens count as one more in the forward KL (published: they do not)."""

    def __post_init__(self) -> None:
        if self.outlier_coef < 0 or self.support < 1:
            raise AtodError(
                f"--outlier-coef {self.outlier_coef}, --support {self.support}: a weight of at least 0, and at least one token"
            )

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = P_t Delta_t."""
        delta_M, trust_M = scores.require("teacher") - scores.student_M, trust(scores)
        return Advantages(
            distillation_M=trust_M * delta_M,
            notes={"trust_mean": trust_M, "support_mass_mean": np.exp(scores.require("teacher_support")).sum(1)},
        )

    def support_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """Coef (1 - P_t) F_t."""
        from atod_algos.learner.loss import with_tail

        teacher = logprobs.new_tensor(scores.require("teacher_support")[index_M])
        if self.tail:
            teacher, logprobs = with_tail(teacher), with_tail(logprobs)
        outside = logprobs.new_tensor(1 - trust(scores)[index_M])
        return self.outlier_coef * outside * (teacher.exp() * (teacher - logprobs)).sum(-1)


def trust(scores: Scores) -> np.ndarray:
    """P_t: the probability with which speculative decoding accepts the sampled token."""
    return np.asarray(np.exp(np.minimum(scores.require("teacher") - scores.student_M, 0.0)))


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(TrOPD)
