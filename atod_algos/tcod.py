"""TCOD: temporal curriculum for on-policy distillation (arXiv 2604.24005), front to back or back to front.

Objective
    A_t  = c (log pi_T - log pi_old)                              detached; no reward, as in opd.py         (eqs 2, 3)
    k(n) = min( k_start + floor(n / eta),  T_max )                turns the student plays, after n steps        (eq 4)
    L    = the clipped surrogate with A_t

    --curriculum front_to_back   the student plays an episode's first k turns, and all of them are distilled
    --curriculum back_to_front   an expert plays the first L - k turns of its solution of length L, the student the rest

Early in training the states that a weak student reaches late in an episode are ones on which its teacher has little to
say. Front to back does not go there yet; back to front starts from states that an expert has reached. The expert's
turns are executed, but they are not the student's: they have no tokens here and nothing is learned from them. Only
training episodes are limited; evaluation plays every episode whole. T_max is the environment's own limit. An episode
that is cut has no reward; none is used.

``--rules paper`` is the TCOD paper's own setting, ``--rules released`` the baseline as ATOD's authors re-implemented
it:

                        paper             released
    --turns-every       2                 3                (ALFWorld; 6 on WebShop (--preset), Search-QA's is not known)
    --count-from        0                 1                n at the first training step
    --loss-agg          turn_mean         token_mean       average of the loss
    --dual-clip         0                 3
    --entropy-coef      0                 0.001

Differences from the paper: it writes D(pi_T || pi_theta), but its code, and this, uses the sampled reverse gap teacher
minus student. Its code takes the sampler's log-probs for pi_old, this the learner's (their difference is logged). Its
expert is the best of ten stored attempts of the teacher; ours is the environment's scripted expert. A task that the
expert does not solve is played from the start, as is one whose solution is no longer than k.

    python -m atod_algos.tcod --env atod/ALFWorld-v0
    python -m atod_algos.tcod --env atod/ALFWorld-v0 --curriculum back_to_front
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED, Advantages, Algorithm, RolloutLimits
from atod_algos.batch import Scores, TokenBatch
from atod_algos.turn_plans import ExpertFirst


@dataclass(frozen=True)
class TCOD(Algorithm):
    """On-policy distillation over a growing part of the episode."""

    name: ClassVar[str] = "tcod"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"objective": {"loss_agg": "turn_mean"}},
        "released": {**RELEASED, "turns_every": 3, "count_from": 1},
    }

    opd_coef: float = 1.0
    """c, which multiplies the gap (paper and released code)."""
    curriculum: Literal["front_to_back", "back_to_front"] = "front_to_back"
    """Which part of an episode the student plays: its beginning (released code), or its end after an expert; the paper
    has both."""
    turns_start: int = 1
    """k_start: turns that the student plays at first (paper)."""
    turns_every: int = 2
    """eta: steps until it plays one turn more: 2 (paper), 3 or 6 (released code, ALFWorld and WebShop)."""
    count_from: int = 0
    """n at the first training step: 0 (paper), 1 (released code)."""

    def __post_init__(self) -> None:
        require_range(self, "opd_coef", "count_from", low=0)
        require_range(self, "turns_start", "turns_every", low=1)  # at least one turn, one more every so many steps

    def turns(self, step: int) -> int:
        """k(n), eq 4, before the environment's own limit."""
        return self.turns_start + (step - 1 + self.count_from) // self.turns_every

    def limits(self, step: int) -> RolloutLimits:
        """The first k turns, or all but the expert's first L - k."""
        k = self.turns(step)
        return RolloutLimits(max_turns=k) if self.curriculum == "front_to_back" else RolloutLimits(who=ExpertFirst(k))

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = c (log pi_T - log pi_old) on the student's own turns."""
        first_K = np.flatnonzero(np.diff(batch.trajectory_K, prepend=-1))  # the student's first turn of each trajectory
        weight_M = np.full(batch.n_tokens, self.opd_coef)
        return Advantages(
            distillation_M=weight_M * (scores.require("teacher") - scores.student_M),
            teacher_weight_M=weight_M,
            notes={"window": float(self.turns(step)), "expert_turns_mean": batch.index_K[first_K]},
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(TCOD)
