"""Several environments, several teachers: which rows are whose, and how strongly each environment's teacher speaks.

A trajectory belongs to the environment that it was played in. Its teacher is the one of its task's label, where the run
names one, else that of its environment. The invariant: routing depends on the trajectories alone, so all ranks and
every resumed run route alike.

``--gap-scale`` multiplies the teacher's term, gap or weight of the reverse KL, with one factor an environment. With
D_e the mean of |log pi_T - log pi_S| over the step's tokens of environment e, and E environments in the step:

    alfworld=1 webshop=0.5    s_e as given
    equal                     s_e = min(10, (1/E sum_e' D_e') / D_e)     every s_e D_e is the same, their mean
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from atod_algos.algorithm import Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.training.config import RunConfig
from atod_algos.training.worlds import number, own_value
from atod_envs.errors import AtodError
from atod_envs.trajectory import Trajectory

MOST_SCALE = 10.0
"""Largest factor of ``--gap-scale equal``: a teacher who agrees with the student is not made loud."""

EQUAL = ("equal",)


class ScoringModel(NamedTuple):
    """A model that a run's algorithm asks for log-probs.

    Attributes:
        asked_as: ``"teacher"``, ``"reference"`` or ``"base"``.
        name: its folder, hub name or address, or ``"builtin"``.
        role: ``"student"`` or ``"teacher"``, and ``models``: which of the built-in models ``"builtin"`` is.
    """

    asked_as: str
    name: str
    role: str
    models: str


def scoring_models(config: RunConfig, algorithm: Algorithm) -> list[ScoringModel]:
    """Every model besides the student as it learns, in the order of the environments; some may be the same."""
    asked = [
        *(
            ScoringModel("teacher", name, "teacher", config.models_of(world))
            for world in config.worlds
            for name in (world.teacher, *(name for _, name in world.label_teachers))
        ),
        ScoringModel("reference", config.student, "student", config.models),
        ScoringModel("base", algorithm.base_model or config.student, "student", config.models),
    ]
    return [model for model in asked if model.asked_as in algorithm.scores]


def world_places(trajectories: Sequence[Trajectory], config: RunConfig) -> np.ndarray:
    """The environment of each trajectory, by its place in ``config.worlds`` (axis N)."""
    if not config.others:
        return np.zeros(len(trajectories), dtype=np.int64)
    places = {world.env.rpartition(":")[2]: place for place, world in enumerate(config.worlds)}
    return np.array([places[trajectory.env_id] for trajectory in trajectories], dtype=np.int64)


def label_of(trajectory: Trajectory, world: RunConfig) -> str | None:
    """Which of the labels that have a teacher a trajectory's task has; ``None`` for none."""
    known = dict(world.label_teachers)
    return next((label for label in trajectory.labels.values() if label in known), None)


def unseen_labels(trajectories: Sequence[Trajectory], world_N: np.ndarray, config: RunConfig) -> Iterator[str]:
    """Labels that have a teacher and that no task of some trajectories has: they may be misspelt. A line for each."""
    for place, world in enumerate(config.worlds):
        own = [t for t, at in zip(trajectories, world_N, strict=True) if at == place]
        there = sorted({label for trajectory in own for label in trajectory.labels.values()})
        for label, _ in world.label_teachers if own else ():
            if label not in there:
                yield (
                    f"--teacher {world.name}/{label}: no task of the first step has this label; there were: {', '.join(there)}"
                )


def require_scale(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse a ``--gap-scale`` that is not understood, or that would not act on all that is learned from a teacher.

    Args:
        config: the run's settings.
        algorithm: who learns.

    Raises:
        AtodError: says what was expected.
    """
    teacher = "teacher" in algorithm.scores
    own_loss = type(algorithm).support_loss is not Algorithm.support_loss
    if config.gap_scale and (not teacher or own_loss):
        why = "learns from its top-k tokens by a loss of their own" if teacher else "learns from no teacher"
        raise AtodError(f"--gap-scale scales a teacher's gap, but this algorithm {why}; leave it out")
    if config.gap_scale and config.gap_scale != EQUAL:
        _given(config)


def gap_factors(config: RunConfig, world_N: np.ndarray, batch: TokenBatch, scores: Scores) -> np.ndarray:
    """The factor of each environment; see the module's text.

    Args:
        config: resolved settings.
        world_N: the environment of each trajectory.
        batch: the step's data.
        scores: log-probs of student and teacher.

    Returns:
        One factor for each of ``config.worlds``; 1 where nothing of it was played.
    """
    if config.gap_scale != EQUAL:
        return _given(config)
    world_M = world_N[batch.trajectory_M]
    gap_M = np.abs(scores.require("teacher") - scores.student_M)
    count_E = np.bincount(world_M, minlength=len(config.worlds))
    mean_E = np.bincount(world_M, gap_M, minlength=len(config.worlds)) / np.maximum(count_E, 1)
    common = mean_E[count_E > 0].mean()
    return np.where(count_E > 0, np.minimum(MOST_SCALE, common / np.maximum(mean_E, 1e-12)), 1.0)


def scaled_gaps(
    config: RunConfig, batch: TokenBatch, scores: Scores, advantages: Advantages, names: Sequence[str]
) -> tuple[Advantages, dict[str, float]]:
    """A step's advantages after ``--gap-scale``, and the factors as metrics.

    Args:
        config: resolved settings.
        batch: the step's data.
        scores: log-probs of student and teacher.
        advantages: the algorithm's.
        names: of the environments, the first part of the metrics' keys.

    Raises:
        AtodError: the algorithm has no term of a teacher.
    """
    if not config.gap_scale:
        return advantages, {}
    world_N = world_places(batch.trajectories, config)
    factors = gap_factors(config, world_N, batch, scores)
    metrics = {f"{name}/gap_scale": float(factor) for name, factor in zip(names, factors, strict=True)}
    return advantages.scaled(factors[world_N][batch.trajectory_M]), metrics


def _given(config: RunConfig) -> np.ndarray:
    names = [world.name for world in config.worlds]
    values = [own_value(config.gap_scale, name, names, "--gap-scale") for name in names]
    factors = np.array([1.0 if v is None else number(v, float, "--gap-scale") for v in values])
    if not (np.isfinite(factors).all() and (factors >= 0).all()):
        raise AtodError(f"--gap-scale {' '.join(config.gap_scale)}: expected equal, or factors from 0: {names[0]}=0.5")
    return factors
