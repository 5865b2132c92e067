"""A model's forward pass over ragged tokens: through its own modules, or, for the common family, written out.

The invariant: all give what the model's own ``forward`` gives for each request alone, up to rounding. It is tried on
every model before the model is trusted to a decoder; a model that neither ragged decoder can run goes through its own
``forward``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.nn.functional import linear, pad, rms_norm

from agents.engines.kv_cache import Segment, Store
from agents.engines.own_forward import OwnDecoder, OwnStore, cache_argument
from agents.logits import (
    LogitHead,
    UnsupportedModel,
    attends_fully,
    decoder_of,
    in_eval_mode,
    logit_head,
    longest_context,
    own_logits,
    passes_agree,
    probe_ids,
    text_config,
)

log = logging.getLogger(__name__)

_ATTENTION = "atod_ragged"
"""Name under which the store's attention is registered with transformers."""
_FAMILY = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Dense decoders of one shape: RMS norms before attention and a gated MLP, rotary positions, nothing else."""
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose angles depend on the position alone."""

_PACK_BYTES = 2 << 30
"""Models up to this size have their matrices packed, which is one more copy of them."""
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
PACK_ELEMENTS = 1 << 16
"""Smaller matrices are faster as they are."""
_PACK_ROWS = 32
"""Rows of a typical step, for which the packing is chosen; it serves any number."""
_EVEN_ROWS = (8, 64)
"""Passes are filled up to a multiple of the first number of rows, large ones of the second: oneDNN makes and keeps a
kernel for each number of rows that it meets (half a millisecond and half a MiB each)."""
_LARGE_ROWS = 512

_Map = Callable[[torch.Tensor], torch.Tensor]


class Decoder(Protocol):
    """The forward pass of an engine."""

    def next_logits(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Any, last_S: torch.Tensor
    ) -> torch.Tensor:
        """Logits [S, V] in the model's own type, at the S last tokens of a pass.

        Args:
            ids_T: the pass's token ids.
            positions_T: position of each in its slot.
            store: the store, prepared for this pass.
            last_S: place of each slot's last token on axis T.
        """

    def rebind(self) -> None:
        """Look the model's modules up again."""


_PROBE = ((40, 9), (3, 1, 12))
"""New tokens of each slot in the two passes of the probe."""


