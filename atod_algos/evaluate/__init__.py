"""Success on fixed, named panels of tasks, with intervals: ``python -m atod_algos.evaluate --env ... --agent ...``.

The invariant: a result names its tasks, seeds and sampling, so that the same call gives the same number, and two
policies can be compared task by task. Evaluation never uses an algorithm's limits, and an episode that could not be
played is an error, not a failure of the policy.

    python -m atod_algos.evaluate --env atod/ALFWorld-v0 --agent expert
    python -m atod_algos.evaluate --env atod/ALFWorld-v0 --agent runs/atod-ALFWorld-v0-seed0/checkpoints/best
    python -m atod_algos.evaluate --env atod/WebShop-v0 --agent api:gpt-4o-mini --panels test/500
    python -m atod_algos.evaluate --compare evaluations/A evaluations/B
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atod_algos.evaluate.statistics import Paired, bootstrap, mcnemar, paired, wilson
from atod_envs.errors import AtodError
from atod_envs.trajectory import Trajectory

if TYPE_CHECKING:
    from atod_algos.rollout.episodes import Play

__all__ = ["Comparison", "Evaluation", "compare", "evaluate", "wilson"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Episodes of one policy on one panel, of one or several seeds."""

    trajectories: tuple[Trajectory, ...]

    @property
    def success(self) -> float:
        """Share of solved episodes."""
        return self._mean([t.success for t in self.trajectories])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the success rate.

        Wilson's where every task was played once. With several seeds the episodes of a task depend on each other, so it
        is the bootstrap's over tasks; Wilson's over all episodes would be too narrow. Where all tasks have the same
        share, it is Wilson's over tasks.
        """
        by_task = self.by_task()
        if len(by_task) == len(self.trajectories):
            return wilson(sum(t.success for t in self.trajectories), len(self.trajectories))
        low, high = self.bootstrap_interval
        if low == high:  # all tasks alike: resampling them shows no spread, but others may differ
            return wilson(self.success * len(by_task), len(by_task))
        return low, high

    @property
    def bootstrap_interval(self) -> tuple[float, float]:
        """95 % percentile interval of the success rate, resampling tasks."""
        parts = list(self.by_task().values())
        return bootstrap(np.array([sum(p) for p in parts], dtype=float), np.array([len(p) for p in parts], dtype=float))

    @property
    def length(self) -> float:
        """Mean number of turns."""
        return self._mean([len(t.turns) for t in self.trajectories])

    @property
    def score(self) -> float:
        """Mean task score in [0, 1]."""
        return self._mean([t.score for t in self.trajectories])

    @property
    def valid(self) -> float:
        """Share of turns whose response had the right form and whose action the environment understood."""
        return self._mean([turn.valid and turn.format_ok for t in self.trajectories for turn in t.turns])

    def by_task(self) -> dict[str, list[bool]]:
        """Outcome of each episode, by task."""
        parts: dict[str, list[bool]] = {}
        for trajectory in self.trajectories:
            parts.setdefault(trajectory.task_id, []).append(trajectory.success)
        return parts

    def by_label(self) -> dict[str, Evaluation]:
        """The same, split by the first label (task type, data set, category)."""
        parts: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            parts.setdefault(next(iter(trajectory.labels.values()), "all"), []).append(trajectory)
        return {name: Evaluation(tuple(members)) for name, members in sorted(parts.items())}

    def summary(self) -> dict[str, Any]:
        """The numbers, JSON-compatible."""
        return {
            **self._numbers(),
            "bootstrap": list(self.bootstrap_interval),
            "tasks": len(self.by_task()),
            "score": self.score,
            "valid": self.valid,
            "stop_reasons": self._count([str(t.stop_reason) for t in self.trajectories]),
            "by_label": {name: part._numbers() for name, part in self.by_label().items()},
        }

    def _numbers(self) -> dict[str, Any]:
        low, high = self.interval
        n = len(self.trajectories)
        return {"success": self.success, "low": low, "high": high, "n": n, "length": self.length}

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / max(1, len(values))

    @staticmethod
    def _count(names: Sequence[str]) -> dict[str, int]:
        return {name: names.count(name) for name in sorted(set(names))}


def evaluate(
    play: Play,
    tasks: Sequence[str],
    *,
    seed: int = 0,
    world: int = 0,
    on_finish: Callable[[int], None] | None = None,
) -> Evaluation:
    """Play every task of a panel once, without any algorithm's limits.

    Args:
        play: plays episodes: ``Rollout.play``, or a pool's with split and temperature chosen.
        tasks: the panel.
        seed: of episodes and sampling.
        world: the environment's place among those that ``play`` knows, from 0.
        on_finish: called with the number of finished episodes.

    Raises:
        AtodError: not one prompt fitted the context.
    """
    from atod_algos.rollout.episodes import EpisodeSpec
    from atod_algos.rollout.groups import collect_groups, require_turns

    specs = [EpisodeSpec(task, task, episode_seed(seed, task), world) for task in tasks]
    trajectories = tuple(play(specs, on_finish=on_finish))
    require_turns(collect_groups(trajectories))
    return Evaluation(trajectories)


def episode_seed(seed: int, task: str) -> int:
    """Seed of a task's episode: the same for every policy, so that comparisons share whatever the task leaves open."""
    from atod_algos.rollout.episodes import derive_seed

    return derive_seed(seed, "evaluation", task)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two policies on the same tasks and seeds: A minus B.

    Attributes:
        success: paired difference of success over tasks.
        length: paired difference of the number of turns over tasks.
        only_a: episodes (task and seed) that A alone solved.
        only_b: episodes that B alone solved.
        mcnemar: p-value of the exact McNemar test on them; with several seeds it takes dependent episodes for
            independent ones, so ``success.p_value``, which is over tasks, is the one to quote.
        by_label: the difference of success by task type or data set.
    """

    success: Paired
    length: Paired
    only_a: int
    only_b: int
    mcnemar: float
    by_label: dict[str, Paired]


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two policies that played the same panel with the same seeds.

    Raises:
        AtodError: they did not; names a task that only one of them played.
    """
    episodes_a, episodes_b = ({(t.task_id, t.seed): t for t in side.trajectories} for side in (a, b))
    strangers = sorted(episodes_a.keys() ^ episodes_b.keys())
    if strangers:
        raise AtodError(
            f"the two evaluations differ in {len(strangers)} episodes, e.g. task {strangers[0][0]!r} with seed {strangers[0][1]}; "
            "a paired comparison needs the same panel and seeds: evaluate one of them again with the other's --panels and --seeds"
        )
    for key, trajectory in episodes_a.items():
        if trajectory.task != episodes_b[key].task:
            raise AtodError(
                f"task {key[0]!r} is {trajectory.task!r:.80} in one evaluation and {episodes_b[key].task!r:.80} in the other; a paired "
                "comparison needs the same data: evaluate one of them again on the other's"
            )
    tasks: dict[str, list[tuple[Trajectory, Trajectory]]] = {}
    for key, trajectory in episodes_a.items():
        tasks.setdefault(key[0], []).append((trajectory, episodes_b[key]))

    def over(chosen: Sequence[str], value: Callable[[Trajectory], float]) -> Paired:
        sides = (np.array([np.mean([value(pair[side]) for pair in tasks[t]]) for t in chosen]) for side in (0, 1))
        return paired(*sides)

    labels: dict[str, list[str]] = {}
    for task, pairs in tasks.items():
        labels.setdefault(next(iter(pairs[0][0].labels.values()), "all"), []).append(task)
    pairs = [pair for members in tasks.values() for pair in members]
    only_a = sum(x.success and not y.success for x, y in pairs)
    only_b = sum(y.success and not x.success for x, y in pairs)
    everything = list(tasks)
    return Comparison(
        success=over(everything, lambda t: float(t.success)),
        length=over(everything, lambda t: float(len(t.turns))),
        only_a=only_a,
        only_b=only_b,
        mcnemar=mcnemar(only_a, only_b),
        by_label={name: over(chosen, lambda t: float(t.success)) for name, chosen in sorted(labels.items())},
    )
