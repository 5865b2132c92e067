"""What a run will need, before it runs: memory by part, and tokens a step. It loads and downloads nothing.

Architectures come from a folder's ``config.json`` or, for the models of the presets, from the table below; the number
of weights is that of the model built without memory (torch's meta device), so it is exact. The invariant: every number
is an upper bound up to rounding, because lengths are taken at their limits: how long the answers will be is not known
yet. What the learner itself predicts at work (``atod_algos.learner.memory``) knows the model and the answers, and is
closer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from atod_algos.learner.distribution import WHOLE
from atod_algos.learner.logprobs import CHUNK_LOGITS
from atod_algos.teachers.remote import is_address
from atod_algos.teachers.routing import scoring_models
from atod_algos.training.config import RunConfig
from atod_algos.training.presets import TRAINED, WORLDS

if TYPE_CHECKING:
    from atod_algos.algorithm import Algorithm

_FLOAT = 4
"""Bytes of a number in float32."""
_HEAD_COPIES = 5
"""Logits, log-probs, probabilities, their elementwise product and its gradient, of one chunk."""


def _qwen3(layers: int, width: int, inner: int, heads: int, **further: Any) -> Mapping[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, **further,
    }  # fmt: skip


_EXPERTS: Mapping[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16),
        "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16),
        "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32),
        "Qwen/Qwen3-30B-A3B": _qwen3(
            48, 2048, 6144, 32, model_type="qwen3_moe", num_key_value_heads=4, tie_word_embeddings=False, **_EXPERTS
        ),
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

    from agents.gguf import converted, gguf_file
    from agents.models import REFERENCE

    name = name.removesuffix(TRAINED)
    packed = gguf_file(name)
    folder = REFERENCE / world / role if name == "builtin" else converted(packed) if packed else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _shape(AutoConfig.from_pretrained(folder).get_text_config(decoder=True))
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


def activation_bytes(shape: Shape, tokens: int, number: int) -> int:
    """What the decoder keeps of a micro-batch for the backward pass.

    A layer of the usual kind (two norms, gated feed-forward, normalised queries and keys) keeps of each token: the
    input of a norm, which is worked out in float32, the normalised input and the scaled one; queries before, inside and
    after their norm, and what attention gives, as it comes and as it goes on; keys three times and values once; the
    four arrays of the feed-forward part.

    Args:
        shape: of the model.
        tokens: of the micro-batch.
        number: bytes of the type that computes.
    """
    norm = (_FLOAT + 2 * number) * shape.width
    queries = (_FLOAT + 4 * number) * shape.queries
    keys_values = (_FLOAT + 3 * number) * shape.keys
    layer = 2 * norm + queries + keys_values + 4 * number * shape.mlp
    return tokens * (shape.layers * layer + norm)


def recomputed_bytes(shape: Shape, tokens: int, number: int) -> int:
    """The same where layers are recomputed: every layer's input, and the inside of one."""
    inputs = shape.layers * number * shape.width
    return tokens * inputs + activation_bytes(shape, tokens, number) // shape.layers


def head_bytes(shape: Shape, tokens: int, number: int = 0) -> int:
    """What the output head has alive at once: chunks are recomputed in the backward pass, so it is bounded.

    Args:
        shape: of the model.
        tokens: of the micro-batch.
        number: bytes of the head's type where it learns: a chunk's share is added to its gradient.
    """
    logits = min(tokens * shape.vocabulary, max(CHUNK_LOGITS, shape.vocabulary))
    return _FLOAT * _HEAD_COPIES * logits + number * shape.vocabulary * shape.width


def cache_bytes(shape: Shape, slots: int, positions: int, number: int) -> int:
    """Keys and values of all of an engine's slots, all of them full."""
    return number * 2 * shape.layers * shape.keys * slots * positions


def adapter_weights(shape: Shape, rank: int) -> int:
    """Weights of adapters on every linear layer but the output head."""
    ends = 2 * (shape.width + shape.queries) + 2 * (shape.width + shape.keys) + 3 * (shape.width + shape.mlp)
    return rank * shape.layers * ends


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the memory.

    Attributes:
        name: what it is.
        size: its bytes; ``None`` where they are not known.
        how: how they were worked out.
        phase: when it is there: ``always``, in the ``update``, in the ``scoring``, or in the ``computer``'s memory,
            apart from a GPU's.
    """

    name: str
    size: int | None
    how: str
    phase: str = "always"


def number_bytes(config: RunConfig) -> int:
    """Bytes of the type that computes. Where it is left to the device, real checkpoints are taken to run on a GPU."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and _on_gpu(config))
    return 2 if half else _FLOAT


