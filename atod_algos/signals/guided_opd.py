"""Guided-OPD: a guide plays some turns at first, the student learns on its own (arXiv 2606.15912).

Early in training a weak student meets few states in which its teacher knows what to do. So each turn is played by the
teacher with a probability that falls to 0; the gap is learned from on the turns that the student played, from wherever
the teacher led.

Objective
    p(s)  = p_0 max(0, 1 - (s - 1) / T)                            training step s counts from 1
    turn k of an episode is the guide's with probability p(s), else the student's
    A_t   = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)            on the tokens of the student's turns, detached
    L     = the clipped surrogate with A_t, as in opd.py

What to watch: ``guided_opd/guide_share`` is p(s), ``guided_opd/guided_turns`` the share of turns that the guide played.
``episode/success`` counts the guide's help until p is 0; ``val/success_rate`` never does.

Differences: written from the paper's abstract, which gives neither p_0, T nor the shape of the fall: 0.5, 60 steps and
a straight line are this project's. ``--guide expert`` lets the environment's scripted expert guide instead. The teacher
guides in this process alone: several ranks, Ray and ``--staleness`` are refused. ``--rules released`` presets OPD's
token mean, dual clip and entropy bonus.

    python -m atod_algos.signals.guided_opd --env atod/ALFWorld-v0
"""

from __future__ import annotations

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
    guide_share: float = 0.5
    """p_0, the share of turns that the guide plays at the first step."""
    guide_steps: int = 60
    """T, the steps after which the student plays alone."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 <= self.guide_share < 1 or self.guide_steps < 1:
            raise AtodError(
                f"--guide-share {self.guide_share} and --guide-steps {self.guide_steps}: expected a share from 0 to below 1, since the "
                "student plays some turns, and at least one step"
            )

    def share(self, step: int) -> float:
        """p(s)."""
        return self.guide_share * max(0.0, 1 - (step - 1) / self.guide_steps)

    def limits(self, step: int) -> RolloutLimits:
        """The guide plays p(s) of the turns, as long as it plays any."""
        share = self.share(step)
        return RolloutLimits(who=Guided(share, self.guide)) if share else RolloutLimits()

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = log pi_T - log pi_old on the student's own turns."""
        played = sum(len(trajectory.turns) for trajectory in batch.trajectories)
        return Advantages(
            distillation_M=scores.require("teacher") - scores.student_M,
            teacher_weight_M=np.ones(batch.n_tokens),
            coefficients={
                "guide_share": self.share(step),
                "guided_turns": 1 - len(batch.trajectory_K) / max(1, played),
            },
        )


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GuidedOPD)
