"""Primitives that algorithms share: group-relative advantage, mean by turn, min-max by trajectory, soft-or.

Pure functions on arrays: nothing here knows a model, a file or a step's history. What one algorithm alone uses stands
in its own file. Axes: M sampled tokens, K turns, N trajectories (see ``atod_algos.batch``); turns are in order of
trajectory. Everything is float64 and detached: gradients flow through the importance ratio alone. Equation numbers are
those of the ATOD paper (arXiv 2606.27814).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atod_algos.batch import TokenBatch
from atod_envs.errors import AtodError

NO_RANGE = 1e-8
"""A smaller range counts as none in a min-max normalisation."""
_EPS = 1e-6
"""Added to the deviation of a group."""


def require_range(options: object, *names: str, low: float, high: float = math.inf) -> None:
    """Refuse options that are not finite or not between two bounds, both included; one that is None is left open.

    Args:
        options: whose fields the options are.
        names: the fields.
        low: the least.
        high: the most.

    Raises:
        AtodError: names the option and what was expected.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            expected = "finite number" if math.isinf(low) else f"number from {low:g}"
            expected += "" if math.isinf(high) else f" to {high:g}"
            raise AtodError(f"--{name.replace('_', '-')} {value}: expected a {expected}")


@dataclass(frozen=True)
class GroupOptions:
    """How rewards become group-relative advantages (eq 2)."""

    reward: Literal["success", "score"] = "success"
    """What is rewarded: 'success' (0/1, as published) or 'score' (partial credit where the environment has it)."""
    reward_scale: float = 10.0
    """Multiplies the reward; 10 is the published scale. It cancels where rewards are divided by the group's deviation
    and nothing is subtracted from them; it matters with --invalid-penalty, and without --group-std it scales the
    advantage."""
    group_stats: Literal["trajectory", "turn_row"] = "trajectory"
    """Unit of the group's mean and deviation: 'trajectory' (eq 2) or 'turn_row' (released code: long episodes count
    more)."""
    group_std: bool = True
    """Divide by the group's standard deviation (eq 2); off gives Dr. GRPO's advantage and GiGPO's mean_norm."""
    invalid_penalty: float = 0.0
    """Subtracted from the reward of turns whose action was invalid: 0 (paper), 0.1 or 0.01 (released code)."""

    def __post_init__(self) -> None:
        require_range(self, "reward_scale", "invalid_penalty", low=0)


def task_reward(batch: TokenBatch, group: GroupOptions) -> np.ndarray:
    """Training reward of each trajectory (axis N): success or score, scaled."""
    base_N = batch.success_N.astype(np.float64) if group.reward == "success" else batch.score_N
    return np.asarray(group.reward_scale * base_N)


def group_advantage(
    reward_R: np.ndarray,
    group_R: np.ndarray,
    *,
    divide: bool = True,
    ddof: int = 1,
    alone: bool = False,
) -> np.ndarray:
    """Group-relative advantage, eq 2: (r - mean) / (std + eps) within each group.

    A group of one has nothing to compare with: r - mean is 0.

    Args:
        reward_R: reward of each unit (trajectory, or turn row).
        group_R: group of each unit.
        divide: divide by the standard deviation.
        ddof: 1 for the sample deviation (released code; the paper is silent), 0 for the population's.
        alone: give a unit that is alone in its group its reward, as the released code does (mean 0, deviation 1).

    Returns:
        Advantage of each unit.
    """
    _, group_R = np.unique(group_R, return_inverse=True)
    count = np.bincount(group_R).astype(np.float64)
    compared = count > alone
    mean = np.where(compared, np.bincount(group_R, reward_R) / count, 0.0)
    centred_R = reward_R - mean[group_R]
    # The mean of equal numbers can miss them by a rounding, which an optimizer would make an update of.
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, group_R, reward_R)
    np.maximum.at(high, group_R, reward_R)
    centred_R = np.where(((low == high) & compared)[group_R], 0.0, centred_R)
    if not divide:
        return np.asarray(centred_R)
    variance = np.bincount(group_R, centred_R**2) / np.maximum(count - ddof, 1)
    std = np.where(count > 1, np.sqrt(variance), 1.0)
    return np.asarray(centred_R / (std[group_R] + _EPS))


