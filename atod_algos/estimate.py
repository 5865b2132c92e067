"""What a run will need, before it runs: memory by part, and tokens a step. No GPU, no weights and no download are needed.

Architectures come from a folder's ``config.json`` or, for the models of the presets, from the table below; the number of weights is that of
the model built without memory (torch's meta device), so it is exact. The invariant: every number is an upper bound or says that it is one
of rounding; lengths are taken at their limits, because nobody knows yet how long the answers will be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from atod_algos.config import TrainConfig
from atod_algos.presets import TRAINED, WORLDS
from atod_algos.scoring import CHUNK_LOGITS
from atod_envs.errors import AtodError

if TYPE_CHECKING:
    from atod_algos.algorithm import Algorithm, Supported

_BYTES = 4
"""Bytes of a number: weights, gradients, states and keys are float32."""
_HEAD_COPIES = 5
"""Logits, log-probs, probabilities, their product and its gradient, of one chunk."""

_DENSE: Mapping[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Qwen/Qwen3-0.6B": {
            **_DENSE,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
        "Qwen/Qwen3-1.7B": {
            **_DENSE,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
        "Qwen/Qwen3-4B": {
            **_DENSE,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
        "Qwen/Qwen3-30B-A3B": {
            **_DENSE,
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "tie_word_embeddings": False,
        },
    }
)
"""Hub id -> its config.json, as far as it decides about sizes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a language model that decide about memory.

    Attributes:
        parameters: number of weights, tied ones counted once.
        layers: decoder layers.
        width: hidden size.
        queries: width of all query heads.
        keys: width of all key heads (the values' are as wide).
        mlp: inner width of the feed-forward part; of the active experts where there are several.
        vocabulary: rows of the output head.
    """

    parameters: int
    layers: int
    width: int
    queries: int
    keys: int
    mlp: int
    vocabulary: int


def shape_of(name: str, world: str, role: str) -> Shape | None:
    """The shape of a model, by the name that a run gives it.

    Args:
        name: a folder, ``"builtin"``, or a hub id of the presets' models.
        world: the environment's key, for ``"builtin"``.
        role: ``"student"`` or ``"teacher"``, for ``"builtin"``.

    Returns:
        ``None`` where the architecture is not known on this machine.
    """
    from transformers import AutoConfig

    from agents.models import REFERENCE

    name = name.removesuffix(TRAINED)
    folder = REFERENCE / world / role if name == "builtin" else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _shape(AutoConfig.from_pretrained(folder))
    if name in ARCHITECTURES:
        values = dict(ARCHITECTURES[name])
        return _shape(AutoConfig.for_model(values.pop("model_type"), **values))
    return None


def _shape(config: Any) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    mlp = config.intermediate_size
    if getattr(config, "num_experts", 0):
        mlp = config.moe_intermediate_size * config.num_experts_per_tok
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        mlp=mlp,
        vocabulary=config.vocab_size,
    )


def activation_bytes(shape: Shape, tokens: int) -> int:
    """What the decoder keeps of a micro-batch for the backward pass.

    A layer of the usual kind (two norms, gated feed-forward, normalised queries and keys) keeps of each token: input, normalised and scaled
    input of both norms (6 widths); queries before, inside and after their norm, attention's output as it comes and as it goes on
    (5 query widths); keys three times and values once; the four arrays of the feed-forward part. The last norm adds 3 widths.
    """
    layer = 6 * shape.width + 5 * shape.queries + 4 * shape.keys + 4 * shape.mlp
    return _BYTES * tokens * (shape.layers * layer + 3 * shape.width)


def head_bytes(shape: Shape, tokens: int) -> int:
    """What the output head has alive at once: chunks are recomputed in the backward pass, so it is bounded."""
    return _BYTES * _HEAD_COPIES * min(tokens * shape.vocabulary, max(CHUNK_LOGITS, shape.vocabulary))


def cache_bytes(shape: Shape, slots: int, positions: int) -> int:
    """Keys and values of all of an engine's slots, all of them full."""
    return _BYTES * 2 * shape.layers * shape.keys * slots * positions


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the memory: what it is, its bytes (``None``: not known), and how it was worked out."""

    name: str
    size: int | None
    how: str


def memory(config: TrainConfig, algorithm: Algorithm) -> list[Part]:
    """Memory of a run by part, with resolved settings. All parts may be there at the same time."""
    world = _key(config.env)
    student = shape_of(config.student, world, "student")
    parts: list[Part] = []

    def add(name: str, shape: Shape | None, size: Any, how: str) -> None:
        parts.append(Part(name, None if shape is None else int(size(shape)), how))

    add("student: weights", student, lambda s: _BYTES * s.parameters, _count(student))
    add("student: gradients", student, lambda s: _BYTES * s.parameters, "as many")
    add("student: AdamW", student, lambda s: 2 * _BYTES * s.parameters, "two moments of each weight")
    for role, wanted, name in (
        ("teacher", "teacher", config.teacher),
        ("student", "reference", config.student),
        ("student", "base", config.base or config.student),
    ):
        if wanted in algorithm.scores:
            shape = shape_of(name, world, role)
            add(f"{wanted}: weights", shape, lambda s: _BYTES * s.parameters, _count(shape))
    budget = max(config.token_budget, _set(config.max_context, "max_context"))
    add(
        "update: activations",
        student,
        lambda s: activation_bytes(s, budget),
        f"{budget:,} tokens of a micro-batch (--token-budget, at least a row)",
    )
    add("update: output head", student, lambda s: head_bytes(s, budget), f"chunks of {CHUNK_LOGITS:,} logits")
    slots, context = config.slots, _set(config.max_context, "max_context")
    add(
        "engine: keys, values",
        student,
        lambda s: cache_bytes(s, slots, context),
        f"{slots} slots (--slots) of {context:,} tokens (--max-context)",
    )
    if "support" in algorithm.scores:
        size = cast("Supported", algorithm).support
        sampled = tokens(config, algorithm)["sampled tokens, at most"]
        width = 8 * size
        parts.append(
            Part("teacher's likeliest", None if sampled is None else sampled * width, f"{size} a sampled token")
        )
    return parts


def tokens(config: TrainConfig, algorithm: Algorithm) -> dict[str, int | None]:
    """Sizes of one training step, with resolved settings; lengths at their limits, ``None`` where a limit is not known."""
    limits = algorithm.limits(_set(config.steps, "steps"))
    own = WORLDS[config.env].settings["max_turns"] if config.env in WORLDS else None
    given = [turns for turns in (config.max_turns or own, limits.max_turns) if turns]
    turns = min(given) if given else None
    context, response = _set(config.max_context, "max_context"), _set(config.max_response, "max_response")
    episodes = _set(config.tasks_per_step, "tasks_per_step") * config.group_size
    one_row_a_turn = config.style == "atod"
    rows = (None if turns is None else episodes * turns) if one_row_a_turn else episodes
    return {
        "episodes": episodes,
        "episodes played, at most": episodes * max(1, limits.rounds),
        "turns of an episode, at most": turns,
        "prompt tokens of a turn, at most": context - response,
        "response tokens of a turn, at most": response,
        "training rows, at most": rows,
        "sampled tokens, at most": None
        if turns is None
        else episodes * (turns * response if one_row_a_turn else min(turns * response, context)),
        "tokens in rows, at most": None if rows is None else rows * context,
        "trajectories of an update": -(-episodes // config.minibatches),
    }


def report(config: TrainConfig, algorithm: Algorithm) -> str:
    """The estimate as text, with resolved settings."""
    parts = memory(config, algorithm)
    known = [part.size for part in parts if part.size is not None]
    open_ = sorted({part.name.partition(":")[0] for part in parts if part.size is None})
    total = "" if not open_ else f"   without {', '.join(open_)}: architecture not known here, give a folder"
    lines = ["memory, in float32, at most:"]
    lines += [f"  {part.name:<24}{_size(part.size):>12}   {part.how}" for part in parts]
    lines += [f"  {'all together':<24}{_size(sum(known)):>12}{total}", "", "one step:"]
    lines += [
        f"  {name:<36}{'not known' if number is None else f'{number:,}':>14}"
        for name, number in tokens(config, algorithm).items()
    ]
    return "\n".join(lines)


def _key(env: str) -> str:
    return env.rpartition("/")[2].partition("-")[0].lower()


def _count(shape: Shape | None) -> str:
    return "architecture not known" if shape is None else f"{shape.parameters:,} numbers"


def _size(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"


def _set(value: int | None, name: str) -> int:
    if value is None:
        raise AtodError(f"--{name.replace('_', '-')} is not set; pass the settings through atod_algos.config.resolve")
    return value
