"""Two stored evaluations, compared task by task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atod_algos.evaluate import Comparison, Evaluation, compare
from atod_algos.evaluate.settings import episodes_path
from atod_algos.training.run_dir import read_settings
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import read_jsonl

log = logging.getLogger(__name__)


def load_evaluation(folder: Path) -> dict[str, Evaluation]:
    """The episodes of a stored evaluation, by panel.

    Raises:
        DataError: there is no finished one.
    """
    if not (folder / "result.json").is_file():
        raise DataError(f"{folder} holds no finished evaluation (no result.json); run the evaluation to its end first")
    settings = read_settings(folder)
    try:
        names, seeds = [str(panel["name"]) for panel in settings["panels"]], [int(seed) for seed in settings["seeds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / 'config.json'}: expected the panels and seeds of an evaluation ({error!r})"
        ) from error
    found = {
        name: Evaluation(tuple(t for seed in seeds for t in read_jsonl(episodes_path(folder, name, seed))))
        for name in names
    }
    for panel in settings["panels"]:
        played, wanted = len(found[str(panel["name"])].trajectories), panel.get("tasks")
        if type(wanted) is int and played != wanted * len(seeds):
            raise DataError(
                f"{folder}: expected {wanted} episodes of {panel['name']} for each of {len(seeds)} seeds, found {played} in all; run the "
                "evaluation again in another folder"
            )
    return found


def _say_what_differs(a: Path, b: Path, names: Sequence[str]) -> None:
    """One line for each thing that decides numbers and is not the same on both sides: environment, data, limits."""

    def known(folder: Path) -> dict[str, Any]:
        settings = read_settings(folder)
        sampling = settings.get("sampling", {})
        versions = {f"data of {p['name']}": p.get("data_version") for p in settings["panels"] if p["name"] in names}
        own = {
            "environment": settings.get("env"),
            "options": settings.get("option"),
            "max_turns": sampling.get("max_turns"),
        }
        return own | versions

    left, right = known(a), known(b)
    for name, value in left.items():
        if value != right.get(name):
            log.warning(
                "A and B differ in more than who plays: %s is %r in A and %r in B", name, value, right.get(name)
            )


def show_comparison(a: Path, b: Path) -> dict[str, Comparison]:
    """Compare two stored evaluations and show the table.

    Raises:
        AtodError: they share no panel, or played different seeds.
    """
    left, right = load_evaluation(a), load_evaluation(b)
    shared = [name for name in left if name in right]
    if not shared:
        raise AtodError(f"{a} holds {', '.join(left)} and {b} holds {', '.join(right)}: no panel in common")
    _say_what_differs(a, b, shared)
    table = Table(title=f"A = {a}\nB = {b}", title_justify="left")
    for column in (
        "panel",
        "A",
        "B",
        "A - B",
        "95 % interval",
        "p over tasks",
        "only A",
        "only B",
        "McNemar p",
        "turns A - B",
    ):
        table.add_column(column, justify="left" if column == "panel" else "right", no_wrap=True)
    found = {}
    for name in shared:
        found[name] = result = compare(left[name], right[name])
        paired = result.success
        table.add_row(
            f"{name} (n={paired.tasks})", f"{left[name].success:.1%}", f"{right[name].success:.1%}", f"{paired.difference:+.1%}",
            paired.points, f"{paired.p_value:.3g}", str(result.only_a), str(result.only_b),
            f"{result.mcnemar:.3g}", f"{result.length.difference:+.2f}",
        )  # fmt: skip
        for label, part in result.by_label.items():
            table.add_row(
                f"  {label} (n={part.tasks})", "", "", f"{part.difference:+.1%}",
                part.points, f"{part.p_value:.3g}",
            )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 170
    console.print(table)
    return found
