"""The settings of a training run, and the two profiles that fill in what was not given.

Every default stands once: either here in ``TrainConfig``, or, where it depends on the size of the models, in ``BUILTIN`` (the
reference models that come with the project; ``BUILTIN_WORLDS`` where environments differ) or ``PUBLISHED`` (real checkpoints; the
values of the released scripts).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from atod_envs.errors import AtodError
from atod_envs.options import put_before


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on what, for how long. Settings whose default is None are filled in by the models' profile."""

    env: str = "atod/ALFWorld-v0"
    """Registered id of the environment."""
    data: str | None = None
    """Data folder of the environment; by default its own variable (e.g. $ALFWORLD_DATA), else the built-in world."""
    option: tuple[str, ...] = ()
    """Any other arguments of the environment, as key=value: --option dataset=nq,hotpotqa split_style=verl-agent. With a split before
    it, for that split alone: train.dataset=nq:2,hotpotqa:1."""
    student: str = "builtin"
    """Model to train: a folder, a hub id, or 'builtin'."""
    teacher: str = "builtin"
    """Frozen teacher, for algorithms that ask for one: a folder, a hub id, 'builtin', or a server (http://HOST:PORT/v1#MODEL)."""
    teacher_engine: Literal["transformers", "vllm"] = "transformers"
    """What scores a teacher that is no server; 'vllm' needs the package and --temperature 1."""
    base: str | None = None
    """Third model, for algorithms that ask for one (G-OPD: the teacher before its own training); by default the initial student."""
    run: str | None = None
    """Run folder; by default runs/<algorithm>-<environment>-seed<seed>. An unfinished run in it is resumed."""
    seed: int = 0
    """Seed of everything: tasks, episodes, sampling, mini-batches."""
    steps: int | None = None
    """Training steps."""
    tasks_per_step: int = 16
    """Tasks drawn each step."""
    group_size: int = 8
    """Attempts at each task (G)."""
    style: str | None = None
    """Prompt style: 'atod' (the paper's) or 'compact' (for small models)."""
    max_turns: int | None = None
    """Turn limit of training and evaluation episodes."""
    max_response: int | None = None
    """Longest response, in tokens."""
    max_context: int | None = None
    """Longest prompt plus response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of training; student, teacher and reference are scored at the same."""
    gap_clip: float | None = None
    """Largest gap between the teacher's and the student's log-prob of a token that is learned from; 0 is no limit (published)."""
    eval_temperature: float | None = None
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_every: int = 10
    """Steps between validations on the selection split; 0 is never."""
    eval_tasks: int = 128
    """Tasks of the validation panel (all of a smaller split)."""
    report_tasks: int = 256
    """Tasks of the final panel, from a split that no choice was made on (all of a smaller split)."""
    lr: float | None = None
    """Learning rate."""
    lr_floor: float | None = None
    """Share of the learning rate that is left at the last step, along a cosine; 1 keeps it constant (published)."""
    weight_decay: float = 0.01
    """AdamW's weight decay (released code)."""
    adam_beta2: float | None = None
    """AdamW's second decay rate; 0.999 (released code) remembers the first, large gradients for a thousand updates."""
    grad_clip: float = 1.0
    """Largest gradient norm (released code)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    minibatches: int = 4
    """Optimizer updates a step."""
    token_budget: int = 4096
    """Tokens of a micro-batch; lowered by itself where memory runs out, results do not change."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that compute; 'auto' is bfloat16 on a GPU, float32 elsewhere. Updates are made in float32 either way."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """'adamw8bit' keeps AdamW's moments in eight bits (needs bitsandbytes and a GPU)."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping them: a third more time, a fraction of the memory."""
    lora_rank: int = 0
    """Rank of low-rank adapters (needs peft); 0 trains all weights."""
    lora_alpha: float = 32.0
    """The adapters' products are scaled by this over the rank."""
    staleness: Literal[0, 1, 2] = 0
    """Steps by which the weights that play lag behind, so that playing and learning overlap; 0 is exactly on-policy."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """Log-probs before the update: recomputed by the learner, or the engine's own, which saves a pass (where they agree to rounding)."""
    importance_cap: float = 2.0
    """Largest importance weight of a token played by older weights (with --staleness 1 or 2)."""
    layout: Literal["auto", "window", "turns", "trajectory"] = "auto"
    """How episodes become prompts and rows: 'window' (a retelling and a row each turn), 'turns' (the whole conversation as prompt,
    a row each turn), 'trajectory' (one row an episode, observations not learned from); 'auto' is what the style is made for."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses; 'vllm' needs the package (docs/engines.md)."""
    engine_memory: float = 0.45
    """Share of a GPU's memory that vLLM may take while it samples."""
    slots: int = 128
    """Requests that the engine runs at the same time."""
    checkpoint_every: int = 1
    """Steps between checkpoints, so the most that a killed run loses; the last two and the best are kept."""
    keep_trajectories: int = 1
    """Store the trajectories of every n-th step; 0 stores none."""
    keep_tokens: bool = False
    """Store, with the trajectories, every sampled token's log-probs under student and teacher."""
    wandb: str | None = None
    """Project to log to in Weights & Biases as well, where it is installed (WANDB_MODE=offline keeps it on this machine)."""
    cluster: Literal["none", "ray"] = "none"
    """Where episodes are played: 'ray' has rollout workers do it, on the cluster that $RAY_ADDRESS names or on this machine."""
    workers: int = 2
    """Rollout workers of a cluster, each with environments and an engine."""
    worker_cpus: float = 1.0
    """CPU cores that each worker takes."""
    worker_gpus: float = 0.0
    """GPUs that each worker takes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""
    threads: int = 0
    """CPU threads of the numerical library; 0 means one for models this small on a CPU, else its own choice."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and how a step's data is split. The defaults are those of :class:`TrainConfig`."""

    lr: float
    """Learning rate."""
    lr_floor: float
    """Share of the rate that is left at the last step, along a cosine; 1 keeps it constant."""
    warmup_steps: int
    """Training steps over which the learning rate rises linearly."""
    steps: int
    """Training steps in all, for the cosine."""
    weight_decay: float
    """AdamW's weight decay, on matrices alone."""
    beta2: float
    """AdamW's second decay rate."""
    grad_clip: float
    """Largest gradient norm."""
    optimizer: Literal["adamw", "adamw8bit"]
    """'adamw8bit' keeps the two moments in eight bits (bitsandbytes, on a GPU)."""
    minibatches: int
    """Optimizer updates a step; each takes its share of the step's trajectories."""
    token_budget: int
    """Tokens of a micro-batch."""


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
"""Registered id -> what the reference models of that environment need beside, or instead of, ``BUILTIN``. Its ``option`` stands before
the options that were given, so that those win."""

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


def optimizer_options(config: TrainConfig) -> OptimizerOptions:
    """The learner's part of resolved settings."""
    names = [field.name for field in dataclasses.fields(OptimizerOptions) if field.name != "beta2"]
    return OptimizerOptions(beta2=given(config, "adam_beta2"), **{name: given(config, name) for name in names})


def given(config: TrainConfig, name: str) -> Any:
    """A setting that must have been filled in.

    Raises:
        AtodError: it was not.
    """
    value = getattr(config, name)
    if value is None:
        raise AtodError(
            f"--{name.replace('_', '-')} is not set; pass the settings through atod_algos.training.config.resolve"
        )
    return value


def builtin_profile(env: str) -> dict[str, Any]:
    """Settings for the reference models of an environment, given its registered id."""
    return BUILTIN | BUILTIN_WORLDS.get(env, {})


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what was left open from the profile of the student."""
    profile = builtin_profile(config.env) if config.student == "builtin" else PUBLISHED
    missing = {name: value for name, value in profile.items() if getattr(config, name) is None}
    return dataclasses.replace(config, option=put_before(profile.get("option", ()), config.option), **missing)
