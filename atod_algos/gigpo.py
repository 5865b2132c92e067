"""GiGPO: group-in-group policy optimisation (Feng et al. 2025, arXiv 2505.10978).

GRPO says which attempts at a task went well; GiGPO also says in which turns. Attempts at the same task meet the same
states. The turns of a group that answer the same observation, an anchor state, form a group inside the group, and their
actions are compared by the return that followed.

Objective
    A^E_i  = F(R_i - mean R)              over the G attempts at a task                              episode advantage
    R_t    = sum_j gamma^j r_(t+j)        discounted return from turn t to the end of its episode
    A^S_t  = F(R_t - mean R)              over the turns of the group with the observation of turn t    step advantage
    A_t    = A^E_i + omega A^S_t          for every token of turn t
    L      = the clipped surrogate of GRPO with A_t
    F(x)   = x, verl-agent's mean_norm, or x / (std + 1e-6), its mean_std_norm                            --group-std
A turn whose observation occurs once has nothing to be compared with: A^S_t = 0.

Differences from the public implementation (verl-agent, core_gigpo):
    unit of A^E          the trajectory                     | the turn row: long episodes count more  --group-stats
    loss average         mean over trajectories             | mean over tokens                        --loss-agg
    reward               the task's                         | minus 0.1 on invalid turns              --invalid-penalty
    dual clip            none                               | 3                                       --dual-clip
    entropy bonus        none                               | 0.001                                   --entropy-coef
    KL to the start      none                               | 0.01 (k3)                               --kl-coef

The left column is ``--rules paper`` (the default), the right ``--rules released``. Where it is on, the penalty is taken
off the return of its own turn after the discounting, as published, so it is not passed on to the turns before. Rows
that were duplicated to fill a batch enter the published means; here there are none. Its grouping of *similar*
observations (off by default) is left out. With ``--reward success`` the reward stands on an episode's last turn; with
``--reward score`` each turn has the environment's own.

    python -m atod_algos.gigpo --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import GroupOptions, group_advantage, require_range, reward_advantage
from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import kl_to_reference
from atod_envs.trajectory import Turn

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GiGPO(RewardAlgorithm):
    """Group-in-group policy optimisation."""

    name: ClassVar[str] = "gigpo"
    needs_student: ClassVar[bool] = False
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {**RELEASED_REWARD, "kl_coef": 0.01},
    }

    group: GroupOptions = field(default_factory=lambda: GroupOptions(group_std=False))
    omega: float = 1.0
    """Weight of the step advantage: 1 (verl-agent's step_advantage_w)."""
    discount: float = 0.95
    """gamma of the discounted returns: 0.95 (verl-agent's scripts)."""
    kl_coef: float = 0.0
    """Weight of the KL to the initial student: 0.01 in verl-agent's scripts."""

    def __post_init__(self) -> None:
        require_range(self, "discount", low=0, high=1)
        require_range(self, "omega", "kl_coef", low=0)

    @property
    def scores(self) -> frozenset[str]:
        """The initial student is scored only where the KL term is on."""
        return frozenset({"reference"}) if self.kl_coef else frozenset()

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A^E + omega A^S, one value a turn."""
        episode_K = reward_advantage(self.reward(batch), batch.group_N, batch.trajectory_K, batch.valid_K, self.group)

        anchor_K = anchor_states(batch)
        return_K = discounted_returns(self._turn_rewards(batch), batch.trajectory_K, self.discount)
        return_K = return_K - self.group.invalid_penalty * ~batch.valid_K
        size_K = np.bincount(anchor_K)[anchor_K]
        step_K = group_advantage(return_K, anchor_K, divide=self.group.group_std)  # 0 where nothing is compared

        return Advantages(
            reward_M=(episode_K + self.omega * step_K)[batch.turn_M],
            notes={
                "episode_abs_mean": np.abs(episode_K),
                "step_abs_mean": np.abs(step_K),
                "anchor_states": float(anchor_K.max() + 1),
                "anchor_size_mean": size_K,
                "shared_turns": size_K > 1,
            },
        )

    def _turn_rewards(self, batch: TokenBatch) -> np.ndarray:
        if self.group.reward == "score":
            return self.group.reward_scale * np.array([turn.reward for turn in turns_of(batch)])
        last_K = np.append(np.diff(batch.trajectory_K) > 0, True)
        return np.asarray(self.reward(batch)[batch.trajectory_K] * last_K)

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """KL to the initial student, as in GRPO."""
        return kl_to_reference(logprobs, index_M, scores, self.kl_coef)


def turns_of(batch: TokenBatch) -> list[Turn]:
    """The turns on axis K themselves."""
    return [batch.trajectories[n].turns[k] for n, k in zip(batch.trajectory_K, batch.index_K, strict=True)]


def anchor_states(batch: TokenBatch) -> np.ndarray:
    """Number of each turn's anchor state, axis K: equal for turns of a group that answer the same observation."""
    seen: dict[tuple[int, str], int] = {}
    groups_K = batch.group_N[batch.trajectory_K]
    states = zip(groups_K, turns_of(batch), strict=True)
    return np.array([seen.setdefault((int(group), turn.observation), len(seen)) for group, turn in states])


def discounted_returns(reward_K: np.ndarray, trajectory_K: np.ndarray, discount: float) -> np.ndarray:
    """Sum of the discounted rewards from each turn to the end of its trajectory (turns in order of trajectory)."""
    return_K = np.array(reward_K, dtype=np.float64)
    for k in range(len(return_K) - 2, -1, -1):
        if trajectory_K[k] == trajectory_K[k + 1]:
            return_K[k] += discount * return_K[k + 1]
    return return_K


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(GiGPO)
