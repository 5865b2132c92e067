"""Many callers, few searches: requests that wait at the same time are answered together, equal queries once.

The invariants: a caller gets the answers to its own queries, in its order, or the error of its own batch; a slow batch
holds up no caller whose batch another worker can take; a caller with many queries gives way to others after every few.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from .protocol import Passage

Answer = Callable[[list[str], int], list[list[Passage]]]
"""Answers distinct queries at one depth."""
SHARE: Final = 32
"""Queries of one caller that are taken before it is another's turn."""


@dataclass(slots=True)
class _Call:
    """One caller's queries, and where their answers go."""

    left: int
    found: list[list[Passage]]
    future: Future[list[list[Passage]]] = field(default_factory=Future)


@dataclass(slots=True, order=True)
class _Ticket:
    """One query of one caller; tickets are taken in their order."""

    turn: int
    number: int
    query: str = field(compare=False)
    k: int = field(compare=False)
    place: int = field(compare=False)
    call: _Call = field(compare=False)
    taken: bool = field(default=False, compare=False)


class Batcher:
    """Collects waiting queries into batches.

    There is no lingering: a free worker takes whatever waits, so a lone query goes at once and queries that come
    while all workers are busy go together.

    Args:
        answer: answers one batch.
        workers: batches under way at a time.
        batch_size: most queries in a batch.

    Attributes:
        waiting: queries that no worker has taken.
    """

    def __init__(self, answer: Answer, *, workers: int, batch_size: int) -> None:
        self._answer = answer
        self._workers = workers
        self._batch_size = batch_size
        self._wake = threading.Condition()
        self._owner = 0
        self._closed = False
        self._clear()

    def _clear(self) -> None:
        self.waiting = 0
        self._turn = 0
        self._numbers = itertools.count()
        self._waiting: list[_Ticket] = []
        self._at_depth: defaultdict[int, list[_Ticket]] = defaultdict(list)
        self._equal: defaultdict[tuple[str, int], list[_Ticket]] = defaultdict(list)

    def retrieve(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Wait for the answers to some queries.

        Raises:
            BaseException: what `answer` raised for the batch of one of them.
        """
        return self.submit(queries, k).result()

    def submit(self, queries: Sequence[str], k: int) -> Future[list[list[Passage]]]:
        """Let queries wait for a worker; their answers come all at once, in the order of the queries.

        Raises:
            RuntimeError: the batcher is closed.
        """
        call = _Call(len(queries), [[] for _ in queries])
        call.future.set_running_or_notify_cancel()  # a caller that stops waiting leaves the batch as it is
        if not queries:
            call.future.set_result([])
            return call.future
        self._start()
        with self._wake:
            if self._closed:
                raise RuntimeError("the batcher is closed; make another")
            for place, query in enumerate(queries):
                ticket = _Ticket(self._turn + place // SHARE, next(self._numbers), query, k, place, call)
                heapq.heappush(self._waiting, ticket)
                heapq.heappush(self._at_depth[k], ticket)
                self._equal[query, k].append(ticket)
            self.waiting += len(queries)
            self._wake.notify(len(queries))
        return call.future

    def close(self) -> None:
        """Let the workers end; queries that still wait are answered first."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _start(self) -> None:
        """Start the workers on first use, and anew in a forked child, where no thread has survived."""
        if self._owner == os.getpid():
            return
        if self._owner:
            self._wake = threading.Condition()
            self._clear()
        with self._wake:
            if self._owner == os.getpid():
                return
            self._owner = os.getpid()
            for number in range(self._workers):
                threading.Thread(target=self._work, name=f"retrieve-{number}", daemon=True).start()

    def _work(self) -> None:
        while batch := self._take():
            try:
                queries = list(dict.fromkeys(ticket.query for ticket in batch))
                answers = dict(zip(queries, self._answer(queries, batch[0].k), strict=True))
            except BaseException as error:  # every caller of the batch must hear of it
                with self._wake:
                    failed = {id(ticket.call): ticket.call for ticket in batch if not ticket.call.future.done()}
                for call in failed.values():
                    _resolve(call, error)
                continue
            with self._wake:
                for ticket in batch:
                    ticket.call.found[ticket.place] = list(answers[ticket.query])
                    ticket.call.left -= 1
                done = {id(ticket.call): ticket.call for ticket in batch if not ticket.call.left}
            for call in done.values():
                _resolve(call)

    def _take(self) -> list[_Ticket]:
        """The next batch: the first ticket, others of its depth, and all that ask the same; empty at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self.waiting or self._closed)
            if not self._waiting:
                return []
            self._turn, k = self._waiting[0].turn, self._waiting[0].k
            same_depth = self._at_depth[k]
            batch: list[_Ticket] = []
            for _ in range(self._batch_size):
                for ticket in self._equal.pop((same_depth[0].query, k)):
                    ticket.taken = True
                    batch.append(ticket)
                _drop_taken(same_depth)
                if not same_depth:
                    del self._at_depth[k]
                    break
            _drop_taken(self._waiting)
            self.waiting -= len(batch)
            return batch


def _drop_taken(tickets: list[_Ticket]) -> None:
    """Let the first ticket of a heap be one that waits."""
    while tickets and tickets[0].taken:
        heapq.heappop(tickets)


def _resolve(call: _Call, error: BaseException | None = None) -> None:
    """Answer a caller, unless another batch of it has failed already."""
    if call.future.done():
        return
    if error is None:
        call.future.set_result(call.found)
    else:
        call.future.set_exception(error)
