"""Groups of trajectories -> ``TokenBatch``: training rows, and flat arrays over the tokens that the policy sampled.

Every quantity that is computed per token lives in an array with one entry for each *sampled* token (axis M), in the
order trajectory, turn, token. Prompts and observations have no entry at all, so they cannot leak into a mean, a minimum
or a loss. The invariant: ``rows[row_M[i]][column_M[i]]`` is the id that was sampled.

Only the policy's own turns are on axis K. Turns of another actor (an expert's, before the policy took over) are part of
the prompt that follows them, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np

from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory


class RowLayout(StrEnum):
    """How trajectories become training rows."""

    MERGED = "merged"
    """A turn whose prompt continues the turn before shares its row: one row for a conversation, one a turn
    otherwise."""
    PER_TURN = "per_turn"
    """Every turn has its own row, its whole prompt included."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One training step's data.

    Axes: B rows, M sampled tokens, K turns (in order of trajectory), N trajectories, G groups.

    Attributes:
        rows: B arrays of token ids, each one training sequence.
        row_M: row of each sampled token.
        column_M: its place in the row (its prediction stands one place before).
        turn_M: its turn, an index into axis K.
        sampler_logprobs_M: log-probability that the engine sampled it with.
        trajectory_K: trajectory of each turn, an index into axis N.
        index_K: place of the turn in its trajectory, from 0; turns of other actors count.
        prompt_length_K: tokens of the turn's prompt.
        valid_K: the environment understood the turn's action and the response had the right form.
        group_N: group of each trajectory.
        success_N: task solved.
        score_N: task score in [0, 1].
        trajectories: the N trajectories themselves.
    """

    rows: tuple[np.ndarray, ...]
    row_M: np.ndarray
    column_M: np.ndarray
    turn_M: np.ndarray
    sampler_logprobs_M: np.ndarray
    trajectory_K: np.ndarray
    index_K: np.ndarray
    prompt_length_K: np.ndarray
    valid_K: np.ndarray
    group_N: np.ndarray
    success_N: np.ndarray
    score_N: np.ndarray
    trajectories: tuple[Trajectory, ...]

    @property
    def n_tokens(self) -> int:
        """M, the number of sampled tokens."""
        return len(self.row_M)

    @property
    def trajectory_M(self) -> np.ndarray:
        """Trajectory of each sampled token."""
        return np.asarray(self.trajectory_K[self.turn_M])

    @property
    def trajectory_B(self) -> np.ndarray:
        """Trajectory of each row (a row never mixes trajectories)."""
        owner = np.zeros(len(self.rows), dtype=np.int64)
        owner[self.row_M] = self.trajectory_M
        return owner

    @property
    def n_K(self) -> np.ndarray:
        """Number of sampled tokens of each turn."""
        return np.bincount(self.turn_M, minlength=len(self.trajectory_K))

    @property
    def turns_N(self) -> np.ndarray:
        """Number of the policy's turns of each trajectory."""
        return np.bincount(self.trajectory_K, minlength=len(self.group_N))


def make_batch(groups: Sequence[Group], layout: RowLayout = RowLayout.MERGED) -> TokenBatch:
    """Lay groups out for training.

    Aborted trajectories are left out: how they would have ended is unknown.

    Args:
        groups: groups of trajectories that carry token ids.
        layout: how rows are made.

    Raises:
        AtodError: no trajectory holds a sampled token.
    """
    rows: list[np.ndarray] = []
    row_M, column_M, turn_M, sampler_M = [], [], [], []
    trajectory_K: list[int] = []
    index_K: list[int] = []
    prompt_length_K: list[int] = []
    valid_K: list[bool] = []
    kept: list[Trajectory] = []
    group_N: list[int] = []
    for group_index, group in enumerate(groups):
        for trajectory in group.trajectories:
            if trajectory.stop_reason is StopReason.ABORTED:
                continue
            ids: tuple[int, ...] = ()
            for turn in trajectory.turns:
                if not turn.prompt_ids:
                    continue  # played by an actor without tokens
                continues = bool(ids) and turn.prompt_ids[: len(ids)] == ids
                if turn.response_ids and not (continues and layout is RowLayout.MERGED):
                    rows.append(np.empty(0, dtype=np.int64))
                if turn.response_ids:
                    ids = turn.prompt_ids + turn.response_ids
                    rows[-1] = np.array(ids, dtype=np.int64)
                    row_M.append(np.full(len(turn.response_ids), len(rows) - 1))
                    column_M.append(len(turn.prompt_ids) + np.arange(len(turn.response_ids)))
                    turn_M.append(np.full(len(turn.response_ids), len(trajectory_K)))
                    sampler_M.append(np.array(turn.logprobs))
                trajectory_K.append(len(kept))
                index_K.append(turn.index)
                prompt_length_K.append(len(turn.prompt_ids))
                valid_K.append(turn.valid and turn.format_ok)
            kept.append(trajectory)
            group_N.append(group_index)
    if not row_M:
        raise AtodError(
            "no episode of the step holds a token that the student sampled: prompts were longer than the context (raise "
            "--max-context), or a guide, an expert or an agent without tokens played every turn (lower its share)"
        )
    return TokenBatch(
        rows=tuple(rows),
        row_M=np.concatenate(row_M),
        column_M=np.concatenate(column_M),
        turn_M=np.concatenate(turn_M),
        sampler_logprobs_M=np.concatenate(sampler_M),
        trajectory_K=np.array(trajectory_K, dtype=np.int64),
        index_K=np.array(index_K, dtype=np.int64),
        prompt_length_K=np.array(prompt_length_K, dtype=np.int64),
        valid_K=np.array(valid_K, dtype=bool),
        group_N=np.array(group_N, dtype=np.int64),
        success_N=np.array([t.success for t in kept], dtype=bool),
        score_N=np.array([t.score for t in kept], dtype=np.float64),
        trajectories=tuple(kept),
    )


