"""Intervals and tests for success rates: pure functions on arrays.

Classical tests are scipy's (extra ``evaluate``), loaded where two policies are compared. The invariant: whatever is
random here is drawn from a fixed seed, so the same results give the same interval everywhere. The unit that is
resampled is the *task*: several episodes of one task are not independent, and treating them so makes intervals too
narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959964
"""Quantile of the normal distribution, for 95 %."""
_ENDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)
"""Quantiles at which an interval of 95 % ends."""
_DRAWS = 10_000
_CHUNK = 500


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a success rate, 95 %.

    Args:
        successes: how many succeeded; a mean over seeds need not be whole.
        n: of how many independent episodes.
    """
    if n == 0:
        return 0.0, 1.0
    rate, z = successes / n, _Z
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula is exact but rounding is not.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def bootstrap(sums_N: np.ndarray, counts_N: np.ndarray) -> tuple[float, float]:
    """Percentile interval of a mean, 95 %, resampling whole tasks.

    Args:
        sums_N: sum of the values of each task's episodes.
        counts_N: number of episodes of each task.
    """
    n = len(sums_N)
    if n == 0:
        return 0.0, 1.0
    means = []
    rng = np.random.default_rng(0)
    for _ in range(_DRAWS // _CHUNK):
        drawn = rng.integers(n, size=(_CHUNK, n))
        means.append(sums_N[drawn].sum(1) / counts_N[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), _ENDS)
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: are the episodes that only one policy solved split evenly?

    Args:
        only_a: solved by A alone.
        only_b: solved by B alone.

    Returns:
        The p-value: the chance of a split at least as uneven if neither were better.
    """
    return float(_stats().binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


@dataclass(frozen=True, slots=True)
class Paired:
    """Two policies on the same tasks: A minus B.

    Attributes:
        difference: of the mean success (or whatever the values are).
        low: lower end of the 95 % paired-bootstrap interval over tasks.
        high: upper end.
        p_value: of the sign-flip permutation test over tasks.
        tasks: how many tasks were compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    tasks: int

    @property
    def points(self) -> str:
        """The interval in points; "-" where all tasks differ by the same, for resampling then shows no spread."""
        return "-" if self.low == self.high else f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"


def paired(a_N: np.ndarray, b_N: np.ndarray) -> Paired:
    """Compare two policies task by task.

    Args:
        a_N: mean value of A's episodes on each task.
        b_N: of B's, on the same tasks in the same order.

    Raises:
        ValueError: the arrays differ in length.
    """
    if len(a_N) != len(b_N):
        raise ValueError(f"{len(a_N)} tasks against {len(b_N)}; a paired comparison needs the same tasks")
    gap_N = np.asarray(a_N, dtype=float) - np.asarray(b_N, dtype=float)
    low, high = bootstrap(gap_N, np.ones(len(gap_N)))
    moved = gap_N[gap_N != 0]
    p_value = 1.0
    if len(moved):
        rng, extreme, observed = np.random.default_rng(1), 0, abs(moved.sum())
        for _ in range(_DRAWS // _CHUNK):
            signs = rng.integers(2, size=(_CHUNK, len(moved))) * 2 - 1
            extreme += int((np.abs((signs * moved).sum(1)) >= observed - 1e-12).sum())
        p_value = (extreme + 1) / (_DRAWS + 1)
    return Paired(float(gap_N.mean()) if len(gap_N) else 0.0, low, high, p_value, len(gap_N))


# --- over training seeds: few values, so Student's t --------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few independent values, one a seed; the whole line for fewer than two."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(_stats().t.ppf(_ENDS[1], n - 1) * np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test: do two methods differ beyond the spread of their training seeds?

    Returns:
        1.0 where there are fewer than two values on a side; 0.0 or 1.0 where neither side varies.
    """
    if min(len(a), len(b)) < 2:
        return 1.0
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    return float(_stats().ttest_ind(a, b, equal_var=False).pvalue)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("comparing needs scipy: pip install 'atod[evaluate]'") from error
    return stats
