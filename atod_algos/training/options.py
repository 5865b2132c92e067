"""The options of a training run, in the groups that the help shows.

Each field is an option; the text under it is its help, and its default stands nowhere else. What depends on the models
is open here (``None``) and filled in by ``atod_algos.training.config``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agents.chat import CHAT_DATE, ThinkingMode
from atod_algos.learner.options import UpdateOptions
from atod_algos.training.worlds import PerWorld


@dataclass(frozen=True)
class RunOptions:
    """What is trained on, and for how long."""

    env: PerWorld = "atod/ALFWorld-v0"
    """Registered id of the environment, or of several, each with a weight if given: atod/ALFWorld-v0 atod/WebShop-v0=2
    (docs/several_worlds.md)."""
    data: PerWorld | None = None
    """Data folder of the environment; by default its own variable (e.g. $ALFWORLD_DATA), else the built-in world. With
    several, NAME=VALUE says whose: webshop=PATH; so for --style, --max-*, --gap-clip and --teacher."""
    option: tuple[str, ...] = ()
    """Any other arguments of the environment, as key=value: --option dataset=nq,hotpotqa split_style=verl-agent. With a
    split before it, for that split alone: train.dataset=nq:2,hotpotqa:1. Of one environment among several:
    searchqa/topk=3."""
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
    teacher: PerWorld = "builtin"
    """Frozen teacher, for algorithms that ask for one: a folder, a hub id, 'builtin', or a server
    (http://HOST:PORT/v1#MODEL). Several are routed: alfworld=PATH webshop=builtin, alfworld/TASK_TYPE=PATH."""
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
    style: PerWorld | None = None
    """Prompt style: 'atod' (the paper's) or 'compact' (for small models)."""
    layout: Literal["auto", "window", "turns", "trajectory"] = "auto"
    """How episodes become prompts and rows: 'window' (a sliding-window prompt and a row each turn), 'turns' (the whole
    conversation as prompt, a row each turn), 'trajectory' (one row an episode, observations not learned from); 'auto'
    is what the style is made for."""
    max_turns: int | tuple[str, ...] | None = None
    """Turn limit of training and evaluation episodes; by default the environment's own."""
    max_response: int | tuple[str, ...] | None = None
    """Longest response, in tokens."""
    max_context: int | tuple[str, ...] | None = None
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
    gap_clip: float | tuple[str, ...] | None = None
    """Largest gap between the teacher's and the student's log-prob of a token; what is computed from gaps, such as the
    weights of turns, sees the bounded ones. The student's own gap under a privileged text is not bounded. 0 is no limit
    (published)."""
    gap_scale: tuple[str, ...] = ()
    """Factor on the teacher's term of an environment: webshop=0.5; 'equal' gives each environment's gap the same mean
    size, so that no teacher drowns another."""
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
    """Steps between validations on the selection split; 0: at the start alone, and no best checkpoint is kept."""
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
