"""The paper's Figures 2, 4, 5, 6, 13 and 14, drawn from stored runs as PNG and SVG.

Runs that differ in their seed alone are drawn as one line, their mean, with the span between the lowest and the
highest. The invariant: a figure is drawn from stored data alone, and left out where the runs do not hold what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atod_algos.report.data import Run, by_method
from atod_algos.report.plotting import (
    COLOURS,
    MARKERS,
    Series,
    bar_figure,
    draw_lines,
    draw_named,
    label,
    legend,
    line_style,
    panels,
    pyplot,
    save,
)
from atod_algos.report.tokens import Scorer, TurnScores
from atod_algos.report.weights import before_and_after, by_turn_index


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


# --- the figures ------------------------------------------------------------------------------------------------------


def _figure2(plt: Any, runs: Sequence[Run], scorers: Mapping[Path, Scorer]) -> Any:
    """(a) validation success by step; (b) d_k, h_k and w_k of the turns of one trajectory."""
    example = _example(runs, scorers)
    figure, axes = panels(plt, 2 if example else 1, 2)
    if not draw_lines(axes[0], runs, lambda run: run.validations(), scale=100) and example is None:
        plt.close(figure)
        return None
    label(axes[0], "(a) validation success", "%")
    axes[0].set_ylim(bottom=0)
    legend(axes[0])
    if example:
        title, scores = example
        turns = np.arange(1, len(scores) + 1)
        for place, (name, values) in enumerate(
            (("disagreement $d_k$", [s.d for s in scores]), ("uncertainty $h_k$", [s.h for s in scores]))
        ):
            axes[1].plot(turns, values, label=name, **{**line_style(place), "markersize": 4})
        bars = {"color": "#CC79A7", "alpha": 0.45, "hatch": "//", "edgecolor": "#7a4b94", "linewidth": 0.5}
        axes[1].bar(turns, [s.w or 0.0 for s in scores], label="weight $w_k$", **bars)
        axes[1].set_xticks(turns)
        axes[1].set_ylim(bottom=0)
        label(axes[1], f"(b) {title}", "nats a token; weight", "turn")
        legend(axes[1])
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


def training_figure(plt: Any, runs: Sequence[Run]) -> Any:
    """(a) reward of training, (b) validation success, (c) turns, by step."""
    figure, axes = panels(plt, 3)
    draw_lines(axes[0], runs, lambda run: run.series("critic/rewards/mean"), smooth=True)
    label(axes[0], "(a) training reward, mean over turns", "reward")
    draw_lines(axes[1], runs, lambda run: run.validations(), scale=100)
    label(axes[1], "(b) validation success", "%")
    axes[1].set_ylim(bottom=0)
    draw_lines(axes[2], runs, lambda run: run.series("episode/length/mean"), smooth=True)
    label(axes[2], "(c) turns of a training episode", "turns")
    legend(axes[0])
    return figure


def _figure6(plt: Any, runs: Sequence[Run]) -> Any:
    """(a) sizes of the two terms, (b) mean turn weight, (c) gap between teacher and student, by step."""
    if not any(run.series("/teacher_student_gap_mean")[0] for run in runs):
        return None
    hybrid = [run for run in runs if run.series("atod/opd_abs_mean")[0]]
    figure, axes = panels(plt, 3 if hybrid else 1)
    if hybrid:
        whole = [run for run in hybrid if run.method == "ATOD"] or hybrid[:1]
        draw_named(axes[0], whole, (("OPD term", "atod/opd_abs_mean"), ("reward term", "atod/rl_abs_mean")))
        label(axes[0], f"(a) size of the two terms, {whole[0].method}", "mean over tokens")
        legend(axes[0])
        draw_lines(axes[1], hybrid, lambda run: run.series("tip/mean_importance"), smooth=True)
        label(axes[1], "(b) mean turn weight", "$w_k$")
        axes[1].set_ylim(0, 1)
        legend(axes[1])
    draw_lines(axes[-1], runs, lambda run: _negated(run.series("/teacher_student_gap_mean")), smooth=True)
    label(axes[-1], "(c) gap to the teacher", r"$-\overline{\Delta}$, nats a token")
    axes[-1].set_ylim(bottom=0)
    legend(axes[-1])
    return figure


def _figure13(plt: Any, runs: Sequence[Run], scorers: Mapping[Path, Scorer]) -> Any:
    """d_k, h_k and w_k by turn index on the validation panel, before and after training; dashed: open episodes."""
    for run in sorted(runs, key=lambda run: run.method != "ATOD"):
        tables = before_and_after(run, scorers.get(run.path))
        if not tables:
            continue
        figure, axes = panels(plt, 3)
        for axis, quantity, title in zip(
            axes, "dhw", ("(a) disagreement $d_k$", "(b) uncertainty $h_k$", "(c) weight $w_k$"), strict=True
        ):
            alive = axis.twinx()
            alive.grid(False)
            for place, (name, scores) in enumerate(tables.items()):
                turns, means, counts = by_turn_index(scores, quantity)
                axis.plot(turns, means, color=COLOURS[place], marker=MARKERS[place], markersize=3.5, label=name)
                alive.plot(turns, counts, color=COLOURS[place], linestyle="--", linewidth=0.9)
            alive.set_ylim(bottom=0)
            alive.set_ylabel("episodes (dashed)")
            alive.spines["right"].set_visible(True)
            axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            label(axis, f"{title}, {run.method}", "weight" if quantity == "w" else "nats a token", "turn")
        legend(axes[0])
        return figure
    return None


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
    figure, axes = panels(plt, len(held))
    for axis, (key, title, unit) in zip(axes, held, strict=True):
        draw_lines(axis, runs, lambda run, key=key: run.series(key), smooth=not key.endswith("_coef"))  # type: ignore[misc]
        label(axis, title, unit)
        if unit == "share":
            axis.set_ylim(bottom=0)
    legend(axes[0])
    return figure


def _negated(series: Series) -> Series:
    return series[0], [-value for value in series[1]]
