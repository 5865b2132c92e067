"""What is left of a step's episodes, and who has taken which: the list that a cluster's workers take from.

It runs in a process of its own next to the driver, so that workers need not wait for either; it imports nothing, so
that this process is small. The invariant: an episode is with one call at most, whole groups at a time, until that call
is given up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


class WorkQueue:
    """The groups of a step that no consumer has taken yet.

    A consumer is known by the number of its call, which is never used again: one that was given up, or that still plays
    an earlier step, gets nothing.
    """

    def __init__(self) -> None:
        self._left: deque[list[int]] = deque()
        self._taken: dict[int, list[list[int]]] = {}
        self._running: dict[int, int] = {}
        self._lost: set[int] = set()
        self._first = self._share = self._total = 0

    def begin(self, group_ids: Sequence[str], workers: int, first: int) -> None:
        """Give out a step's episodes from now on.

        Args:
            group_ids: of the episodes, by place.
            workers: how many share them.
            first: the first call that belongs to this step.
        """
        groups: dict[str, list[int]] = {}
        for place, group_id in enumerate(group_ids):
            groups.setdefault(group_id, []).append(place)
        self._left = deque(groups.values())
        # No consumer holds more than its share at a time: the first would take everything.
        self._share = math.ceil(len(group_ids) / workers)
        self._taken, self._running, self._lost = {}, {}, set()
        self._first, self._total = first, len(group_ids)

    def take(self, call: int, room: int, running: int) -> list[int] | None:
        """Places of the episodes that a call goes on with.

        Args:
            call: its number.
            room: episodes that its worker has room for.
            running: episodes that it has taken and not ended.

        Returns:
            Whole groups, no more than the worker's share at a time; None when there are none left.
        """
        if call < self._first or call in self._lost:
            return None
        self._running[call] = running
        if not self._left:
            return None
        taken: list[int] = []
        while self._left and (not taken or len(taken) + len(self._left[0]) <= room):
            if running + len(taken) and running + len(taken) + len(self._left[0]) > self._share:
                break
            group = self._left.popleft()
            self._taken.setdefault(call, []).append(group)
            taken += group
        self._running[call] += len(taken)
        return taken

    def give_back(self, call: int) -> None:
        """A call's worker is lost: all that it took is to be taken again."""
        self._lost.add(call)
        self._left.extendleft(reversed(self._taken.pop(call, [])))
        self._running.pop(call, None)

    def finished(self) -> int:
        """Episodes that have come to their end, as far as the workers have said."""
        waiting = sum(len(group) for group in self._left)
        return self._total - waiting - sum(self._running.values())
