"""Which goals belong to which split.

- ``disjoint`` (default). Human goals: the original's ranges of goal numbers, test 0 to 500, dev 500 to 1500, train the
  rest. Synthetic goals, of which the original gives one for every combination of a product's options, are split by
  product: all goals of a product, and of products with the same title or the same instruction, lie in one split (5 %
  test, 10 % dev, 85 % train of the product families). ``all`` holds every goal, for replays and for looking around; who
  trains on it trains on the test.
- ``verl-agent``: the protocol behind published numbers. Every worker shuffles the goals with its own seed, then takes
  numbers 0 to 499 for validation and the rest for training, so validation tasks are trained on. Kept for comparison,
  and said in a warning.

The invariant: task ids are ``<kind>/<number>`` in the shuffled order (``<kind>/<worker seed>/<number>`` for
``verl-agent``), and a split is a function of the catalogue and the seeds alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np

from atod_envs.errors import DataError, UnknownName
from atod_envs.tasks import TaskSet
from atod_envs.webshop.catalogue.store import FOLDS, Array
from atod_envs.webshop.goals import Goals

SplitStyle = Literal["disjoint", "verl-agent"]
SPLIT_STYLES: tuple[SplitStyle, ...] = ("disjoint", "verl-agent")
HUMAN_RANGES: dict[str, tuple[int, int | None]] = {
    "train": (1500, None),
    "dev": (500, 1500),
    "test": (0, 500),
    "all": (0, None),
}
SYNTHETIC_FOLDS = {"train": (3, FOLDS), "dev": (1, 3), "test": (0, 1), "all": (0, FOLDS)}
"""Split -> half-open range of folds."""
VERL_AGENT_WORKERS = {"train": range(16), "test": range(1000, 1128)}
"""Split -> seeds of its workers: 16 task groups in training, 128 validation episodes, as in the published scripts."""
VERL_AGENT_VALIDATION = 500


_LONGEST_PART = 20
"""Digits of a number in a task id."""


class GoalIds(Sequence[str]):
    """Task ids made on demand, so that millions of goals cost four bytes each.

    Args:
        kind: ``"synthetic"`` or ``"human"``.
        numbers: goal numbers, ascending.
        workers: worker seeds, for ``verl-agent``; every one of them has every number.
    """

    def __init__(self, kind: str, numbers: Array, workers: range | None = None) -> None:
        self._kind = kind
        self._numbers = numbers
        self._workers = workers

    def __len__(self) -> int:
        return len(self._numbers) * (1 if self._workers is None else len(self._workers))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        """The id at a position, or a tuple of ids."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        worker, place = divmod(index % len(self), len(self._numbers))
        number = int(self._numbers[place])
        return f"{self._kind}/{number}" if self._workers is None else f"{self._kind}/{self._workers[worker]}/{number}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, task_id: object) -> bool:
        if not isinstance(task_id, str):
            return False
        parts = task_id.split("/")
        if len(parts) != (2 if self._workers is None else 3) or parts[0] != self._kind:
            return False
        if max(map(len, parts)) > _LONGEST_PART:  # Python reads no whole number of any length
            return False
        if not all(part.isdecimal() and part.isascii() and str(int(part)) == part for part in parts[1:]):
            return False
        number = int(parts[-1])
        place = int(np.searchsorted(self._numbers, number))
        found = place < len(self._numbers) and int(self._numbers[place]) == number
        return found and (self._workers is None or int(parts[1]) in self._workers)


class GoalSet(TaskSet):
    """A :class:`TaskSet` over ids that are made on demand."""

    def __init__(self, split: str, ids: GoalIds) -> None:
        self.split = split
        self._ids = ids  # type: ignore[assignment]  # the same protocol as a tuple, without holding the strings
        self._members = ids  # type: ignore[assignment]


def read_task_id(task_id: str) -> tuple[int | None, int]:
    """Worker seed (``None`` outside ``verl-agent``) and goal number of a task id."""
    _, *worker, number = task_id.split("/")
    return (int(worker[0]) if worker else None), int(number)


def split_goals(goals: Goals, split: str, style: SplitStyle = "disjoint") -> GoalSet:
    """The goals of a split.

    Args:
        goals: all goals of the kind that is played.
        split: ``"train"``, ``"dev"``, ``"test"`` or ``"all"``; ``verl-agent`` has ``"train"`` and ``"test"``.
        style: see the module's text.

    Raises:
        UnknownName: no such split or style.
        DataError: the split is empty with this catalogue.
    """
    if style not in SPLIT_STYLES:
        raise UnknownName("split style", style, SPLIT_STYLES)
    known = VERL_AGENT_WORKERS if style == "verl-agent" else SYNTHETIC_FOLDS
    if split not in known:
        raise UnknownName(f"split (style {style!r})", split, known)
    workers = None
    if style == "verl-agent":
        warnings.warn(
            "split_style='verl-agent' leaks: every worker shuffles the goals with its own seed, so validation tasks "
            "occur in training; use it only to compare with numbers published under that protocol",
            stacklevel=3,
        )
        cut = min(VERL_AGENT_VALIDATION, len(goals))
        numbers = np.arange(0, cut) if split == "test" else np.arange(cut, len(goals))
        workers = VERL_AGENT_WORKERS[split]
    elif goals.kind == "human":
        numbers = np.arange(len(goals))[slice(*HUMAN_RANGES[split])]
    else:
        low, high = SYNTHETIC_FOLDS[split]

        def select() -> Array:
            folds = goals.store.folds[goals.rows]
            return np.flatnonzero((folds >= low) & (folds < high)).astype(np.int32)

        numbers = goals.store.table(f"split-{goals.name}-{split}", select)
    if not len(numbers):
        raise DataError(
            f"split {split!r} (style {style!r}) is empty: the catalogue yields {len(goals)} {goals.kind} goals; "
            f"use another split or a larger catalogue"
        )
    return GoalSet(split, GoalIds(goals.kind, numbers, workers))
