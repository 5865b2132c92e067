"""GRPO: group-relative policy optimisation, reward only (Shao et al. 2024, arXiv 2402.03300; ATOD paper section 3.2).

Objective
    A_i  = (r_i - mean r) / (std r + eps)                        within the group of G attempts at a task   (eq 2)
    L    = -E min(eta A, clip(eta, 1 - e, 1 + e) A)              averaged as --loss-agg says                (eqs 3, 4)
           + beta (e^x - x - 1),  x = log pi_ref - log pi_theta  KL to the initial student, k3              (--kl-coef)

``--rules`` presets its well-known forms; every entry is an option of its own:

                        paper            released          deepseek         dr_grpo        dapo
    --group-stats       trajectory       turn_row          trajectory       trajectory     trajectory
    --group-std         yes              yes               yes              no             yes
    --loss-agg          trajectory_mean  token_mean        trajectory_mean  constant       token_mean
    --clip-high         0.2              0.2               0.2              0.2            0.28
    --kl-coef           0                0.01              0.04             0              0
    --sampling-rounds   1                1                 1                1              10
    --invalid-penalty   0                0.1               0                0              0
    --dual-clip         0                3                 0                0              0
    --entropy-coef      0                0.001             0                0              0

    paper     the ATOD paper's text                       deepseek  DeepSeekMath (arXiv 2402.03300)
    released  the baseline as the ATOD authors ran it     dr_grpo   Dr. GRPO (arXiv 2503.20783)
                                                          dapo      DAPO (arXiv 2503.14476)

Differences: the average of eq 4 is over whole trajectories, of which DeepSeekMath's single answer is the one-turn case; the
deviation is the sample's (ddof 1; the papers are silent, the released code has it). Dr. GRPO's constant divisor is
--length-divisor for each trajectory; verl divides by the padded length and not by the number of trajectories, which is the same
direction at another length. DAPO's dynamic sampling plays further tasks until --tasks-per-step groups hold both good and bad
attempts; where DAPO's recipe stops the run after 10 rounds, the step goes on with the groups it has. What counts as different is
the task's reward, without the penalty for invalid actions. DAPO's penalty for over-long answers is left out: a response is bounded by
--max-response, and its reward is the environment's.

    python -m atod_algos.grpo --env atod/ALFWorld-v0
    python -m atod_algos.grpo --env atod/ALFWorld-v0 --rules dapo
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import GroupOptions, reward_advantage
from atod_algos.algorithm import Advantages
from atod_algos.batch import Scores, TokenBatch
from atod_algos.learner.learner import Objective
from atod_algos.metrics import row_reward_metrics
from atod_algos.rollout.episodes import RolloutLimits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation."""

    name: ClassVar[str] = "grpo"
    needs_student: ClassVar[bool] = False
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {
            "group": {"group_stats": "turn_row", "invalid_penalty": 0.1},
            "objective": {"dual_clip": 3.0, "loss_agg": "token_mean", "entropy_coef": 0.001},
            "kl_coef": 0.01,
        },
        "deepseek": {"kl_coef": 0.04},
        "dr_grpo": {"group": {"group_std": False}, "objective": {"loss_agg": "constant"}},
        "dapo": {"objective": {"loss_agg": "token_mean", "clip_high": 0.28}, "sampling_rounds": 10},
    }

    group: GroupOptions = field(default_factory=GroupOptions)
    objective: Objective = field(default_factory=Objective)
    kl_coef: float = 0.0
    """Weight of the KL to the initial student: 0 (ATOD paper, section 4.1), 0.01 (released scripts), 0.04 (DeepSeekMath)."""
    sampling_rounds: int = 1
    """Rounds of episodes a step may play to find --tasks-per-step groups whose rewards differ; 1 takes every group, 10 is DAPO's bound."""

    @property
    def scores(self) -> frozenset[str]:
        """The initial student is scored only where the KL term is on."""
        return frozenset({"reference"}) if self.kl_coef else frozenset()

    def limits(self, step: int) -> RolloutLimits:
        """Several rounds where the groups are chosen."""
        return RolloutLimits(rounds=self.sampling_rounds)

    def informative(self, batch: TokenBatch) -> np.ndarray:
        """Groups whose rewards differ; in the others every advantage is 0 (DAPO's dynamic sampling)."""
        return differing_groups(task_reward(batch, self.group), batch.group_N)

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """R(tau), scaled."""
        return task_reward(batch, self.group)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """Every token of a turn gets the turn's group-relative advantage (eq 2)."""
        return Advantages(grpo_token_advantage(batch, self.group), grpo_metrics(batch, self.group))

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """Beta D_KL(pi_theta || pi_ref), by k3."""
        return kl_to_reference(logprobs, index_M, scores, self.kl_coef)


def kl_to_reference(
    logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores, coefficient: float
) -> torch.Tensor | None:
    """KL to the initial student by k3, weighted; None where it is off."""
    if not coefficient or scores.reference_M is None:
        return None
    return coefficient * k3(logprobs, logprobs.new_tensor(scores.reference_M[index_M]))


def task_reward(batch: TokenBatch, group: GroupOptions) -> np.ndarray:
    """Training reward of each trajectory (axis N): success or score, scaled."""
    base_N = batch.success_N.astype(np.float64) if group.reward == "success" else batch.score_N
    return np.asarray(group.reward_scale * base_N)


def differing_groups(reward_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Which groups hold more than one value of the reward (axis G)."""
    low_G, high_G = np.full(group_N.max() + 1, np.inf), np.full(group_N.max() + 1, -np.inf)
    np.minimum.at(low_G, group_N, reward_N)
    np.maximum.at(high_G, group_N, reward_N)
    return np.asarray(high_G > low_G)


def grpo_token_advantage(batch: TokenBatch, group: GroupOptions) -> np.ndarray:
    """A^GRPO of each sampled token (axis M)."""
    advantage_K = reward_advantage(task_reward(batch, group), batch.group_N, batch.trajectory_K, batch.valid_K, group)
    return np.asarray(advantage_K[batch.turn_M])


def grpo_metrics(batch: TokenBatch, group: GroupOptions) -> dict[str, float]:
    """The reward that the group's statistics were made of, penalties included."""
    return row_reward_metrics(batch, task_reward(batch, group), group.invalid_penalty)


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Low-variance estimate of KL(pi_theta || pi_ref) for each token: e^x - x - 1 with x = log pi_ref - log pi_theta."""
    x = reference - logprobs
    return x.exp() - x - 1


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GRPO)
