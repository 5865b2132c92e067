"""Models and batches of the GPU's parts: random Qwen3, SmolLM2 where it was brought, toys in a rehearsal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from gpu_setting import Setting

SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
"""The shape of SmolLM2-135M, for where its weights were not brought."""
TOY = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip


def random_model(name: str, setting: Setting, dtype: torch.dtype, seed: int = 0, device: str | None = None) -> Any:
    """A random model: ``"0.6B"``, ``"1.7B"`` (Qwen3's shapes) or ``"smollm2"``; a toy in their place in a rehearsal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from atod_algos.training.memory_estimate import ARCHITECTURES

    shape = dict(SMOLLM2 if name == "smollm2" else ARCHITECTURES[f"Qwen/Qwen3-{name}"])
    if setting.toy:
        shape = dict(TOY)
    # A wider spread than that of a fresh model, so that distributions differ from place to place.
    config = AutoConfig.for_model(
        shape.pop("model_type"), **{"max_position_embeddings": 4096, "initializer_range": 0.05, **shape}
    )
    torch.manual_seed(seed)
    with torch.device(device or setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def smollm2(setting: Setting) -> str:
    """What ``--student`` says for the real model; the built-in one in a rehearsal, and a note where it was not brought.

    Raises:
        AtodError: the package is not there.
    """
    from agents.gguf import gguf_file

    if setting.toy:
        return "builtin"
    gguf_file("smollm2-135m")
    return "smollm2-135m"


def batch_of(vocabulary: int, groups: int, attempts: int, prompt: int, response: int, seed: int = 0) -> Any:
    """Random episodes of one turn, a prompt for each group, lengths around the given ones."""
    from atod_algos.batch import make_batch
    from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, max(2, n)).tolist())

    made = []
    for g in range(groups):
        shown = ids(int(prompt * rng.uniform(0.6, 1.0)))
        members = []
        for seed_of in range(attempts):
            said = ids(int(response * rng.uniform(0.2, 1.0)))
            turn = Turn(0, "", (), shown, said, (-1.0,) * len(said), "", "", True, True, 0.0)
            members.append(
                Trajectory("e", f"t{g}", "s", "", f"g{g}", seed_of, (turn,), "", False, 0.0, StopReason.FAILURE)
            )
        made.append(Group(f"t{g}", tuple(members)))
    return make_batch(made)


def vocabulary_of(model: Any) -> int:
    """Rows of its output layer."""
    return int(model.get_output_embeddings().weight.shape[0])
