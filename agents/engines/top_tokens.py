"""The top-k tokens of places in a prompt, as vLLM gives them: read, checked, sorted.

vLLM answers ``prompt_logprobs=k`` with the k most likely ids of a place, whose ranks are 1 to k, and with the prompt's
own id, whose rank may be any. So a place has k or k + 1 entries. The invariant: what is kept has the ranks 1 to k, each
once, and log-probs that are finite, sorted, and part of one distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

MOST_LOGPROB = 1e-3
"""Largest log-prob that rounding can make of certainty."""
_MOST_MASS = 1.02
"""Largest sum of probabilities that rounding can make of 1."""
_MOST_ID = (1 << 31) - 1
"""Largest id that is kept."""


class TooFew(ValueError):
    """Not all of the ranks 1 to k are there."""


@dataclass(frozen=True, slots=True)
class TopTokens:
    """What a model says of one row: of its own ids, and of the most likely ones at some places.

    Axes: T ids of the row, P places, S top-k tokens.

    Attributes:
        own_T: log-prob of every id given the ids before it; the first is not a number.
        ids_PS: the most likely ids, the most likely first (int32).
        logprobs_PS: their log-probs over the whole vocabulary (float32).
    """

    own_T: np.ndarray
    ids_PS: np.ndarray
    logprobs_PS: np.ndarray

    def __len__(self) -> int:
        """How much it holds, in numbers of eight bytes."""
        return len(self.own_T) + self.ids_PS.size


def top_tokens(
    own_T: Sequence[float] | np.ndarray, found: Sequence[tuple[Sequence[int], Sequence[float]]], k: int
) -> TopTokens:
    """Join the places of a row.

    Args:
        own_T: log-prob of every id of the row.
        found: ids and log-probs of each of P places, as :func:`most_likely` gives them.
        k: how many each place has.
    """
    ids, logprobs = [place[0] for place in found], [place[1] for place in found]
    return TopTokens(
        np.asarray(own_T, dtype=np.float64),
        np.array(ids, dtype=np.int32).reshape(len(found), k),
        np.array(logprobs, dtype=np.float32).reshape(len(found), k),
    )


def most_likely(entries: Iterable[tuple[int, Any, Any]], k: int, own: int) -> tuple[list[int], list[float]]:
    """The k most likely ids of a place, the most likely first, and their log-probs.

    Args:
        entries: id, log-prob and rank of each entry, in any order.
        k: how many are wanted.
        own: the prompt's own id, which is there whatever its rank.

    Raises:
        TooFew: a rank from 1 to k is missing; says how many are there.
        ValueError: a number is none, is not finite, or does not fit the others.
    """
    ranked: list[tuple[int, Any] | None] = [None] * k
    for token, logprob, rank in entries:
        if type(rank) is not int or not 1 <= rank <= k:
            continue
        held = ranked[rank - 1]
        # Where probabilities are equal, the own id may bear the rank of another, which then stands for both.
        if held is None or held[0] == own:
            ranked[rank - 1] = token, logprob
        elif token != own:
            raise ValueError(f"ids {held[0]} and {token} both have rank {rank}")
    kept = [entry for entry in ranked if entry is not None]
    if len(kept) < k:
        raise TooFew(f"{len(kept)} of the {k} most likely ids with their ranks")
    ids, logprobs = [token for token, _ in kept], [logprob for _, logprob in kept]
    if len(set(ids)) < k or min(ids) < 0 or max(ids) > _MOST_ID:
        raise ValueError(f"the ids {ids[:8]} are no {k} ids of a vocabulary")
    for token, logprob in kept:
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not number or not math.isfinite(logprob) or logprob > MOST_LOGPROB:
            raise ValueError(f"the log-prob of id {token} is {logprob!r}; expected a number up to 0")
    if any(after > before for before, after in pairwise(logprobs)):
        raise ValueError("the log-probs do not fall with the rank")
    if (mass := sum(map(math.exp, logprobs))) > _MOST_MASS:
        raise ValueError(f"the probabilities of {k} ids add up to {mass:.3f}")
    return ids, [float(logprob) for logprob in logprobs]
