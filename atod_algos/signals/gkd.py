"""GKD: forward, reverse or Jensen-Shannon divergence on the teacher's top k, with a tail (arXiv 2306.13649).

Distillation on the student's own tokens, as in OPD, but from the teacher's top k tokens and not only from the sampled
one. All other tokens count as one more token, the tail. Without it a student could move its mass where no term sees it.

Objective
    V_t    = the teacher's top k tokens in place t, and the tail with what is left of each distribution
    p, q   = pi_T and pi_theta on V_t                                   each sums to 1
    forward    KL(p || q)           covers all that the teacher might say
    reverse    KL(q || p)           settles on something that it says; OPD's, in expectation
    jsd        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
    L    = coef times the mean of the divergence (--loss-agg); pi_theta is the current student, with gradient

There is no advantage, no ratio and no clip, so the gradient is that of the divergence itself. (A divergence used as an
advantage of the sampled token would have a gradient of zero mean.) With k as large as the vocabulary each is exact;
below it each is a lower bound, as lumping tokens together only hides differences.

Differences: the paper mixes rollouts of the student with the teacher's own; these are the student's alone. Its
divergence is over the whole vocabulary. For exact reverse KL with updates of its own there is ``opd --gap exact``. A
teacher on vLLM or behind a server gives its top k as well; vLLM's server gives 20 unless started with --max-logprobs.

    python -m atod_algos.signals.gkd --env atod/ALFWorld-v0 --divergence jsd --beta 0.5
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED, ActsWith, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GKD(Algorithm):
    """A divergence from the teacher's top k tokens, as a loss."""

    name: ClassVar[str] = "gkd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "support"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}
    acts_with: ClassVar[ActsWith] = {"beta": ("divergence", ("jsd",))}

    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """Which divergence."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of --divergence jsd, above 0 and below 1."""
    coef: float = 1.0
    """Multiplies the divergence."""
    support: int = 32
    """k: how many of the teacher's top tokens stand for themselves (our choice)."""

    def __post_init__(self) -> None:
        require_range(self, "coef", low=0)
        if not 0 < self.beta < 1 or self.support < 1:
            raise AtodError(
                f"--beta {self.beta}, --support {self.support}: a share above 0 and below 1, and at least one token; "
                "--divergence forward and reverse are the ends of jsd"
            )

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """No token has one: the divergence is a loss of its own."""
        return Advantages(
            distillation_M=np.zeros(batch.n_tokens),
            notes={"support_mass_mean": np.exp(scores.require("teacher_support")).sum(1)},
        )

    def support_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """The divergence of each place."""
        from atod_algos.learner.loss import with_tail

        own = with_tail(logprobs)
        theirs = with_tail(logprobs.new_tensor(scores.require("teacher_support")[index_M]))
        if self.divergence == "forward":
            return self.coef * kl(theirs, own)
        if self.divergence == "reverse":
            return self.coef * kl(own, theirs)
        # The log of a sum of exponentials would be -inf where both are tiny, and 0 times infinity follows.
        middle = (theirs + math.log(self.beta)).logaddexp(own + math.log(1 - self.beta))
        return self.coef * (self.beta * kl(theirs, middle) + (1 - self.beta) * kl(own, middle))


def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) along the last axis, from log-probs."""
    return (first.exp() * (first - second)).sum(-1)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GKD)
