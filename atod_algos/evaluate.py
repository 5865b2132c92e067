"""Success on a fixed panel of tasks, with an interval.

The invariant: a result names its tasks, seeds and sampling, so that the same call gives the same number, and two policies can be
compared task by task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atod_algos.rollout import EpisodeSpec, Rollout, derive_seed
from atod_envs.trajectory import Trajectory


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate (95 % by default).

    Args:
        successes: how many succeeded.
        n: of how many.
        z: quantile of the normal distribution.
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula is exact but rounding is not.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Episodes of one policy on one panel."""

    trajectories: tuple[Trajectory, ...]

    @property
    def success(self) -> float:
        """Share of solved tasks."""
        return sum(t.success for t in self.trajectories) / max(1, len(self.trajectories))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson(sum(t.success for t in self.trajectories), len(self.trajectories))

    @property
    def length(self) -> float:
        """Mean number of turns."""
        return sum(len(t.turns) for t in self.trajectories) / max(1, len(self.trajectories))

    @property
    def score(self) -> float:
        """Mean task score, in [0, 1]."""
        return sum(t.score for t in self.trajectories) / max(1, len(self.trajectories))

    def by_label(self) -> dict[str, Evaluation]:
        """The same, split by the first label (task type, data set, category)."""
        parts: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            parts.setdefault(next(iter(trajectory.labels.values()), "all"), []).append(trajectory)
        return {name: Evaluation(tuple(members)) for name, members in sorted(parts.items())}

    def summary(self) -> dict[str, Any]:
        """The numbers, JSON-compatible."""
        low, high = self.interval
        return {
            "success": self.success,
            "low": low,
            "high": high,
            "n": len(self.trajectories),
            "length": self.length,
            "by_label": {name: {"success": e.success, "n": len(e.trajectories)} for name, e in self.by_label().items()},
        }


def evaluate(
    rollout: Rollout, tasks: Sequence[str], *, seed: int = 0, on_finish: Callable[[int], None] | None = None
) -> Evaluation:
    """Play every task of a panel once with a rollout's policy, without any algorithm's limits.

    Args:
        rollout: engine, environment and sampling.
        tasks: the panel.
        seed: of episodes and sampling.
        on_finish: called with the number of finished episodes.
    """
    specs = [EpisodeSpec(task, task, derive_seed(seed, "evaluation", task)) for task in tasks]
    return Evaluation(tuple(rollout.play(specs, on_finish=on_finish)))
