"""Rebuild the small models that come with the project: ``make models``, or ``python data/make_reference_models.py [OUT]``.

    tokenizer   from the scripted expert's episodes in the built-in world
    student     a two-layer Qwen3, stopped early in imitating the expert: it speaks the language and seldom succeeds
    teacher     a larger Qwen3 that imitates longer, mostly from states that its own actions led to, and is then improved by GRPO

One thread and fixed seeds: on the same machine the same bits come out. It takes the better part of an hour on one core.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gymnasium as gym
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.chat import ChatFormat
from agents.models import REFERENCE
from agents.reference.tokenizer import train_tokenizer
from atod_algos.cli import train
from atod_algos.config import TrainConfig, builtin_profile, resolve
from atod_algos.grpo import GRPO
from atod_algos.imitation import ImitationOptions, demonstrate, imitate
from atod_envs.alfworld.household import tables

PROFILE = builtin_profile("atod/ALFWorld-v0")
STUDENT = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 288,
}
TEACHER = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 288,
}
STUDENT_IMITATION = ImitationOptions(rounds=10, episodes=256, lr=4e-3, last_beta=0.4, seed=1)
TEACHER_IMITATION = ImitationOptions(rounds=60, episodes=320, lr=4e-3, seed=2)
TEACHER_GRPO_STEPS = 20


def world() -> gym.Env[str, str]:
    """The built-in world's training split."""
    return gym.make("atod/ALFWorld-v0", data="builtin", split="train", max_turns=20)


def make_tokenizer() -> Any:
    """A tokenizer from the expert's episodes, with words for everything a household can hold."""
    bare = train_tokenizer(["a b"], tags=["<think>"])
    tasks = world().unwrapped.tasks  # type: ignore[attr-defined]
    shown = demonstrate(tasks[:600], world, ChatFormat(bare), style="compact", seed=0)
    texts = []
    for trajectory in shown.trajectories:
        texts += [trajectory.task, trajectory.final_observation]
        texts += [text for turn in trajectory.turns for text in (turn.observation, turn.response)]
    return train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>"], extra=household_words())


def household_words() -> list[str]:
    """Names of all receptacle and object classes of the official games, with the blank before them."""
    held = tables().contains
    names = set(held).union(*held.values())
    return sorted(f" {name.lower()}" for name in names)


def new_model(tokenizer: Any, shape: dict[str, int], seed: int) -> Any:
    """A Qwen3 with random weights, drawn wider than the library's default, which learns slowly at this size."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.05 if "embed" in name else shape["hidden_size"] ** -0.5)
    return model


def imitator(tokenizer: Any, shape: dict[str, int], options: ImitationOptions, out: Path) -> None:
    """Make a model imitate the expert, and save it."""
    model = new_model(tokenizer, shape, options.seed)
    started = time.monotonic()
    imitate(
        model,
        ChatFormat(tokenizer),
        world,
        options,
        style="compact",
        max_tokens=PROFILE["max_response"],
        max_context=PROFILE["max_context"],
        on_round=lambda n, loss: print(
            f"{out.name}: round {n}, loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True
        ),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Build everything into a scratch folder, then put it in place."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE / "alfworld"
    scratch = Path("runs/reference-models")
    tokenizer = make_tokenizer()
    imitator(tokenizer, STUDENT, STUDENT_IMITATION, scratch / "student")
    imitator(tokenizer, TEACHER, TEACHER_IMITATION, scratch / "teacher-imitation")
    config = TrainConfig(
        student=str(scratch / "teacher-imitation"),
        data="builtin",
        run=str(scratch / "teacher-grpo"),
        steps=TEACHER_GRPO_STEPS,
        **GRPO_SETTINGS,
    )
    train(resolve(config), GRPO(), "paper")
    shutil.copytree(scratch / "teacher-grpo" / "checkpoints" / "best", scratch / "teacher", dirs_exist_ok=True)
    for role in ("student", "teacher"):
        target = out / role
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ):
            shutil.copy(scratch / role / name, target / name)
        print(f"wrote {target}")


GRPO_SETTINGS = {
    "style": PROFILE["style"],
    "max_turns": PROFILE["max_turns"],
    "max_response": PROFILE["max_response"],
    "max_context": PROFILE["max_context"],
    "eval_temperature": PROFILE["eval_temperature"],
    "eval_every": 5,
    "eval_tasks": 300,
    "lr": 2e-4,
    "lr_floor": 0.1,
    "adam_beta2": PROFILE["adam_beta2"],
    "threads": 1,
}

if __name__ == "__main__":
    main()
