"""``--preset paper-0.6b | paper-1.7b | paper-4b``: the published settings of each model size on each environment.

What is given on the command line wins over the preset, the preset over the models' profile
(``atod_algos.training.config``), the profile over plain defaults. The source of each value is in docs/presets.md. A
preset names models by where their architecture is known; the paper's teachers are such models after GRPO, and they have
no public name, so a run that wants one must be told where it is.

Without a preset, runs of the built-in models take ``BUILTIN_RUNS``: an algorithm's own settings on an environment.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from atod_algos.training.config import RunConfig, TrainConfig
from atod_envs.errors import AtodError, UnknownName

TRAINED = " after GRPO"
"""Ends the name of a teacher that has to be trained first."""


@dataclass(frozen=True, slots=True)
class World:
    """What the published runs set for one environment.

    Attributes:
        settings: fields of ``TrainConfig``.
        invalid_penalty: of the released rules.
        kl_coef: of the released rules, where a run has a KL term.
        turns_every: TCOD's steps until one turn more, of the released rules.
    """

    settings: Mapping[str, Any]
    invalid_penalty: float
    kl_coef: float
    turns_every: int


_EVERYWHERE: Mapping[str, Any] = {
    "steps": 150,
    "group_size": 8,
    "style": "atod",
    "max_response": 512,
    "temperature": 1.0,
    "gap_clip": 0.0,
    "lr": 1e-6,
    "lr_floor": 1.0,
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "grad_clip": 1.0,
    "seed": 0,
}

_BY_TURNS: Mapping[str, Any] = {
    **_EVERYWHERE,
    "tasks_per_step": 16,
    "minibatches": 16,
    "eval_temperature": 0.4,
    "eval_every": 5,
    "eval_tasks": 128,
    "warmup_steps": 0,
}
"""What the two worlds of many turns, ALFWorld and WebShop, share."""

WORLDS: Mapping[str, World] = MappingProxyType(
    {
        "atod/ALFWorld-v0": World(
            {**_BY_TURNS, "max_turns": 50, "max_context": 2048 + 512},
            invalid_penalty=0.1,
            kl_coef=0.01,
            turns_every=3,
        ),
        "atod/WebShop-v0": World(
            {**_BY_TURNS, "max_turns": 15, "max_context": 4096 + 512},
            invalid_penalty=0.1,
            kl_coef=0.01,
            turns_every=6,
        ),
        "atod/SearchQA-v0": World(
            {
                **_EVERYWHERE,
                "tasks_per_step": 128,
                "minibatches": 10,
                "max_turns": 4,
                "max_context": 4096 + 512,
                "eval_temperature": 0.0,
                "eval_every": 15,
                "eval_tasks": 2048,
                "warmup_steps": 15,
            },
            invalid_penalty=0.01,
            kl_coef=0.001,
            turns_every=6,
        ),
    }
)
"""Registered id -> its settings; the published history windows (2, 2, 4 turns) are those of the prompt style 'atod'."""

MODELS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "paper-0.6b": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
        "paper-1.7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B"),
        "paper-4b": ("Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B"),
    }
)
"""Preset -> student, and the model that its teacher was before GRPO."""


_EXACT: Mapping[str, Any] = {"gap": "exact", "lr": 4e-4, "warmup_steps": 5, "staleness": 1}
_ANNEALED: Mapping[str, Any] = {"coef_anneal_steps": 60, "objective": {"clip_high": 0.28}}

BUILTIN_RUNS: Mapping[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]] = MappingProxyType(
    {
        ("atod", "atod/ALFWorld-v0"): ({"steps": 110, **_EXACT}, _ANNEALED),
        ("atod", "atod/WebShop-v0"): (_EXACT, _ANNEALED),
        ("atod", "atod/SearchQA-v0"): (_EXACT, _ANNEALED),
        ("atod", "all"): ({"steps": 100, "tasks_per_step": 24, "minibatches": 12, **_EXACT}, _ANNEALED),
    }
)
"""(Algorithm, registered id or ``all``) -> settings of a run and options of the algorithm, for the built-in models and
data under the paper's rules. Where nothing stands, an algorithm has its own defaults and the profile that all share."""


