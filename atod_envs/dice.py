"""Random choices of the generators of fresh data.

The invariant: the same seed gives the same choices on every machine and in every version of Python, because only
``Random.random`` is used, whose sequence Python guarantees.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random choices from a seed.

    Args:
        seed: a text or a whole number; equal seeds give equal choices.

    Attributes:
        roll: gives a number in [0, 1).
    """

    def __init__(self, seed: str | int) -> None:
        self.roll = random.Random(seed).random

    def below(self, bound: int) -> int:
        """A whole number in [0, bound)."""
        return int(self.roll() * bound)

    def between(self, fewest: int, most: int) -> int:
        """A whole number in [fewest, most]."""
        return fewest + self.below(most - fewest + 1)

    def chance(self, share: float) -> bool:
        """True with probability ``share``."""
        return self.roll() < share

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Up to ``count`` different options, in the order in which they stand."""
        places = list(range(len(options)))
        chosen = [places.pop(self.below(len(places))) for _ in range(min(count, len(options)))]
        return [options[place] for place in sorted(chosen)]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """One of the options, with probabilities in proportion to the weights."""
        left = self.roll() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            left -= weight
            if left < 0:
                return option
        return options[-1]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """The items in random order."""
        return [item for _, item in sorted(((self.roll(), item) for item in items), key=lambda pair: pair[0])]
