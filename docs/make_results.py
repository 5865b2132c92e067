"""The study's results of one algorithm, for its page: a table, what is decided about it, and curves as SVG.

``docs/make_pages.py`` writes and checks them.
"""

from __future__ import annotations

import json
import textwrap
from html import escape
from typing import Any

from make_study import RESULTS, WORLDS, commands, decisions

from atod_algos.evaluate.statistics import t_interval
from atod_algos.study import METHODS


def cells_of(method: str) -> dict[str, list[dict[str, Any]]]:
    """The study's finished cells of a method, by world."""
    every = json.loads(RESULTS.read_text())["cells"]
    return {world: [cell for cell in every if (cell["world"], cell["method"]) == (world, method)] for world in WORLDS}


def rows_of(name: str) -> list[str]:
    """An algorithm's own rows of the study: its methods that were run."""
    return [key for key, method in METHODS.items() if method.algorithm == name and any(cells_of(key).values())]


def results(name: str) -> str:
    """Success in all worlds with the command, or that there is none."""
    rows = rows_of(name)
    if not rows:
        offered = [key for key, method in METHODS.items() if method.algorithm == name]
        how = f"\nTo run it there: `--methods {' '.join(offered)}`." if offered else ""
        return f"Not run in [the study](../study.md): there is no table and no curve, in any world.{how}"
    cells = [cell for key in rows for found in cells_of(key).values() for cell in found]
    torch = {cell["versions"]["torch"] for cell in cells}
    commits = dict.fromkeys(commit[:7] for cell in cells for commit in cell.get("commits", ()))
    seeds = sorted({len(found) for key in rows for found in cells_of(key).values() if found})
    how_many = " or ".join(map(str, seeds))
    table = ["| | ALFWorld | turns | Search-QA | turns | WebShop | turns |", f"|---|{'---:|' * 6}"]
    for key in ("vanilla", *rows, "teacher"):
        label = {"vanilla": "the student before", "teacher": "the teacher"}.get(key) or f"**{METHODS[key].label}**"
        table.append(f"| {label} | {' | '.join(in_world(cells) for cells in cells_of(key).values())} |")
    claims = decisions(json.loads(RESULTS.read_text())["claims"], tuple(METHODS), rows)
    said = "What [the study](../study.md) decides: points of success (p over tasks, p over seeds), bold where both are below 5 %."
    decided = [*textwrap.wrap(said, 120), "", claims, ""] if len(claims.splitlines()) > 2 else []
    asked = commands(cells, "laptop")
    command = ("Command: " if len(asked) == 1 else "Commands: ") + ", ".join(f"`{one}`" for one in asked) + "."
    return "\n".join(
        [
            f"Success in % of the last checkpoint, with the 95 % t-interval over {how_many} training seeds, 60 steps each.",
            "",
            *table,
            "",
            f"![validation success by step, the other methods in grey](../images/results-{name}.svg)",
            "",
            *decided,
            *textwrap.wrap(command, 120, break_on_hyphens=False),
            f"Commit `{', '.join(commits)}`, torch {', '.join(sorted(torch))}.",
            "All rows, seeds and curves: [tables](../study/tables.md).",
        ]
    )


def in_world(cells: list[dict[str, Any]]) -> str:
    """Success with its interval, and turns; a bar where the method was not run."""
    if not cells:
        return "- | -"
    values = [100 * cell["last"]["success"] for cell in cells]
    low, high = t_interval(values)
    turns = sum(cell["last"]["length"] for cell in cells) / len(cells)
    return f"{sum(values) / len(values):.1f} ± {(high - low) / 2:.1f} | {turns:.1f}"


def curves(name: str) -> str:
    """Validation success by step in each world, the mean over seeds: own methods in colour, the others in grey."""
    width, height, left, top, bottom = 300, 190, 44, 24, 36
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7a5195")
    dashes = ("", "7 3", "2 2", "8 3 2 3", "1 3", "10 2", "4 1", "6 2 1 2")
    own = rows_of(name)
    body = []
    for column, (world, title) in enumerate(WORLDS.items()):
        x0, y0 = column * width + left, height - bottom
        lines = {}
        for key in (key for key, method in METHODS.items() if method.algorithm):
            found = [cell["validation"] for cell in cells_of(key)[world]]
            if found:
                lines[key] = {int(step): 100 * sum(v[step] for v in found) / len(found) for step in found[0]}
        steps = sorted({step for line in lines.values() for step in line})
        highest = 10 * -(-max(max(line.values()) for line in lines.values()) // 10)

        def at(
            step: float, value: float, x0: int = x0, y0: int = y0, last: int = steps[-1], most: float = highest
        ) -> str:
            across, up = (width - left - 14) * step / last, (height - top - bottom) * value / most
            return f"{x0 + across:.1f} {y0 - up:.1f}"

        for value in range(0, int(highest) + 1, 10):
            body.append(f'<path class="g" d="M{at(0, value)}L{at(steps[-1], value)}"/>')
            body.append(
                f'<text x="{x0 - 5}" y="{float(at(0, value).split()[1]) + 4:.1f}" text-anchor="end">{value}</text>'
            )
        for step in steps[1::2]:
            body.append(f'<text x="{at(step, 0).split()[0]}" y="{y0 + 14}" text-anchor="middle">{step}</text>')
        body.append(f'<text class="b" x="{x0}" y="15">{title}</text>')
        body.append(f'<text x="{x0 + 121}" y="{height - 6}" text-anchor="middle">training step</text>')
        for key in sorted(lines, key=own.__contains__):
            path = "L".join(at(step, lines[key][step]) for step in sorted(lines[key]))
            place = own.index(key) if key in own else None
            look = 'class="o"' if place is None else f'stroke="{colours[place]}" stroke-dasharray="{dashes[place]}"'
            body.append(f'<path fill="none" stroke-width="{1 if place is None else 2.2}" {look} d="M{path}"/>')
    body.append(
        f'<text transform="translate(11 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">success, %</text>'
    )
    for place, key in enumerate(own):
        x, y = 44 + place % 4 * 215, height + 12 + place // 4 * 18
        body.append(
            f'<path stroke-width="2.2" stroke="{colours[place]}" stroke-dasharray="{dashes[place]}" d="M{x} {y - 4}h28"/>'
        )
        body.append(f'<text x="{x + 34}" y="{y}">{escape(METHODS[key].label)}</text>')
    style = (
        "text{font:11px system-ui,Arial,sans-serif;fill:#5b6570}.b{font-weight:700;font-size:13px}.g{stroke:#e3e7eb}"
        ".o{stroke:#b9c1ca}@media(prefers-color-scheme:dark){text{fill:#99a3b0}.g{stroke:#39414b}.o{stroke:#5b6570}}"
    )
    tall = height + 20 + (len(own) - 1) // 4 * 18
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {tall}" role="img">'
    return "\n".join([head, f"<style>{style}</style>", *body, "</svg>", ""])
