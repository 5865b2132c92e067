"""Rows of different length in one forward pass: no padding, no attention across rows, shared prefixes computed once.

Rows are laid end to end in one stream. Where two rows begin alike (the attempts of a group share their first prompt,
the turns of an episode their history), the shared prefix stands in the stream once: a causal model's states there are
the same for both. Positions restart with every row. Everything but attention works on single tokens and never notices;
attention is given the rows' places in the stream and looks at one row at a time: a loop over scaled-dot-product calls
on a CPU, one variable-length flash kernel on a GPU.

The invariant: a token's state equals that of its row run alone, up to rounding. It is checked on each model once,
before the model is trusted with packed rows; a model that fails (recurrent layers, sliding windows, foreign attention
code) runs padded.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from agents.engines.kv_cache import causal_attention
from agents.logits import attends_fully, decoder_of, in_eval_mode
from atod_algos.learner.onednn import row_padding

log = logging.getLogger(__name__)

ATTENTION = "atod_packed"
"""Name of our attention among those of ``transformers``."""
_SHORTEST_SHARED = 8
"""Shorter shared prefixes are computed twice; gathering them would cost more."""
_ROW_TOKENS = 4
"""A pack's rows, counted with their shared prefixes, hold at most this many times its budget: attention sees them in
full."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows in one stream.

    Axes: T tokens of the stream, R tokens of all rows (R = T where nothing is shared), B rows.

    Attributes:
        ids_T: token ids.
        position_T: place of each token in its row.
        bounds: B + 1 places on axis R at which the rows begin and end.
        place_R: place in the stream of each row's tokens.
        keep_T: for each token of the stream, the place on axis R whose attention output it takes; ``None`` where R = T.
    """

    ids_T: np.ndarray
    position_T: np.ndarray
    bounds: tuple[int, ...]
    place_R: np.ndarray
    keep_T: np.ndarray | None


def pack(rows: Sequence[np.ndarray]) -> Pack:
    """Lay rows end to end, shared prefixes once.

    Args:
        rows: token ids of each row; every row holds at least one.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    places: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    ids, positions, owner = [], [], []
    length = 0
    before: int | None = None
    for row in order:
        shared = 0 if before is None else shared_prefix(rows[before], rows[row])
        if before is None or shared < _SHORTEST_SHARED:
            shared = 0
        new = len(rows[row]) - shared
        head = places[before][:shared] if before is not None else places[row]
        places[row] = np.concatenate([head, length + np.arange(new)])
        ids.append(rows[row][shared:])
        positions.append(np.arange(shared, len(rows[row])))
        owner.append((row, shared))
        length += new
        before = row
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    place_R = np.concatenate(places)
    keep_T = np.concatenate([np.arange(bounds[row] + shared, bounds[row + 1]) for row, shared in owner])
    plain = len(place_R) == length and bool((place_R == np.arange(length)).all())
    return Pack(
        np.concatenate(ids), np.concatenate(positions), tuple(bounds.tolist()), place_R, None if plain else keep_T
    )


def packs(rows: Sequence[np.ndarray], budget: int) -> Iterator[np.ndarray]:
    """Split rows into packs of at most ``budget`` tokens, rows that begin alike together.

    Args:
        rows: token ids of each row.
        budget: most tokens of a pack, a shared prefix counted once; a single row may exceed it.

    Yields:
        Indices of rows, each row exactly once.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    chosen: list[int] = []
    fresh = whole = 0
    for row in order:
        size = len(rows[row])
        shared = shared_prefix(rows[chosen[-1]], rows[row]) if chosen else 0
        new = size - (shared if shared >= _SHORTEST_SHARED else 0)
        if chosen and (fresh + new > budget or whole + size > _ROW_TOKENS * budget):
            yield np.array(chosen)
            chosen, fresh, whole, new = [], 0, 0, size
        chosen.append(row)
        fresh, whole = fresh + new, whole + size
    if chosen:
        yield np.array(chosen)


def shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the prefix that two rows share."""
    size = min(len(a), len(b))
    unequal = np.flatnonzero(a[:size] != b[:size])
    return int(unequal[0]) if len(unequal) else size


# --- the forward pass ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """What attention must know of a pack: the rows' bounds, and how to go from the stream to rows and back."""

    bounds: tuple[int, ...]
    offsets: torch.Tensor
    place_R: torch.Tensor | None
    keep_T: torch.Tensor | None
    padding: int


