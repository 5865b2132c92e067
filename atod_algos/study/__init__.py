"""The study: every method on every environment with several training seeds, at the scale of a preset.

    python -m atod_algos.study --preset laptop

trains what is not yet trained, evaluates it on fixed panels, and writes the paper's Table 1 and Figure 4 in our terms.
The invariant: methods differ in nothing but themselves. Student, teacher, tasks, episodes' seeds, steps, panels and
sampling are shared, and each method's learning rate and number of updates are chosen from the same values, on the same
split, with a seed that the study itself does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atod_algos.algorithm import algorithm_names
from atod_algos.training.config import builtin_profile
from atod_envs.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        name: its key, and the name of its folders.
        label: as printed.
        algorithm: name in the entry-point group ``atod.algorithms``; empty for a policy that is not trained.
        options: the algorithm's options that differ from its rule set.
        tuned_as: the method whose learning rate and updates it takes: an ablation changes one thing only.
        asked_for: it is run only where the command names it.
    """

    name: str
    label: str
    algorithm: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str = ""
    asked_for: bool = False


def _signal(name: str, label: str, algorithm: str, **options: Any) -> Method:
    return Method(name, label, algorithm, options, asked_for=True)


def _distilled(name: str, label: str, algorithm: str = "atod", **options: Any) -> Method:
    """OPD with one thing changed, so with OPD's learning rate; of ATOD the teacher's term alone, at a strength of 1."""
    alone = {"rho_init": 0.0, "rho_max": 0.0, "coef_anneal_steps": 0, "tdur_mean_preserve": True}
    return Method(name, label, algorithm, {**(alone if algorithm == "atod" else {}), **options}, "opd", asked_for=True)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("vanilla", "Vanilla"),
        Method("teacher", "Teacher"),
        Method("grpo", "GRPO", "grpo"),
        Method("sdar", "SDAR", "sdar"),
        Method("opd", "OPD", "opd"),
        Method("sod", "SOD", "sod"),
        Method("tcod", "TCOD", "tcod"),
        Method("atod", "ATOD", "atod"),
        Method("atod-constant", "ATOD w/o annealing", "atod", {"coef_anneal_steps": 0}, "atod"),
        Method("atod-uniform", "ATOD w/o T-DUR", "atod", {"weighting": "none"}, "atod"),
        Method("atod-token", "ATOD token-level", "atod", {"weighting": "token"}, "atod"),
        Method("atod-level", "ATOD, weights of mean 1", "atod", {"tdur_mean_preserve": True}, "atod", asked_for=True),
        Method(
            "atod-kappa10",
            "ATOD, kappa 10 to 1",
            "atod",
            {"kappa_init": 10.0, "kappa_min": 1.0},
            "atod",
            asked_for=True,
        ),
        _distilled("opd-turn", "OPD by turn, weights of mean 1"),
        _distilled("opd-token", "OPD by token, weights of mean 1", weighting="token"),
        _distilled("iw-opd-level", "OPD by position, weights of mean 1", "iw_opd", mean_preserve=True),
        _distilled("guided-opd", "Guided-OPD", "guided_opd"),
        _signal("vopd", "vOPD", "vopd"),
        _signal("opsa", "no teacher, fixed", "opsa"),
        _signal("opsa-entropy", "no teacher, by entropy", "opsa", adapt="entropy"),
        _signal("iw-opd", "IW-OPD", "iw_opd"),
        _signal("agent-opsd", "AgentOPSD", "agent_opsd"),
        _signal("rlsd", "RLSD", "sign_safe"),
        _signal("crest", "CrEST", "sign_safe", rule="crest"),
        _signal("stepopsd", "StepOPSD", "sign_safe", rule="stepopsd"),
        _signal("sg-opd", "SG-OPD", "sign_safe", rule="sg_opd"),
        _signal("opdvr", "OPDVR", "sign_safe", rule="opdvr"),
        _signal("gkd-forward", "GKD, forward KL", "gkd", divergence="forward"),
        _signal("gkd-reverse", "GKD, reverse KL", "gkd", divergence="reverse"),
        _signal("gkd-jsd", "GKD, Jensen-Shannon", "gkd", divergence="jsd"),
        _signal("tropd", "TrOPD", "tropd"),
        _signal("turn-opd", "TurnOPD's loss", "turn_opd"),
        _signal("sage-opd", "SAGE-OPD's weights", "sage_opd"),
        _signal("reopd", "ReOPD", "reopd"),
        _signal("futurebridge", "FutureBridge-OPD", "futurebridge"),
        _signal("sibling-sdpo", "sibling, SDPO", "siblings"),
        _signal("sibling-opid", "sibling, OPID", "siblings", rule="opid"),
        _signal("sibling-grsd", "sibling, GRSD", "siblings", rule="grsd"),
    )
}
"""Every row, the untrained student and the teacher first; ablations as in section 5.3 of the paper. The signals of 2026
come last, and are run where they are asked for."""


def method_of(name: str) -> Method:
    """A row by name; an algorithm of another package is a row of its own, with its own options.

    Raises:
        UnknownName: neither a row nor an installed algorithm. A row's own algorithm is neither: it would lack the
            row's options.
    """
    if name in METHODS:
        return METHODS[name]
    installed = [other for other in algorithm_names() if other.replace("_", "-") not in METHODS]
    if name not in installed:
        raise UnknownName("method", name, [*METHODS, *installed])
    return Method(name, name, name, asked_for=True)


