"""Low-rank adapters (LoRA) through peft: few weights learn, the model underneath stays what it was.

The invariant: the model object stays the one that was loaded, with adapters put into its linear layers, so that the
learner, scoring and packing never know. With adapters off it *is* the initial student; no further model is loaded as
reference. Engines know nothing of adapters: they are given the sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from agents.logits import text_config
from atod_envs.errors import AtodError, DataError


def add_adapters(model: Any, *, rank: int, alpha: float, seed: int) -> Any:
    """Put an adapter into every linear layer but the output head and routers; only adapters stay trainable.

    In a mixture of experts the routers stay as they are (an adapter there moves tokens between experts instead of
    teaching them), and so do experts whose matrices stand in one tensor.

    Args:
        model: a ``transformers`` model; changed in place.
        rank: of the adapters.
        alpha: their outputs are scaled by alpha / rank.
        seed: of their initial values.

    Returns:
        peft's wrapper, which saves, loads and switches off the adapters.

    Raises:
        AtodError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise AtodError(
            "--lora-rank needs peft; pip install 'atod[lora]', or train all weights with --lora-rank 0"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=_targets(model)))


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def _targets(model: Any) -> Any:
    """Which layers get an adapter: peft's word for all, or, in a mixture of experts, the names of all but routers."""
    config = text_config(model)
    if not any(isinstance(getattr(config, name, None), int) for name in _EXPERTS):
        return "all-linear"
    head = model.get_output_embeddings()
    routers = tuple(
        name
        for name, part in model.named_modules()
        if re.search("Router|Gating", type(part).__name__) or _ROUTER.search(name)
    )
    chosen = [
        name
        for name, part in model.named_modules()
        if type(part) is torch.nn.Linear
        and part is not head
        and not any(name == router or name.startswith(router + ".") for router in routers)
    ]
    if not chosen:
        raise AtodError(
            f"{type(model).__name__} has no linear layer for an adapter; train all weights with --lora-rank 0"
        )
    return chosen


_ROUTER = re.compile(r"(^|\.)(router|gate|[a-z_]*_gate)$")


def base_model(model: Any) -> Any:
    """The model under peft's wrapper, adapters in its layers; anything else is given back."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapters(wrapper: Any) -> AbstractContextManager[Any]:
    """While open, the model computes what it did before adapters were added."""
    return wrapper.disable_adapter()  # type: ignore[no-any-return]


def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the model that adapters and base make together, under the base model's own names.

    A model without adapters gives its own parameters.
    """
    from_layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            from_layers[name] = module
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            continue
        layer = from_layers.get(name.removesuffix(".base_layer.weight"))
        plain = name.replace(".base_layer.", ".")
        if layer is None:
            yield plain, weight
        else:
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            yield plain, (weight.detach() + delta).to(weight.dtype)


def load_adapters(wrapper: Any, path: Path) -> None:
    """Read adapters saved by the wrapper's ``save_pretrained`` into it.

    Raises:
        DataError: they do not fit.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = set_peft_model_state_dict(wrapper, load_file(path / "adapter_model.safetensors"))
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if found.unexpected_keys or missing:
        raise DataError(f"{path} holds other adapters: {[*found.unexpected_keys, *missing][0]!r} does not fit")
