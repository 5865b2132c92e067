"""Privileged siblings: the student as its own teacher, shown an attempt at the same task that succeeded.

A group often holds what a failed attempt lacked. With the actions of a successful sibling in front of its prompt, the
student gives each token that it sampled another probability. The gap between the two is a teacher without another
model.

Objective
    s+      = the actions of a successful sibling, then everything that the student saw in s
    delta_t = log pi_old(y_t | s+) - log pi_old(y_t | s)             0 where no sibling succeeded
Rules (``--rule``)
    sdpo   A_t = delta_t                                           no reward                        (arXiv 2601.20802)
    opid   A_t = A + omega delta_t,  omega = 0.001                 reward, and a nudge              (arXiv 2606.26790)
    grsd   A_k = A max(0.1, 1 + l clip(q_k, -g, g)),  l = 0.5, g = 0.2      by turn                 (arXiv 2607.28076)
           q_k = x_k / mean |x| over the group's turns,  x_k = exp(sign(A) mean_t delta_t) - 1
A is A^GRPO of the episode. Under grsd the mean runs over the tokens of turn k, and a group without both a success and
a failure keeps its A. L is the clipped surrogate, and a KL to the initial student, k3, where --kl-coef is above 0.

The sibling is the shortest successful attempt of the group but the one that is scored, the first among equals: an
attempt never sees itself. No policy sees it in a rollout or an evaluation. A student must be able to use such a text;
to one that cannot it is noise, as the skills of sdar.py are. A row that no longer fits the model is an error that says
by how much.

Differences: what these share, a sibling, is here; what each does with words is not. SDPO also shows the environment's
feedback, distils whole distributions (a Jensen-Shannon divergence on the top 100) and averages its teacher over steps;
this is its gap on sampled tokens. OPID has another model sum an episode up as skills, for the episode and for steps;
here the sibling stands in for them, at OPID's weight. GRSD has the policy write reflections and contrast them; here,
too, the sibling stands in, and the rest is as in its code. g = 0.2 is that of all its scripts, which bounds the factor
to 0.9 and 1.1; its function has 3 where nothing is given, under which the floor of 0.1 acts. ``--rules released``
presets the reward's released settings, and the KL of OPID's and GRSD's scripts.

    python -m atod_algos.signals.siblings --env atod/ALFWorld-v0 --rule grsd
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import require_range, turn_mean
from atod_algos.algorithm import RELEASED_REWARD, ActsWith, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import differing_groups, kl_to_reference
from atod_envs.trajectory import Group, Trajectory

if TYPE_CHECKING:
    import torch

HEADING = "An earlier attempt at this task succeeded with these actions:"
"""Stands before the sibling's actions."""
SMALLEST_FACTOR = 0.1
"""What GRSD leaves of A at least (authors' code)."""


@dataclass(frozen=True)
class Siblings(RewardAlgorithm):
    """A successful attempt of the same group as privileged text."""

    name: ClassVar[str] = "siblings"
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {**RELEASED_REWARD, "kl_coef": 0.01},
    }
    acts_with: ClassVar[ActsWith] = {
        "nudge": ("rule", ("opid",)),
        "strength": ("rule", ("grsd",)),
        "largest_signal": ("rule", ("grsd",)),
    }

    rule: Literal["sdpo", "opid", "grsd"] = "sdpo"
    """What is made of the gap."""
    nudge: float = 0.001
    """omega: OPID's weight of the gap next to the reward (its scripts)."""
    strength: float = 0.5
    """l: how far GRSD's signal reshapes a turn's advantage (its scripts)."""
    largest_signal: float = 0.2
    """g: bound of GRSD's signal: 0.2 (all its scripts), 3 (its function where nothing is given)."""
    kl_coef: float = 0.0
    """Weight of the KL to the initial student: 0.01 in OPID's and GRSD's scripts (0.001 on Search-QA)."""

    def __post_init__(self) -> None:
        require_range(self, "nudge", "strength", "largest_signal", "kl_coef", low=0)

    @property
    def scores(self) -> frozenset[str]:
        """The student with the sibling in front; the initial student only where the KL term is on."""
        return frozenset({"privileged", "reference"} if self.kl_coef else {"privileged"})

    def privileged_text(self, trajectory: Trajectory, group: Group) -> str:
        """The actions of the shortest successful sibling, one a line; nothing where there is none."""
        return told(min(successes(trajectory, group), key=lambda other: len(other.turns), default=None))

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t of the chosen rule."""
        shown_N = has_sibling(batch)
        # Without a text in front the difference is the rounding of two passes: no signal.
        delta_M = np.where(shown_N[batch.trajectory_M], scores.require("privileged") - scores.student_M, 0.0)
        notes: dict[str, np.ndarray | float] = {
            "shown_ratio": shown_N,
            "gap_mean": delta_M[shown_N[batch.trajectory_M]],
        }
        if self.rule == "sdpo":
            return Advantages(distillation_M=delta_M, notes=notes)
        if self.rule == "opid":
            return Advantages(distillation_M=self.nudge * delta_M, reward_M=self.grpo(batch), notes=notes)
        advantage_K = self.grpo_by_turn(batch)
        gap_K = turn_mean(delta_M, batch.turn_M, len(advantage_K))
        signal_K = np.expm1(np.clip(np.sign(advantage_K) * gap_K, -20.0, 20.0))
        mixed_K = differing_groups(batch.success_N.astype(np.float64), batch.group_N)[batch.group_N][batch.trajectory_K]
        group_K, counted_K = batch.group_N[batch.trajectory_K], batch.n_K > 0
        total_G = np.bincount(group_K, np.abs(signal_K) * counted_K)
        mean_G = total_G / np.maximum(np.bincount(group_K, counted_K), 1)
        level_K = np.clip(signal_K / (mean_G[group_K] + 1e-6), -self.largest_signal, self.largest_signal) * mixed_K
        factor_K = np.maximum(SMALLEST_FACTOR, 1 + self.strength * level_K)
        return Advantages(
            reward_M=(advantage_K * factor_K)[batch.turn_M],
            turn_weight_K=factor_K,
            notes={**notes, "mixed_ratio": mixed_K, "signal_abs_mean": np.abs(signal_K[counted_K])},
        )

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """The KL to the initial student."""
        return kl_to_reference(logprobs, index_M, scores, self.kl_coef)


def successes(trajectory: Trajectory, group: Group) -> list[Trajectory]:
    """The successful attempts of a group but the one that is scored, in their order."""
    return [other for other in group.trajectories if other.success and other is not trajectory]


def told(sibling: Trajectory | None) -> str:
    """A sibling as a text: its actions, one a line; nothing where there is none."""
    if sibling is None:
        return ""
    actions = "\n".join(f"{k}. {turn.action}" for k, turn in enumerate(sibling.turns, 1))
    return f"{HEADING}\n{actions}\n\n"


def has_sibling(batch: TokenBatch) -> np.ndarray:
    """Which trajectories have a successful sibling to be shown (booleans, axis N)."""
    return np.asarray(np.bincount(batch.group_N, batch.success_N)[batch.group_N] - batch.success_N > 0)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(Siblings)
