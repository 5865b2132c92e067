"""Which tasks of the final panel a cell solved: what claims are decided on, and what a published study keeps of it.

The invariant: two cells are compared on the same tasks only. A panel is known by a digest of its tasks' names and
instructions and of the data's version, which counts what decides a reward. So cells of other machines can stand next to
one's own, and cells of other data cannot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.weights import DONE
from atod_algos.evaluate.paired_command import load_evaluation
from atod_algos.study import place
from atod_algos.study.checks import RESULTS, is_number
from atod_algos.training.run_dir import FREE_SETTINGS, read_metrics, read_object, read_settings
from atod_envs.errors import AtodError, DataError

_OWN = {*FREE_SETTINGS, "seed", "lr", "minibatches", "data"} - {"steps"}
"""Settings that cells of one table need not share; of data it is the panel that counts, not where they lie."""

_GROUPS = ("fail_first", "fail_last", "success_last")

_ROLES = {"vanilla": "student", "teacher": "teacher"}
"""Whose model an untrained row is."""

_ADVICE = "take the file from where it was published, or write it again with --tables-only"


@dataclass(frozen=True, slots=True)
class Panel:
    """The tasks of a final panel, in a fixed order.

    Attributes:
        tasks: names.
        labels: the kind of each.
        digest: of names, instructions and the data's version.
    """

    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Whether each task of a panel was solved by a cell's last checkpoint."""

    panel: Panel
    solved: tuple[bool, ...]


def outcomes_of(cell: Mapping[str, Any]) -> Outcomes:
    """What a cell's last checkpoint solved: as published, or from its evaluation's episodes.

    Raises:
        DataError: the evaluation is gone or broken.
    """
    if "outcomes" in cell:
        found: Outcomes = cell["outcomes"]
        return found
    parts = load_evaluation(Path(cell["folder"]) / "evaluation-last")
    played = sorted((t for part in parts.values() for t in part.trajectories), key=lambda t: t.task_id)
    digest = hashlib.sha256(json.dumps([[t.task_id, t.task, t.data_version] for t in played]).encode()).hexdigest()[:16]
    labels = tuple(next(iter(t.labels.values()), "all") for t in played)
    return Outcomes(Panel(tuple(t.task_id for t in played), labels, digest), tuple(t.success for t in played))


def require_its_numbers(cell: Mapping[str, Any]) -> None:
    """Refuse a cell of the study's own folder that says other numbers than its evaluations.

    Args:
        cell: of :func:`joined`; whole.

    Raises:
        DataError: names the cell's file.
    """
    if "folder" not in cell:
        return
    advice = "delete it to evaluate the cell again"
    solved = cell["outcomes"].solved
    same = abs(sum(solved) / len(solved) - cell["last"]["success"]) < 1e-9
    for which in ("last", "best"):
        if which in cell:
            file = Path(cell["folder"]) / f"evaluation-{which}" / "result.json"
            same = same and list(read_object(file, advice, panels=dict)["panels"].values()) == [cell[which]]
    if not same:
        raise DataError(f"{cell['folder']}/cell.json has other numbers than the cell's evaluations; {advice}")


