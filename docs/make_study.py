"""The made parts of the study's page and of the README, from the results in ``docs/study``: of 60 steps, and of 150.

``docs/make_pages.py`` writes and checks them, so that no table can differ from what was run. What is said about the
tables is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atod_algos.study import METHODS
from atod_algos.study.cells import without
from atod_algos.study.claims import CLAIMS, decide, mean_of
from atod_algos.study.outcomes import read_published
from atod_algos.study.tables import markdown_table, with_spread

DOCS = Path(__file__).parent
RESULTS = DOCS / "study" / "study-results.json"
LONG = DOCS / "study" / "laptop-150" / "study-results.json"
"""The paper's number of steps."""
WORLDS = {"alfworld": "ALFWorld", "searchqa": "Search-QA", "webshop": "WebShop"}
SHORT = ("vanilla", "teacher", "grpo", "opd", "atod")
"""Rows of the README's table."""
USUAL = tuple(name for name, method in METHODS.items() if not method.asked_for)
"""The paper's rows."""
ASKED = tuple(name for name in METHODS if name not in USUAL)
"""Rows that run where they are named: the signals of 2026."""
COMPARED = ("opd", "atod", "atod-uniform")
"""What they are compared with."""

Cells = Sequence[Mapping[str, Any]]


def pages() -> dict[Path, dict[str, str]]:
    """Made parts by page."""
    short, long = (json.loads(path.read_text()) for path in (RESULTS, LONG))
    cells, long_cells = short["cells"], long["cells"]
    study = {
        "results": success(cells, USUAL),
        "settings": settings(cells),
        "source": source(cells, "laptop"),
        "claims": decisions(short["claims"], USUAL),
        "signals": success(cells, (*COMPARED, *(name for name in ASKED if _everywhere(cells, name)))),
        "questions": decisions(short["claims"], tuple(METHODS), ASKED),
        "further": further(read_published(RESULTS)),
        "long-results": success(long_cells, USUAL),
        "long-claims": decisions(long["claims"], USUAL),
        "long-source": source(long_cells, "laptop-150"),
    }
    return {DOCS / "study.md": study, DOCS.parent / "README.md": {"study": success(long_cells, SHORT)}}


def further(cells: Cells) -> str:
    """Signals that were run in one world: success, and how far they are ahead of OPD and of GRPO there."""
    rows = []
    names = [name for name in ASKED if not _everywhere(cells, name)]
    worlds = [world for world in WORLDS if any(_of(cells, name, world) for name in names)]
    for world in worlds:
        found = [(name, some) for name in names if (some := _of(cells, name, world))]
        for name, some in sorted(found, key=lambda pair: -mean_of(pair[1], "last")):
            decided = [decide("", some, _of(cells, rival, world)) for rival in ("opd", "grpo")]
            shown = [_difference(None if one is None else asdict(one) | {"verdict": one.verdict}) for one in decided]
            place = [WORLDS[world]] if len(worlds) > 1 else []
            rows.append([METHODS[name].label, *place, with_spread(some, "last"), *shown])
    seeds = {cell["seed"] for name in names for world in worlds for cell in _of(cells, name, world)}
    where = ["world"] if len(worlds) > 1 else []
    what = f"{WORLDS[worlds[0]]}, %, {len(seeds)} seeds" if len(worlds) == 1 else f"%, {len(seeds)} seeds"
    return _table([what, *where, "success", "against OPD", "against GRPO"], rows)


def _everywhere(cells: Cells, method: str) -> bool:
    return all(_of(cells, method, world) for world in WORLDS)


def _worlds(cells: Cells) -> list[str]:
    return [world for world in WORLDS if any(cell["world"] == world for cell in cells)]


def _of(cells: Cells, method: str, world: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if (cell["method"], cell["world"]) == (method, world)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(header, rows))


