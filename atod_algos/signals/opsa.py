"""OPSA: a negative advantage on unlikely tokens (arXiv 2608.31046): the control without a teacher.

The paper finds that most of what distillation gives a student comes from pushing down tokens that it rarely says, and
that one fixed number instead of the teacher's gap does nearly as well. A claim that a teacher helps needs this control.

Objective
    U   = the share rho of the batch's sampled tokens with the smallest log pi_old
    A_t = -a                                                    on U, fixed (section 3.2: a = 0.5); 0 on the others
    A_t = -1/2 - (H_t - H_min) / (2 (H_max - H_min))            with --adapt entropy (section 4.2): from -1/2 to -1
    L   = the clipped surrogate with A_t

H_t is the entropy of the student's whole distribution, in nats, H_min and H_max over U. Without a range of entropies
A_t is -3/4. There is no reward, no teacher and no text in it.

Differences: the paper speaks of the lowest 20 % of tokens; that they are those of a whole batch, and that H_min and
H_max are taken over them, is our reading. Tokens that tie with the last of U belong to U. ``--advantage`` takes a
positive number too: the paper reports that a positive one collapses the policy. ``--rules released`` presets the
objective that the other methods are compared under.

    python -m atod_algos.signals.opsa --env atod/ALFWorld-v0
    python -m atod_algos.signals.opsa --env atod/ALFWorld-v0 --adapt entropy
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import min_max
from atod_algos.algorithm import RELEASED, ActsWith, Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class OPSA(Algorithm):
    """A negative advantage on unlikely tokens, without teacher or reward."""

    name: ClassVar[str] = "opsa"
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}
    acts_with: ClassVar[ActsWith] = {"advantage": ("adapt", ("fixed",))}

    keep: float = 0.2
    """rho: share of the batch's tokens that is pushed, in (0, 1] (paper: the lowest 20 %)."""
    advantage: float = -0.5
    """A_t of those tokens under --adapt fixed (paper, section 3.2: -0.5)."""
    adapt: Literal["fixed", "entropy"] = "fixed"
    """'fixed' gives every such token --advantage; 'entropy' from -1/2 to -1 as the student is less sure (section
    4.2)."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise AtodError(f"--keep {self.keep}: a share of the tokens, above 0 and at most 1")

    @property
    def scores(self) -> frozenset[str]:
        """Nothing but the student's own entropies, and those only where they are used."""
        return frozenset({"entropy"} if self.adapt == "entropy" else ())

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """-a on the unlikely tokens."""
        last = math.ceil(round(self.keep * batch.n_tokens, 9)) - 1  # 0.07 * 100 is above 7
        threshold = np.sort(scores.student_M)[last]
        unlikely_M = scores.student_M <= threshold
        advantage_M = np.zeros(batch.n_tokens)
        advantage_M[unlikely_M] = self.advantage
        if self.adapt == "entropy":
            advantage_M[unlikely_M] = -0.5 - 0.5 * min_max(scores.require("entropy")[unlikely_M])
        return Advantages(
            distillation_M=advantage_M,
            coefficients={"logprob_threshold": float(threshold)},
            notes={"kept_ratio": unlikely_M, "advantage_mean": advantage_M[unlikely_M]},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(OPSA)
