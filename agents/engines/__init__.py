"""Inference engines: token ids in, token ids and log-probs out, many requests at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atod_envs.errors import UnknownName

if TYPE_CHECKING:
    from agents.engines.base import Engine


def make_engine(name: str, model: Any, *, slots: int, max_context: int, memory: float) -> Engine:
    """Make an engine by name.

    Args:
        name: ``"transformers"`` or ``"vllm"``.
        model: the ``transformers`` model whose weights sample first.
        slots: requests that run at the same time.
        max_context: longest prompt plus response, in tokens.
        memory: share of a GPU's memory, for engines that set it aside.

    Raises:
        AtodError: the engine is not installed, or cannot run the model.
        UnknownName: there is no such engine.
    """
    if name == "transformers":
        from agents.engines.transformers import TransformersEngine

        return TransformersEngine(model, slots=slots, max_context=max_context)
    if name == "vllm":
        from agents.engines.vllm import VllmEngine

        return VllmEngine(model, slots=slots, max_context=max_context, memory=memory)
    raise UnknownName("engine", name, ("transformers", "vllm"))