def success(cells: Cells, methods: Sequence[str]) -> str:
    """Success of the last checkpoint by method and world, half of the 95 % t-interval over seeds.

    With several worlds their mean comes last. A method that was not run in some world has a dash there, and no mean.
    A row of fewer seeds than the table's says so.
    """
    rows, worlds = [], _worlds(cells)
    most = max((len(_of(cells, method, world)) for method in methods for world in worlds), default=0)
    for method in methods:
        found = [_of(cells, method, world) for world in worlds]
        if not any(found):
            continue
        means = [sum(100 * cell["last"]["success"] for cell in some) / len(some) for some in found if some]
        shown = [with_spread(some, "last") if some else "-" for some in found]
        mean = [f"{sum(means) / len(means):.1f}" if all(found) else "-"] if len(worlds) > 1 else []
        counts = sorted({len(some) for some in found if some} - {most})
        few = f" ({' or '.join(map(str, counts))} seeds)" if counts else ""
        rows.append([METHODS[method].label + few, *shown, *mean])
    header = [f"last checkpoint, %, {most} seeds", *(WORLDS[world] for world in worlds)]
    return _table([*header, "mean"] if len(worlds) > 1 else header, rows)


def settings(cells: Cells) -> str:
    """Learning rate and updates a step of the paper's methods, as tuning chose them in each world."""
    rows = []
    for method in USUAL:
        found = [_of(cells, method, world) for world in WORLDS]
        if METHODS[method].algorithm and not METHODS[method].tuned_as and any(found):
            chosen = [f"{one[0]['lr']:g}, {one[0].get('updates', 'as trained')}" if one else "-" for one in found]
            rows.append([METHODS[method].label, *chosen])
    return _table(["rate, updates a step", *WORLDS.values()], rows)


def decisions(claims: Mapping[str, Cells], methods: Sequence[str], about: Sequence[str] = ()) -> str:
    """Difference of each claim in each world and in all together, with both tests; bold where both decide.

    Args:
        claims: as the results hold them.
        methods: the claims are those about two of these.
        about: of which one is among these, if any are given.
    """
    pairs = [one for one in CLAIMS if {*one[1:]} <= {*methods} and (not about or {*one[1:]} & {*about})]
    asked = {claim for claim, _, _ in pairs}
    known = [name for name in (*WORLDS, "together") if name in claims]
    columns = {name: {one["claim"]: one for one in claims[name]} for name in known}
    names = dict.fromkeys(claim for found in columns.values() for claim in found if claim in asked)
    rows = [[name, *[_difference(found.get(name)) for found in columns.values()]] for name in names]
    return _table(["claim", *(WORLDS.get(name, "all") for name in known)], rows)


def _difference(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    points, tasks, seeds = f"{100 * one['tasks']['difference']:+.1f}", one["tasks"]["p_value"], one["p_seeds"]
    bold = "**" if one["verdict"] in ("holds", "reversed") else ""
    return f"{bold}{points}{bold} ({_p(tasks)}, {_p(seeds)})"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def commands(cells: Cells, preset: str) -> list[str]:
    """What trains the cells again, as they were chosen: a command for the methods of the same worlds and seeds."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method]
        if own:
            groups.setdefault((tuple(_worlds(own)), tuple(sorted({cell["seed"] for cell in own}))), []).append(method)
    found = []
    for (worlds, seeds), methods in groups.items():
        where = [] if len(worlds) == len(WORLDS) else ["--worlds", *worlds]
        words = ["--preset", preset, "--settings-of docs/study", *where, "--seeds", *map(str, seeds)]
        found.append(" ".join(["python -m atod_algos.study", *words, "--methods", *methods]))
    return found


def source(cells: Cells, preset: str) -> str:
    """Commands, commits and torch of the cells; one cell's own command as an example."""
    commits = sorted({commit[:7] for cell in cells for commit in cell.get("commits", ())})
    torch = sorted({cell["versions"]["torch"] for cell in cells})
    one = next(cell["command"] for cell in cells if cell["method"] == "atod" and "command" in cell)
    lines = [
        '<!-- skip: next "trains for hours" -->',
        "",
        "```bash",
        *(line for command in commands(cells, preset) for line in _wrapped(command)),
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