def reward_advantage(
    reward_N: np.ndarray,
    group_N: np.ndarray,
    trajectory_K: np.ndarray,
    valid_K: np.ndarray,
    options: GroupOptions,
    *,
    ddof: int = 1,
) -> np.ndarray:
    """Advantage of each turn from the rewards of its trajectory, in either unit of statistics.

    With ``turn_row`` every turn is a row that carries its trajectory's reward less its own penalty. With ``trajectory``
    a trajectory's reward is reduced by the penalty times its share of invalid turns.

    Returns:
        Advantage of each turn (axis K).
    """
    penalty_K = options.invalid_penalty * ~valid_K
    if options.group_stats == "turn_row":
        reward_K = reward_N[trajectory_K] - penalty_K
        return group_advantage(reward_K, group_N[trajectory_K], divide=options.group_std, ddof=ddof, alone=True)
    turns_N = np.maximum(np.bincount(trajectory_K, minlength=len(reward_N)), 1)
    share_N = np.bincount(trajectory_K, penalty_K, minlength=len(reward_N)) / turns_N
    advantage_N = group_advantage(reward_N - share_N, group_N, divide=options.group_std, ddof=ddof)
    return np.asarray(advantage_N[trajectory_K])


def turn_mean(value_M: np.ndarray, turn_M: np.ndarray, n_turns: int) -> np.ndarray:
    """Mean over each turn's sampled tokens (0 for a turn without any), axis K."""
    count_K = np.bincount(turn_M, minlength=n_turns)
    return np.bincount(turn_M, value_M, minlength=n_turns) / np.maximum(count_K, 1)


def min_max_by_trajectory(value_K: np.ndarray, trajectory_K: np.ndarray, counted_K: np.ndarray) -> np.ndarray:
    """Min-max within each trajectory, eq 15; 0.5 where there is no range, as in a trajectory of one turn.

    Args:
        value_K: d_k or h_k.
        trajectory_K: trajectory of each turn.
        counted_K: turns that take part; a turn without tokens must not set the minimum.

    Returns:
        Values in [0, 1]; 0.5 for turns that do not take part.
    """
    n = int(trajectory_K.max(initial=-1)) + 1
    low_N, high_N = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low_N, trajectory_K[counted_K], value_K[counted_K])
    np.maximum.at(high_N, trajectory_K[counted_K], value_K[counted_K])
    with np.errstate(invalid="ignore"):
        range_K = (high_N - low_N)[trajectory_K]
    usable_K = counted_K & np.isfinite(range_K) & (range_K >= NO_RANGE)
    out_K = np.full(len(value_K), 0.5)
    out_K[usable_K] = (value_K[usable_K] - low_N[trajectory_K[usable_K]]) / range_K[usable_K]
    return out_K


def soft_or(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Probabilistic OR, eq 16: 1 - (1 - a)(1 - b)."""
    return 1.0 - (1.0 - a) * (1.0 - b)


def importance(divergence_M: np.ndarray, uncertainty_M: np.ndarray, quantile: float) -> np.ndarray:
    """Soft-OR of both, min-max normalised over all tokens of the batch, uncertainty first cut at its quantile (TIP)."""
    cut_M = np.minimum(uncertainty_M, np.quantile(uncertainty_M, quantile))
    return soft_or(min_max(divergence_M), min_max(cut_M))


def min_max(value_M: np.ndarray) -> np.ndarray:
    """Min-max over all entries; 0.5 where there is no range."""
    low, high = value_M.min(), value_M.max()
    return np.full_like(value_M, 0.5) if high - low < NO_RANGE else (value_M - low) / (high - low)
