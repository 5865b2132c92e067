"""The made parts of the study's page and of the README, from ``docs/study/study-results.json``.

``docs/make_pages.py`` writes and checks them, so that no table can differ from what was run. What is said about the
tables is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_algos.study import METHODS
from atod_algos.study.cells import without
from atod_algos.study.tables import markdown_table, with_spread

DOCS = Path(__file__).parent
RESULTS = DOCS / "study" / "study-results.json"
WORLDS = {"alfworld": "ALFWorld", "searchqa": "Search-QA", "webshop": "WebShop"}
SHORT = ("vanilla", "teacher", "grpo", "opd", "atod")
"""Rows of the README's table."""

Cells = Sequence[Mapping[str, Any]]


def pages() -> dict[Path, dict[str, str]]:
    """Made parts by page."""
    known = json.loads(RESULTS.read_text())
    cells, claims = known["cells"], known["claims"]
    study = {
        "results": success(cells, tuple(METHODS)),
        "settings": settings(cells),
        "source": source(cells),
        "claims": decisions(claims),
    }
    return {DOCS / "study.md": study, DOCS.parent / "README.md": {"study": success(cells, SHORT)}}


def _of(cells: Cells, method: str, world: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if (cell["method"], cell["world"]) == (method, world)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(header, rows))


def success(cells: Cells, methods: Sequence[str]) -> str:
    """Success of the last checkpoint by method and world, half of the 95 % t-interval over seeds, and the mean."""
    rows = []
    for method in methods:
        found = [_of(cells, method, world) for world in WORLDS]
        if not all(found):
            continue
        means = [sum(100 * cell["last"]["success"] for cell in some) / len(some) for some in found]
        shown = [with_spread(some, "last") for some in found]
        rows.append([METHODS[method].label, *shown, f"{sum(means) / len(means):.1f}"])
    counts = {len(_of(cells, method, world)) for method in methods for world in WORLDS} - {0}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
    return _table([f"last checkpoint, %, {seeds} seeds", *WORLDS.values(), "mean"], rows)


def settings(cells: Cells) -> str:
    """Learning rate and updates a step of every trained method, as tuning chose them in each world."""
    rows = []
    for method in METHODS:
        found = [_of(cells, method, world) for world in WORLDS]
        if METHODS[method].algorithm and not METHODS[method].tuned_as and all(found):
            chosen = [f"{some[0]['lr']:g}, {some[0].get('updates', 'as trained')}" for some in found]
            rows.append([METHODS[method].label, *chosen])
    return _table(["rate, updates a step", *WORLDS.values()], rows)


def decisions(claims: Mapping[str, Cells]) -> str:
    """Difference of each claim in each world and in all together, with both tests; bold where both decide."""
    columns = {name: {one["claim"]: one for one in claims.get(name, ())} for name in (*WORLDS, "together")}
    names = dict.fromkeys(claim for found in columns.values() for claim in found if not claim.startswith("the first,"))
    rows = [[name, *[_difference(found.get(name)) for found in columns.values()]] for name in names]
    return _table(["claim", *WORLDS.values(), "all"], rows)


def _difference(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    points, tasks, seeds = f"{100 * one['tasks']['difference']:+.1f}", one["tasks"]["p_value"], one["p_seeds"]
    bold = "**" if one["verdict"] in ("holds", "reversed") else ""
    return f"{bold}{points}{bold} ({_p(tasks)}, {_p(seeds)})"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def source(cells: Cells) -> str:
    """Command, commits and torch of the cells; one cell's own command as an example."""
    methods = [method for method in METHODS if any(cell["method"] == method for cell in cells)]
    seeds = sorted({cell["seed"] for cell in cells})
    commits = sorted({commit[:7] for cell in cells for commit in cell.get("commits", ())})
    torch = sorted({cell["versions"]["torch"] for cell in cells})
    one = next(cell["command"] for cell in cells if cell["method"] == "atod" and "command" in cell)
    lines = [
        '<!-- skip: next "trains for hours" -->',
        "",
        "```bash",
        "python -m atod_algos.study --preset laptop \\",
        f"    --seeds {' '.join(map(str, seeds))} --methods {' '.join(methods)}",
        "```",
        "",
        f"Commit `{', '.join(commits)}`, torch {', '.join(torch)}, one thread a run. Every cell can be trained by itself;",
        "`study-results.json` holds its command. ATOD's first:",
        "",
        "```text",
        *_wrapped(without(one, "--threads")),
        "```",
    ]
    return "\n".join(lines)


def _wrapped(command: str, width: int = 116) -> list[str]:
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines[-1] += "\\"
            lines.append("    ")
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]