def groups_of(cell: Mapping[str, Any]) -> dict[str, float]:
    """Share of training groups whose attempts end alike; empty for a policy that is not trained.

    All fail in the run's first quarter, all fail in its last, and all succeed in its last.
    """
    if "groups" in cell or "folder" not in cell:
        return dict(cell.get("groups", {}))
    rows = read_metrics(Path(cell["folder"]))
    if not rows:
        return {}
    quarter = max(1, len(rows) // 4)
    first, last = rows[:quarter], rows[-quarter:]
    parts = (first, "group/all_fail"), (last, "group/all_fail"), (last, "group/all_success")
    return {name: sum(row[key] for row in part) / len(part) for name, (part, key) in zip(_GROUPS, parts, strict=True)}


def shared_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell shares with all others of its world: settings, rule set, digests of the models.

    An untrained row has the digest of its model alone.
    """
    if "shared" in cell or "folder" not in cell:
        return dict(cell.get("shared", {}))
    folder = Path(cell["folder"])
    if not (folder / "config.json").is_file():
        evaluated = folder / "evaluation-last"
        digest = read_settings(evaluated).get("model") if (evaluated / "config.json").is_file() else None
        return {f"{_ROLES.get(cell['method'], 'model')}'s files": digest} if digest else {}
    settings = read_settings(folder, "train")
    whole = sorted(folder.glob(f"checkpoints/step_*/{DONE}"))
    last = read_object(whole[-1], "train the cell again") if whole else {}
    return shared_settings(settings, last.get("models", {}))


def shared_settings(settings: Mapping[str, Any], digests: Mapping[str, str | None]) -> dict[str, Any]:
    """The part of a run's settings that all cells of a world share.

    Models are known by their files, not by where these lie; a model whose files are not known goes by its name.

    Args:
        settings: of :func:`atod_algos.training.run_dir.settings_of`, as JSON has them.
        digests: of :func:`atod_algos.training.checkpoint.model_digests`.
    """
    train = {name: value for name, value in settings["train"].items() if name not in _OWN}
    found: dict[str, Any] = {"rules": settings.get("rules")}
    for role in ("student", "teacher"):
        named = train.pop(role, None)
        names = [named] if isinstance(named, str) else named or []
        known = sorted(
            digest for name, digest in digests.items() if digest and (name in names or name.startswith(f"{role} "))
        )
        # A method without a teacher names one all the same, and has no digest of it: nothing to compare.
        if known:
            found[f"{role}'s files"] = " ".join(known)
        elif role == "student" or any(name in names for name in digests):
            found[role] = named
    return {**found, **train}


def require_shared(cells: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Refuse cells of a world that differ in more than their method.

    Args:
        cells: world, name as it is to be said, and what the cell shares.

    Raises:
        AtodError: names the cell and the first difference.
    """
    shared: dict[str, dict[str, Any]] = {}
    for world, said, mine in cells:
        known = shared.setdefault(world, {})
        for name, value in mine.items():
            if known.setdefault(name, value) != value:
                raise AtodError(
                    f"{said} has {name}={value!r:.200}, other cells {known[name]!r:.200}; a table joins studies of one preset with the "
                    "same rules, models and data"
                )


def joined(own: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A study's own cells and, for what it has not run, published ones, in the order of the table.

    Worlds of which the study has no cell are left out.

    Args:
        own: cells of the study's folder.
        published: cells of other studies; of two that have a cell the first is taken.

    Returns:
        The cells, each with its ``outcomes``.

    Raises:
        AtodError: two cells of a world were trained with other settings or models, or played on other tasks.
    """
    worlds = {cell["world"] for cell in own}
    found: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for cell in (*own, *published):
        if cell["world"] in worlds:
            found.setdefault((cell["world"], cell["method"], cell["seed"]), cell)
    require_shared((cell["world"], name_of(cell), shared_of(cell)) for cell in found.values())
    whole = {key: {**cell, "outcomes": outcomes_of(cell)} for key, cell in found.items()}
    require_shared(
        (cell["world"], name_of(cell), {"tasks": f"panel {cell['outcomes'].panel.digest}"}) for cell in whole.values()
    )
    return [whole[key] for key in sorted(whole, key=lambda key: (key[0], place(key[1]), key[2]))]


def name_of(cell: Mapping[str, Any]) -> str:
    """A cell in words."""
    return f"{cell['world']}, {cell['method']}, seed {cell['seed']}" + (
        f" ({cell['source']})" if "source" in cell else ""
    )


def to_json(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Panels and cells as ``study-results.json`` holds them; :func:`read_published` is the way back."""
    panels: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    plain = []
    for cell in cells:
        outcomes = outcomes_of(cell)
        panels[outcomes.panel.digest] = {"tasks": outcomes.panel.tasks, "labels": outcomes.panel.labels}
        solved = "".join("01"[won] for won in outcomes.solved)
        more: dict[str, Any] = {"groups": groups} if (groups := groups_of(cell)) else {}
        shared[cell["world"]] = shared_of(cell) | shared.get(cell["world"], {})
        kept = {name: value for name, value in cell.items() if name not in ("folder", "outcomes", "source", "shared")}
        plain.append({**kept, **more, "panel": outcomes.panel.digest, "solved": solved})
    return {"settings": shared, "panels": panels, "cells": plain}


def read_published(path: Path) -> list[dict[str, Any]]:
    """A study's cells from its results alone.

    Args:
        path: ``study-results.json``, or its folder.

    Raises:
        AtodError: there is none, or one of an older version, which kept no outcomes.
        DataError: it is broken, or says two things.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise AtodError(f"{path}: expected the {RESULTS} of a study, or the folder that holds it")
    stored = read_object(file, _ADVICE, cells=list)
    if "panels" not in stored or "settings" not in stored:
        raise AtodError(
            f"{file} is of an older version, which kept neither the tasks that each cell solved nor the study's settings; its cells "
            "cannot be compared task by task: train them again (each holds its command)"
        )
    found = []
    try:
        panels = {
            digest: Panel(tuple(panel["tasks"]), tuple(panel["labels"]), digest)
            for digest, panel in stored["panels"].items()
        }
        for cell in stored["cells"]:
            if not isinstance(cell["method"], str) or type(cell["seed"]) is not int:
                raise ValueError(f"expected a method and a seed, found {cell['method']!r} and {cell['seed']!r}")
            panel, marks = panels[cell["panel"]], cell["solved"]
            if not marks or not len(marks) == len(panel.tasks) == len(panel.labels) or set(marks) - set("01"):
                raise ValueError(f"expected a label, and a 0 or 1, for each of {len(panel.tasks)} tasks")
            if abs(marks.count("1") / len(marks) - cell["last"]["success"]) > 1e-9:
                raise ValueError(f"success {cell['last']['success']} is not the share of the tasks solved")
            groups = cell.get("groups", dict.fromkeys(_GROUPS, 0.0))
            if groups.keys() != set(_GROUPS) or not all(map(is_number, groups.values())):
                raise ValueError(f"expected the numbers {', '.join(_GROUPS)} as groups")
            whole = stored["settings"].get(cell["world"], {})
            role = _ROLES.get(cell["method"])
            shared = {k: v for k, v in whole.items() if role is None or k == f"{role}'s files"}
            kept = {name: value for name, value in cell.items() if name not in ("panel", "solved")}
            outcomes = Outcomes(panel, tuple(mark == "1" for mark in marks))
            found.append({**kept, "outcomes": outcomes, "shared": shared, "source": str(file)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: expected panels and cells of a study ({error!r:.200}); {_ADVICE}") from error
    return found
