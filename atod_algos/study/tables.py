"""The study's tables: the paper's Table 1 and Figure 4 in our terms, and what decides each of its claims.

The invariant: a mean over training seeds is never shown without its spread, and cells that were trained elsewhere are
said to be.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_algos.evaluate.statistics import t_interval
from atod_algos.study import ABLATIONS, Preset, place, row_of
from atod_algos.study.cells import without
from atod_algos.study.checks import RESULTS, Tuned
from atod_algos.study.claims import Cells, Decision, decisions_of, mean_of, together
from atod_algos.study.outcomes import groups_of, outcomes_of, to_json
from atod_algos.study.tuning import tuned_of
from atod_algos.training.run_dir import read_object, replace_text

_LINES = 7
"""Methods of a figure; more cannot be told apart."""


def write_tables(out: Path, cells: Sequence[Mapping[str, Any]], preset: Preset) -> None:
    """Write ``tables.md``, ``study-results.json`` and, where matplotlib is installed, the figures.

    Args:
        out: the study's folder.
        cells: finished cells, those of published studies among them.
        preset: the study's preset.
    """
    cells = [_with_command({**cell, "outcomes": outcomes_of(cell)}) for cell in cells]
    worlds: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        worlds.setdefault(cell["world"], {}).setdefault(cell["method"], []).append(cell)
    decisions = {name: decisions_of(methods) for name, methods in worlds.items()}
    if everywhere := together(worlds):
        decisions["together"] = everywhere
    lines = ["# Results", "", *_table1(worlds), *_sources(cells)]
    for name, methods in worlds.items():
        lines += ["", f"## {name}", "", *_success(methods), "", *_claims(decisions[name])]
        lines += ["", *_labels(methods), "", *_groups(methods), "", *_curves(methods)]
        found = [world for world in preset.worlds if world.name == name]
        if found and (tuned := tuned_of(out, found[0])):
            lines += ["", *_tuning(tuned)]
    if everywhere:
        note = "All tasks of the worlds together; a seed's value is its mean over them. Claims that every world decides on."
        lines += ["", f"## {', '.join(worlds)}", "", note, "", *_claims(everywhere)]
    replace_text(out / "tables.md", "\n".join(lines) + "\n")
    known = {
        name: [dataclasses.asdict(decision) | {"verdict": decision.verdict} for decision in found]
        for name, found in decisions.items()
    }
    replace_text(out / RESULTS, in_lines({**to_json(cells), "claims": known}))
    try:
        _figures(out, worlds)
    except ImportError:
        return


def in_lines(results: Mapping[str, Any]) -> str:
    """JSON with a line for every entry and every cell, so that another cell is another line."""
    parts = []
    for name, value in results.items():
        inside = ",\n".join(json.dumps(one) for one in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(name)}: " + (f"[\n{inside}\n]" if inside else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _with_command(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's numbers, with the command and the commits of its training run."""
    about = Path(cell["folder"]) / "config.json" if "folder" in cell else None
    source = read_object(about, "train the cell again") if about and about.exists() else {}
    named: dict[str, Any] = {name: source[name] for name in ("command", "commits") if name in source}
    if "command" in named:
        named["command"] = without(named["command"], "--run")
    return {**cell, **named}


