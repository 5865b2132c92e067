"""What is chosen for each method before it is compared: learning rate and number of updates.

    STUDY/WORLD/tuning/METHOD/lrX-updatesU/     the runs that chose, with validation alone
    STUDY/WORLD/tuning/METHOD/lrX-updatesU/tuned.json    what was tried, and its score

The invariant: every method chooses from the same values, by the same rule, with a seed that the study does not use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_algos.study import Method, World
from atod_algos.study.cells import algorithm_of, config_of, read_cell, train_cell
from atod_algos.study.checks import RESULTS, Tuned, is_number, read_tuned
from atod_algos.training.run_dir import (
    held,
    read_metrics,
    read_object,
    replace_text,
    require_settings,
    settings_of,
)
from atod_envs.errors import AtodError, DataError


def tune(
    study: Path, method: Method, world: World, rules: str, seed: int, lrs: Sequence[float], updates: Sequence[int] = ()
) -> Tuned:
    """Choose a learning rate, then a number of updates: the best mean success over the later half of the validations.

    The mean, because a single validation of 128 tasks has a standard error of about four points. One after the other,
    because the whole grid would cost more runs than the study has seeds. What has one value is taken as it is.

    Args:
        study: the study's folder.
        method: the method to tune.
        world: where.
        rules: rule set of all algorithms.
        seed: training seed, none of the study's.
        lrs: learning rates; they are compared under the first number of updates.
        updates: numbers of updates a step, or none for the training's own.

    Raises:
        Busy: another process is at one of the runs.
    """
    return _choose(lrs, updates, lambda tuned: _validated(study, method, world, rules, seed, tuned))


def _choose(lrs: Sequence[float], updates: Sequence[int], score: Callable[[Tuned], float]) -> Tuned:
    """The best rate under the first number of updates, then the best number at that rate."""
    rates = [Tuned(lr, updates[0] if updates else 0) for lr in lrs]
    best = rates[0] if len(rates) == 1 else max(rates, key=score)
    numbers = [best, *(Tuned(best.lr, number) for number in updates[1:])]
    return best if len(numbers) == 1 else max(numbers, key=score)


def _validated(study: Path, method: Method, world: World, rules: str, seed: int, tuned: Tuned) -> float:
    """Train with these settings, unless that was done; the mean of the later half of the validations."""
    name = f"lr{tuned.lr:g}" + (f"-updates{tuned.updates}" if tuned.updates else "")
    folder = study / world.name / "tuning" / method.name / name
    done = folder / "tuned.json"
    if not done.exists():
        with held(folder):
            train_cell(folder, method, world, rules, seed, tuned)
            values = [row["val/success_rate"] for row in read_metrics(folder) if "val/success_rate" in row]
            if not values:
                raise AtodError(
                    f"{folder} has no validation to choose by; set a time for it (eval_every) in the preset"
                )
            late = values[len(values) // 2 :]
            found = {**dataclasses.asdict(tuned), "validation": values, "score": sum(late) / len(late)}
            replace_text(done, json.dumps(found) + "\n")
    chosen, score = read_tuned(done)
    if chosen != tuned:
        raise AtodError(
            f"{done} is about {chosen}, and {tuned} has the same name; give rates that differ in six digits"
        )
    if (folder / "config.json").exists():
        config = config_of(world, seed, tuned, folder)
        require_settings(folder, settings_of(config, algorithm_of(method, world, rules), rules), "--out")
    return score


def tuned_of(study: Path, world: World) -> Mapping[str, dict[Tuned, float]]:
    """What tuning found: score of each choice by method."""
    found: dict[str, dict[Tuned, float]] = {}
    for path in sorted((study / world.name / "tuning").glob("*/lr*/tuned.json")):
        chosen, score = read_tuned(path)
        found.setdefault(path.parent.parent.name, {})[chosen] = score
    return found


def chosen_in(study: Path, method: Method, world: World) -> Tuned:
    """What another study chose for a method.

    Its cells tell: those that are finished, or were published. Before the first is finished, it is what tuning chose
    from the rates and updates that stand in its ``study.json``.

    Raises:
        AtodError: it has not tried all of them for this method in this world, or has no cell of it.
        DataError: its file is broken.
    """
    trained = [read_cell(path.parent) for path in sorted((study / world.name / method.name).glob("seed*/cell.json"))]
    used = {Tuned(cell["lr"], cell.get("updates", 0)) for cell in trained if cell is not None and "lr" in cell}
    if len(used) > 1:
        raise AtodError(
            f"{study} has trained {method.label} in {world.name} with {' and '.join(sorted(map(str, used)))}, so it has chosen none; "
            "leave --settings-of out to choose here"
        )
    if used:
        return used.pop()
    if not (study / "study.json").is_file():
        return _published(study, method, world)
    grid = read_object(study / "study.json", "give the folder of a study as --settings-of", lrs=list, updates=list)
    if grid.get("settings_of"):  # it chose nothing itself
        return _published(study, method, world)
    lrs, updates = grid["lrs"], grid["updates"]
    if not lrs or not all(map(is_number, [*lrs, *updates])):
        raise DataError(f"{study / 'study.json'}: expected numbers as lrs and updates; run the study there again")
    found = tuned_of(study, world).get(method.name, {})

    def score(tuned: Tuned) -> float:
        if tuned not in found:
            raise AtodError(
                f"{study} has not tried {method.label} in {world.name} with {tuned}, so it has not chosen yet; let it end, or leave "
                "--settings-of out to choose here"
            )
        return found[tuned]

    chosen = _choose(lrs, updates, score)
    score(chosen)  # of a single value none was tried
    return chosen


def _published(study: Path, method: Method, world: World) -> Tuned:
    file = study / RESULTS if study.is_dir() else study
    if not file.is_file():
        raise AtodError(f"--settings-of {study}: expected the folder of a study, with its study.json or {RESULTS}")
    cells = read_object(file, "give the folder of a study as --settings-of", cells=list)["cells"]
    found = set()
    for cell in cells:
        if isinstance(cell, dict) and (cell.get("world"), cell.get("method")) == (world.name, method.name):
            lr: Any = cell.get("lr")
            updates: Any = cell.get("updates", 0)
            if not is_number(lr) or type(updates) is not int:
                raise DataError(
                    f"{file}: expected numbers as lr and updates of {method.name} in {world.name}, found {lr!r} and {updates!r}"
                )
            found.add(Tuned(float(lr), updates))
    if len(found) != 1:
        raise AtodError(
            f"{file} has {len(found)} settings of {method.label} in {world.name}, expected one; leave --settings-of out to choose here"
        )
    return found.pop()
