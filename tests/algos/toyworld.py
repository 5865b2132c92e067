"""The toy world under a registered id, and random models for it; shared by the tests of this folder."""

import sys
from pathlib import Path

import gymnasium as gym

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))
from toy import ToyEnv

TOY = "toy/Say-v0"
if TOY not in gym.registry:
    gym.register(TOY, entry_point=ToyEnv, disable_env_checker=True)


def small_model(tokenizer, seed: int, hidden: int = 32):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    return model.eval()


def learner_options(**changes):
    """The learner's settings as a real checkpoint's run has them, with changes."""
    from atod_algos.config import TrainConfig, optimizer_options, resolve

    return optimizer_options(resolve(TrainConfig(student="folder", **changes)))