def _on_gpu(config: RunConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and config.student != "builtin")


def memory(config: RunConfig, algorithm: Algorithm) -> list[Part]:
    """Memory of a run by part, with resolved settings."""
    world, number = config.models, number_bytes(config)
    student = shape_of(config.student, world, "student")
    parts: list[Part] = []

    def add(name: str, shape: Shape | None, size: Any, how: str, phase: str = "always") -> None:
        parts.append(Part(name, None if shape is None else int(size(shape)), how, phase))

    def learned(shape: Shape) -> int:
        return adapter_weights(shape, config.lora_rank) if config.lora_rank else shape.parameters

    moment = 1 if config.optimizer == "adamw8bit" else _FLOAT
    add("student: weights", student, lambda s: number * s.parameters, _count(student))
    if config.lora_rank:
        add("student: adapters", student, lambda s: _FLOAT * learned(s), f"rank {config.lora_rank}")
    elif number != _FLOAT:
        add("student: master weights", student, lambda s: _FLOAT * s.parameters, "float32, which the updates move")
    add("student: AdamW", student, lambda s: 2 * moment * learned(s), "two moments of each weight that learns")
    if config.lora_rank or config.staleness:
        how = "those of earlier steps" if config.staleness else "weights and adapters added up"
        add("engine: weights", student, lambda s: number * s.parameters, how)
    kept_on_cpu = "computer" if _on_gpu(config) else "always"
    if versions := config.staleness + bool(config.staleness):
        how = f"of {versions} steps (--staleness)"
        add("student: kept weights", student, lambda s: versions * number * s.parameters, how, kept_on_cpu)
    slots, context = config.engine_slots, max(world.max_context for world in config.worlds)
    how = f"{slots} slots (--slots) of {context:,} tokens (--max-context)"
    add("engine: keys, values", student, lambda s: cache_bytes(s, slots, context, number), how)

    budget = max(config.token_budget, context)
    kept = recomputed_bytes if config.gradient_checkpointing else activation_bytes
    add("update: gradient", student, lambda s: _FLOAT * learned(s), "float32", "update")
    how = f"{budget:,} tokens at once (--token-budget)"
    add("update: activations", student, lambda s: kept(s, budget, number), how, "update")
    how, share = f"chunks of {CHUNK_LOGITS:,} logits", 0 if config.lora_rank else number
    if share:
        how += ", one's share of the gradient"
    add("update: output head", student, lambda s: head_bytes(s, budget, share), how, "update")

    phase = "scoring" if _on_gpu(config) else "always"
    for name, model, shape in _scorer_models(config, algorithm):
        add(f"{name}: weights", shape, lambda s: number * s.parameters, f"{model}, {_count(shape)}", phase)
        if phase == "scoring":
            add(f"{name}: offloaded", shape, lambda s: number * s.parameters, "visits the GPU for scoring", "computer")
    return [*parts, *_teacher_tokens(config, algorithm, student, kept_on_cpu)]


def _teacher_tokens(config: RunConfig, algorithm: Algorithm, student: Shape | None, phase: str) -> list[Part]:
    """What is kept of the teacher's distribution in the place of each sampled token."""
    exact = config.gap == "exact" and algorithm.takes_exact_gap
    if not exact and "support" not in algorithm.scores:
        return []
    known = WHOLE + 1 if student is None else student.vocabulary
    whole = exact and known <= WHOLE
    size = known if whole else min(known, config.gap_topk if exact else algorithm.support)
    sampled = tokens(config, algorithm)["sampled tokens, at most"]
    kept = None if sampled is None else (1 if whole else 2) * _FLOAT * size * sampled
    how = f"{'all ' if whole else ''}{size:,} for each sampled token"
    return [Part("teacher's tokens" if whole else "teacher's top-k", kept, how, phase)]


