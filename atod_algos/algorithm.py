"""What an algorithm is: the few questions that the trainer asks.

The trainer knows no algorithm by name. An outside package adds one through the entry-point group ``atod.algorithms``: a
frozen dataclass whose fields are its options and which answers the protocol below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from atod_algos.batch import Scores, TokenBatch
from atod_algos.learner.learner import Objective
from atod_algos.rollout.episodes import RolloutLimits
from atod_envs.errors import AtodError, UnknownName
from atod_envs.trajectory import Trajectory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Advantages:
    """What an algorithm makes of a scored batch.

    Attributes:
        token_M: detached advantage of each sampled token.
        metrics: the numbers that explain it.
        weight_K: weight of each turn's teacher supervision, where the algorithm weighs turns; kept for the figures.
    """

    token_M: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)
    weight_K: np.ndarray | None = None


class Algorithm(Protocol):
    """Answers the trainer's questions; a frozen dataclass whose fields are the options."""

    name: ClassVar[str]
    """Short name, e.g. ``"atod"``."""

    @property
    def scores(self) -> frozenset[str]:
        """Which log-probs it wants beside the student's.

        A subset of {"teacher", "reference", "base", "divergence", "support", "privileged"}. "base" is a third model's;
        "divergence" compares the whole distributions of student and teacher; for "support" the algorithm also answers
        :class:`Supported`, for "privileged" :class:`Privileged`.
        """

    rules: ClassVar[Mapping[str, Mapping[str, Any]]]
    """What ``--rules paper`` and ``--rules released`` preset: option name -> value."""

    @property
    def objective(self) -> Objective:
        """The surrogate's options."""

    def limits(self, step: int) -> RolloutLimits:
        """Limits of the training rollouts at a step (from 1)."""

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """Training reward of each trajectory."""

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """Per-token advantages of a scored batch at a step (from 1)."""

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """A further loss for each of some tokens, from their current log-probs; None for none."""


class Supported(Protocol):
    """What an algorithm answers beside, if its ``scores`` name "support": it learns from more than the sampled token."""

    @property
    def support(self) -> int:
        """How many of the teacher's likeliest tokens are kept in the place of each sampled one (S)."""

    def support_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor:
        """A further loss for each of some tokens, from the student's current log-probs [m, S] of the teacher's likeliest."""


class Selective(Protocol):
    """What an algorithm answers beside, if its ``limits`` ask for more than one round of episodes."""

    def informative(self, batch: TokenBatch) -> np.ndarray:
        """Which groups of a batch have something to teach (booleans along axis G); the others are played again."""


class Privileged(Protocol):
    """What an algorithm answers beside, if its ``scores`` name "privileged"."""

    def privileged_text(self, trajectory: Trajectory) -> str:
        """What the student is shown in front of everything else when it is scored as its own teacher.

        Raises:
            AtodError: there is nothing to show for this trajectory's task.
        """


def needs_student(algorithm: Algorithm) -> bool:
    """Whether the algorithm looks at ``scores.student_M`` before the update; it does unless its ``needs_student`` says False.

    Where it does not, and a step has one update, the pass that makes the update gives them: a pass less.
    """
    return bool(getattr(algorithm, "needs_student", True))


def find_algorithm(name: str) -> type[Algorithm]:
    """Load an algorithm by name from the entry-point group ``atod.algorithms``.

    Raises:
        UnknownName: nobody offers it; the message lists what is installed.
        AtodError: it is offered, but cannot be imported.
    """
    offered = {point.name: point for point in entry_points(group="atod.algorithms")}
    if name not in offered:
        raise UnknownName("algorithm", name, sorted(offered))
    try:
        return offered[name].load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise AtodError(f"algorithm {name!r} is offered as {offered[name].value}, but: {error}") from error