def make_decoder(model: Any, slots: int, max_context: int) -> tuple[Decoder, Any]:
    """The fastest decoder that gives the model's own logits, and its empty store.

    Args:
        model: a causal language model, perhaps wrapped by peft.
        slots: requests that run at the same time.
        max_context: most positions of a request.

    Raises:
        UnsupportedModel: nothing gives them; names the model and what to use instead.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    head = logit_head(base)
    kinds: list[Callable[[], Decoder]] = []
    if attends_fully(base, max_context):
        if name in _FAMILY and _rotary_type(base) in _STATIC_ROTARY:
            kinds.append(lambda: FamilyDecoder(base, max_context, head))
        kinds.append(lambda: ModuleDecoder(base, head))
    reasons = []
    for make in kinds:
        reason = _reason(base, head, make, lambda count: ragged_store(base, count, max_context), max_context)
        if reason is None:
            return make(), ragged_store(base, slots, max_context)
        reasons.append(reason)
    device = next(base.parameters()).device
    for caches in (True, False):
        own = partial(OwnDecoder, base, head, caches=caches)
        reason = _reason(base, head, own, lambda _: OwnStore(device), max_context)
        if reason is None:
            log.warning(
                "%s runs through its own forward pass, one request at a time%s, which is slow (%s); --engine vllm may be faster",
                name,
                "" if caches else " and without a cache",
                reasons[-1] if reasons else "its layers do not attend to the whole context",
            )
            return own(), OwnStore(device)
        reasons.append(reason)
    raise UnsupportedModel(f"{name} cannot be sampled from by this engine: {reasons[-1]}; use --engine vllm")


def ragged_store(model: Any, slots: int, context: int) -> Store:
    """An empty store of the shape that the model's attention writes."""
    config = text_config(model)
    parameter = next(model.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Store(config.num_hidden_layers, slots, context, heads, width, parameter.dtype, parameter.device)


def _reason(
    model: Any, head: LogitHead, make: Callable[[], Decoder], make_store: Callable[[int], Any], max_context: int
) -> str | None:
    """Why a decoder cannot be used: it raises on two small passes, or its logits differ; None where it can."""
    longest = min(max_context, longest_context(model))
    try:
        with torch.inference_mode(), in_eval_mode(model):
            store, decoder = make_store(len(_PROBE[1])), make()
            dtype = next(model.parameters()).dtype
            rows = [
                probe_ids(model, min(longest, sum(p[row] for p in _PROBE if row < len(p))), 7 + row) for row in range(3)
            ]
            done = [0, 0, 0]
            for sizes in _PROBE:
                segments, ids = [], []
                for row, size in enumerate(sizes):
                    new = rows[row][done[row] : done[row] + size]
                    if new:
                        segments.append(Segment(row, done[row], len(new)))
                        ids += new
                        done[row] += len(new)
                if not segments:
                    continue
                tokens, places, last = store.begin(segments, np.array(ids, dtype=np.int64))
                got = decoder.next_logits(tokens, places, store, last).float()
                expected = torch.stack([own_logits(model, rows[s.row][: done[s.row]])[-1] for s in segments])
                if not passes_agree(got, expected, dtype):
                    return "its logits differ from those of the model's own forward pass"
    except Exception as error:
        # Whatever a model's own code raises means that it cannot be run so.
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    return None


def _rotary_type(model: Any) -> str:
    return str((getattr(text_config(model), "rope_parameters", None) or {}).get("rope_type", "default"))


class ModuleDecoder:
    """Any decoder that lets its attention be chosen: its own modules, with the store's attention put in."""

    def __init__(self, model: Any, head: LogitHead) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        self._model, self._head = model, head

    def next_logits(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store, last_S: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Decoder`."""
        return self._head.raw(self(ids_T, positions_T, store)[last_S])

    def rebind(self) -> None:
        """Nothing was remembered."""

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Run the modules on one row that holds all tokens."""
        decoder = decoder_of(self._model)
        options: dict[str, Any] = {cache_argument(decoder): store, "use_cache": True, "atod_store": store}
        with _chosen_attention(decoder.config):
            output = decoder(input_ids=ids_T[None], position_ids=positions_T[None], **options)
        states: torch.Tensor = output.last_hidden_state[0]
        return states


@contextlib.contextmanager
def _chosen_attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    atod_store: Store | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if atod_store is None or softcap is not None or s_aux is not None:
        what = (
            "soft-capped scores or attention sinks" if atod_store is not None else "attention without keyword options"
        )
        raise NotImplementedError(f"{type(module).__name__} uses {what}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return atod_store.attend(module.layer_idx, query[0].transpose(0, 1), scale)[None], None


class FamilyDecoder:
    """Qwen2, Qwen3, Llama and Mistral, written out.

    For small models and few tokens most of a forward pass is the bookkeeping of modules and of unfused norms; written
    out it takes a fraction. Projections that are more than a matrix (adapters) are called as the modules they are.
    """

    def __init__(self, model: Any, max_context: int, head: LogitHead) -> None:
        self._model = model
        self._max_context = max_context
        self._own_head = head
        self._layers: list[_Layer] = []
        self._head: _Map | None = None
        self.packed: list[tuple[torch.Tensor, int]] = []
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def rebind(self) -> None:
        """Look the modules up again; they may have been wrapped or moved, and packed matrices are copies."""
        size = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self.packed = []
        project = self._pack if size <= _PACK_BYTES else _projection
        self._layers = [_Layer.of(layer, project) for layer in self._model.get_decoder().layers]
        self._head = project(self._model.get_output_embeddings()) if self._own_head.plain else self._own_head.raw
        self._angles = None

    def _pack(self, module: Any) -> _Map:
        """A projection whose matrix is laid out for matmuls of few rows on a CPU."""
        weight: Any = getattr(module, "weight", None)
        fits = type(module) is torch.nn.Linear and weight is not None and weight.numel() >= PACK_ELEMENTS
        if not fits or weight.device.type != "cpu" or weight.dtype != torch.float32 or not _ONEDNN:
            return _projection(module)
        operations, bias = torch.ops.mkldnn, module.bias
        packed = operations._reorder_linear_weight(weight.detach(), _PACK_ROWS)
        self.packed.append((weight, weight._version))
        return lambda x: cast("torch.Tensor", operations._linear_pointwise(x, packed, bias, "none", [], ""))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The output layer."""
        if self._head is None:
            self.rebind()
        return cast("_Map", self._head)(pad(states, (0, 0, 0, self._row_padding(len(states)))))[: len(states)]

    def next_logits(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store, last_S: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Decoder`."""
        return self.logits(self(ids_T, positions_T, store)[last_S])

    def _row_padding(self, rows: int) -> int:
        """How many rows to add to a pass."""
        return -rows % _EVEN_ROWS[rows >= _LARGE_ROWS] if self.packed and rows >= _EVEN_ROWS[0] else 0

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Run the layers."""
        # Weights that were changed in place without being loaded must not leave old copies behind.
        if not self._layers or any(weight._version != version for weight, version in self.packed):
            self.rebind()
        body = self._model.get_decoder()
        length = len(ids_T)
        padding = self._row_padding(length)
        ids_T, positions_T = pad(ids_T, (0, padding)), pad(positions_T, (0, padding))
        states = body.embed_tokens(ids_T)
        cos, sin = self._rotary(body, positions_T, states)
        for index, layer in enumerate(self._layers):
            x = layer.before(states)
            heads = (len(x), -1, layer.width)
            q, k, v = layer.q(x).view(heads), layer.k(x).view(heads), layer.v(x).view(heads)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            store.write(index, _rotate(k, cos, sin)[:length], v[:length])
            mixed = store.attend(index, _rotate(q, cos, sin)[:length], layer.scaling)
            states = states + layer.o(pad(mixed.flatten(1), (0, 0, 0, padding)))
            x = layer.between(states)
            states = states + layer.down(layer.act(layer.gate(x)) * layer.up(x))
        return _norm(body.norm)(states[:length])

    def _rotary(self, body: Any, positions_T: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each token, [T, 1, width], from a table of all positions."""
        if self._angles is None or self._angles[0].device != states.device or self._angles[0].dtype != states.dtype:
            everywhere = torch.arange(self._max_context, device=states.device)
            cos, sin = body.rotary_emb(states, everywhere[None])
            half = sin.shape[-1] // 2
            # The sign of the rotation's first half is put into the table.
            self._angles = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        cos, sin = self._angles
        return cos[positions_T, None], sin[positions_T, None]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer computes with."""

    before: _Map
    q: _Map
    k: _Map
    v: _Map
    q_norm: _Map | None
    k_norm: _Map | None
    o: _Map
    between: _Map
    gate: _Map
    up: _Map
    down: _Map
    act: _Map
    width: int
    scaling: float

    @classmethod
    def of(cls, layer: Any, project: Callable[[Any], _Map]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            before=_norm(layer.input_layernorm),
            q=project(attention.q_proj),
            k=project(attention.k_proj),
            v=project(attention.v_proj),
            q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            o=project(attention.o_proj),
            between=_norm(layer.post_attention_layernorm),
            gate=project(mlp.gate_proj),
            up=project(mlp.up_proj),
            down=project(mlp.down_proj),
            act=mlp.act_fn,
            width=attention.head_dim,
            scaling=attention.scaling,
        )


def _projection(module: Any) -> _Map:
    if type(module) is not torch.nn.Linear:
        return cast("_Map", module)
    weight, bias = module.weight, module.bias
    return lambda x: linear(x, weight, bias)


def _norm(module: Any) -> _Map:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: rms_norm(x, x.shape[-1:], weight, epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
