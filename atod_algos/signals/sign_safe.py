"""Sign-safe gaps: the outcome says whether a token goes up or down, the teacher by how much. Four published rules.

A teacher with a negative gap on a token of a successful episode lowers a token that worked. These rules forbid that,
or weaken it. delta_t is the gap on a sampled token: of an external teacher (``--gap-source teacher``), or of the
student shown the skills of sdar.py (``--gap-source skills``). A is A^GRPO of the episode, y = +1 where it succeeded
and -1 where it failed.

Rules (``--rule``)
    rlsd     A_t = A (1 - l + l w_t),  w_t = clip(exp(sign(A) delta_t), 1 - e, 1 + e)          (arXiv 2604.03128)
             l falls in a line from 0.5 to 0 over --fade-steps; e = 0.2
    crest    A_t = A (1 + l_t (w_t - 1)),  w_t as above with delta_t / 2, e = 0.28              (arXiv 2608.13179)
             l_t = min(l, l g_t m_t), l = 0.3;  g_t = 1 where sign(A) delta_t > 0, else 0
             m_t = 1 + r (2 sigmoid(z_t) - 1), r = 0.5;  z_t: -log pi_old, standardised over the batch's tokens
    sg_opd   A_t = c_t delta_t,  c_t = 1.8 where sign(delta_t) = y, else 1.0                    (arXiv 2606.09304)
    opdvr    A_t = y max(0, y delta_t): 0 where outcome and gap disagree                       (arXiv 2608.24696)

rlsd and crest keep A's sign on every token and never read the teacher's; sg_opd and opdvr take its size from the gap
alone. In a group of one outcome A is 0: rlsd and crest then learn nothing, sg_opd and opdvr go on.

Differences. RLSD's form and numbers are those of the code next to SDAR, which fades over 50 to 100 steps by world.
CrEST's advantage is per turn in its paper, from rewards of each turn, which these environments do not give: ours is
the episode's. How its entropy gate becomes m_t is not public; we take a range of 1 - r to 1 + r, which its cut at l
and its bound of l e = 8.4 % fit. SG-OPD's factors are second-hand, from a paper that ran it as a baseline; its phased
teacher rollouts are left out. StepOPSD (arXiv 2605.27140) belongs here and is left out: the formula of its credit
budget per step was in no public text or code that we found (docs/log.md). ``--rules released`` presets the reward's
released settings.

    python -m atod_algos.signals.sign_safe --env atod/ALFWorld-v0 --rule crest
    python -m atod_algos.signals.sign_safe --env atod/ALFWorld-v0 --rule sg_opd --gap-source teacher
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.sdar import skill_text
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, Trajectory

PUBLISHED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "rlsd": {"strength": 0.5, "bound": 0.2, "softness": 1.0},
        "crest": {"strength": 0.3, "bound": 0.28, "softness": 2.0},
    }
)
"""Published numbers of the rules that weigh A."""
CREST_RANGE = 0.5
"""r: CrEST's weight of a token's surprise (published)."""


@dataclass(frozen=True)
class SignSafe(RewardAlgorithm):
    """Reward's direction, a teacher's size."""

    name: ClassVar[str] = "sign_safe"
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED_REWARD}

    rule: Literal["rlsd", "crest", "sg_opd", "opdvr"] = "rlsd"
    """Which published rule."""
    gap_source: Literal["skills", "teacher"] = "skills"
    """Whose gap: the student's own, shown the skills for the task, or an external teacher's."""
    strength: float | None = None
    """l: how much of A the gap reshapes; by default the rule's: 0.5 (RLSD), 0.3 (CrEST)."""
    bound: float | None = None
    """e: a weight stays within 1 - e and 1 + e; by default the rule's: 0.2 (RLSD), 0.28 (CrEST)."""
    fade_steps: int = 0
    """Steps over which RLSD's strength falls to 0, in a line; 0 keeps it (the code next to SDAR: 50 to 100)."""
    agreed: float = 1.8
    """SG-OPD's factor of a gap that agrees with the outcome (second-hand)."""
    opposed: float = 1.0
    """SG-OPD's factor of a gap that does not (second-hand)."""
    skills: str | None = None
    """Markdown file of skills, with '# General' and '## kind' sections; by default the environment's own."""

    def __post_init__(self) -> None:
        shares = [x for x in (self.strength, self.bound) if x is not None]
        if not all(0 <= x <= 1 for x in shares) or self.fade_steps < 0 or min(self.agreed, self.opposed) < 0:
            raise AtodError(
                f"--strength {self.strength}, --bound {self.bound}, --fade-steps {self.fade_steps}, --agreed {self.agreed}, "
                f"--opposed {self.opposed}: the first two are shares from 0 to 1, the others at least 0"
            )

    @property
    def scores(self) -> frozenset[str]:
        """Whose gap it is."""
        return frozenset({"teacher"} if self.gap_source == "teacher" else {"privileged"})

    def privileged_text(self, trajectory: Trajectory, group: Group) -> str:
        """The skills for the trajectory's task; see :func:`atod_algos.sdar.skill_text`."""
        return skill_text(trajectory, self.skills)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t of the chosen rule."""
        source = "teacher" if self.gap_source == "teacher" else "privileged"
        delta_M = scores.require(source) - scores.student_M
        A_M = self.grpo(batch)
        outcome_M = np.where(batch.success_N, 1.0, -1.0)[batch.trajectory_M]
        direction_M = np.sign(A_M) if self.rule in PUBLISHED else outcome_M
        notes: dict[str, np.ndarray | float] = {"gap_mean": delta_M, "agreement_ratio": direction_M * delta_M > 0}
        if self.rule == "sg_opd":
            factor_M = np.where(np.sign(delta_M) == outcome_M, self.agreed, self.opposed)
            return Advantages(distillation_M=factor_M * delta_M, notes=notes)
        if self.rule == "opdvr":
            return Advantages(distillation_M=outcome_M * np.maximum(0.0, outcome_M * delta_M), notes=notes)
        numbers = PUBLISHED[self.rule]
        strength = numbers["strength"] if self.strength is None else self.strength
        bound = numbers["bound"] if self.bound is None else self.bound
        exponent_M = np.clip(direction_M * delta_M / numbers["softness"], -20.0, 20.0)  # nothing overflows
        weight_M = np.clip(np.exp(exponent_M), 1 - bound, 1 + bound)
        if self.rule == "rlsd":
            strength *= max(0.0, 1 - step / self.fade_steps) if self.fade_steps else 1.0
            strength_M = np.full(batch.n_tokens, strength)
        else:
            gate_M = (direction_M * delta_M > 0) * (1 + CREST_RANGE * np.tanh(0.5 * standardised(-scores.student_M)))
            strength_M = np.minimum(strength, strength * gate_M)
        factor_M = 1 + strength_M * (weight_M - 1)
        return Advantages(
            reward_M=A_M * factor_M,
            coefficients={"strength": strength},
            notes={**notes, "factor_mean": factor_M, "factor_spread": np.abs(factor_M - 1)},
        )


def standardised(value_M: np.ndarray) -> np.ndarray:
    """Values less their mean, over their deviation."""
    return np.asarray((value_M - value_M.mean()) / (value_M.std() + 1e-6))


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(SignSafe)
