"""Intervals and tests for success rates: pure functions on arrays, no dependency but numpy.

The invariant: whatever is random here is drawn from a fixed seed, so the same results give the same interval everywhere. The unit
that is resampled is the *task*: several episodes of one task are not independent, and treating them so makes intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000
_CHUNK = 500


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate (95 % by default).

    Args:
        successes: how many succeeded.
        n: of how many independent episodes.
        z: quantile of the normal distribution.
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula is exact but rounding is not.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def bootstrap(sums_N: np.ndarray, counts_N: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a mean, resampling whole tasks.

    Args:
        sums_N: sum of the values of each task's episodes.
        counts_N: number of episodes of each task.
        level: share of the resampled means inside the interval.
    """
    n = len(sums_N)
    if n == 0:
        return 0.0, 1.0
    means = []
    rng = np.random.default_rng(0)
    for _ in range(_DRAWS // _CHUNK):
        drawn = rng.integers(n, size=(_CHUNK, n))
        means.append(sums_N[drawn].sum(1) / counts_N[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: are the episodes that only one policy solved split evenly?

    Args:
        only_a: solved by A alone.
        only_b: solved by B alone.

    Returns:
        The p-value: the chance of a split at least as uneven if neither were better.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    log_tail = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(least + 1)]
    tail = sum(math.exp(value - n * math.log(2)) for value in log_tail)
    return min(1.0, 2 * tail)


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


# --- over training seeds: few values, so Student's t ----------------------------------------------------------------------


def t_tail(t: float, degrees: float) -> float:
    """Chance that Student's t with ``degrees`` degrees of freedom exceeds ``t`` in absolute value.

    With t = sqrt(degrees) tan(a) the density becomes cos(a) ** (degrees - 1), smooth and on a bounded interval.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))

    def integral(low: float) -> float:
        grid = np.linspace(low, math.pi / 2, 20_001)
        return float(np.trapezoid(np.cos(grid).clip(0) ** (degrees - 1), grid))

    return integral(angle) / integral(0.0)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of a few independent values (one a training seed); the whole line for fewer than two."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, n - 1) > 1 - level else (low, middle)
    half = high * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test: do two methods differ beyond the spread of their training seeds?

    Returns:
        1.0 where there are fewer than two values on a side; 0.0 or 1.0 where neither side varies.
    """
    if min(len(a), len(b)) < 2:
        return 1.0
    parts = [float(np.var(side, ddof=1)) / len(side) for side in (a, b)]
    gap, total = float(np.mean(a) - np.mean(b)), sum(parts)
    if total == 0:
        return 1.0 if gap == 0 else 0.0
    degrees = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    return t_tail(gap / math.sqrt(total), degrees)