def override(options: Any, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass with some fields changed; a mapping changes fields of a nested one."""
    changed = {
        name: override(getattr(options, name), value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    return dataclasses.replace(options, **changed)


def builtin_run(algorithm: Any, env: str) -> tuple[TrainConfig, Any]:
    """Defaults of a run of the built-in models and data: settings, and the algorithm with its options.

    Args:
        algorithm: with the paper's rules.
        env: registered id of the environment; ``all`` for the three of the paper; several are separated by blanks.
    """
    settings, options = BUILTIN_RUNS.get((algorithm.name, env), ({}, {}))
    config = TrainConfig(**settings)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        config = dataclasses.replace(config, staleness=0)  # ranks learn from what they have just played
    return config, override(algorithm, options)


def _world(preset: str, env: str) -> World:
    if preset not in MODELS:
        raise UnknownName("preset", preset, MODELS)
    if env not in WORLDS:
        raise AtodError(
            f"preset {preset} has settings for {', '.join(WORLDS)}, not for {env}; give --env, or no --preset"
        )
    return WORLDS[env]


def preset_config(preset: str, env: str) -> TrainConfig:
    """The settings of a preset on an environment; what it leaves open is left to the profile.

    Raises:
        UnknownName: no such preset.
        AtodError: it has no settings for the environment.
    """
    world = _world(preset, env)
    student, teacher = MODELS[preset]
    return TrainConfig(env=env, student=student, teacher=teacher + TRAINED, **world.settings)


def fit_algorithm(algorithm: Any, preset: str, env: str) -> Any:
    """An algorithm whose options differ by model or environment, set as published.

    Only what the rules have switched on is fitted: a penalty, a KL term or a curriculum of the released rules. The
    annealing horizon T holds under any rules.

    Args:
        algorithm: with its rules already applied.
        preset: name of the preset.
        env: registered id of the environment.
    """
    world = _world(preset, env)
    changed: dict[str, Any] = {}
    if hasattr(algorithm, "coef_anneal_steps"):
        changed["coef_anneal_steps"] = 150 if (preset, env) == ("paper-1.7b", "atod/ALFWorld-v0") else 80
    released = algorithm.rules.get("released", {})
    if getattr(algorithm, "kl_coef", 0.0) == released.get("kl_coef", None):
        changed["kl_coef"] = world.kl_coef
    if hasattr(algorithm, "turns_every") and algorithm.turns_every == released.get("turns_every"):
        changed["turns_every"] = world.turns_every
    group = getattr(algorithm, "group", None)
    if group is not None and group.invalid_penalty:
        changed["group"] = dataclasses.replace(group, invalid_penalty=world.invalid_penalty)
    return dataclasses.replace(algorithm, **changed)


def require_teacher(config: RunConfig, wanted: frozenset[str]) -> None:
    """Refuse a run that wants a teacher which is only described.

    Raises:
        AtodError: says how the teacher is made, and how it is given.
    """
    for world in config.worlds if "teacher" in wanted else ():
        if world.teacher.endswith(TRAINED):
            model = world.teacher.removesuffix(TRAINED)
            raise AtodError(
                f"the preset's teacher is {world.teacher}, which does not come with a name; train it (atod train grpo --preset paper-4b "
                f"--student {model} --env {world.env}) or take your own, and give its folder with --teacher"
            )


def refuse_settings(config: RunConfig, algorithm: Any) -> None:
    """Refuse, before anything is loaded, what the algorithm does not use and what several ranks cannot do.

    Raises:
        AtodError: names the setting and what to use instead.
    """
    from atod_algos.algorithm import Algorithm
    from atod_algos.learner import distributed

    if config.gap_minibatches and not algorithm.takes_exact_gap:
        raise AtodError(
            f"--gap-minibatches {config.gap_minibatches}: {algorithm.name} has no divergence from a teacher to learn from under these "
            "options, so it would get none of these updates; leave it out"
        )
    plan = algorithm.limits(1).who
    others = plan is not None and bool({*plan.learned} - {"student"})
    others = others or type(algorithm).branch is not Algorithm.branch
    for setting, asked in (
        ("--old-logprobs sampler", config.old_logprobs == "sampler"),
        (f"--staleness {config.staleness}", config.staleness > 0),
    ):
        if asked and others:
            raise AtodError(
                f"{setting}: {algorithm.name} also learns from turns that no student sampled, and what they were sampled with says "
                "nothing about the student; use --old-logprobs learner and --staleness 0"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and distributed.size() == 1:
        return
    reasons = {
        "--engine vllm": (
            config.engine == "vllm" and config.cluster == "none",
            "every rank's engine would start on the first GPU; use --engine transformers, or --cluster ray, whose workers have GPUs of "
            "their own",
        ),
        "--teacher-engine vllm": (
            config.teacher_engine == "vllm",
            "every rank's engine would start on the first GPU; use --teacher-engine transformers (divided among the ranks), or a "
            "server: --teacher http://HOST:PORT/v1#MODEL",
        ),
        "--optimizer adamw8bit": (
            config.optimizer == "adamw8bit",
            "eight-bit moments are not divided among ranks and cannot be loaded again; use --optimizer adamw",
        ),
        f"--staleness {config.staleness}": (
            config.staleness > 0,
            "it plays in a second thread, and ranks must speak to each other in one order; use --staleness 0 under torchrun, or "
            "--cluster ray with a single learner",
        ),
    }
    for setting, (asked, reason) in reasons.items():
        if asked:
            raise AtodError(f"{setting} cannot be used under torchrun: {reason}")
