"""A model's forward pass over ragged tokens: through its own modules, or, for the common family, written out.

The invariant: both give what the model's own ``forward`` gives for each request alone, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import linear, pad, rms_norm

from agents.engines.kv_cache import Store

_ATTENTION = "atod_ragged"
"""Name under which the store's attention is registered with transformers."""
_FAMILY = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Dense decoders of one shape: RMS norms before attention and a gated MLP, rotary positions, nothing else."""
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose angles depend on the position alone."""

_PACK_BYTES = 2 << 30
"""Models up to this size have their matrices packed, which is one more copy of them."""
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_PACK_ELEMENTS = 1 << 16
"""Smaller matrices are faster as they are."""
_PACK_ROWS = 32
"""Rows of a typical step, for which the packing is chosen; it serves any number."""
_EVEN_ROWS = (8, 64)
"""Passes are filled up to a multiple of the first number of rows, large ones of the second: oneDNN makes and keeps a kernel for each
number of rows that it meets (half a millisecond and half a MiB each)."""
_LARGE_ROWS = 512

_Map = Callable[[torch.Tensor], torch.Tensor]


class Decoder(Protocol):
    """Ids and positions of a pass's tokens, both [T], and the store that was prepared for it -> states [T, D]."""

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Compute the tokens."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The output layer."""

    def rebind(self) -> None:
        """Look the model's modules up again."""


def make_decoder(model: Any, max_context: int) -> Decoder:
    """The fastest decoder that fits the model.

    Args:
        model: a causal language model with full attention, perhaps wrapped by peft.
        max_context: most positions of a request.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).__name__ in _FAMILY and _rotary_type(base) in _STATIC_ROTARY:
        return FamilyDecoder(base, max_context)
    return ModuleDecoder(base)


def _rotary_type(model: Any) -> str:
    return str((getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default"))


class ModuleDecoder:
    """Any decoder that lets its attention be chosen: its own modules, with the store's attention put in."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        self._model = model

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own output layer."""
        logits: torch.Tensor = self._model.get_output_embeddings()(states)
        return logits

    def rebind(self) -> None:
        """Nothing was remembered."""

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Run the modules on one row that holds all tokens."""
        decoder = self._model.get_decoder()
        with _chosen_attention(decoder.config):
            output = decoder(
                input_ids=ids_T[None],
                position_ids=positions_T[None],
                past_key_values=store,
                use_cache=True,
                atod_store=store,
            )
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
        raise NotImplementedError(
            f"{type(module).__name__} uses {what}, which this engine does not run; use --engine vllm"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return atod_store.attend(module.layer_idx, query[0].transpose(0, 1), scale)[None], None


class FamilyDecoder:
    """Qwen2, Qwen3, Llama and Mistral, written out.

    For small models and few tokens most of a forward pass is the bookkeeping of modules and of unfused norms; written out it
    takes a fraction. Projections that are more than a matrix (adapters) are called as the modules they are.
    """

    def __init__(self, model: Any, max_context: int) -> None:
        self._model = model
        self._max_context = max_context
        self._layers: list[_Layer] = []
        self._head: _Map | None = None
        self._packed: list[tuple[torch.Tensor, int]] = []
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def rebind(self) -> None:
        """Look the modules up again; they may have been wrapped or moved, and packed matrices are copies."""
        size = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self._packed = []
        project = self._pack if size <= _PACK_BYTES else _projection
        self._layers = [_Layer.of(layer, project) for layer in self._model.get_decoder().layers]
        self._head = project(self._model.get_output_embeddings())
        self._angles = None

    def _pack(self, module: Any) -> _Map:
        """A projection whose matrix is laid out for the processor's small products."""
        weight: Any = getattr(module, "weight", None)
        fits = type(module) is torch.nn.Linear and weight is not None and weight.numel() >= _PACK_ELEMENTS
        if not fits or weight.device.type != "cpu" or weight.dtype != torch.float32 or not _ONEDNN:
            return _projection(module)
        operations, bias = torch.ops.mkldnn, module.bias
        packed = operations._reorder_linear_weight(weight.detach(), _PACK_ROWS)
        self._packed.append((weight, weight._version))
        return lambda x: cast("torch.Tensor", operations._linear_pointwise(x, packed, bias, "none", [], ""))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The output layer."""
        if self._head is None:
            self.rebind()
        return cast("_Map", self._head)(pad(states, (0, 0, 0, self._filling(len(states)))))[: len(states)]

    def _filling(self, rows: int) -> int:
        """How many rows to add to a pass."""
        return -rows % _EVEN_ROWS[rows >= _LARGE_ROWS] if self._packed and rows >= _EVEN_ROWS[0] else 0

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Run the layers."""
        # Weights that were changed in place without being loaded must not leave old copies behind.
        if not self._layers or any(weight._version != version for weight, version in self._packed):
            self.rebind()
        body = self._model.get_decoder()
        length = len(ids_T)
        filling = self._filling(length)
        ids_T, positions_T = pad(ids_T, (0, filling)), pad(positions_T, (0, filling))
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
            states = states + layer.o(pad(mixed.flatten(1), (0, 0, 0, filling)))
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