def _scorer_models(config: RunConfig, algorithm: Algorithm) -> list[tuple[str, str, Shape | None]]:
    """The models that are held besides the student, each once: the roles that ask for it, its name, its shape."""
    held: dict[tuple[str, str, str], list[str]] = {}
    for asked_as, name, role, models in scoring_models(config, algorithm):
        if is_address(name):  # a server's model is not in this machine's memory
            continue
        key = (name, role, models) if name == "builtin" else (name, "", "")
        own = name == config.student and role == "student" and config.lora_rank
        if not own:  # with adapters off, the student is its own beginning
            held.setdefault(key, []).append(asked_as)
    return [
        (", ".join(dict.fromkeys(roles)), name, shape_of(name, models, role or "student"))
        for (name, role, models), roles in held.items()
    ]


def peak(parts: Sequence[Part]) -> int:
    """The most that is there at one time, of the known parts: update and scoring take turns, so do scored models."""

    def of(phase: str) -> list[int]:
        return [part.size for part in parts if part.phase == phase and part.size is not None]

    return sum(of("always")) + max(sum(of("update")), max(of("scoring"), default=0))


def tokens(config: RunConfig, algorithm: Algorithm) -> dict[str, int | None]:
    """Sizes of a training step, with resolved settings; lengths at their limits, ``None`` where no limit is known."""
    limits = algorithm.limits(config.steps)
    bounds = [_turns(world, limits.max_turns) for world in config.worlds]
    turns = None if None in bounds else max(bound for bound in bounds if bound)
    context = max(world.max_context for world in config.worlds)
    response = max(world.max_response for world in config.worlds)
    episodes = config.tasks_per_step * config.group_size
    own = any(world.style == "atod" for world in config.worlds)  # the style whose turns stand alone
    one_row_a_turn = own if config.layout == "auto" else config.layout != "trajectory"
    rows = (None if turns is None else episodes * turns) if one_row_a_turn else episodes
    return {
        "episodes": episodes,
        "episodes played, at most": episodes * max(1, limits.rounds),
        "turns of an episode, at most": turns,
        "prompt tokens of a turn, at most": max(world.max_context - world.max_response for world in config.worlds),
        "response tokens of a turn, at most": response,
        "training rows, at most": rows,
        "sampled tokens, at most": None
        if turns is None
        else episodes * (turns * response if one_row_a_turn else min(turns * response, context)),
        "tokens in rows, at most": None if rows is None else rows * context,
        "trajectories of an update": -(-episodes // config.minibatches),
    }


def _turns(config: RunConfig, limit: int | None) -> int | None:
    """The most turns of an environment's episodes; ``None`` where no limit is known."""
    own = WORLDS[config.env].settings["max_turns"] if config.env in WORLDS else None
    return min((bound for bound in (config.max_turns or own, limit) if bound), default=None)


def report(config: RunConfig, algorithm: Algorithm) -> str:
    """The estimate as text, with resolved settings."""
    parts = memory(config, algorithm)
    unknown = sorted({part.name.partition(":")[0] for part in parts if part.size is None})
    place, kind = ("GPU", "bfloat16") if _on_gpu(config) else ("computer", "float32")
    kind = kind if config.dtype == "auto" else config.dtype
    titles = {
        "always": "all the time",
        "update": "while it learns",
        "scoring": "while it is scored, one at a time",
        "computer": "in the computer's memory",
    }
    lines = [f"memory in {kind}, lengths at their limits"]
    for phase, title in titles.items():
        here = [part for part in parts if part.phase == phase]
        lines += [f" {title}"] * bool(here)
        lines += [f"  {part.name:<26}{_size(part.size):>12}   {part.how}" for part in here]
    note = "" if not unknown else f"   without {', '.join(unknown)}: architecture not known here, give a folder"
    lines += [f" {'at most, on the ' + place:<27}{_size(peak(parts)):>12}{note}", "", "one step"]
    lines += [
        f"  {name:<36}{'not known' if number is None else f'{number:,}':>14}"
        for name, number in tokens(config, algorithm).items()
    ]
    return "\n".join(lines)


def _count(shape: Shape | None) -> str:
    return "architecture not known" if shape is None else f"{shape.parameters:,} numbers"


def _size(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
