"""Task ids of one split: membership, seeded draws, orders, and fixed evaluation panels.

The invariant: everything here depends on the ids and the given seed alone, never on file order, hash randomisation or
the machine, so a panel named ``valid_unseen/256`` is the same list of tasks for everybody who has the same data.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Self, overload

import numpy as np

from atod_envs.errors import UnknownName


class TaskSet(Sequence[str]):
    """The task ids of one split, in the order of the data.

    Args:
        split: the split's name, e.g. ``"valid_unseen"``.
        ids: stable task ids; duplicates are refused.
    """

    def __init__(self, split: str, ids: Sequence[str]) -> None:
        self.split = split
        self._ids = tuple(ids)
        self._members: frozenset[str] = frozenset(self._ids)
        if len(self._members) != len(self._ids):
            raise ValueError(f"split {split!r} holds duplicate task ids")

    @classmethod
    def of_split(cls, split: str, where: Mapping[str, str]) -> Self:
        """The tasks of one split.

        Args:
            split: its name; ``all`` takes the tasks of every split.
            where: task id -> split.

        Raises:
            UnknownName: no task is in a split of that name.
        """
        ids = [task_id for task_id, at in where.items() if split in (at, "all")]
        if not ids:
            raise UnknownName("split", split, (*dict.fromkeys(where.values()), "all"))
        return cls(split, ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        """The id at a position, or a tuple of ids."""
        return self._ids[index]

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._members

    def __repr__(self) -> str:
        return f"TaskSet({self.split!r}, {len(self)} tasks)"

    def require(self, task_id: str) -> str:
        """Return ``task_id`` if it belongs to the split.

        Raises:
            UnknownName: it does not; the message names the split and the nearest id.
        """
        if task_id not in self._members:
            raise UnknownName(f"task id (split {self.split!r})", task_id, self._ids)
        return task_id

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one task uniformly."""
        return self._ids[int(rng.integers(len(self._ids)))]

    def order(self, seed: int) -> tuple[str, ...]:
        """A permutation of all tasks that depends on ``seed`` and the ids only (an epoch's order)."""
        return tuple(sorted(self._ids, key=lambda task_id: _digest(f"order/{seed}", task_id)))

    def panel(self, size: int | None = None, name: str = "panel") -> tuple[str, ...]:
        """A fixed list of tasks for evaluation, the same on every machine.

        Tasks are ranked by a hash of (name, id), so a smaller panel is a prefix of a larger one, and adding tasks to
        the data only inserts them.

        Args:
            size: number of tasks; ``None`` takes all.
            name: distinguishes panels that should not coincide.

        Raises:
            ValueError: the split holds fewer tasks than asked for.
        """
        if size is not None and not 0 < size <= len(self._ids):
            raise ValueError(f"a panel of {size} tasks was asked for, but split {self.split!r} holds {len(self._ids)}")
        return tuple(sorted(self._ids, key=lambda task_id: _digest(name, task_id))[:size])


def _digest(name: str, task_id: str) -> bytes:
    return hashlib.blake2b(f"{name}\x00{task_id}".encode(), digest_size=16).digest()


def dealt(name: str, shares: Mapping[str, float]) -> str:
    """The split that a name falls to, by its hash alone: the same on every machine, whatever other names there are.

    Args:
        name: of a task, or of a family of tasks that belong together.
        shares: split -> its share of all names; the last gets what is left.
    """
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
    ends = itertools.accumulate(shares.values())
    return next((split for split, end in zip(shares, ends, strict=True) if place < end), list(shares)[-1])
