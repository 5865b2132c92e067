"""Turn weights over training: how they are distributed at each step, and by turn index before and after (Figure 13).

The invariant: d and h are means over tokens, w is a mean over turns, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from atod_algos.report.data import Run
from atod_algos.report.tokens import Scorer, TurnScores

BINS = 10
"""Classes of weight on the page."""
MOST_STEPS = 60
"""Training steps whose weights are read, evenly spread over those stored."""


def weight_distribution(run: Run) -> dict[str, Any] | None:
    """The share of turns in each class of weight, by training step.

    Args:
        run: whose turn tables are read.

    Returns:
        ``steps``; ``shares``, for each step its ``BINS`` shares from small weights to large; ``means`` by step; and
        ``top``, the upper end of the last class. ``None`` where no weights are stored.
    """
    stored = run.steps("train")
    spread = np.linspace(0, len(stored) - 1, min(MOST_STEPS, len(stored))).round().astype(int)
    found: dict[int, np.ndarray] = {}
    for step in (stored[place] for place in spread):
        table = run.turn_table(step)
        weights = np.array(table["weight"] if table and "weight" in table else [], dtype=float)
        if (known := weights[np.isfinite(weights)]).size:
            found[step] = known
    if not found:
        return None
    top = max(1.0, *(float(weights.max()) for weights in found.values()))
    counts = [np.histogram(weights, BINS, (0.0, top))[0] for weights in found.values()]
    return {
        "steps": list(found),
        "shares": [[round(float(share), 4) for share in count / count.sum()] for count in counts],
        "means": [round(float(weights.mean()), 4) for weights in found.values()],
        "top": top,
    }


def before_and_after(run: Run, scorer: Scorer | None) -> dict[str, dict[tuple[int, int], TurnScores]]:
    """Scores of the first and of the last stored validation; empty without a teacher's scores for both."""
    steps = run.steps("valid")
    if len(steps) < 2 or scorer is None:
        return {}
    found = {}
    for name, step in (("before", steps[0]), (f"after step {steps[-1]}", steps[-1])):
        scores = scorer.scores("valid", step, run.episodes("valid", step))
        if any(score.d is not None for score in scores.values()):
            found[name] = scores
    return found if len(found) == 2 else {}


def by_turn_index(
    scores: Mapping[tuple[int, int], TurnScores], quantity: str
) -> tuple[list[int], list[float], list[int]]:
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
