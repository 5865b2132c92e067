"""Branches of a step's episodes: played and scored with the weights of the step, and learned from with the others.

The invariant: what a step publishes of its episodes is that of the episodes which were played from their start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atod_algos.algorithm import Advantages, Algorithm, RolloutLimits
from atod_algos.batch import RowLayout, Scores, TokenBatch, make_batch, part_of
from atod_algos.rollout.episodes import Play
from atod_algos.turn_plans import Branch, Branches, EpisodeSpec, Role
from atod_envs.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True)
class StepBranching:
    """Plays and scores the branches of one step; see ``atod_algos.algorithm.Branching``.

    Attributes:
        episodes: the step's episodes, in the batch's order.
        world_N: environment of each.
        play_specs: plays episodes.
        wake: gives the step's weights to the engines.
        rest: lets them give memory back.
        score_batch: scores a batch.
        rows: how rows are made.
    """

    episodes: Sequence[Trajectory]
    world_N: np.ndarray
    play_specs: Play
    wake: Callable[[], None]
    rest: Callable[[], None]
    score_batch: Callable[[TokenBatch], Scores]
    rows: RowLayout

    def play(self, branches: Mapping[int, Branch], learned: Role) -> dict[int, Trajectory]:
        """Play branches; each has its episode's task and seed, so its turns draw from the same random streams."""
        specs = [
            EpisodeSpec(
                self.episodes[n].task_id,
                f"{self.episodes[n].group_id}/{n}",
                self.episodes[n].seed,
                int(self.world_N[n]),
            )
            for n in branches
        ]
        if not specs:
            return {}
        plans = {spec.group_id: branch for spec, branch in zip(specs, branches.values(), strict=True)}
        self.wake()
        played = self.play_specs(specs, limits=RolloutLimits(who=Branches(plans, (learned,))))
        self.rest()
        return dict(zip(branches, played, strict=True))

    def score(self, trajectories: Sequence[Trajectory]) -> tuple[TokenBatch, Scores]:
        """Lay episodes out, each as a group of its own, and score their tokens."""
        batch = make_batch([Group(t.task_id, (t,)) for t in trajectories], self.rows)
        return batch, self.score_batch(batch)


def with_branches(
    algorithm: Algorithm,
    groups: Sequence[Group],
    batch: TokenBatch,
    scores: Scores,
    step: int,
    branching: StepBranching,
) -> tuple[TokenBatch, Scores, dict[str, float]]:
    """The batch and scores of a step with the further episodes that the algorithm learns from, and its numbers.

    The further episodes come last.
    """
    further, numbers = algorithm.branch(batch, scores, step, branching)
    published = {f"{algorithm.name}/{name}": float(value) for name, value in numbers.items()}
    if not further:
        return batch, scores, published
    batch = make_batch([*groups, *(Group(t.task_id, (t,)) for t in further)], branching.rows)
    return batch, branching.score_batch(batch), published


def first_only(
    n_played: int, batch: TokenBatch, scores: Scores, advantages: Advantages
) -> tuple[TokenBatch, Scores, Advantages]:
    """The part of a step that was played from its start: its first ``n_played`` trajectories."""
    if n_played == len(batch.trajectories):
        return batch, scores, advantages
    keep_N = np.arange(len(batch.trajectories)) < n_played
    part, keep_M = part_of(batch, keep_N)
    terms = replace(advantages.only(batch, keep_N), coefficients=advantages.coefficients, notes=advantages.notes)
    return part, scores.only(keep_M), terms
