"""The settings of a training run, and the two profiles that fill in what was not given.

Every default stands once: in a group of options here, in ``atod_algos.learner.options``, or, where it depends on the
size of the models, in ``BUILTIN`` (the reference models that come with the project; ``BUILTIN_WORLDS`` where
environments differ) or ``PUBLISHED`` (real checkpoints; the values of the released scripts). What a single algorithm
needs with the reference models is in ``presets.BUILTIN_RUNS``. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agents.chat import CHAT_DATE, ThinkingMode
from atod_algos.learner.options import OptimizerOptions, UpdateOptions
from atod_envs.errors import AtodError
from atod_envs.options import put_before


@dataclass(frozen=True)
class RunOptions:
    """What is trained on, and for how long."""

    env: str = "atod/ALFWorld-v0"
    """Registered id of the environment."""
    data: str | None = None
    """Data folder of the environment; by default its own variable (e.g. $ALFWORLD_DATA), else the built-in world."""
    option: tuple[str, ...] = ()
    """Any other arguments of the environment, as key=value: --option dataset=nq,hotpotqa split_style=verl-agent. With a
    split before it, for that split alone: train.dataset=nq:2,hotpotqa:1."""
    run: str | None = None
    """Run folder; by default runs/<algorithm>-<environment>-seed<seed>. An unfinished run in it is resumed."""
    seed: int = 0
    """Seed of everything: tasks, episodes, sampling, mini-batches."""
    steps: int | None = None
    """Training steps."""


@dataclass(frozen=True)
class ModelOptions:
    """Student and teacher, and how they are held."""

    student: str = "builtin"
    """Model to train: a folder, a hub id, or 'builtin'."""
    teacher: str = "builtin"
    """Frozen teacher, for algorithms that ask for one: a folder, a hub id, 'builtin', or a server
    (http://HOST:PORT/v1#MODEL)."""
    teacher_engine: Literal["transformers", "vllm"] = "transformers"
    """What scores a teacher that is no server; 'vllm' needs the package and --temperature 1."""
    lora_rank: int = 0
    """Rank of low-rank adapters (needs peft); 0 trains all weights."""
    lora_alpha: float = 32.0
    """The adapters' outputs are scaled by this over --lora-rank."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that compute; 'auto' is bfloat16 on a GPU, float32 elsewhere. Updates are made in float32
    either way."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping them: a third more time, a fraction of the memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""
    threads: int = 0
    """CPU threads of the numerical library; 0 means one for models this small on a CPU, else its own choice."""


@dataclass(frozen=True)
class RolloutOptions:
    """How episodes are sampled."""

    tasks_per_step: int = 16
    """Tasks drawn each step."""
    group_size: int = 8
    """Attempts at each task (G)."""
    style: str | None = None
    """Prompt style: 'atod' (the paper's) or 'compact' (for small models)."""
    layout: Literal["auto", "window", "turns", "trajectory"] = "auto"
    """How episodes become prompts and rows: 'window' (a sliding-window prompt and a row each turn), 'turns' (the whole
    conversation as prompt, a row each turn), 'trajectory' (one row an episode, observations not learned from); 'auto'
    is what the style is made for."""
    max_turns: int | None = None
    """Turn limit of training and evaluation episodes; by default the environment's own."""
    max_response: int | None = None
    """Longest response, in tokens."""
    max_context: int | None = None
    """Longest prompt plus response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of training; student, teacher and reference are scored at the same."""
    thinking: ThinkingMode = "off"
    """Thoughts that the chat template knows: 'off' asks for none (prompts ask in their own words); 'on' asks for them
    and drops a turn's when the next begins; 'keep' asks for them and leaves them in the conversation. What the template
    opens counts as said."""
    chat_date: str = CHAT_DATE
    """Date that chat templates are told, so that prompts are the same tomorrow and on every worker."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses; 'vllm' needs the package (docs/engines.md)."""
    engine_memory: float = 0.45
    """Share of a GPU's memory that vLLM may take while it samples."""
    slots: int = 128
    """Requests that the engine runs at the same time."""
    staleness: Literal[0, 1, 2] = 0
    """Steps by which the weights that sample lag behind, so that rollout and learning overlap; 0 is exactly
    on-policy."""


@dataclass(frozen=True)
class LearningOptions(UpdateOptions):
    """The optimizer, and what it is given."""

    lr: float | None = None
    """Learning rate."""
    lr_floor: float | None = None
    """Share of the learning rate that is left at the last step, along a cosine; 1 keeps it constant (published)."""
    adam_beta2: float | None = None
    """AdamW's second decay rate; 0.999 (released code) remembers the first, large gradients for a thousand updates."""
    gap_clip: float | None = None
    """Largest gap between the teacher's and the student's log-prob of a token that is learned from; 0 is no limit
    (published)."""
    gap: Literal["sampled", "exact"] = "sampled"
    """How the teacher is learned from: 'sampled' puts its gap at the sampled token into the advantage (the paper's);
    'exact' makes a loss of the reverse KL over all tokens, or over the teacher's top-k tokens and one bucket for the
    rest where the vocabulary is large."""
    gap_topk: int = 64
    """Tokens of the teacher that --gap exact keeps at each place of a vocabulary above 4,096; smaller ones are kept
    whole."""
    gap_minibatches: int = 0
    """Optimizer updates that --gap exact has for itself in each pass, after the reward's; 0 makes it part of the
    reward's."""
    gap_epochs: int = 1
    """Passes over the step's trajectories in the updates of --gap-minibatches."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """Log-probs before the update: recomputed by the learner, or the engine's own, which saves a pass (where they agree
    to rounding)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Validation during training, and the final evaluation."""

    eval_every: int = 10
    """Steps between validations on the selection split; 0 is never."""
    eval_tasks: int = 128
    """Tasks of the validation panel (all of a smaller split)."""
    eval_temperature: float | None = None
    """Sampling temperature of evaluation; 0 is greedy."""
    report_tasks: int = 256
    """Tasks of the final panel, from a split that no choice was made on (all of a smaller split)."""


@dataclass(frozen=True)
class StorageOptions:
    """What is kept of a run."""

    checkpoint_every: int = 1
    """Steps between checkpoints, so the most that a killed run loses; the last two and the best are kept."""
    store: str = "trajectories"
    """What is stored of the steps: 'trajectories', 'tokens' (trajectories and every sampled token's log-probs under
    student and teacher) or 'nothing'. With /N, of every N-th step alone: trajectories/10."""
    wandb: str | None = None
    """Project to log to in Weights & Biases as well, where it is installed (WANDB_MODE=offline keeps it on this
    machine)."""
    log: tuple[str, ...] = ()
    """Where metrics go as well: wandb, trackio, mlflow, or a writer that another package offers; NAME=PROJECT names the
    project, 'atod' otherwise."""


@dataclass(frozen=True)
class ClusterOptions:
    """Rollout workers on Ray."""

    cluster: str = "none"
    """Where episodes are played: 'ray' has rollout workers do it, on the cluster that $RAY_ADDRESS names or on this
    machine. Each worker takes one CPU core and no GPU, unless said: ray:cpus=2,gpus=0.5."""
    workers: int = 2
    """Rollout workers, each with environments and an engine."""


@dataclass(frozen=True)
class TrainConfig(
    ClusterOptions, StorageOptions, EvaluationOptions, LearningOptions, RolloutOptions, ModelOptions, RunOptions
):
    """What was asked for. Settings whose default is None are filled in by the models' profile (:func:`resolve`)."""


GROUPS: dict[str, type] = {
    "run": RunOptions,
    "models": ModelOptions,
    "rollout": RolloutOptions,
    "optimizer": LearningOptions,
    "evaluation": EvaluationOptions,
    "storage": StorageOptions,
    "cluster": ClusterOptions,
}
"""Groups of the options in the help, in its order; a :class:`TrainConfig` has the fields of all."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig, OptimizerOptions):
    """A run's settings with nothing left open: what :func:`resolve` returns."""

    steps: int
    style: str
    max_response: int
    max_context: int
    lr: float
    lr_floor: float
    adam_beta2: float
    gap_clip: float
    eval_temperature: float


BUILTIN: dict[str, Any] = {
    "style": "compact",
    "max_response": 24,
    "max_context": 1024,
    "eval_temperature": 1.0,
    "gap_clip": 3.0,
    "lr": 1e-3,
    "lr_floor": 0.1,
    "adam_beta2": 0.99,
}
"""Settings for all reference models; see docs/training.md."""

BUILTIN_WORLDS: dict[str, dict[str, Any]] = {
    "atod/ALFWorld-v0": {"steps": 150, "max_turns": 14},
    "atod/WebShop-v0": {"steps": 100, "max_turns": 6, "max_response": 32, "lr": 1.5e-3},
    "atod/SearchQA-v0": {"steps": 150, "max_turns": 4, "lr": 5e-4, "option": ("topk=1",)},
}
"""Registered id -> what the reference models of that environment need as well as, or instead of, ``BUILTIN``. Its
``option`` stands before the options that were given, so that those win."""

PUBLISHED: dict[str, Any] = {
    "steps": 150,
    "style": "atod",
    "max_turns": None,
    "max_response": 512,
    "max_context": 2560,
    "eval_temperature": 0.4,
    "gap_clip": 0.0,
    "lr": 1e-6,
    "lr_floor": 1.0,
    "adam_beta2": 0.999,
}
"""Settings of the released scripts for ALFWorld (max_turns: the environment's own 50)."""


def builtin_profile(env: str) -> dict[str, Any]:
    """Settings for the reference models of an environment, given its registered id."""
    return {"steps": PUBLISHED["steps"]} | BUILTIN | BUILTIN_WORLDS.get(env, {})


def resolve(config: TrainConfig) -> RunConfig:
    """Fill in what was left open from the profile of the student, and refuse what cannot be run.

    Raises:
        AtodError: a setting is out of its range, or two do not go together.
    """
    profile = builtin_profile(config.env) if config.student == "builtin" else PUBLISHED
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    missing = {name: value for name, value in profile.items() if values[name] is None}
    option = put_before(profile.get("option", ()), config.option)
    resolved = RunConfig(**{**values, **missing, "option": option})
    _check(resolved)
    return resolved


def storage_of(config: RunConfig) -> tuple[int, bool]:
    """What ``--store`` says: steps are stored every so often (0: never), and whether with every token's log-probs.

    Raises:
        AtodError: it is not understood.
    """
    what, slash, every = config.store.partition("/")
    if what not in ("nothing", "trajectories", "tokens") or (slash and not (every.isdecimal() and int(every))):
        raise AtodError(
            f"--store {config.store}: expected trajectories, tokens or nothing, or trajectories/10 for every 10th step"
        )
    return (0 if what == "nothing" else int(every or 1)), what == "tokens"


def worker_resources(config: RunConfig) -> tuple[float, float]:
    """CPU cores and GPUs of each rollout worker, as ``--cluster`` says.

    Raises:
        AtodError: it is not understood.
    """
    kind, colon, rest = config.cluster.partition(":")
    found = {"cpus": 1.0, "gpus": 0.0}
    try:
        for pair in rest.split(",") if colon else ():
            name, _, number = pair.partition("=")
            found[name] = float(number)
        known = kind in ("none", "ray") and len(found) == 2 and not (colon and kind == "none")
        if not known or not all(0 <= number < math.inf for number in found.values()):
            raise ValueError
    except ValueError:
        message = f"--cluster {config.cluster}: expected none, ray, or ray:cpus=2,gpus=0.5 for what each worker takes"
        raise AtodError(message) from None
    return found["cpus"], found["gpus"]


_POSITIVE = (
    "tasks_per_step", "group_size", "steps", "max_turns", "max_response", "max_context", "temperature", "slots", "minibatches",
    "epochs", "gap_topk", "gap_epochs", "token_budget", "grad_clip", "checkpoint_every", "workers",
)  # fmt: skip
_NOT_NEGATIVE = (
    "threads", "lora_rank", "lora_alpha", "warmup_steps", "weight_decay", "lr", "gap_clip", "gap_minibatches", "eval_every", "eval_tasks",
    "eval_temperature", "report_tasks",
)  # fmt: skip


def _check(config: RunConfig) -> None:
    """Refuse what cannot be run, before anything is loaded."""

    def inside(names: Sequence[str], expected: str, allowed: Callable[[float], bool]) -> None:
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and allowed(value)):
                raise AtodError(f"--{name.replace('_', '-')} {value}: expected {expected}")

    inside(_POSITIVE, "a number above 0", lambda x: x > 0)
    inside(_NOT_NEGATIVE, "0 or more", lambda x: x >= 0)
    inside(["lr_floor", "engine_memory"], "a share from 0 to 1", lambda x: 0 <= x <= 1)
    inside(["adam_beta2"], "a number from 0 to below 1", lambda x: 0 <= x < 1)
    if config.max_response >= config.max_context:
        raise AtodError(
            f"--max-response {config.max_response} leaves no room for a prompt in --max-context {config.max_context}; "
            "lower the one or raise the other"
        )
    if config.old_logprobs == "sampler" and config.staleness:
        raise AtodError(
            f"--old-logprobs sampler with --staleness {config.staleness}: the weights that sampled are not those that learn; "
            "use --old-logprobs learner"
        )
    if config.teacher_engine == "vllm" and config.temperature != 1.0:
        raise AtodError(
            f"--teacher-engine vllm gives prompt log-probs at temperature 1 only, but --temperature is {config.temperature}; "
            "use --teacher-engine transformers"
        )
    storage_of(config)
    worker_resources(config)