def packed_states(model: Any, packed: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a pack through a model's decoder.

    Args:
        model: a causal language model that ``packable`` accepts.
        packed: the rows.

    Returns:
        States [T, D] and ids [T] of the stream.
    """
    device = next(model.parameters()).device
    length = len(packed.ids_T)
    padding = row_padding(length, device)
    ids = F.pad(torch.from_numpy(packed.ids_T).to(device), (0, padding))
    shares = packed.keep_T is not None
    rows = _Rows(
        packed.bounds,
        torch.tensor(packed.bounds, dtype=torch.int32, device=device),
        torch.from_numpy(packed.place_R).to(device) if shares else None,
        torch.from_numpy(cast("np.ndarray", packed.keep_T)).to(device) if shares else None,
        padding,
    )
    decoder = decoder_of(model)
    if decoder.config._attn_implementation != ATTENTION:
        _register()
        decoder.config._attn_implementation = ATTENTION
    output = decoder(
        input_ids=ids[None],
        position_ids=F.pad(torch.from_numpy(packed.position_T).to(device), (0, padding))[None],
        # A mask of four dimensions is passed on as it is, so none of T x T is built. Should it ever reach another
        # attention than ours, the result is not a number rather than a quiet mixture of rows.
        attention_mask=torch.full((1, 1, 1, 1), float("nan"), device=device, dtype=next(model.parameters()).dtype),
        use_cache=False,
        packed_rows=rows,
    )
    return output.last_hidden_state[0, :length], ids[:length]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_rows: _Rows | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention within rows; without ``packed_rows`` (the engine's passes, say) plain scaled-dot-product attention."""
    if packed_rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return cast("tuple[torch.Tensor, torch.Tensor | None]", plain)
    length = query.shape[2] - packed_rows.padding
    states = [tensor[0, :, :length].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, width]
    if packed_rows.place_R is not None:
        states = [tensor.index_select(0, packed_rows.place_R) for tensor in states]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and dropout == 0.0 and flash_kernel() is not None:
        output = _flash_rows(states, packed_rows, scaling)
    else:
        output = loop_rows(states, packed_rows.bounds, scaling, dropout)
    if packed_rows.keep_T is not None:
        output = output.index_select(0, packed_rows.keep_T)
    return F.pad(output, (0, 0, 0, 0, 0, packed_rows.padding))[None], None


def loop_rows(
    states: list[torch.Tensor], bounds: tuple[int, ...], scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention row by row; states are [T, heads, width]."""
    # Divided at once: a slice for each row would be given back a gradient of the whole stream for each row.
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    divided = ((tensor.transpose(0, 1)[None] for tensor in torch.split(tensor, lengths)) for tensor in states)
    parts = [
        causal_attention(query, key, value, scaling, dropout)[0].transpose(0, 1)
        for query, key, value in zip(*divided, strict=True)
    ]
    return torch.cat(parts)


def _flash_rows(states: list[torch.Tensor], rows: _Rows, scaling: float | None) -> torch.Tensor:
    query, key, value = (tensor.contiguous() for tensor in states)
    options: dict[str, Any] = {"window_size": (-1, 0)} if flash_has("window_size") else {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and flash_has("enable_gqa"):
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    longest = max(end - start for start, end in itertools.pairwise(rows.bounds))
    kernel = cast("Any", flash_kernel())
    return cast(
        "torch.Tensor",
        kernel(query, key, value, rows.offsets, rows.offsets, longest, longest, scale=scaling, **options),
    )


@cache
def flash_kernel() -> Any:
    """The variable-length flash attention, where this torch has it with the scale that we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


@cache
def flash_has(option: str) -> bool:
    """Whether the flash kernel of this torch takes an option."""
    return option in inspect.signature(flash_kernel()).parameters


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# --- may this model be packed? ------------------------------------------------------------------------------------

PACKABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def packable(model: Any) -> bool:
    """Whether packed rows give this model's own states; found out once for each model, by trying."""
    known = PACKABLE.get(model)
    if known is None:
        known = PACKABLE[model] = _try(model)
        if not known:
            log.warning("%s cannot run packed rows; rows are padded instead, which is slower", type(model).__name__)
    return known


def _try(model: Any) -> bool:
    config = decoder_of(model).config
    if not attends_fully(model) or not getattr(model, "_supports_sdpa", False):
        return False
    original = config._attn_implementation
    if original == "eager":  # asked for by name, to look inside
        return False
    size = int(model.get_input_embeddings().num_embeddings)
    ids = np.random.default_rng(0).integers(0, size, 24)
    rows = [ids[:7], np.concatenate([ids[:9], ids[15:24]]), ids[:15]]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), in_eval_mode(model):
            expected = [
                decoder_of(model)(input_ids=torch.from_numpy(row)[None].to(device), use_cache=False)
                .last_hidden_state[0]
                .float()
                for row in rows
            ]
            packed = pack(rows)
            states, _ = packed_states(model, packed)
            got = states.float()[torch.from_numpy(packed.place_R).to(device)]
        error = float((got - torch.cat(expected)).norm() / torch.cat(expected).norm())
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        good = error < (0.05 if half else 1e-3)  # rounding of SmolLM2-135M: 0.02 in bfloat16
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as reason:
        log.info("packed rows fail on %s: %s", type(model).__name__, reason)
        good = False
    if not good:
        config._attn_implementation = original
    return good