def part_of(batch: TokenBatch, keep_N: np.ndarray) -> tuple[TokenBatch, np.ndarray]:
    """The part of a batch that is some of its trajectories; groups keep their numbers.

    Args:
        batch: the batch.
        keep_N: which trajectories (booleans).

    Returns:
        The part, and which of the batch's sampled tokens are in it (booleans, axis M).
    """
    keep_B, keep_K = keep_N[batch.trajectory_B], keep_N[batch.trajectory_K]
    keep_M = keep_K[batch.turn_M]
    row_B, turn_K, trajectory_N = (np.cumsum(keep) - 1 for keep in (keep_B, keep_K, keep_N))
    part = TokenBatch(
        rows=tuple(row for row, kept in zip(batch.rows, keep_B, strict=True) if kept),
        row_M=row_B[batch.row_M[keep_M]],
        column_M=batch.column_M[keep_M],
        turn_M=turn_K[batch.turn_M[keep_M]],
        sampler_logprobs_M=batch.sampler_logprobs_M[keep_M],
        trajectory_K=trajectory_N[batch.trajectory_K[keep_K]],
        index_K=batch.index_K[keep_K],
        prompt_length_K=batch.prompt_length_K[keep_K],
        valid_K=batch.valid_K[keep_K],
        group_N=batch.group_N[keep_N],
        success_N=batch.success_N[keep_N],
        score_N=batch.score_N[keep_N],
        trajectories=tuple(t for t, kept in zip(batch.trajectories, keep_N, strict=True) if kept),
    )
    return part, keep_M


def put_in_front(batch: TokenBatch, ids_N: Sequence[Sequence[int]]) -> TokenBatch:
    """The same sampled tokens, seen by a reader who was shown something more before everything else.

    Args:
        batch: the batch.
        ids_N: token ids that go in front of every row of a trajectory.

    Returns:
        A batch with the same axis M in longer rows; nothing is cut.
    """
    ahead_B = [np.asarray(ids_N[n], dtype=np.int64) for n in batch.trajectory_B]
    longer_B = np.array([len(ids) for ids in ahead_B], dtype=np.int64)
    return replace(
        batch,
        rows=tuple(np.concatenate([ids, row]) for ids, row in zip(ahead_B, batch.rows, strict=True)),
        column_M=batch.column_M + longer_B[batch.row_M],
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs of a batch's sampled tokens, natural logarithm, all at the sampling temperature.

    Attributes:
        student_M: under the weights that rolled out, recomputed by the learner's model (the paper's pi_old).
        teacher_M: under the teacher, on the same ids; ``None`` where no algorithm asked for it.
        reference_M: under the initial student.
        base_M: under a third model, the teacher as it was before its own training.
        privileged_M: under the weights that rolled out, had they been shown the algorithm's privileged text.
        entropy_M: entropy of the student's whole distribution at each token, in nats.
        teacher_entropy_M: the same of the teacher's.
        reverse_kl_M: KL(student || teacher) over the whole vocabulary at each token, in nats.
        gap_mean_M: mean of log pi_T - log pi_S over all tokens that the student could have sampled, each gap cut as
            that of the sampled token is (``--gap-clip``); minus ``reverse_kl_M`` where none is cut.
        support_MS: ids of the teacher's S top-k tokens in the place of each token; ``None`` with ``teacher_support_MS``
            given: S is the whole vocabulary, in its order.
        teacher_support_MS: their log-probs under the teacher.
        vocabulary: how many ids student and teacher share; 0 where their distributions were not compared.
    """

    student_M: np.ndarray
    teacher_M: np.ndarray | None = None
    reference_M: np.ndarray | None = None
    base_M: np.ndarray | None = None
    privileged_M: np.ndarray | None = None
    entropy_M: np.ndarray | None = None
    teacher_entropy_M: np.ndarray | None = None
    reverse_kl_M: np.ndarray | None = None
    gap_mean_M: np.ndarray | None = None
    support_MS: np.ndarray | None = None
    teacher_support_MS: np.ndarray | None = None
    vocabulary: int = 0

    def only(self, keep_M: np.ndarray) -> Scores:
        """The scores of some of the tokens (booleans, axis M)."""
        return replace(self, **{name: value[keep_M] for name, value in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by field; the first axis of each is M."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "vocabulary"}
        return {name: value for name, value in values.items() if value is not None}

    def require(self, name: str) -> np.ndarray:
        """An array by its name.

        Names: "teacher", "reference", "base", "privileged", "entropy", "teacher_entropy", "reverse_kl",
        "gap_mean" and "teacher_support".

        Raises:
            ValueError: the algorithm's ``scores`` do not name it, so it was not scored.
        """
        found: np.ndarray | None = getattr(self, f"{name}_M", None)
        found = getattr(self, f"{name}_MS", None) if found is None else found
        if found is None:
            raise ValueError(f"the batch was not scored under {name!r}; name what gives it in the algorithm's `scores`")
        return found
