"""The command: run what is missing, then write the tables."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from atod_algos.evaluate.settings import held_out_splits
from atod_algos.guard import guarded, parse
from atod_algos.study import METHODS, PRESETS, Method, Preset, World, method_of
from atod_algos.study.cells import algorithm_of, config_of, finish_cell, read_study
from atod_algos.study.checks import RESULTS, Tuned, require_whole_cell
from atod_algos.study.outcomes import (
    joined,
    name_of,
    read_published,
    require_its_numbers,
    require_shared,
    shared_settings,
)
from atod_algos.study.tuning import chosen_in, tune
from atod_algos.training.run_dir import Busy, replace_text, settings_of
from atod_envs.caches import one_at_a_time
from atod_envs.errors import AtodError, UnknownName
from atod_envs.files import make_folder
from atod_envs.options import read_pair


@dataclass(frozen=True)
class StudyConfig:
    """Compare methods over environments and seeds. The same command goes on where it stopped."""

    preset: str = "laptop"
    """Scale of the study."""
    out: Path | None = None
    """The study's folder; by default studies/<preset>."""
    worlds: tuple[str, ...] = ()
    """Environments, by the preset's names; by default the paper's three. The laptop preset has textcraft and
    scienceworld, too; no models come with the project for them: give --student and --teacher."""
    methods: tuple[str, ...] = ()
    """Methods; by default the paper's. The signals of 2026 (docs/study.md) and the algorithms of other packages run
    where they are named."""
    seeds: tuple[int, ...] = ()
    """Training seeds; by default the preset's."""
    lrs: tuple[float, ...] = ()
    """Learning rates to choose from for each method; a single one is taken as it is. By default the preset's."""
    updates: tuple[int, ...] = ()
    """Updates a step (--minibatches) to choose from for each method, after the rate; a single number is taken as it is.
    By default the preset's."""
    settings_of: Path | None = None
    """Folder of a study, or of its published results: each method takes the rate and the updates that were chosen
    there, and nothing is chosen here. A long study can so build on a short one."""
    published: tuple[Path, ...] = ()
    """Results of other studies (study-results.json, or its folder), whose cells stand in the tables next to those of
    this one and are compared with them task by task: --published docs/study."""
    rules: Literal["paper", "released"] = "paper"
    """Rule set of all algorithms."""
    student: str | None = None
    """Model to train, instead of the preset's."""
    teacher: tuple[str, ...] = ()
    """Teachers, WORLD=PATH_OR_HUB_ID each, instead of the preset's."""
    data: tuple[str, ...] = ()
    """Data folders, WORLD=PATH each, instead of the preset's."""
    tables_only: bool = False
    """Train nothing; write the tables of what is finished."""
    verbose: bool = False
    """Log more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse(StudyConfig, arguments, "atod_algos.study", StudyConfig.__doc__)
    logging.basicConfig(level=logging.INFO if config.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    guarded(lambda: run(config), lambda: _kept(config))


def _kept(config: StudyConfig) -> str:
    out = _folder(config)
    done = sum(1 for _ in out.glob("*/*/seed*/cell.json"))
    return f"kept in {out}: finished cells {done}, checkpoints of others; run the same command again to go on"


def _folder(config: StudyConfig) -> Path:
    return config.out or Path("studies") / config.preset


def run(config: StudyConfig) -> None:
    """Run what is missing, then write the tables.

    Raises:
        UnknownName: a preset, world or method that does not exist.
    """
    if config.preset not in PRESETS:
        raise UnknownName("preset", config.preset, PRESETS)
    preset = _chosen(PRESETS[config.preset], config)
    usual = [name for name, method in METHODS.items() if not method.asked_for]
    methods = [method_of(name) for name in config.methods or usual]
    out = _folder(config)
    if (out / RESULTS).is_file() and not (out / "study.json").is_file() and not read_study(out):
        raise AtodError(
            f"{out} holds published results of a study, and would be written over; give another --out, and this one as --published"
        )
    if not config.tables_only:
        make_folder(out, "--out")
    console = Console(soft_wrap=True)
    published = [cell for path in config.published for cell in read_published(path)]
    if not config.tables_only:
        _require_fit(preset, methods, config.rules, published)
        given = {}
        if config.settings_of:  # all of them before the first hour of training
            for world in preset.worlds:
                for method in methods:
                    if method.algorithm:
                        given[world.name, method.name] = chosen_in(config.settings_of, tuned_as(method), world)
        asked = {"preset": config.preset, "rules": config.rules, "settings_of": config.settings_of}
        stored = {**asked, **dataclasses.asdict(preset)}
        with one_at_a_time(out):  # two processes may share a study
            replace_text(out / "study.json", json.dumps(stored, indent=1, default=str) + "\n")
        for world in preset.worlds:
            _run_world(out, world, preset, methods, config.rules, given, console)
    from atod_algos.study.tables import write_tables

    own = read_study(out)
    if not own:
        raise AtodError(f"{out} holds no finished cell; give the folder of a study as --out, or train one first")
    cells = joined(own, published)
    for cell in cells:
        require_whole_cell(cell)
        require_its_numbers(cell)
    with one_at_a_time(out):
        write_tables(out, cells, preset)
    console.print(f"{out / 'tables.md'} and {out / 'study-results.json'}", highlight=False)


def tuned_as(method: Method) -> Method:
    """The method whose learning rate and updates a method takes."""
    return METHODS[method.tuned_as] if method.tuned_as else method


def _require_fit(preset: Preset, methods: Sequence[Method], rules: str, published: Sequence[Mapping[str, Any]]) -> None:
    """Refuse published cells that could not be compared with what is about to be trained."""
    if not published:
        return
    from atod_algos.training.checkpoint import model_digests

    planned = []
    for world in preset.worlds:
        for method in methods:
            if method.algorithm:
                config = config_of(world, preset.seeds[0], Tuned(preset.lrs[0]), Path())
                algorithm = algorithm_of(method, world, rules)
                settings = json.loads(json.dumps(settings_of(config, algorithm, rules)))
                shared = shared_settings(settings, model_digests(config, algorithm))
                planned.append((world.name, f"{world.name}, {method.name}, to be trained,", shared))
    wanted = {world.name for world in preset.worlds}
    theirs = [(cell["world"], name_of(cell), cell["shared"]) for cell in published if cell["world"] in wanted]
    require_shared([*planned, *theirs])


def _run_world(
    out: Path,
    world: World,
    preset: Preset,
    methods: Sequence[Method],
    rules: str,
    given: Mapping[tuple[str, str], Tuned],
    console: Console,
) -> None:
    split = held_out_splits(world.train["env"])[1]
    tuned: dict[str, Tuned] = {}
    for method in methods:
        if not method.algorithm:
            tuned[method.name] = Tuned(preset.lrs[0])
            continue
        if (world.name, method.name) in given:
            tuned[method.name] = given[world.name, method.name]
        else:
            chooser = tuned_as(method)
            tuned[method.name] = _again(
                lambda m=chooser: tune(out, m, world, rules, preset.tuning_seed, preset.lrs, preset.updates)
            )
        console.print(f"{world.name}  {method.label}: {tuned[method.name]}", highlight=False)
    # Seed by seed, so that a study that is stopped early has compared all methods.
    left = [(seed, method) for seed in preset.seeds for method in methods]
    while left:
        waiting = []
        for seed, method in left:
            try:
                cell = finish_cell(out, method, world, rules, seed, tuned[method.name], split)
            except Busy:
                waiting.append((seed, method))
                continue
            best = f", best {cell['best']['success']:.1%}" if "best" in cell else ""
            line = f"{world.name}  {method.label}  seed {seed}: last {cell['last']['success']:.1%}{best}"
            console.print(f"{line}  of {cell['last']['n']} tasks, {cell['seconds']:.0f} s", highlight=False)
        if len(waiting) == len(left):
            time.sleep(5)  # another process is at all that is left
        left = waiting


def _again(work: Any) -> Any:
    """Do something that another process may be doing, as soon as it has ended there."""
    while True:
        try:
            return work()
        except Busy:
            time.sleep(5)


def _chosen(preset: Preset, config: StudyConfig) -> Preset:
    """The preset with what the command line changes."""
    known = (*preset.worlds, *preset.others)
    names = [world.name for world in known]
    for name in config.worlds:
        if name not in names:
            raise UnknownName("world", name, names)
    taken = config.worlds or tuple(usual.name for usual in preset.worlds)
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting, pairs in (("teacher", config.teacher), ("data", config.data)):
        for pair in pairs:
            name, value = read_pair(pair, names, f"--{setting}", "PATH")
            if name not in taken:
                raise AtodError(
                    f"--{setting} {pair}: {name} is none of this study's worlds ({', '.join(taken)}); leave it out, or name it with --worlds"
                )
            changes[name][setting] = value
    if config.student is not None:
        for change in changes.values():
            change["student"] = config.student
    worlds = tuple(
        dataclasses.replace(world, train={**world.train, **changes[world.name]})
        for world in known
        if world.name in taken
    )
    chosen = {name: getattr(config, name) or getattr(preset, name) for name in ("seeds", "lrs", "updates")}
    found = dataclasses.replace(preset, worlds=worlds, others=(), **chosen)
    if config.settings_of and (config.lrs or config.updates):
        raise AtodError(
            "--settings-of takes rates and updates from another study, so nothing is chosen from --lrs and --updates; leave the one or "
            "the others out"
        )
    if len({f"{lr:g}" for lr in found.lrs}) < len(found.lrs) or not all(0 < lr < math.inf for lr in found.lrs):
        raise AtodError(f"--lrs {found.lrs}: expected rates above 0 that differ in six digits")
    for name, least in (("seeds", 0), ("updates", 1)):
        values = getattr(found, name)
        if len(set(values)) < len(values) or any(value < least for value in values):
            raise AtodError(f"--{name} {values}: expected different whole numbers from {least}")
    if preset.tuning_seed in found.seeds and len(found.lrs) * max(1, len(found.updates)) > 1:
        raise AtodError(
            f"--seeds {found.seeds}: {preset.tuning_seed} is the seed that chooses rate and updates; take others"
        )
    return found
