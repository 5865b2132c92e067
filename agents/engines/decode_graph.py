"""Steps of single next tokens at fixed shapes, in fixed memory, so that a GPU can record one and run it again.

A ragged pass has another number of tokens each time, so each of its kernels is launched by itself. A step that has no
prompt tokens is done here for a fixed number of slots instead, over a fixed number of cached positions. Both are
rounded up to one of a few sizes. Slots that run nothing are carried along. A recorded step reads five numbers a slot
and writes two, in buffers that never move; launching it is one call.

The invariant: a slot that is carried along writes only behind what it has cached. So recorded and ragged steps may take
turns, and give the same tokens, up to rounding.

Recordings are bounded: at most ``MOST`` are kept, the least recently used one goes first. All share one memory pool,
which holds the intermediate results of the largest step. They are dropped together with the cached keys and values, and
when a weight or the cache has moved; weights that are changed in place need nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from agents.engines.kv_cache import GROWTH, Store

log = logging.getLogger(__name__)

MOST = 8
"""Recordings that are kept."""
_SHARES = (16, 4, 1)
"""Numbers of slots: all of them divided by these, rounded up."""
_WARM_UPS = 2
"""Runs before a recording; libraries choose kernels and take their workspaces there."""

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids, positions, places of last tokens, temperatures, draws), each [n] -> [2, n] in float64: ids and log-probs."""


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The last token of each running request, whose successor is wanted.

    Attributes:
        rows_S: slots, int64.
        ids_S: token ids, int64.
        positions_S: where each stands in its slot, int64.
        temperatures_S: float64; 0 is greedy.
        draws_S: a number in [0, 1) for each, float64.
    """

    rows_S: np.ndarray
    ids_S: np.ndarray
    positions_S: np.ndarray
    temperatures_S: np.ndarray
    draws_S: np.ndarray


class _Buffers:
    """What the steps of one number of slots read and write; it never moves."""

    def __init__(self, count: int, device: torch.device) -> None:
        host = torch.zeros((5, count), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.host = host
        self.integers = host.numpy()[:3]
        self.numbers = host.numpy()[3:].view(np.float64)
        self.inputs = torch.zeros((5, count), dtype=torch.int64, device=device)
        self.rows, self.ids, self.positions = self.inputs[0], self.inputs[1], self.inputs[2]
        self.temperatures, self.draws = self.inputs[3].view(torch.float64), self.inputs[4].view(torch.float64)
        self.output = torch.zeros((2, count), dtype=torch.float64, device=device)

    def send(self) -> None:
        """Copy the host's numbers over. The host may write again once it has read the step's output."""
        self.inputs.copy_(self.host, non_blocking=self.inputs.device.type == "cuda")


class DecodeGraphs:
    """Runs steps of single tokens; on a GPU as CUDA graphs, elsewhere kernel by kernel in the same memory.

    Args:
        model: its parameters and buffers are watched for having moved.
        store: keys and values.
        slots: how many the store has.
        compute: from the tokens of a pass to what is drawn; everything in it must be work of the device alone.
    """

    def __init__(self, model: torch.nn.Module, store: Store, slots: int, compute: Compute) -> None:
        self._model, self._store, self._slots, self._compute = model, store, slots, compute
        self._device = next(model.parameters()).device
        self.records = self._device.type == "cuda"
        self._sizes = sorted({-(-slots // share) for share in _SHARES})
        self._buffers: dict[int, _Buffers] = {}
        self.recorded: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()
        self._weights: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._pool: Any = None
        self._failed = False

    def drop(self) -> None:
        """Forget all recordings, and give their memory back."""
        self.recorded.clear()
        self._weights, self._addresses, self._pool = [], [], None

    def step(self, live: NextTokens, idle: Sequence[tuple[int, int]]) -> list[list[float]] | None:
        """Compute the given tokens and draw their successors.

        Args:
            live: the running requests.
            idle: every other slot, and the first position that it has not cached.

        Returns:
            Ids and log-probs, in the order of ``live``; None where recording failed, now or before.
        """
        if self._failed:
            return None
        alive = len(live.rows_S)
        count = next(size for size in self._sizes if size >= alive)
        carried = np.array(idle[: count - alive], dtype=np.int64).reshape(-1, 2)
        rows = np.concatenate([live.rows_S, carried[:, 0]])
        positions = np.concatenate([live.positions_S, carried[:, 1]])
        order = np.argsort(rows)  # where all slots take part, row i is slot i
        self._store.grow(int(positions.max()) + 1, self._slots)
        span = -(-(int(live.positions_S.max()) + 1) // GROWTH) * GROWTH
        buffers = self._buffers.get(count)
        if buffers is None:
            buffers = self._buffers[count] = _Buffers(count, self._device)
        nothing = np.zeros(len(carried))
        buffers.integers[0] = rows[order]
        buffers.integers[1] = np.concatenate([live.ids_S, nothing])[order]
        buffers.integers[2] = positions[order]
        buffers.numbers[0] = np.concatenate([live.temperatures_S, nothing])[order]
        buffers.numbers[1] = np.concatenate([live.draws_S, nothing])[order]
        buffers.send()
        try:
            replay = self._recording(count, span, buffers)
        except Exception as error:
            # Whatever a driver or a library refuses while it is recorded, a ragged pass can still do.
            self.drop()
            self._failed = True
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            log.warning(
                "single tokens are computed without CUDA graphs, which is slower: recording a step failed (%s: %s)",
                type(error).__name__,
                reason,
            )
            return None
        replay()
        places = np.argsort(order)[:alive]
        return [[line[place] for place in places] for line in buffers.output.tolist()]

    def _recording(self, count: int, span: int, buffers: _Buffers) -> Callable[[], None]:
        """What runs a step of this size; recorded at its first use, and again after something has moved."""
        if not self._weights:
            self._weights = [*self._model.parameters(), *self._model.buffers()]
        addresses = [tensor.data_ptr() for tensor in (*self._weights, *self._store.keys, *self._store.values)]
        if addresses != self._addresses:
            self.recorded.clear()
            self._addresses = addresses
        replay = self.recorded.pop((count, span), None)
        if replay is None:
            run = partial(self._run, buffers, span)
            replay = self._record(run) if self.records else run
            while len(self.recorded) >= MOST:
                self.recorded.popitem(last=False)
        self.recorded[count, span] = replay
        return replay

    def _run(self, buffers: _Buffers, span: int) -> None:
        """The step itself: nothing in it may depend on what the buffers hold, other than on the device."""
        self._store.begin_fixed(buffers.rows, buffers.positions, span)
        last = torch.arange(len(buffers.rows), device=self._device)
        drawn = self._compute(buffers.ids, buffers.positions, last, buffers.temperatures, buffers.draws)
        buffers.output.copy_(drawn)

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the kernels that a run launches. Warming up computes the step that is due, which may be repeated."""
        with torch.cuda.device(self._device):
            side, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            here.wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Another thread, such as the learner's, may ask for memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay
