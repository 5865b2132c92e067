"""The study's tables: the paper's Table 1 and Figure 4 in our terms, and what decides each of its claims.

The invariant: a mean over training seeds is never shown without its spread, and a claim is decided by two tests at
once, over tasks (are these policies different on such tasks?) and over training seeds (would training again give the
same order?). Three seeds decide large differences only; where they do not, the table says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atod_algos.evaluate import Evaluation, compare
from atod_algos.evaluate.paired_command import load_evaluation
from atod_algos.evaluate.statistics import Paired, t_interval, welch
from atod_algos.study import ABLATIONS, METHODS, Preset
from atod_algos.study.cells import without
from atod_algos.study.checks import Tuned
from atod_algos.study.tuning import tuned_of
from atod_algos.training.run_dir import read_metrics, read_object, replace_text

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""Finished cells of one world by method, in the order of the table."""

CLAIMS = (
    ("ATOD beats OPD", "atod", "opd"),
    ("OPD beats GRPO", "opd", "grpo"),
    ("ATOD beats GRPO", "atod", "grpo"),
    ("ATOD beats SDAR", "atod", "sdar"),
    ("ATOD beats SOD", "atod", "sod"),
    ("ATOD beats TCOD", "atod", "tcod"),
    ("the student passes its teacher", "atod", "teacher"),
    ("a distilled student passes its teacher", "opd", "teacher"),
    ("annealing is needed", "atod", "atod-constant"),
    ("turn weights are needed", "atod", "atod-uniform"),
    ("turns are a better unit than tokens", "atod", "atod-token"),
    ("turn weights are needed, at equal strength", "atod-level", "atod-uniform"),
    ("ATOD: kappa 10 to 1 against 1 to 0.1", "atod-kappa10", "atod"),
    ("ATOD, kappa 10 to 1, beats OPD", "atod-kappa10", "opd"),
    ("distillation: turns against nothing", "opd-turn", "opd"),
    ("distillation: turns against tokens", "opd-turn", "opd-token"),
    ("distillation: turns against positions", "opd-turn", "iw-opd-level"),
    ("a teacher against no teacher", "opd", "opsa"),
    ("a teacher that plays against one that comments", "guided-opd", "opd"),
)
"""The paper's claims, then the questions about weights and teachers: who should be ahead of whom."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One claim in one world, on the last checkpoints.

    Attributes:
        claim: in words.
        seeds: training seeds that both methods have.
        tasks: paired difference over tasks, episodes of all seeds together.
        p_seeds: Welch's test over training seeds; 1 where there are fewer than two.
        by_label: difference by task type or data set.
    """

    claim: str
    seeds: tuple[int, ...]
    tasks: Paired
    p_seeds: float
    by_label: Mapping[str, Paired]

    @property
    def verdict(self) -> str:
        """Both tests must agree at 5 %."""
        decided = self.tasks.p_value < 0.05 and self.p_seeds < 0.05
        if self.tasks.difference > 0:
            return "holds" if decided else "ahead, not decided"
        if self.tasks.difference < 0:
            return "reversed" if decided else "behind, not decided"
        return "no difference"


def decide(claim: str, ahead: Sequence[Mapping[str, Any]], behind: Sequence[Mapping[str, Any]]) -> Decision | None:
    """Compare two methods' last checkpoints on the seeds that both have; None where they share none.

    Cells of several worlds are taken together: all their tasks are compared, and a seed's value is its mean over the
    worlds. A seed counts where both methods have it in all worlds of the cells.
    """
    worlds = sorted({str(cell.get("world")) for cell in (*ahead, *behind)})  # an order of their own, or p would vary
    left, right = ({(cell["seed"], str(cell.get("world"))): cell for cell in side} for side in (ahead, behind))
    both = left.keys() & right.keys()
    seeds = tuple(sorted({seed for seed, _ in both if all((seed, world) in both for world in worlds)}))
    if not seeds:
        return None
    chosen = [[[side[seed, world] for world in worlds] for seed in seeds] for side in (left, right)]
    whole = []
    for side in chosen:
        parts = [load_evaluation(Path(cell["folder"]) / "evaluation-last") for cells in side for cell in cells]
        whole.append(Evaluation(tuple(t for part in parts for e in part.values() for t in e.trajectories)))
    result = compare(whole[0], whole[1])
    return Decision(
        claim,
        seeds,
        result.success,
        welch(*[[_mean(cells, "last") for cells in side] for side in chosen]),
        result.by_label,
    )


def write_tables(out: Path, cells: Sequence[Mapping[str, Any]], preset: Preset) -> None:
    """Write ``tables.md``, ``study-results.json`` and, where matplotlib is installed, the figures.

    Args:
        out: the study's folder.
        cells: finished cells.
        preset: the study's preset.
    """
    worlds: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        worlds.setdefault(cell["world"], {}).setdefault(cell["method"], []).append(cell)
    decisions = {name: _decisions(methods) for name, methods in worlds.items()}
    if together := _together(worlds):
        decisions["together"] = together
    lines = ["# Results", "", *_table1(worlds)]
    for name, methods in worlds.items():
        lines += ["", f"## {name}", "", *_success(methods), "", *_claims(decisions[name])]
        lines += ["", *_labels(methods), "", *_groups(methods), "", *_curves(methods)]
        found = [world for world in preset.worlds if world.name == name]
        if found and (tuned := tuned_of(out, found[0])):
            lines += ["", *_tuning(tuned)]
    if together:
        note = "All tasks of the worlds together; a seed's value is its mean over them. Claims that every world decides on."
        lines += ["", f"## {', '.join(worlds)}", "", note, "", *_claims(together)]
    replace_text(out / "tables.md", "\n".join(lines) + "\n")
    plain = [_published(cell) for cell in cells]
    known = {
        name: [asdict(decision) | {"verdict": decision.verdict} for decision in found]
        for name, found in decisions.items()
    }
    replace_text(out / "study-results.json", json.dumps({"cells": plain, "claims": known}, indent=1) + "\n")
    try:
        _figures(out, worlds)
    except ImportError:
        return


def _published(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's numbers, with the command and the commits of its training run."""
    about = Path(cell["folder"]) / "config.json"
    source = read_object(about, "train the cell again") if about.exists() else {}
    named = {name: source[name] for name in ("command", "commits") if name in source}
    if "command" in named:
        named["command"] = without(named["command"], "--run")
    return {name: value for name, value in cell.items() if name != "folder"} | named


def _decisions(methods: Cells) -> list[Decision]:
    found = [decide(claim, methods[a], methods[b]) for claim, a, b in CLAIMS if a in methods and b in methods]
    trained = [name for name in methods if METHODS[name].algorithm and name not in ABLATIONS[1:]]
    if len(trained) > 1:
        first, second = sorted(trained, key=lambda name: -_mean(methods[name], "last"))[:2]
        claim = f"the first, {METHODS[first].label}, against the runner-up, {METHODS[second].label}"
        found.append(decide(claim, methods[first], methods[second]))
    return [decision for decision in found if decision is not None]


def _together(worlds: Mapping[str, Cells]) -> list[Decision]:
    """The claims over all worlds; none where there is one world."""
    found = []
    for claim, a, b in CLAIMS if len(worlds) > 1 else ():
        if all(a in methods and b in methods for methods in worlds.values()):
            sides = [[cell for methods in worlds.values() for cell in methods[name]] for name in (a, b)]
            found.append(decide(claim, *sides))
    return [decision for decision in found if decision is not None]


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
    for key, method in METHODS.items():
        if not any(key in methods for methods in worlds.values()):
            continue
        row, values = [method.label], []
        for methods in worlds.values():
            cells = methods.get(key, [])
            values += [_mean(cells, "last")] if cells else []
            row += [with_spread(cells, "last"), f"{_mean(cells, 'last', 'length'):.1f}"] if cells else ["-", "-"]
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
                METHODS[name].label, str(len(cells)), with_spread(cells, "last"), each, with_spread(cells, "best") if trained else "-",
                f"{100 * sum(peaks) / len(peaks):.1f}" if peaks else "-", f"{_mean(cells, 'last', 'length'):.2f}",
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
            d.claim, f"{100 * d.tasks.difference:+.1f}", f"{100 * d.tasks.low:+.1f} to {100 * d.tasks.high:+.1f}", f"{d.tasks.p_value:.3g}",
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
        *markdown_table(["kind", *[METHODS[m].label for m in methods]], rows),
    ]


def _groups(methods: Cells) -> list[str]:
    """What reward has to say: groups in which all attempts end alike give it nothing."""
    header = ["method", "all fail, first quarter", "last quarter", "all succeed, last quarter", "mixed, last quarter"]
    rows = []
    for name, cells in methods.items():
        runs = [metrics for cell in cells if (metrics := read_metrics(Path(cell["folder"])))]
        if not runs:
            continue

        def share(key: str, part: Callable[[int], slice], runs: Sequence[list[dict[str, float]]] = runs) -> float:
            values = [row[key] for rows in runs for row in rows[part(len(rows))]]
            return sum(values) / len(values)

        first, last = (lambda n: slice(0, max(1, n // 4))), (lambda n: slice(-max(1, n // 4), None))
        fail, won = share("group/all_fail", last), share("group/all_success", last)
        numbers = (share("group/all_fail", first), fail, won, 1 - fail - won)
        rows.append([METHODS[name].label, *[f"{100 * x:.0f} %" for x in numbers]])
    return ["Groups by outcome during training:", "", *markdown_table(header, rows)]


def _curves(methods: Cells) -> list[str]:
    steps = sorted({int(step) for cells in methods.values() for cell in cells for step in cell.get("validation", {})})
    rows = []
    for name, cells in methods.items():
        if "validation" in cells[0]:
            means = [[cell["validation"][str(s)] for cell in cells if str(s) in cell["validation"]] for s in steps]
            rows.append([METHODS[name].label, *[f"{100 * sum(v) / len(v):.1f}" if v else "-" for v in means]])
    return ["Validation success by step, %, mean over seeds:", "", *markdown_table(["method", *map(str, steps)], rows)]


def _tuning(tuned: Mapping[str, Mapping[Tuned, float]]) -> list[str]:
    columns = sorted({one for found in tuned.values() for one in found}, key=lambda one: (one.updates, one.lr))
    rows = [
        [METHODS[name].label, *[f"{100 * found[one]:.1f}" if one in found else "-" for one in columns]]
        for name, found in tuned.items()
    ]
    return [
        "Choice of the settings: mean of the later validations, %, with a seed of its own:",
        "",
        *markdown_table(["method", *map(str, columns)], rows),
    ]


def _mean(cells: Sequence[Mapping[str, Any]], which: str, key: str = "success") -> float:
    values = [float(cell[which][key]) for cell in cells]
    return sum(values) / len(values)


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
        bars = {METHODS[m].label: _bars(methods[m]) for m in ABLATIONS if m in methods}
        if len(bars) > 1:
            save(plt, bar_figure(plt, bars, f"success on {name}, %"), folder / f"figure4-{name}")
        drawn = [cells for m, cells in methods.items() if METHODS[m].algorithm and m not in ABLATIONS[1:]]
        runs = [read_run(Path(cell["folder"])) for cells in drawn for cell in cells]
        if runs:
            save(plt, training_figure(plt, runs), folder / f"figure5-{name}")


def _bars(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = {"last": "last", "best": "best by validation"}
    return {name: [100 * cell[which]["success"] for cell in cells] for which, name in names.items()}
