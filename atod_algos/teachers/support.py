"""The top-k tokens of a teacher that is no model in this process: laid along the sampled tokens.

A local teacher is compared over all ids that both models have. Another process names k ids of its own vocabulary, and a
few of them may be padding that the student does not have. The invariant: every id that is kept is one of the student's,
and every log-prob is the teacher's over its whole vocabulary; what is left out belongs to the tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from agents.engines.top_tokens import TopTokens
from atod_algos.batch import Scores, TokenBatch
from atod_algos.learner.loss import TeacherTokens
from atod_envs.errors import AtodError


@runtime_checkable
class TopKScorer(Protocol):
    """Gives the top-k tokens of a teacher elsewhere, at as many as it was made for."""

    def top(self, batch: TokenBatch, *, temperature: float, budget: int) -> tuple[np.ndarray, TeacherTokens]:
        """Log-probs of the sampled tokens along axis M, and the teacher's top-k tokens in the place of each."""


def tokens_of_rows(batch: TokenBatch) -> list[np.ndarray]:
    """Indices into axis M of each row's sampled tokens."""
    order = np.argsort(batch.row_M, kind="stable")
    ends = np.cumsum(np.bincount(batch.row_M, minlength=len(batch.rows)))
    return np.split(order, ends[:-1])


def along_tokens(
    batch: TokenBatch, at_B: Sequence[np.ndarray], found_B: Sequence[TopTokens]
) -> tuple[np.ndarray, TeacherTokens]:
    """Lay what was found for each row along axis M.

    Args:
        batch: the batch.
        at_B: indices into axis M of each row's sampled tokens.
        found_B: for each row its ids' log-probs, and the top-k tokens at the places of its sampled tokens.

    Returns:
        Log-probs of the sampled tokens along axis M, float64; their top-k tokens, [M, k].
    """
    shape = (batch.n_tokens, found_B[0].ids_PS.shape[1])
    teacher_M = np.zeros(batch.n_tokens)
    ids_MS, logprobs_MS = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    for at, found in zip(at_B, found_B, strict=True):
        teacher_M[at] = found.own_T[batch.column_M[at]]
        ids_MS[at], logprobs_MS[at] = found.ids_PS, found.logprobs_PS
    return teacher_M, TeacherTokens(ids_MS, logprobs_MS)


def known_only(tokens: TeacherTokens, known: np.ndarray) -> TeacherTokens:
    """The tokens that the student has, as many in each place as the poorest place has.

    Args:
        tokens: [M, k] ids and log-probs, the most likely first.
        known: the student's ids.

    Raises:
        AtodError: a place has none.
    """
    ids_MS = tokens.ids_MS
    if ids_MS is None or not len(ids_MS):
        return tokens
    known_MS = np.isin(ids_MS, known)
    width = int(known_MS.sum(1).min())
    if width == ids_MS.shape[1]:
        return tokens
    if not width:
        raise AtodError(
            f"none of the teacher's {ids_MS.shape[1]} most likely ids at a token is one of the student's (such as "
            f"{int(ids_MS[~known_MS][0])}, which is none); choose models of one family"
        )
    order = np.argsort(~known_MS, axis=1, kind="stable")[:, :width]
    return TeacherTokens(
        np.take_along_axis(ids_MS, order, 1), np.ascontiguousarray(np.take_along_axis(tokens.logprobs_MS, order, 1))
    )


def joined(n_tokens: int, parts: Sequence[tuple[np.ndarray, Scores]]) -> Scores:
    """The scores of a batch from those of its parts, whose teachers may give different things.

    An array that one part lacks is left out: half of it would be no number. Of top-k tokens all parts keep as many as
    the part with the fewest.

    Args:
        n_tokens: M of the batch.
        parts: which of the tokens (booleans, axis M) and their scores.
    """
    arrays: list[tuple[np.ndarray, Mapping[str, np.ndarray]]] = [(keep_M, s.arrays()) for keep_M, s in parts]
    names = [name for name in arrays[0][1] if all(name in own for _, own in arrays)]
    whole: dict[str, np.ndarray] = {}
    for name in names:
        values = [own[name] for _, own in arrays]
        shape = (n_tokens,) if values[0].ndim == 1 else (n_tokens, min(value.shape[1] for value in values))
        whole[name] = np.zeros(shape, values[0].dtype)
        for (keep_M, _), value in zip(arrays, values, strict=True):
            whole[name][keep_M] = value[:, : shape[1]] if len(shape) == 2 else value
    return Scores(**whole, vocabulary=min(scores.vocabulary for _, scores in parts))
