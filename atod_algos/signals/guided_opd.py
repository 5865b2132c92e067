"""Guided-OPD: a guide plays some turns at first, the student learns on its own (arXiv 2606.15912).

Early in training a weak student meets few states in which its teacher knows what to do. So each turn is played by the
teacher with a probability that falls to 0. The student learns from the gap on the turns that it played, from wherever
the teacher led, and imitates the turns that the teacher played.

Objective
    p(s)  = p_0 (1 + cos(pi min(1, (s - 1) / T))) / 2              training step s counts from 1
    turn k of an episode is the guide's with probability p(s), else the student's
    A_t   = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)            on the student's tokens, detached: reverse KL
    A_t   = c                                                      on the guide's tokens: cross-entropy, forward KL
    L     = the clipped surrogate with A_t, as in opd.py
Under ``--gap exact`` the reverse KL over the vocabulary takes the place of both, weighted by c on the guide's turns.

What to watch: ``guided_opd/guide_share`` is p(s), ``guided_opd/guided_turns`` the share of turns that the guide played.
``episode/success`` counts the guide's help until p is 0; ``val/success_rate`` never does. The gap's mean over tokens
may be above 0 while the guide plays, and ``sampler/logprob_gap_mean`` is then no rounding: the guide has sampled.

Differences: the paper's own code is not public. p_0 = 1, the cosine, an end after 0.8 of the training and a
cross-entropy on the guide's turns are those of a baseline that other authors published (with FutureBridge-OPD). There
the two kinds of turns have a mean each, weighted alike; here they share one mean over tokens, and the ratio's clip
holds for both. c = 0 leaves the guide's turns out. ``--guide expert`` lets the environment's scripted expert guide
instead. The teacher guides in this process alone: several ranks and Ray are refused. So is ``--staleness``, with the
expert unless c = 0. ``--rules released`` presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.signals.guided_opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.algorithm import RELEASED, Advantages, Algorithm, RolloutLimits
from atod_algos.batch import Scores, TokenBatch
from atod_algos.turn_plans import Guided
from atod_envs.errors import AtodError


@dataclass(frozen=True)
class GuidedOPD(Algorithm):
    """On-policy distillation on the student's turns of episodes that a guide helps to play."""

    name: ClassVar[str] = "guided_opd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    guide: Literal["teacher", "expert"] = "teacher"
    """Who plays the turns that the student does not."""
    guide_share: float = 1.0
    """p_0, the share of turns that the guide plays at the first step."""
    guide_steps: int = 120
    """T, the steps after which the student plays alone; published: 0.8 of the training, here of 150 steps."""
    guide_weight: float = 1.0
    """c, what a token of the guide's turns counts for; 0 leaves them out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 <= self.guide_share <= 1 or self.guide_steps < 1:
            raise AtodError(
                f"--guide-share {self.guide_share} and --guide-steps {self.guide_steps}: expected a share from 0 to 1, and at least one step"
            )
        if not 0 <= self.guide_weight < np.inf or (self.guide_share == 1 and not self.guide_weight):
            raise AtodError(
                f"--guide-weight {self.guide_weight}: expected a number from 0, and above 0 where the guide plays all turns of the first "
                "step (--guide-share 1), or nothing would be learned from"
            )

    def share(self, step: int) -> float:
        """p(s)."""
        done = (step - 1) / self.guide_steps
        return 0.0 if done >= 1 else self.guide_share * (1 + math.cos(math.pi * done)) / 2

    def plan(self, step: int) -> Guided:
        """The guide plays p(s) of the turns."""
        return Guided(self.share(step), self.guide, guide_learned=self.guide_weight > 0)

    def limits(self, step: int) -> RolloutLimits:
        """The plan, as long as the guide plays any turn."""
        plan = self.plan(step)
        return RolloutLimits(who=plan) if plan.share else RolloutLimits()

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = log pi_T - log pi_old on the student's own turns, c on the guide's."""
        plan, played = self.plan(step), sum(len(trajectory.turns) for trajectory in batch.trajectories)
        owner_K = [batch.trajectories[n] for n in batch.trajectory_K]
        places = zip(owner_K, batch.index_K, strict=True)
        guided_K = np.array([plan.guide_learned and plan.guides(t.seed, int(k)) for t, k in places])
        guided_M = guided_K[batch.turn_M]
        return Advantages(
            distillation_M=np.where(guided_M, self.guide_weight, scores.require("teacher") - scores.student_M),
            teacher_weight_M=np.where(guided_M, self.guide_weight, 1.0),
            coefficients={
                "guide_share": plan.share,
                "guided_turns": 1 - (len(guided_K) - int(guided_K.sum())) / max(1, played),
            },
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GuidedOPD)
