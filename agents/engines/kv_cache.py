"""Keys and values of the running requests, and attention over them for one ragged forward pass.

The new tokens of all requests, whether a whole prompt or a single token, are laid end to end: nothing but attention
needs to know where one request ends, so no layer computes padding. Attention goes by blocks of rows that want a similar
amount of work. The invariant: a token sees the positions of its own slot up to its own, and nothing else.

Which token goes where is worked out in numpy. It reaches the device in one copy a pass; no layer copies or waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

GROWTH = 256
"""The store's positions come in multiples of this, so that short episodes do not pay for the longest context."""
_WIDE = 64
"""Rows with at least this many new tokens attend on their own: nothing is padded, and a fused kernel pays."""
BLOCK_SCORES = 1 << 22
"""Most attention scores of a block that stand in memory at once."""
_BLOCK_COST = (1 << 19, 1 << 26)
"""What one more block costs, as bytes that could be read meanwhile: on a CPU, on a GPU."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The new tokens of one slot in a pass.

    Attributes:
        row: the slot.
        start: position of the first new token, which is the number of positions cached before.
        width: number of new tokens.
    """

    row: int
    start: int
    width: int


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Small arrays of one type on a device, in one copy that the host does not wait for; a CPU shares their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    gpu = device.type == "cuda"
    # Only memory that is pinned is copied without waiting; torch keeps it until the copy is done.
    there = (joined.pin_memory() if gpu else joined).to(device, non_blocking=gpu)
    parts = there.split_with_sizes([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Rows that attend together, as the host works them out; n rows of up to w queries over ``span`` positions."""

    rows: slice | np.ndarray
    gather: np.ndarray  # [n, w] places in the pass
    real: np.ndarray  # [t] places in [n * w] that are real
    span: int
    last: np.ndarray | None  # [n, w] last position that each query sees; None: causal from the first position


@dataclass(frozen=True, slots=True)
class _Block:
    """A plan on the device."""

    rows: torch.Tensor | slice
    gather: torch.Tensor  # [n, w]
    scatter: torch.Tensor  # [t]
    target: torch.Tensor  # [t] where the real queries stand in the pass
    span: int
    bias: torch.Tensor | None  # [n, 1, 1, w, span], 0 or -inf; None: causal from the first position


class Store:
    """Keys and values of all slots: for each layer one tensor [rows, heads, positions, width].

    It grows with what is used, in rows (a slot is one) and in positions. Growing copies what is there, so it grows by
    half or more, but never beyond what its slots and their context can fill. It is also the cache object that
    transformers' attention layers write through.

    Args:
        layers: of the model.
        slots: most rows.
        context: most positions of a row; the store has their number rounded up to a multiple of ``GROWTH``.
        heads: that keys and values have.
        width: of a head.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(
        self, layers: int, slots: int, context: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (0, heads, 0, width)
        self._most = (slots, -(-context // GROWTH) * GROWTH)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._ramp = torch.empty(0, dtype=torch.int64, device=device)
        self._shut = torch.full((), float("-inf"), device=device)
        self._blocks: list[_Block] = []
        self._place = torch.empty(0)

    @property
    def length(self) -> int:
        """Positions there is room for."""
        return int(self.keys[0].shape[2]) if self.keys else 0

    def grow(self, length: int, rows: int) -> None:
        """Make room for ``length`` positions in each of the first ``rows`` rows."""
        known, heads, before, width = self.keys[0].shape
        if length <= before and rows <= known:
            return
        if rows > known:
            rows = max(rows, min(self._most[0], known + known // 2))
        if length > before:
            length = max(-(-length // GROWTH) * GROWTH, min(self._most[1], (before + before // 2) // GROWTH * GROWTH))
        shape = (max(rows, known), heads, max(length, before), width)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = old.new_zeros(shape)
                new[:known, :, :before] = old
                tensors[i] = new
        self._ramp = torch.arange(shape[2], device=self.keys[0].device)

    def clear(self) -> None:
        """Give the memory back."""
        for tensors in (self.keys, self.values):
            tensors[:] = [tensor[:0, :, :0].clone() for tensor in tensors]
        self._blocks = []

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of one row to others."""
        self.grow(length, max(targets) + 1)
        (rows,) = to_device([np.array(targets, dtype=np.int64)], self.keys[0].device)
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[rows, :, :length] = tensor[source, :, :length]

    # --- one pass -------------------------------------------------------------------------------------------------

    def begin(self, segments: Sequence[Segment], ids_T: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prepare a pass over the new tokens of some slots, laid end to end in this order.

        Args:
            segments: one for each slot; every slot at most once.
            ids_T: their new tokens, int64.

        Returns:
            On the device: the ids and their positions, each [T], and the place of each slot's last token, [S].
        """
        columns_T = positions_of(segments)
        self.grow(int(columns_T.max()) + 1, max(s.row for s in segments) + 1)
        device = self.keys[0].device
        heads = self.keys[0].shape[1]
        rows_T = np.repeat([s.row for s in segments], [s.width for s in segments])
        place = (rows_T[:, None] * heads + np.arange(heads)) * self.length + columns_T[:, None]
        offsets = np.cumsum([0, *(s.width for s in segments)])
        single = [i for i, s in enumerate(segments) if s.width == 1]
        narrow = sorted((i for i, s in enumerate(segments) if 1 < s.width < _WIDE), key=lambda i: segments[i].width)
        plans = [_wide_plan(segments[i], int(offsets[i])) for i, s in enumerate(segments) if s.width >= _WIDE]
        if single:
            for together in self._split([segments[i] for i in single]):
                chosen = [single[i] for i in together]
                plans.append(_single_plan([segments[i] for i in chosen], offsets[chosen]))
        while narrow:
            # Rows of similar width share a block; one stays small enough for its scores to be held.
            span = max(segments[i].start + segments[i].width for i in narrow)
            count = 1
            while count < len(narrow) and segments[narrow[count]].width <= 2 * segments[narrow[0]].width:
                if (count + 1) * segments[narrow[count]].width * span * heads > BLOCK_SCORES:
                    break
                count += 1
            part, narrow = narrow[:count], narrow[count:]
            plans.append(_narrow_plan([segments[i] for i in part], offsets[part]))
        arrays = [ids_T, columns_T, offsets[1:] - 1, place.ravel()]
        for plan in plans:
            arrays += [plan.gather, plan.real, plan.gather.ravel()[plan.real]]
            arrays += [array for array in (plan.rows, plan.last) if isinstance(array, np.ndarray)]
        sent = iter(to_device(arrays, device))
        ids, columns, last, self._place = (next(sent) for _ in range(4))
        self._blocks = [self._block(plan, sent) for plan in plans]
        return ids, columns, last

    def begin_fixed(self, rows_n: torch.Tensor, positions_n: torch.Tensor, span: int) -> None:
        """Prepare a pass of one token for each of some slots, without a look at which they are.

        Args:
            rows_n: different slots, on the device; where they are all, in order: then keys are viewed, not copied.
            positions_n: position of each one's token, within the store's length.
            span: how many positions are read; more than the position of any token whose result is used.
        """
        slots, heads = self.keys[0].shape[:2]
        head, token = (torch.arange(n, device=rows_n.device) for n in (heads, len(rows_n)))
        self._place = ((rows_n[:, None] * heads + head) * self.length + positions_n[:, None]).flatten()
        rows = slice(0, slots) if len(rows_n) == slots else rows_n
        self._blocks = [_Block(rows, token[:, None], token, token, span, self._bias(positions_n[:, None], span))]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the pass's keys and values of a layer, each [tokens, heads, width]."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            width = store.shape[3]
            store.view(-1, width).index_copy_(0, self._place, new.reshape(-1, width))

    def attend(self, layer: int, queries: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the pass's queries [tokens, query heads, width] over their own slots; the same shape."""
        out = torch.empty_like(queries)
        for block in self._blocks:
            out.index_copy_(0, block.target, self._attend_block(block, layer, queries, scaling))
        return out

    def _attend_block(self, block: _Block, layer: int, queries: torch.Tensor, scaling: float) -> torch.Tensor:
        keys = self.keys[layer][block.rows, :, : block.span]
        values = self.values[layer][block.rows, :, : block.span]
        (n, w), (heads, width) = block.gather.shape, keys.shape[1::2]
        group = queries.shape[1] // heads
        if block.bias is None:
            # One row that begins at its first position: plain causal attention.
            first = queries[block.target].transpose(0, 1)[None]
            return causal_attention(first, keys, values, scaling)[0].transpose(0, 1)
        grouped = queries[block.gather.flatten()].view(n, w, heads, group, width).permute(0, 2, 3, 1, 4)
        flat = grouped.reshape(n, heads, group * w, width)
        # Heads that share keys are further queries of one head: keys are neither repeated nor read twice.
        if w >= _WIDE:
            mask = block.bias.expand(n, 1, group, w, block.span).reshape(n, 1, group * w, block.span)
            mixed = scaled_dot_product_attention(flat, keys, values, attn_mask=mask, scale=scaling)
        else:
            scores = torch.matmul(flat * scaling, keys.transpose(2, 3)).float().view(n, heads, group, w, block.span)
            weights = torch.softmax(scores.add_(block.bias), dim=-1).to(values.dtype)
            mixed = torch.matmul(weights.view(n, heads, group * w, block.span), values)
        order = mixed.view(n, heads, group, w, width).permute(0, 3, 1, 2, 4)
        return order.reshape(n * w, heads * group, width)[block.scatter]

    # --- blocks ---------------------------------------------------------------------------------------------------

    def _split(self, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
        """Divide rows with one new token, in order of slots, into blocks of similar length.

        A block reads as many positions of every slot that it spans as its longest row has. Dividing saves reading and
        costs a few more kernels.

        Yields:
            Indices into ``segments``.
        """
        order = np.argsort([s.row for s in segments])
        rows = np.array([segments[i].row for i in order])
        lengths = np.array([segments[i].start + 1 for i in order])
        keys = self.keys[0]
        position = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
        extra = _BLOCK_COST[keys.device.type == "cuda"] / position
        todo = [(0, len(order))]
        while todo:
            low, high = todo.pop()
            part = lengths[low:high]
            whole = (rows[high - 1] - rows[low] + 1) * part.max()
            left = (rows[low : high - 1] - rows[low] + 1) * np.maximum.accumulate(part)[:-1]
            right = (rows[high - 1] - rows[low + 1 : high] + 1) * np.maximum.accumulate(part[::-1])[-2::-1]
            both = left + right
            if len(both) and both.min() + extra < whole:
                middle = low + 1 + int(both.argmin())
                todo += [(middle, high), (low, middle)]
            else:
                yield order[low:high]

    def _block(self, plan: _Plan, sent: Iterator[torch.Tensor]) -> _Block:
        """A plan whose arrays have been sent, in the order of ``begin``."""
        gather, real, target = (next(sent) for _ in range(3))
        rows = plan.rows if isinstance(plan.rows, slice) else next(sent)
        bias = None if plan.last is None else self._bias(next(sent), plan.span)
        return _Block(rows, gather, real, target, plan.span, bias)

    def _bias(self, last: torch.Tensor, span: int) -> torch.Tensor:
        """0 where a query may look, -inf beyond its position: [n, w] -> [n, 1, 1, w, span]."""
        shut = self._shut.to(self.keys[0].dtype) if last.shape[1] >= _WIDE else self._shut
        return torch.where(self._ramp[:span] > last[:, None, None, :, None], shut, torch.zeros_like(shut))

    # --- transformers' cache protocol -----------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, tokens, width]; attention reads them from here, so they are handed back as they came."""
        self.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly; nothing is inferred from this."""
        return 0


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of queries [n, query heads, T, width] over keys and values of as many or of fewer heads.

    Of CUDA's fused kernels flash alone lets heads share keys, and it takes no float32. There keys are repeated, or the
    scores of all pairs would stand in memory.
    """
    group = queries.shape[1] // keys.shape[1]
    if group > 1 and queries.is_cuda and queries.dtype == torch.float32:
        keys, values, group = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), 1
    return scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=group > 1
    )


def positions_of(segments: Sequence[Segment]) -> np.ndarray:
    """Position of each new token in its slot, [T]."""
    return np.concatenate([np.arange(s.start, s.start + s.width) for s in segments])


def _wide_plan(segment: Segment, offset: int) -> _Plan:
    places = np.arange(offset, offset + segment.width)
    start, span = segment.start, segment.start + segment.width
    last = np.arange(start, span)[None] if start else None
    return _Plan(slice(segment.row, segment.row + 1), places[None], np.arange(segment.width), span, last)


def _narrow_plan(segments: Sequence[Segment], offsets: np.ndarray) -> _Plan:
    width = max(s.width for s in segments)
    starts, widths = np.array([s.start for s in segments]), np.array([s.width for s in segments])
    ramp = np.arange(width)
    gather = offsets[:, None] + np.minimum(ramp, widths[:, None] - 1)
    real = np.flatnonzero((ramp < widths[:, None]).ravel())
    span = int((starts + widths).max())
    return _Plan(np.array([s.row for s in segments]), gather, real, span, starts[:, None] + ramp)


def _single_plan(segments: Sequence[Segment], offsets: np.ndarray) -> _Plan:
    """Rows with one new token.

    Where most slots between the first and the last take part, the others are carried along: a contiguous view of the
    store costs nothing, a gathered copy costs a pass over it. What they compute is dropped.
    """
    rows = np.array([s.row for s in segments])
    starts = np.array([s.start for s in segments])
    span = int(starts.max()) + 1
    low, high = int(rows.min()), int(rows.max()) + 1
    if 2 * len(rows) < high - low:
        return _Plan(rows, offsets[:, None], np.arange(len(rows)), span, starts[:, None])
    gather = np.full(high - low, offsets[0])
    gather[rows - low] = offsets
    ends = np.zeros(high - low, dtype=np.int64)
    ends[rows - low] = starts
    return _Plan(slice(low, high), gather[:, None], rows - low, span, ends[:, None])
