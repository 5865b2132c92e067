"""Rebuild the small models that come with the project: ``make models``, or this file with names of worlds.

For each world (``alfworld``, ``searchqa``, ``webshop``), and for one student of all three (``all``, and its teachers
``all/alfworld`` and so on); all by default:

    tokenizer   its tokens are the world's things, or the parts of its names, and its stock phrases
    student     a small Qwen3, stopped early in imitating the scripted expert: it speaks the language and often fails
    teacher     a Qwen3 of the same size that imitates longer, mostly from its own states; the teacher of a student of
                one world is then trained by GRPO

One thread and fixed seeds: on the same machine the same version of the code gives the same bits. ALFWorld's two took
12 minutes on a busy core, WebShop's 109 CPU-seconds, Search-QA's five minutes, the four of all about twenty.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from reference_recipes import RECIPES, Recipe
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.chat import ChatFormat
from agents.models import REFERENCE
from atod_algos.grpo import GRPO
from atod_algos.training.checkpoint import latest_checkpoint
from atod_algos.training.cli import train
from atod_algos.training.config import TrainConfig, builtin_profile, resolve
from atod_algos.training.imitation import imitate
from atod_algos.training.presets import override

FILES = ("config.json", "model.safetensors")
"""What a shipped model consists of, besides its tokenizer."""


def new_model(tokenizer: Any, size: Mapping[str, int], seed: int, *, copying: bool = False) -> Any:
    """A Qwen3 with random weights, drawn wider than the library's default, which learns slowly at this size.

    Args:
        tokenizer: sets the vocabulary.
        size: sets the shape.
        seed: of the weights.
        copying: begin with heads that copy; see ``teach_copying``.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        # Published Qwen3 models have this base: half of a head then still compares like with like 200 tokens apart.
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} if copying else {}),
        **size,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.05 if "embed" in name else size["hidden_size"] ** -0.5)
        if copying:
            teach_copying(model)
    return model


def teach_copying(model: Any) -> None:
    """Put the circuit that continues a name (an induction head) into the first two layers.

    A model learns this circuit by itself, from far more text than the little that is needed for the rest. One head of
    the first layer looks at the token before; two of the second look for a place where the token before is the present
    one, and say what stands there. It holds for any token, seen or not, and training may change all of it.
    """
    config = model.config
    width, dim = config.hidden_size, config.head_dim
    half, fast = dim // 2, 5
    # Three subspaces besides dimension 0: what a token is (twice), and what the token before it is.
    basis = torch.zeros(width, width - 1)
    basis[1:] = torch.linalg.qr(torch.randn(width - 1, width - 1))[0]
    own, before, rest = basis[:, :dim], basis[:, dim : 2 * dim], basis[:, 2 * dim :]
    model.model.embed_tokens.weight.normal_(0, 0.2)
    model.model.embed_tokens.weight[:, 0] = (
        1.0  # a constant to build fixed queries from; in the output it favours no token
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.o_proj.weight.copy_(0.1 * attention.v_proj.weight.T)
        layer.mlp.down_proj.weight.mul_(0.1)

    first = model.model.layers[0].self_attn
    angles = 1e6 ** (-torch.arange(half) / half)
    strength = torch.zeros(half)
    strength[:fast] = torch.tensor([0.45, 0.2, 0.15, 0.1, 0.1]).sqrt()
    first.k_proj.weight[:dim] = 0.0
    first.k_proj.weight[:half, 0] = strength
    first.q_proj.weight[:dim] = 0.0
    # The query is the key turned one step back.
    first.q_proj.weight[:half, 0] = strength * torch.cos(angles)
    first.q_proj.weight[half:dim, 0] = -strength * torch.sin(angles)
    first.q_norm.weight[:fast] = first.q_norm.weight[half : half + fast] = 3.0
    first.v_proj.weight[:dim] = own.T
    first.o_proj.weight[:, :dim] = before

    second = model.model.layers[1].self_attn
    slow = torch.cat([torch.arange(fast, half), torch.arange(half + fast, dim)])  # what the distance hardly turns
    for head, said in enumerate((own, rest[:, :dim])):
        rows = slice(head * dim, (head + 1) * dim)
        second.q_proj.weight[rows] = 0.0
        second.k_proj.weight[rows] = 0.0
        second.q_proj.weight[rows][slow] = own.T[slow]
        second.k_proj.weight[rows][slow] = before.T[slow]
        second.v_proj.weight[rows] = 0.0
        second.v_proj.weight[rows][: said.shape[1]] = said.T
        second.o_proj.weight[:, rows] = 3 * second.v_proj.weight[rows].T
    second.q_norm.weight.fill_(2.0)


def imitator(recipe: Recipe, role: str, tokenizer: Any, out: Path) -> None:
    """Make a model imitate the expert, and save it."""
    profile, stretches = builtin_profile(recipe.env), recipe.imitation[role]
    model = new_model(tokenizer, recipe.shapes[role], stretches[0].seed, copying=recipe.copying)
    started, done = time.monotonic(), 0

    def after(_: int, loss: float) -> None:
        nonlocal done
        done += 1
        print(f"{out}: round {done}, loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)

    for options in stretches:
        imitate(
            model,
            ChatFormat(tokenizer),
            lambda: recipe.world(done),
            options,
            style=profile["style"],
            max_tokens=recipe.max_response or profile["max_response"],
            max_context=profile["max_context"],
            on_round=after,
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def reinforce(recipe: Recipe, role: str, folder: Path) -> Path:
    """Train an imitator by GRPO, in the built-in world; return the folder of the last step's weights."""
    run = folder.with_name(f"{role}-grpo")
    shutil.rmtree(run, ignore_errors=True)
    config = resolve(
        TrainConfig(
            env=recipe.env,
            data="builtin",
            student=str(folder),
            run=str(run),
            store="nothing",
            old_logprobs="sampler",
            **{**builtin_profile(recipe.env), **recipe.reward[role]},
        )
    )
    train(config, override(GRPO(), {"objective": {"clip_high": 0.28}}), "paper")
    weights = latest_checkpoint(run / "checkpoints")
    assert weights is not None, "a finished run keeps its last step"
    return weights


def make(key: str, out: Path) -> None:
    """Build the models of one world into a scratch folder, then put them in place."""
    recipe, scratch = RECIPES[key], Path("runs/reference-models") / key
    tokenizer = recipe.words().tokenizer()
    made = {role: scratch / role for role in recipe.imitation}
    for role, folder in made.items():
        imitator(recipe, role, tokenizer, folder)
        if role in recipe.reward:
            made[role] = reinforce(recipe, role, folder)
    for role, folder in made.items():
        target = out / key / role
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        tokenizer.save_pretrained(target)
        print(f"wrote {target}")


def main() -> None:
    """Build what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=REFERENCE, help="folder of the models; default: where they are loaded from"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(options.worlds) - set(RECIPES):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; expected some of {', '.join(RECIPES)}")
    for key in options.worlds or RECIPES:
        make(key, options.out)


if __name__ == "__main__":
    main()
