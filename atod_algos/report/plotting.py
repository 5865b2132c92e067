"""How the figures look: palette, panels, lines, bars. What they show is in ``figures``.

The invariant: lines differ in colour, in dash and in marker, in a palette that colour-blind readers can tell apart
(Okabe and Ito 2008), so that a figure survives a grey printer; the same data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atod_algos.report.data import Run, by_method

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)))
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
PANEL_WIDTH = 3.4
"""Inches of a panel: two fit a printed column of 7 inches with 8-point letters."""
_SMOOTH = 9

Series = tuple[list[float], list[float]]


def line_style(place: int, steps: int = 0) -> dict[str, Any]:
    """How the line of this number looks; of many ``steps`` a few carry a marker."""
    marks = {"marker": MARKERS[place % 7], "markersize": 3.5, "markevery": max(1, steps // 7) if steps else None}
    return {"color": COLOURS[place % 7], "linestyle": DASHES[place % 7], **marks}


def save(plt: Any, figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, the same bytes for the same data."""
    files = []
    for suffix in ("png", "svg"):
        target = path.with_name(f"{path.name}.{suffix}")
        figure.savefig(target, dpi=200, metadata={"Date": None} if suffix == "svg" else {"Software": None})
        files.append(target)
    plt.close(figure)
    return files


def pyplot() -> Any:
    """The drawing library, matplotlib's pyplot, set up for print.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'atod[report]', or leave them out with --no-figures"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5, "svg.hashsalt": "atod", "svg.fonttype": "none",
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e7eb", "grid.linewidth": 0.6,
            "figure.constrained_layout.use": True, "lines.linewidth": 1.6, "legend.frameon": False,
        }
    )  # fmt: skip
    return plt


def panels(plt: Any, n: int, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure of ``n`` panels, and their axes."""
    columns = min(n, columns)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(PANEL_WIDTH * columns, 2.5 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[n:]:
        axis.remove()
    return figure, flat[:n]


def draw_lines(
    axis: Any,
    runs: Sequence[Run],
    series: Callable[[Run], Series],
    *,
    smooth: bool = False,
    scale: float = 1.0,
) -> bool:
    """Draw a quantity by step, one line a method; whether there was anything to draw."""
    drawn = False
    for place, (method, members) in enumerate(by_method(runs).items()):
        steps, low, mean, high = over_seeds([series(run) for run in members])
        if not len(steps):
            continue
        drawn = True
        label = method + (f" ({len(members)} seeds)" if len(members) > 1 else "")
        smoothed = smooth and len(steps) > _SMOOTH
        if smoothed:
            axis.plot(steps, scale * mean, color=COLOURS[place % 7], linewidth=0.5, alpha=0.35)
            mean = running_mean(mean)
        axis.plot(steps, scale * mean, label=label, **line_style(place, len(steps) if smoothed else 0))
        if len(members) > 1:
            axis.fill_between(steps, scale * low, scale * high, color=COLOURS[place % 7], alpha=0.13, linewidth=0)
    return drawn


def over_seeds(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all members have, and the lowest, mean and highest value at each."""
    known = [dict(zip(*one, strict=True)) for one in series]
    steps = sorted(set.intersection(*(set(one) for one in known))) if known else []
    values = np.array([[one[step] for step in steps] for one in known], dtype=float).reshape(len(known), len(steps))
    if not steps:
        empty = np.zeros(0)
        return empty, empty, empty, empty
    return np.array(steps), values.min(0), values.mean(0), values.max(0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over nine neighbouring steps, over fewer at the ends."""
    half = _SMOOTH // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def label(axis: Any, title: str, y: str = "", x: str = "training step") -> None:
    """Title and axes of a panel."""
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def bar_figure(plt: Any, bars: Mapping[str, Mapping[str, Sequence[float]]], y: str) -> Any:
    """Grouped bars: mean over seeds, and each seed as a dot.

    Args:
        plt: pyplot.
        bars: group (a method) -> bar -> values, one a seed.
        y: label of the axis.
    """
    figure, axis = plt.subplots(figsize=(max(PANEL_WIDTH, 0.95 * len(bars) + 1), 2.7))
    names = list(next(iter(bars.values())))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = np.arange(len(bars)) + (place - (len(names) - 1) / 2) * width
        values = [bars[group].get(name, []) for group in bars]
        axis.bar(
            at,
            [float(np.mean(v)) if v else 0.0 for v in values],
            width * 0.94,
            color=COLOURS[place],
            alpha=0.6,
            hatch=HATCHES[place],
            edgecolor="white",
            label=name,
        )
        for x, points in zip(at, values, strict=True):
            axis.plot([x] * len(points), points, "o", color="black", markersize=2.6)
    axis.set_xticks(
        np.arange(len(bars)), [group.replace(" w/o ", "\nw/o ").replace(" token", "\ntoken") for group in bars]
    )
    axis.set_ylabel(y)
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(names))
    return figure


def draw_named(axis: Any, runs: Sequence[Run], keys: Sequence[tuple[str, str]]) -> None:
    """Several quantities of one method, a line each."""
    for place, (name, key) in enumerate(keys):
        steps, _, mean, _ = over_seeds([run.series(key) for run in runs])
        if len(steps):
            values = running_mean(mean) if len(steps) > _SMOOTH else mean
            axis.plot(steps, values, label=name, **line_style(place, len(steps)))
    axis.set_ylim(bottom=0)


def legend(axis: Any) -> None:
    """A legend, where there are lines to explain."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