def row_of(name: str) -> Method:
    """The same for a table: the package of a published row need not be installed."""
    return METHODS.get(name) or Method(name, name, name, asked_for=True)


def place(name: str) -> tuple[int, str]:
    """What rows are sorted by: the order of the table; those of other packages come last."""
    return (list(METHODS).index(name) if name in METHODS else len(METHODS), name)


ABLATIONS = ("atod", "atod-token", "atod-uniform", "atod-constant")
"""Bars of Figure 4."""


@dataclass(frozen=True, slots=True)
class World:
    """One column of the table.

    Attributes:
        name: its key, and the name of its folder.
        train: settings of ``TrainConfig`` that differ from its profile, the environment among them.
        report_tasks: tasks of the final panel (all of a smaller split).
        options: by method, options that depend on how long is trained here.
        preset: published settings that all this stands on (``atod_algos.training.presets``); empty for none.
    """

    name: str
    train: Mapping[str, Any]
    report_tasks: int
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset: str = ""


@dataclass(frozen=True, slots=True)
class Preset:
    """A scale.

    Attributes:
        worlds: the columns.
        lrs: learning rates to choose from; a single one is taken without tuning.
        updates: numbers of updates a step (``minibatches``) to choose from, once the rate is chosen, under the first of
            them; empty for the training's own.
        seeds: training seeds.
        tuning_seed: of the runs that choose the learning rate; not among ``seeds``.
        others: worlds that are played where they are named.
    """

    worlds: tuple[World, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 1000
    others: tuple[World, ...] = ()
    updates: tuple[int, ...] = ()


ANNEALING_SHARE = 80 / 150
"""Share of the training over which ATOD's coefficients change (released scripts: 80 of 150 steps)."""
GUIDED_SHARE = 0.8
"""Share of the training in which a guide plays turns (the baseline next to FutureBridge-OPD)."""


def _world(name: str, env: str, *, steps: int, report_tasks: int, **train: Any) -> World:
    """A world of the reference models, with the turns that they know, whose schedules fit its number of steps.

    ATOD's annealing ends at the published share of the training, and with it the balance of TurnOPD; so do the turns
    that a guide plays; TCOD's window reaches the turn limit half-way (its paper: after a quarter, ATOD's
    re-implementation: at the end).
    """
    annealing = {"coef_anneal_steps": round(ANNEALING_SHARE * steps)}
    scaled = {name: annealing for name in ("atod", "atod-uniform", "atod-token", "atod-level", "atod-kappa10")}
    max_turns = train.pop("max_turns", None) or builtin_profile(env)["max_turns"]
    window = {"turns_every": max(1, steps // (2 * (max_turns - 1)))}
    settings = {"env": env, "steps": steps, "max_turns": max_turns, **train}
    ends = {
        "turn-opd": {"balance_steps": annealing["coef_anneal_steps"]},
        "guided-opd": {"guide_steps": round(GUIDED_SHARE * steps)},
    }
    return World(name, settings, report_tasks, {**scaled, **ends, "tcod": window})


def _laptop(steps: int = 60) -> Preset:
    """The reference models on one core; 60 steps of ALFWorld take about four minutes.

    Eight tasks a step are half of the built-in run's. Gradients are noisier for it: at the built-in run's learning rate
    reward alone unlearns within ten steps what the student knew, hence the lower rates and the warm-up. The exact gap
    is ahead of the sampled one with few updates and with many (docs/log.md), hence it, where a method can learn from
    it.
    """
    common: dict[str, Any] = {
        "data": "builtin",
        "tasks_per_step": 8,
        "warmup_steps": 4,
        "gap": "exact",
        "eval_every": 20,
        "eval_tasks": 128,
        "checkpoint_every": 5,
        "store": "trajectories/10",
    }
    small: dict[str, Any] = {"style": "compact", "max_response": 64, "max_context": 4096, "eval_tasks": 60}
    return Preset(
        worlds=(
            _world("alfworld", "atod/ALFWorld-v0", steps=steps, report_tasks=256, **common),
            _world("webshop", "atod/WebShop-v0", steps=steps, report_tasks=500, **common),
            _world("searchqa", "atod/SearchQA-v0", steps=steps, report_tasks=512, **common),
        ),
        lrs=(4e-4, 1e-3),
        updates=(4, 12),
        others=(
            _world("textcraft", "atod/TextCraft-v0", steps=60, report_tasks=240, max_turns=40, **(common | small)),
            _world("scienceworld", "atod/ScienceWorld-v0", steps=20, report_tasks=60, max_turns=30, **(common | small)),
        ),
    )


def _paper(name: str) -> Preset:
    """The published settings of a model size: all unseen games of ALFWorld, larger panels elsewhere."""
    panels = {
        "alfworld": ("atod/ALFWorld-v0", 134),
        "webshop": ("atod/WebShop-v0", 512),
        "searchqa": ("atod/SearchQA-v0", 2048),
    }
    worlds = tuple(World(world, {"env": env}, size, preset=name) for world, (env, size) in panels.items())
    return Preset(worlds, lrs=(1e-6,))


PRESETS: Mapping[str, Preset] = {"laptop": _laptop(), "laptop-150": _laptop(150)} | {
    name: _paper(name) for name in ("paper-0.6b", "paper-1.7b", "paper-4b")
}
"""Scales by name. ``laptop-150`` has the paper's number of steps."""
