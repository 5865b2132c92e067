"""GRPO: group-relative policy optimisation, reward only (Shao et al. 2024, arXiv 2402.03300; ATOD paper section 3.2).

Objective
    A_i  = (r_i - mean r) / (std r + eps)                        within the group of G attempts at a task   (eq 2)
    L    = -E min(eta A, clip(eta, 1 - e, 1 + e) A)              averaged as --loss-agg says                (eqs 3, 4)
           + beta (e^x - x - 1),  x = log pi_ref - log pi_theta  KL to the initial student, k3              (--kl-coef)

``--rules`` presets its well-known forms; every entry is an option of its own:

                        paper            released          deepseek         dr_grpo        dapo
    --group-stats       trajectory       turn_row          trajectory       trajectory     trajectory
    --group-std         yes              yes               yes              no             yes
    --reward-scale      10               10                10               1              10
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

Differences: the average of eq 4 is over whole trajectories, of which DeepSeekMath's single answer is the one-turn case;
the deviation is the sample's (ddof 1; the papers are silent, the released code has it). Dr. GRPO's constant divisor is
--length-divisor for each trajectory; verl divides by the padded length and not by the number of trajectories, which is
the same direction at another length. DAPO's dynamic sampling plays further tasks until --tasks-per-step groups hold
both good and bad attempts; where DAPO's recipe stops the run after 10 rounds, the step goes on with the groups it has.
What counts as different is the task's reward, without the penalty for invalid actions. DAPO's penalty for over-long
answers is left out: a response is bounded by --max-response, and its reward is the environment's.

    python -m atod_algos.grpo --env atod/ALFWorld-v0
    python -m atod_algos.grpo --env atod/ALFWorld-v0 --rules dapo
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm, RolloutLimits
from atod_algos.batch import Scores, TokenBatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GRPO(RewardAlgorithm):
    """Group-relative policy optimisation."""

    name: ClassVar[str] = "grpo"
    needs_student: ClassVar[bool] = False
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {**RELEASED_REWARD, "kl_coef": 0.01},
        "deepseek": {"kl_coef": 0.04},
        "dr_grpo": {"group": {"group_std": False, "reward_scale": 1.0}, "objective": {"loss_agg": "constant"}},
        "dapo": {"objective": {"loss_agg": "token_mean", "clip_high": 0.28}, "sampling_rounds": 10},
    }

    kl_coef: float = 0.0
    """Weight of the KL to the initial student: 0 (ATOD paper, section 4.1), 0.01 (released scripts), 0.04
    (DeepSeekMath)."""
    sampling_rounds: int = 1
    """Rounds of episodes a step may play to find --tasks-per-step groups whose rewards differ; 1 takes every group, 10
    is DAPO's bound."""

    def __post_init__(self) -> None:
        require_range(self, "kl_coef", low=0)
        require_range(self, "sampling_rounds", low=1)

    @property
    def scores(self) -> frozenset[str]:
        """The initial student is scored only where the KL term is on."""
        return frozenset({"reference"}) if self.kl_coef else frozenset()

    def limits(self, step: int) -> RolloutLimits:
        """Several rounds where the groups are chosen."""
        return RolloutLimits(rounds=self.sampling_rounds)

    def informative(self, batch: TokenBatch) -> np.ndarray:
        """Groups whose rewards differ; in the others every advantage is 0 (DAPO's dynamic sampling)."""
        return differing_groups(self.reward(batch), batch.group_N)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """Every token of a turn gets the turn's group-relative advantage (eq 2)."""
        return Advantages(reward_M=self.grpo(batch))

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """Beta D_KL(pi_theta || pi_ref), by k3."""
        return kl_to_reference(logprobs, index_M, scores, self.kl_coef)


def kl_to_reference(
    logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores, coefficient: float
) -> torch.Tensor | None:
    """KL to the initial student by k3, weighted; None where it is off."""
    if not coefficient:
        return None
    return coefficient * k3(logprobs, logprobs.new_tensor(scores.require("reference")[index_M]))


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Low-variance estimate of KL(pi_theta || pi_ref) for each token: e^x - x - 1 with x = log pi_ref - log pi_theta.

    x is cut to [-20, 20], so that a token which the policy all but excludes gives a large number rather than infinity.
    """
    x = (reference - logprobs).clip(-20.0, 20.0)
    return x.exp() - x - 1


def differing_groups(reward_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Which groups hold more than one value of the reward (axis G)."""
    low_G, high_G = np.full(group_N.max() + 1, np.inf), np.full(group_N.max() + 1, -np.inf)
    np.minimum.at(low_G, group_N, reward_N)
    np.maximum.at(high_G, group_N, reward_N)
    return np.asarray(high_G > low_G)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GRPO)
