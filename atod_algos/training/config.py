"""The settings of a training run, and the two profiles that fill in what was not given.

Every default stands once: in ``atod_algos.training.options``, in ``atod_algos.learner.options``, or, where it depends
on the size of the models, in ``BUILTIN`` (the reference models that come with the project; ``BUILTIN_WORLDS`` where
environments differ) or ``PUBLISHED`` (real checkpoints; the values of the released scripts). What a single algorithm
needs with the reference models is in ``presets.BUILTIN_RUNS``. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atod_algos.learner.options import OptimizerOptions
from atod_algos.training.options import (
    ClusterOptions,
    EvaluationOptions,
    LearningOptions,
    ModelOptions,
    RolloutOptions,
    RunOptions,
    StorageOptions,
)
from atod_algos.training.worlds import key_of, number, own_labels, own_options, own_value, read_worlds
from atod_envs.errors import AtodError
from atod_envs.options import put_before


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
    """A run's settings with nothing left open: what :func:`resolve` returns.

    A run of several environments is its first one's settings; :attr:`worlds` has the settings of each, which differ in
    ``PER_WORLD`` alone.
    """

    env: str
    data: str | None
    teacher: str
    steps: int
    style: str
    max_turns: int | None
    max_response: int
    max_context: int
    lr: float
    lr_floor: float
    adam_beta2: float
    gap_clip: float
    eval_temperature: float
    weight: float = 1.0
    """How often the environment is played, compared with the others."""
    label_teachers: tuple[tuple[str, str], ...] = ()
    """Teachers of the tasks that have a label: (label, teacher)."""
    others: tuple[RunConfig, ...] = ()
    """The settings of the further environments."""

    @property
    def worlds(self) -> tuple[RunConfig, ...]:
        """The settings of each environment."""
        return (self, *self.others)

    @property
    def engine_slots(self) -> int:
        """``slots``, or fewer where not even so many episodes are ever played at once: each costs memory."""
        return min(self.slots, max(self.tasks_per_step * self.group_size, self.eval_tasks, self.report_tasks))

    @property
    def name(self) -> str:
        """The environment's name among the run's."""
        return key_of(self.env)

    @property
    def models(self) -> str:
        """Where its built-in models lie among the reference models: the environment's name, or ``all`` of several."""
        return "all" if self.others else self.name

    def models_of(self, world: RunConfig) -> str:
        """Where the built-in teacher of one of the environments lies."""
        return f"{self.models}/{world.name}" if self.others else self.models

    @property
    def title(self) -> str:
        """The environments' ids."""
        return ", ".join(world.env for world in self.worlds)

    def stored(self) -> dict[str, Any]:
        """The settings as a run's folder keeps them, without those of further environments."""
        plain = dataclasses.replace(self, others=())
        return {name: value for name, value in dataclasses.asdict(plain).items() if name not in _OF_SEVERAL}

    def stored_worlds(self) -> dict[str, dict[str, Any]]:
        """What differs between the environments, by name; nothing where there is one, with one teacher."""
        if not self.others and not self.label_teachers:
            return {}
        names = ("env", "weight", "label_teachers", *PER_WORLD)
        return {world.name: {name: getattr(world, name) for name in names} for world in self.worlds}


_OF_SEVERAL = ("weight", "label_teachers", "others")

PER_WORLD = ("data", "option", "teacher", "style", "max_turns", "max_response", "max_context", "gap_clip")
"""Settings that each environment of a run has for itself."""


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
    "atod/WebShop-v0": {"steps": 100, "max_turns": 6, "max_response": 32, "lr": 4e-4},
    "atod/SearchQA-v0": {"steps": 100, "max_turns": 4, "lr": 4e-4, "option": ("topk=1",)},
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
    weights = read_worlds(config.env)
    names = [key_of(env) for env in weights] if _named(config) or len(weights) > 1 else [""]
    worlds = [_resolve_one(config, env, name, names) for env, name in zip(weights, names, strict=True)]
    first = dataclasses.replace(worlds[0], weight=weights[worlds[0].env])
    shared = {field.name: getattr(first, field.name) for field in dataclasses.fields(TrainConfig)}
    others = [
        dataclasses.replace(
            world,
            weight=weights[world.env],
            **{name: value for name, value in shared.items() if name not in ("env", *PER_WORLD)},
        )
        for world in worlds[1:]
    ]
    resolved = dataclasses.replace(first, others=tuple(others))
    for world in resolved.worlds:
        _check(world)
    return resolved


def _named(config: TrainConfig) -> bool:
    """Whether a setting may be for an environment by its name."""
    given = [getattr(config, name) for name in PER_WORLD]
    return any("=" in value if isinstance(value, str) else isinstance(value, tuple) for value in given if value)


def _resolve_one(config: TrainConfig, env: str, name: str, names: Sequence[str]) -> RunConfig:
    """The settings as one environment has them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    values["env"], values["option"] = env, own_options(config.option, name, names)
    for setting in PER_WORLD:
        if setting != "option":
            option = f"--{setting.replace('_', '-')}"
            value = own_value(values[setting], name, names, option)
            kind = float if setting == "gap_clip" else int if setting.startswith("max_") else None
            values[setting] = value if kind is None else number(value, kind, option)
    profile = builtin_profile(env) if config.student == "builtin" else PUBLISHED
    missing = {name: value for name, value in profile.items() if values[name] is None}
    return RunConfig(
        **{
            **values,
            **missing,
            "option": put_before(profile.get("option", ()), values["option"]),
            "teacher": values["teacher"] or ModelOptions.teacher,
            "label_teachers": own_labels(config.teacher, name, names, "--teacher"),
        }
    )


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
    "eval_tasks", "report_tasks",
)  # fmt: skip
_NOT_NEGATIVE = (
    "threads", "lora_rank", "lora_alpha", "warmup_steps", "weight_decay", "lr", "gap_clip", "gap_minibatches", "eval_every",
    "eval_temperature",
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
    if (config.gap_minibatches and config.gap != "exact") or (config.gap_epochs > 1 and not config.gap_minibatches):
        raise AtodError(
            f"--gap-minibatches {config.gap_minibatches}, --gap-epochs {config.gap_epochs} with --gap {config.gap}: updates of the "
            "teacher's term alone need --gap exact, and passes of theirs need --gap-minibatches"
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