def _sources(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which cells were not trained here, and where they stand."""
    files: dict[str, int] = {}
    for cell in cells:
        if "source" in cell:
            files[cell["source"]] = files.get(cell["source"], 0) + 1
    return [
        line
        for file, count in files.items()
        for line in ("", f"{count} of these {len(cells)} cells are published ones: {file}.")
    ]


# --- parts of the page ------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column stands left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _table1(worlds: Mapping[str, Cells]) -> list[str]:
    """Success and length of the last checkpoint by world, and the mean success."""
    header = ["method"]
    for name in worlds:
        header += [f"{name}: success", "turns"]
    rows = []
    for key in sorted({name for methods in worlds.values() for name in methods}, key=place):
        row, values = [row_of(key).label], []
        for methods in worlds.values():
            cells = methods.get(key, [])
            values += [mean_of(cells, "last")] if cells else []
            row += [with_spread(cells, "last"), f"{mean_of(cells, 'last', 'length'):.1f}"] if cells else ["-", "-"]
        rows.append([*row, f"{100 * sum(values) / len(values):.1f}" if len(values) == len(worlds) else "-"])
    return [
        "Last checkpoint, % of the final panel; ± half of the 95 % t-interval over training seeds.",
        "",
        *markdown_table([*header, "mean"], rows),
    ]


def _success(methods: Cells) -> list[str]:
    header = ("method", "seeds", "last, %", "each seed", "best by validation, %", "highest validation, %", "turns")
    rows = []
    for name, cells in methods.items():
        each = " / ".join(f"{100 * cell['last']['success']:.1f}" for cell in cells)
        trained = "best" in cells[0]
        peaks = [max(cell["validation"].values()) for cell in cells] if trained else []
        rows.append(
            [
                row_of(name).label, str(len(cells)), with_spread(cells, "last"), each, with_spread(cells, "best") if trained else "-",
                f"{100 * sum(peaks) / len(peaks):.1f}" if peaks else "-", f"{mean_of(cells, 'last', 'length'):.2f}",
            ]
        )  # fmt: skip
    n = next(iter(methods.values()))[0]["last"]["n"]
    note = (
        f"Final panel: {n} tasks a seed, on which nothing was chosen. The highest validation is what papers report; it is",
        "an optimistic number, on the panel that chose it.",
    )
    return [*note, "", *markdown_table(header, rows)]


def _claims(decisions: Sequence[Decision]) -> list[str]:
    header = (
        "claim (last checkpoints)",
        "difference, points",
        "95 % over tasks",
        "p over tasks",
        "p over seeds",
        "seeds",
        "verdict",
    )
    rows = [
        [
            d.claim, f"{100 * d.tasks.difference:+.1f}", d.tasks.points, f"{d.tasks.p_value:.3g}",
            f"{d.p_seeds:.2g}" if len(d.seeds) > 1 else "-", str(len(d.seeds)), d.verdict,
        ]
        for d in decisions
    ]  # fmt: skip
    return markdown_table(header, rows)


def _labels(methods: Cells) -> list[str]:
    labels = sorted({label for cells in methods.values() for cell in cells for label in cell["last"]["by_label"]})

    def value(cells: Sequence[Mapping[str, Any]], label: str) -> str:
        parts = [cell["last"]["by_label"][label]["success"] for cell in cells if label in cell["last"]["by_label"]]
        return f"{100 * sum(parts) / len(parts):.0f}" if parts else "-"

    rows = [[label, *[value(cells, label) for cells in methods.values()]] for label in labels]
    return [
        "Success by kind of task, last checkpoint, %, mean over seeds:",
        "",
        *markdown_table(["kind", *[row_of(m).label for m in methods]], rows),
    ]


def _groups(methods: Cells) -> list[str]:
    """What reward has to say: groups in which all attempts end alike give it nothing."""
    header = ["method", "all fail, first quarter", "last quarter", "all succeed, last quarter", "mixed, last quarter"]
    rows = []
    for name, cells in methods.items():
        if found := [groups for cell in cells if (groups := groups_of(cell))]:
            fail_first, fail, won = (
                sum(one[key] for one in found) / len(found) for key in ("fail_first", "fail_last", "success_last")
            )
            rows.append([row_of(name).label, *[f"{100 * x:.0f} %" for x in (fail_first, fail, won, 1 - fail - won)]])
    return ["Groups by outcome during training:", "", *markdown_table(header, rows)]


def _curves(methods: Cells) -> list[str]:
    steps = sorted({int(step) for cells in methods.values() for cell in cells for step in cell.get("validation", {})})
    rows = []
    for name, cells in methods.items():
        if "validation" in cells[0]:
            means = [[cell["validation"][str(s)] for cell in cells if str(s) in cell["validation"]] for s in steps]
            rows.append([row_of(name).label, *[f"{100 * sum(v) / len(v):.1f}" if v else "-" for v in means]])
    return ["Validation success by step, %, mean over seeds:", "", *markdown_table(["method", *map(str, steps)], rows)]


def _tuning(tuned: Mapping[str, Mapping[Tuned, float]]) -> list[str]:
    columns = sorted({one for found in tuned.values() for one in found}, key=lambda one: (one.updates, one.lr))
    rows = [
        [row_of(name).label, *[f"{100 * found[one]:.1f}" if one in found else "-" for one in columns]]
        for name, found in tuned.items()
    ]
    return [
        "Choice of the settings: mean of the later validations, %, with a seed of its own:",
        "",
        *markdown_table(["method", *map(str, columns)], rows),
    ]


def with_spread(cells: Sequence[Mapping[str, Any]], which: str) -> str:
    """Mean success over seeds in %, with half of its 95 % t-interval where there are two or more."""
    values = [100 * float(cell[which]["success"]) for cell in cells]
    low, high = t_interval(values)
    return f"{sum(values) / len(values):.1f}" + (f" ± {(high - low) / 2:.1f}" if math.isfinite(low) else "")


def _figures(out: Path, worlds: Mapping[str, Cells]) -> None:
    from atod_algos.report.data import read_run
    from atod_algos.report.figures import training_figure
    from atod_algos.report.plotting import bar_figure, pyplot, save

    plt = pyplot()
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for name, methods in worlds.items():
        bars = {row_of(m).label: _bars(methods[m]) for m in ABLATIONS if m in methods}
        if len(bars) > 1:
            save(plt, bar_figure(plt, bars, f"success on {name}, %"), folder / f"figure4-{name}")
        rows = [m for m in methods if row_of(m).algorithm and m not in ABLATIONS[1:]]
        drawn = sorted(rows, key=place)[:_LINES]
        runs = [
            dataclasses.replace(read_run(Path(cell["folder"])), label=row_of(m).label)
            for m in drawn
            for cell in methods[m]
            if "folder" in cell
        ]
        if runs:
            save(plt, training_figure(plt, runs), folder / f"figure5-{name}")


def _bars(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = {"last": "last", "best": "best by validation"}
    return {name: [100 * cell[which]["success"] for cell in cells] for which, name in names.items()}
