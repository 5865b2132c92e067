"""Every published quantity, computed once, under its published name.

``step_metrics`` gives all that a step publishes, from the batch, the scores and the algorithm's terms; no algorithm
computes a metric of its own. ``turn_table`` keeps what a turn needs for the figures to be redrawn offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atod_algos.advantages import turn_mean
from atod_algos.algorithm import Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch, part_of

MOST_TURNS = 50
"""Quantities by turn index are given for the first turns only, as published; the turn table holds all of them."""


def step_metrics(
    algorithm: Algorithm, batch: TokenBatch, scores: Scores, advantages: Advantages, reward_N: np.ndarray
) -> dict[str, float]:
    """All that a step publishes of its data.

    Args:
        algorithm: the algorithm; its name is the first part of the names of its own quantities.
        batch: the step's data.
        scores: its log-probs.
        advantages: the algorithm's terms.
        reward_N: training reward of each trajectory.
    """
    name = algorithm.name
    group = getattr(algorithm, "group", None)
    metrics = batch_metrics(batch, reward_N, 0.0 if group is None else group.invalid_penalty)
    metrics |= {f"{name}/{key}": float(value) for key, value in advantages.coefficients.items()}
    metrics |= {f"{name}/{key}": float(np.mean(value)) for key, value in advantages.notes.items() if np.size(value)}
    if scores.teacher_M is not None:
        metrics |= teacher_metrics(batch, scores, name)
    if advantages.distillation_M is not None and advantages.reward_M is not None:
        metrics |= term_metrics(advantages.distillation_M, advantages.reward_M, name)
    if advantages.turn_weight_K is not None and advantages.left_out_N is not None:
        metrics |= weight_metrics(advantages.turn_weight_K, advantages.left_out_N, batch, scores)
    elif advantages.turn_weight_K is not None:
        metrics |= weight_by_turn(f"{name}_turn/weight", advantages.turn_weight_K, batch)
    return metrics


def world_metrics(
    algorithm: Algorithm,
    batch: TokenBatch,
    scores: Scores,
    advantages: Advantages,
    reward_N: np.ndarray,
    world_N: np.ndarray,
    names: Sequence[str],
) -> dict[str, float]:
    """:func:`step_metrics` of each environment of several, its name in front; those that spoke no token are left out.

    Args:
        algorithm: the algorithm.
        batch: the step's data.
        scores: its log-probs.
        advantages: the algorithm's terms.
        reward_N: training reward of each trajectory.
        world_N: environment of each trajectory, an index into ``names``.
        names: of the environments.
    """
    metrics: dict[str, float] = {}
    for place, name in enumerate(names):
        keep_N = world_N == place
        part, keep_M = part_of(batch, keep_N)
        if part.n_tokens:
            terms = advantages.only(batch, keep_N)
            own = step_metrics(algorithm, part, scores.only(keep_M), terms, reward_N[keep_N])
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
    return metrics


def batch_metrics(batch: TokenBatch, reward_N: np.ndarray, invalid_penalty: float = 0.0) -> dict[str, float]:
    """Success, reward, length and validity of a batch.

    ``critic/rewards/mean`` averages the episode's reward less the turn's own penalty over turns, as published, so long
    episodes weigh more; ``episode/reward/mean`` is per trajectory.
    """
    turns_N = batch.turns_N
    tokens_N = np.bincount(batch.trajectory_M, minlength=len(reward_N))
    groups = [batch.success_N[batch.group_N == g] for g in np.unique(batch.group_N)]
    row_reward = float((reward_N[batch.trajectory_K] - invalid_penalty * ~batch.valid_K).mean())
    return {
        "critic/rewards/mean": row_reward,
        "critic/score/mean": row_reward,
        "episode/success": float(batch.success_N.mean()),
        "episode/score": float(batch.score_N.mean()),
        "episode/reward/mean": float(reward_N.mean()),
        "episode/length/mean": float(turns_N.mean()),
        "episode/tokens/mean": float(tokens_N.mean()),
        "episode/valid_action_ratio": float(batch.valid_K.mean()),
        "group/all_fail": float(np.mean([not g.any() for g in groups])),
        "group/all_success": float(np.mean([bool(g.all()) for g in groups])),
        "response_length/mean": batch.n_tokens / max(1, len(batch.trajectory_K)),
        "batch/tokens": float(batch.n_tokens),
        "batch/row_tokens": float(sum(len(row) for row in batch.rows)),
    }


def sampler_metrics(batch: TokenBatch, scores: Scores) -> dict[str, float]:
    """How far the learner's log-probs lie from the sampler's: rounding and nothing else, but for ``--staleness``."""
    gap_M = np.abs(scores.student_M - batch.sampler_logprobs_M)
    return {"sampler/logprob_gap_mean": float(gap_M.mean()), "sampler/logprob_gap_max": float(gap_M.max())}


def teacher_metrics(batch: TokenBatch, scores: Scores, name: str) -> dict[str, float]:
    """The gap to the teacher, as it is learned from: after ``--gap-clip``.

    Without a clip its mean is minus a sampled estimate of the reverse KL, so at most 0 in expectation.

    Args:
        batch: the batch.
        scores: log-probs of student and teacher.
        name: the algorithm's, the first part of the keys.
    """
    student_M, teacher_M = scores.student_M, scores.require("teacher")
    delta_M = teacher_M - student_M
    metrics = {
        f"{name}/teacher_student_gap_mean": float(delta_M.mean()),
        f"{name}/teacher_student_gap_std": float(np.sqrt((delta_M**2).mean())),
        f"{name}/raw_kl_mean": float(np.abs(delta_M).mean()),
    }
    index_M = batch.index_K[batch.turn_M]
    speaks_K = batch.n_K > 0
    for index in np.unique(index_M[index_M < MOST_TURNS]):
        at_M = index_M == index
        metrics[f"sod_turn/disagreement/turn_{index}"] = float(np.abs(delta_M[at_M]).mean())
        metrics[f"sod_turn/student_entropy/turn_{index}"] = float(-student_M[at_M].mean())
        metrics[f"sod_turn/teacher_entropy/turn_{index}"] = float(-teacher_M[at_M].mean())
        metrics[f"sod_turn/count/turn_{index}"] = float((speaks_K & (batch.index_K == index)).sum())
    return metrics


def term_metrics(distillation_M: np.ndarray, reward_M: np.ndarray, name: str) -> dict[str, float]:
    """Size of the distillation and the reward term, coefficients included, over all sampled tokens."""
    ratio = np.abs(distillation_M).sum() / max(np.abs(reward_M).sum(), 1e-8)
    metrics = {f"{name}/opd_rl_ratio": float(ratio)}
    for term, value_M in (("opd", distillation_M), ("rl", reward_M)):
        metrics[f"{name}/{term}_abs_mean"] = float(np.abs(value_M).mean())
        metrics[f"{name}/{term}_mean"] = float(value_M.mean())
        metrics[f"{name}/{term}_std"] = float(value_M.std())
        metrics[f"{name}/{term}_min"] = float(value_M.min())
        metrics[f"{name}/{term}_max"] = float(value_M.max())
    return metrics


def weight_metrics(weight_K: np.ndarray, left_out_N: np.ndarray, batch: TokenBatch, scores: Scores) -> dict[str, float]:
    """T-DUR weights: how many trajectories they were computed for, and how they spread over turns."""
    computed_N = left_out_N == 0
    computed_K = computed_N[batch.trajectory_K] & (batch.n_K > 0)
    counted = weight_K[computed_K]
    d_K = turn_mean(np.abs(scores.require("teacher") - scores.student_M), batch.turn_M, len(weight_K))
    largest_N = np.zeros(len(left_out_N))
    np.maximum.at(largest_N, batch.trajectory_K, d_K)
    metrics = {
        "tip/active_ratio": float(computed_N.mean()),
        "tip/mean_importance": float(counted.mean()) if len(counted) else 1.0,
        "tip/min_importance": float(counted.min()) if len(counted) else 1.0,
        "tip/max_importance": float(counted.max()) if len(counted) else 1.0,
        "tip/n_traj_total": float(len(computed_N)),
        "tip/n_computed": float(computed_N.sum()),
        "tip/n_skipped_few_turns": float((left_out_N == 1).sum()),
        "tip/n_skipped_low_div": float((left_out_N == 2).sum()),
        "tip/avg_n_turns_per_traj": float(batch.turns_N.mean()),
        "tip/avg_max_div": float(largest_N.mean()),
    }
    for index in np.unique(batch.index_K[computed_K & (batch.index_K < MOST_TURNS)]):
        at = weight_K[computed_K & (batch.index_K == index)]
        metrics[f"tip/turn_{index}_mean_weight"] = float(at.mean())
        metrics[f"tip/turn_{index}_std_weight"] = float(at.std())
        metrics[f"tip/turn_{index}_count"] = float(len(at))
    return metrics


def weight_by_turn(prefix: str, weight_K: np.ndarray, batch: TokenBatch) -> dict[str, float]:
    """Mean weight of the turns that hold a token, by turn index."""
    spoken_K = (batch.n_K > 0) & (batch.index_K < MOST_TURNS)
    return {
        f"{prefix}/turn_{index}": float(weight_K[spoken_K & (batch.index_K == index)].mean())
        for index in np.unique(batch.index_K[spoken_K])
    }


def turn_table(
    step: int,
    batch: TokenBatch,
    scores: Scores,
    reward_N: np.ndarray,
    weight_K: np.ndarray | None,
    *,
    tokens: bool = False,
) -> dict[str, list[Any]]:
    """Everything that the published figures need, so that they can be redrawn offline: columns, one entry a turn.

    ======================  ====================================================================================
    step                    training step, from 1
    group                   uid of the group
    trajectory              line of the episode in the step's trajectory file, from 0
    trajectory_uid          uid of the trajectory: group and member
    turn                    index of the turn in its episode, from 0
    n                       N_k, sampled tokens: the response's length
    prompt_length           tokens of the prompt
    valid                   the action was understood and the response had the right form
    reward                  training reward of the episode, scaled, without penalties
    success, score          outcome of the episode
    length                  turns of the episode that the policy played
    sum_surprise            sum over the turn's tokens of -log pi_S; h_k is this over n
    sum_teacher_surprise    the same under the teacher
    sum_gap                 sum of Delta = log pi_T - log pi_S
    sum_abs_gap             sum of |Delta|; d_k is this over n
    sum_sq_gap              sum of Delta squared
    sum_privileged_gap      sum of log pi_S(with privileged text) - log pi_S
    weight                  w_k
    token_ids               the sampled ids, a list for each turn
    token_student           their log-probs under the student
    token_teacher           their log-probs under the teacher
    ======================  ====================================================================================

    The teacher's log-probs and gaps are those that were learned from, and that weights are made of: after
    ``--gap-clip``. Columns of a teacher, of privileged text and of weights are there where the algorithm has them;
    those of tokens where they are asked for (``--store tokens``).

    Args:
        step: training step.
        batch: its data.
        scores: the log-probs.
        reward_N: training reward of each trajectory.
        weight_K: weights of the turns.
        tokens: keep the values of single tokens.
    """
    n_turns = len(batch.trajectory_K)

    def total(value_M: np.ndarray) -> list[float]:
        return [float(x) for x in np.bincount(batch.turn_M, value_M, minlength=n_turns)]

    groups = [trajectory.group_id for trajectory in batch.trajectories]
    uids = [f"{group}/{groups[:n].count(group)}" for n, group in enumerate(groups)]
    table: dict[str, list[Any]] = {
        "step": [step] * n_turns,
        "group": [groups[n] for n in batch.trajectory_K],
        "trajectory": batch.trajectory_K.tolist(),
        "trajectory_uid": [uids[n] for n in batch.trajectory_K],
        "turn": batch.index_K.tolist(),
        "n": batch.n_K.tolist(),
        "prompt_length": batch.prompt_length_K.tolist(),
        "valid": batch.valid_K.tolist(),
        "reward": reward_N[batch.trajectory_K].tolist(),
        "success": batch.success_N[batch.trajectory_K].tolist(),
        "score": batch.score_N[batch.trajectory_K].tolist(),
        "length": batch.turns_N[batch.trajectory_K].tolist(),
        "sum_surprise": total(-scores.student_M),
    }
    if scores.teacher_M is not None:
        gap_M = scores.teacher_M - scores.student_M
        table |= {"sum_gap": total(gap_M), "sum_abs_gap": total(np.abs(gap_M)), "sum_sq_gap": total(gap_M**2)}
        table["sum_teacher_surprise"] = total(-scores.teacher_M)
    if scores.privileged_M is not None:
        table["sum_privileged_gap"] = total(scores.privileged_M - scores.student_M)
    if weight_K is not None:
        table["weight"] = [float(w) for w in weight_K]
    if tokens:
        ends = np.cumsum(batch.n_K)[:-1]
        ids_M = np.array([batch.rows[row][column] for row, column in zip(batch.row_M, batch.column_M, strict=True)])
        kept = {"ids": ids_M, "student": scores.student_M, "teacher": scores.teacher_M}
        for name, value_M in kept.items():
            if value_M is not None:
                table[f"token_{name}"] = [part.tolist() for part in np.split(value_M, ends)]
    return table
