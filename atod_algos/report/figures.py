"""The paper's Figures 2, 4, 5, 6, 13 and 14, drawn from stored runs as PNG and SVG.

Runs that differ in their seed alone are drawn as one line, their mean, with the span between the lowest and the highest. The
invariant: lines differ in colour, in dash and in marker, in a palette that colour-blind readers can tell apart (Okabe and Ito 2008), so
that a figure survives a grey printer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atod_algos.report.data import Run
from atod_algos.report.tokens import Scorer, TurnScores

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)))
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_WIDTH = 3.4
"""Inches of a panel: two fit a printed column of 7 inches with 8-point letters."""
_SMOOTH = 9

Series = tuple[list[float], list[float]]


def write_figures(runs: Sequence[Run], out: Path, scorers: Mapping[Path, Scorer]) -> list[Path]:
    """Draw every figure that the runs hold the data for.

    Args:
        runs: stored runs.
        out: where the files go.
        scorers: by run's folder.

    Returns:
        The files, two a figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    out.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[], Any]] = {
        "figure2": lambda: _figure2(plt, runs, scorers),
        "figure4": lambda: _figure4(plt, runs),
        "figure5": lambda: training_figure(plt, runs),
        "figure6": lambda: _figure6(plt, runs),
        "figure13": lambda: _figure13(plt, runs, scorers),
        "figure14": lambda: _figure14(plt, runs),
    }
    files = []
    for name, draw in drawn.items():
        figure = draw()
        if figure is not None:
            files += save(plt, figure, out / name)
    return files


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


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each method, in the order in which methods first appear."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def _panels(plt: Any, n: int, columns: int = 3) -> tuple[Any, list[Any]]:
    columns = min(n, columns)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(_WIDTH * columns, 2.5 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[n:]:
        axis.remove()
    return figure, flat[:n]


def _lines(
    axis: Any,
    runs: Sequence[Run],
    series: Callable[[Run], Series],
    *,
    smooth: bool = False,
    scale: float = 1.0,
    offset: int = 0,
) -> bool:
    """Draw a quantity by step, one line a method; whether there was anything to draw."""
    drawn = False
    for place, (method, members) in enumerate(by_method(runs).items(), offset):
        steps, low, mean, high = _over_seeds([series(run) for run in members])
        if not len(steps):
            continue
        drawn = True
        style = {"color": COLOURS[place % 7], "linestyle": DASHES[place % 7]}
        label = method + (f" ({len(members)} seeds)" if len(members) > 1 else "")
        if smooth and len(steps) > _SMOOTH:
            axis.plot(steps, scale * mean, color=COLOURS[place % 7], linewidth=0.5, alpha=0.35)
            mean = _running(mean)
            axis.plot(
                steps,
                scale * mean,
                label=label,
                marker=MARKERS[place % 7],
                markevery=max(1, len(steps) // 7),
                markersize=3.5,
                **style,
            )
        else:
            axis.plot(steps, scale * mean, label=label, marker=MARKERS[place % 7], markersize=3.5, **style)
        if len(members) > 1:
            axis.fill_between(steps, scale * low, scale * high, color=COLOURS[place % 7], alpha=0.13, linewidth=0)
    return drawn


def _over_seeds(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all members have, and the lowest, mean and highest value at each."""
    known = [dict(zip(*one, strict=True)) for one in series]
    steps = sorted(set.intersection(*(set(one) for one in known))) if known else []
    values = np.array([[one[step] for step in steps] for one in known], dtype=float).reshape(len(known), len(steps))
    if not steps:
        empty = np.zeros(0)
        return empty, empty, empty, empty
    return np.array(steps), values.min(0), values.mean(0), values.max(0)


def _running(values: np.ndarray) -> np.ndarray:
    half = _SMOOTH // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _label(axis: Any, title: str, y: str = "", x: str = "training step") -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)


# --- the figures ------------------------------------------------------------------------------------------------------


def _figure2(plt: Any, runs: Sequence[Run], scorers: Mapping[Path, Scorer]) -> Any:
    """(a) validation success by step; (b) d_k, h_k and w_k of the turns of one trajectory."""
    example = _example(runs, scorers)
    figure, axes = _panels(plt, 2 if example else 1, 2)
    if not _lines(axes[0], runs, lambda run: run.validations(), scale=100) and example is None:
        plt.close(figure)
        return None
    _label(axes[0], "(a) validation success", "%")
    axes[0].set_ylim(bottom=0)
    _legend(axes[0])
    if example:
        title, scores = example
        turns = np.arange(1, len(scores) + 1)
        for place, (name, values) in enumerate(
            (("disagreement $d_k$", [s.d for s in scores]), ("uncertainty $h_k$", [s.h for s in scores]))
        ):
            axes[1].plot(
                turns,
                values,
                color=COLOURS[place],
                linestyle=DASHES[place],
                marker=MARKERS[place],
                markersize=4,
                label=name,
            )
        axes[1].bar(
            turns,
            [s.w or 0.0 for s in scores],
            color="#CC79A7",
            alpha=0.45,
            hatch="//",
            edgecolor="#7a4b94",
            linewidth=0.5,
            label="weight $w_k$",
        )
        axes[1].set_xticks(turns)
        axes[1].set_ylim(bottom=0)
        _label(axes[1], f"(b) {title}", "nats a token; weight", "turn")
        _legend(axes[1])
    return figure


def _example(runs: Sequence[Run], scorers: Mapping[Path, Scorer]) -> tuple[str, list[TurnScores]] | None:
    """The solved episode of the last stored step whose weights differ most, of the first run that has any."""
    for run in runs:
        for step in run.steps("train")[-1:]:
            episodes = run.episodes("train", step)
            scores = scorers[run.path].scores("train", step, episodes) if run.path in scorers else {}
            best: tuple[float, str, list[TurnScores]] | None = None
            for n, episode in enumerate(episodes):
                turns = [scores[n, turn.index] for turn in episode.turns if (n, turn.index) in scores]
                weights = [turn.w for turn in turns if turn.w is not None and turn.d is not None]
                if episode.success and len(weights) == len(turns) >= 3:
                    spread = float(np.std(weights))
                    if best is None or spread > best[0]:
                        best = (spread, f"turns of one episode, {run.method}, step {step}", turns)
            if best is not None:
                return best[1], best[2]
    return None


def _figure4(plt: Any, runs: Sequence[Run]) -> Any:
    """Best and last validation success of each method, as bars; the paper's Figure 4 for its ablations."""
    methods = by_method([run for run in runs if run.validations()[0]])
    if len(methods) < 2:
        return None
    bars = {}
    for method, members in methods.items():
        values = [run.validations()[1] for run in members]
        bars[method] = {
            "best validation": [100 * max(v) for v in values],
            "last validation": [100 * v[-1] for v in values],
        }
    return bar_figure(plt, bars, "validation success, %")


def bar_figure(plt: Any, bars: Mapping[str, Mapping[str, Sequence[float]]], y: str) -> Any:
    """Grouped bars: mean over seeds, and each seed as a dot.

    Args:
        plt: pyplot.
        bars: group (a method) -> bar -> values, one a seed.
        y: label of the axis.
    """
    figure, axis = plt.subplots(figsize=(max(_WIDTH, 0.95 * len(bars) + 1), 2.7))
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


def training_figure(plt: Any, runs: Sequence[Run]) -> Any:
    """(a) reward of training, (b) validation success, (c) turns, by step."""
    figure, axes = _panels(plt, 3)
    _lines(axes[0], runs, lambda run: run.series("critic/rewards/mean"), smooth=True)
    _label(axes[0], "(a) training reward, mean over turns", "reward")
    _lines(axes[1], runs, lambda run: run.validations(), scale=100)
    _label(axes[1], "(b) validation success", "%")
    axes[1].set_ylim(bottom=0)
    _lines(axes[2], runs, lambda run: run.series("episode/length/mean"), smooth=True)
    _label(axes[2], "(c) turns of a training episode", "turns")
    _legend(axes[0])
    return figure


def _figure6(plt: Any, runs: Sequence[Run]) -> Any:
    """(a) sizes of the two terms, (b) mean turn weight, (c) gap between teacher and student, by step."""
    if not any(run.series("/teacher_student_gap_mean")[0] for run in runs):
        return None
    hybrid = [run for run in runs if run.series("atod/opd_abs_mean")[0]]
    figure, axes = _panels(plt, 3 if hybrid else 1)
    if hybrid:
        whole = [run for run in hybrid if run.method == "ATOD"] or hybrid[:1]
        _named(axes[0], whole, (("OPD term", "atod/opd_abs_mean"), ("reward term", "atod/rl_abs_mean")))
        _label(axes[0], f"(a) size of the two terms, {whole[0].method}", "mean over tokens")
        _legend(axes[0])
        _lines(axes[1], hybrid, lambda run: run.series("tip/mean_importance"), smooth=True)
        _label(axes[1], "(b) mean turn weight", "$w_k$")
        axes[1].set_ylim(0, 1)
        _legend(axes[1])
    _lines(axes[-1], runs, lambda run: _negated(run.series("/teacher_student_gap_mean")), smooth=True)
    _label(axes[-1], "(c) gap to the teacher", r"$-\overline{\Delta}$, nats a token")
    axes[-1].set_ylim(bottom=0)
    _legend(axes[-1])
    return figure


def _figure13(plt: Any, runs: Sequence[Run], scorers: Mapping[Path, Scorer]) -> Any:
    """d_k, h_k and w_k by turn index on the validation panel, before and after training; dashed: episodes still going on."""
    for run in sorted(runs, key=lambda run: run.method != "ATOD"):
        steps = run.steps("valid")
        if len(steps) < 2 or run.path not in scorers:
            continue
        tables = {}
        for name, step in (("before", steps[0]), (f"after step {steps[-1]}", steps[-1])):
            episodes = run.episodes("valid", step)
            scores = scorers[run.path].scores("valid", step, episodes)
            if any(score.d is not None for score in scores.values()):
                tables[name] = scores
        if len(tables) < 2:
            continue
        figure, axes = _panels(plt, 3)
        for axis, quantity, title in zip(
            axes, "dhw", ("(a) disagreement $d_k$", "(b) uncertainty $h_k$", "(c) weight $w_k$"), strict=True
        ):
            alive = axis.twinx()
            alive.grid(False)
            for place, (name, scores) in enumerate(tables.items()):
                turns, means, counts = _by_index(scores, quantity)
                axis.plot(turns, means, color=COLOURS[place], marker=MARKERS[place], markersize=3.5, label=name)
                alive.plot(turns, counts, color=COLOURS[place], linestyle="--", linewidth=0.9)
            alive.set_ylim(bottom=0)
            alive.set_ylabel("episodes (dashed)")
            alive.spines["right"].set_visible(True)
            axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            _label(axis, f"{title}, {run.method}", "weight" if quantity == "w" else "nats a token", "turn")
        _legend(axes[0])
        return figure
    return None


def _by_index(scores: Mapping[tuple[int, int], TurnScores], quantity: str) -> tuple[list[int], list[float], list[int]]:
    """Mean of a quantity by turn index, from 1, and the number of episodes that have such a turn.

    d and h are means over tokens, so long responses count more (as published); w is a mean over turns.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    for (_, index), score in scores.items():
        value = getattr(score, quantity)
        if value is not None:
            found.setdefault(index, []).append((value, 1 if quantity == "w" else len(score.student)))
    turns = sorted(found)
    means = [float(np.average([v for v, _ in found[t]], weights=[n for _, n in found[t]])) for t in turns]
    return [t + 1 for t in turns], means, [len(found[t]) for t in turns]


def _figure14(plt: Any, runs: Sequence[Run]) -> Any:
    """Further training curves."""
    wanted = (
        ("actor/entropy_loss", "entropy", "nats a token"),
        ("actor/pg_clipfrac", "clipped tokens", "share"),
        ("actor/grad_norm", "gradient norm", ""),
        ("response_length/mean", "response length", "tokens"),
        ("episode/valid_action_ratio", "valid actions", "share"),
        ("atod/kl_coef", r"$\kappa$", ""),
        ("atod/rl_coef", r"$\rho$", ""),
        ("atod/opd_rl_ratio", "OPD to reward ratio", ""),
        ("tip/active_ratio", "trajectories with weights", "share"),
    )
    held = [one for one in wanted if any(run.series(one[0])[0] for run in runs)]
    if not held:
        return None
    figure, axes = _panels(plt, len(held))
    for axis, (key, title, unit) in zip(axes, held, strict=True):
        _lines(axis, runs, lambda run, key=key: run.series(key), smooth=not key.endswith("_coef"))  # type: ignore[misc]
        _label(axis, title, unit)
        if unit == "share":
            axis.set_ylim(bottom=0)
    _legend(axes[0])
    return figure


def _named(axis: Any, runs: Sequence[Run], keys: Sequence[tuple[str, str]]) -> None:
    """Several quantities of one method, a line each."""
    for place, (name, key) in enumerate(keys):
        steps, _, mean, _ = _over_seeds([run.series(key) for run in runs])
        if len(steps):
            values = _running(mean) if len(steps) > _SMOOTH else mean
            axis.plot(
                steps,
                values,
                color=COLOURS[place],
                linestyle=DASHES[place],
                marker=MARKERS[place],
                markevery=max(1, len(steps) // 7),
                markersize=3.5,
                label=name,
            )
    axis.set_ylim(bottom=0)


def _negated(series: Series) -> Series:
    return series[0], [-value for value in series[1]]


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
