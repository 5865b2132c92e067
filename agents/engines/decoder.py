"""A model's forward pass over ragged tokens: through its own modules, or, for the common family, written out.

The invariant: both give what the model's own ``forward`` gives for each request alone, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import rms_norm

from agents.engines.store import Store

_ATTENTION = "atod_ragged"
"""Name under which the store's attention is registered with transformers."""
_FAMILY = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Dense decoders of one shape: RMS norms before attention and a gated MLP, rotary positions, nothing else."""
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose angles depend on the position alone."""

Decoder = Callable[[torch.Tensor, torch.Tensor, Store], torch.Tensor]
"""Ids and positions of the pass's tokens, both [T], and the store that was prepared for it -> states [T, D]."""


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
        what = "soft-capped scores or attention sinks" if atod_store is not None else "attention without keyword options"
        raise NotImplementedError(f"{type(module).__name__} uses {what}, which this engine does not run; use --engine vllm")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return atod_store.attend(module.layer_idx, query[0].transpose(0, 1), scale)[None], None


class FamilyDecoder:
    """Qwen2, Qwen3, Llama and Mistral, written out.

    For small models and few tokens most of a forward pass is the bookkeeping of modules and of unfused norms; written out it
    takes a fraction. The projections are called as modules, so adapters that were put around them take part.
    """

    def __init__(self, model: Any, max_context: int) -> None:
        self._model = model
        self._max_context = max_context
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: Store) -> torch.Tensor:
        """Run the layers."""
        body = self._model.get_decoder()
        states = body.embed_tokens(ids_T)
        cos, sin = self._rotary(body, positions_T, states)
        for index, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            x = _norm(layer.input_layernorm, states)
            heads = (len(x), -1, attention.head_dim)
            q, k = attention.q_proj(x).view(heads), attention.k_proj(x).view(heads)
            if hasattr(attention, "q_norm"):
                q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
            store.write(index, _rotate(k, cos, sin), attention.v_proj(x).view(heads))
            mixed = store.attend(index, _rotate(q, cos, sin), attention.scaling)
            states = states + attention.o_proj(mixed.flatten(1))
            x = _norm(layer.post_attention_layernorm, states)
            states = states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return _norm(body.norm, states)

    def _rotary(
        self, body: Any, positions_T: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each token, [T, 1, width], from a table of all positions."""
        if self._angles is None or self._angles[0].device != states.device or self._angles[0].dtype != states.dtype:
            everywhere = torch.arange(self._max_context, device=states.device)
            cos, sin = body.rotary_emb(states, everywhere[None])
            half = sin.shape[-1] // 2
            # The sign of the rotation's first half is put into the table.
            self._angles = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        cos, sin = self._angles
        return cos[positions_T, None], sin[positions_T, None]


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
