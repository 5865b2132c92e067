"""Who plays a turn: the seam through which an algorithm lets others play parts of a training episode.

A turn is played by the student, by its teacher, by the environment's scripted expert, or by a decision that was made
before (a stored episode). The invariant: a plan depends on the episode's spec alone, so that every worker and every
resumed run plans alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from agents.base import Decision


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One episode to be played.

    Attributes:
        task_id: the task.
        group_id: attempts with the same group id are compared with each other.
        seed: of the environment's episode and of the sampling.
        world: the environment's place among the run's, from 0.
    """

    task_id: str
    group_id: str
    seed: int
    world: int = 0


Role = Literal["student", "teacher", "expert"]
"""Who can be asked for a turn: the model that is trained, the one it is taught by, or the environment's scripted
expert."""

TurnActor = Callable[[int], Role | Decision]
"""Number of a turn (from 0) -> who plays it, or the decision that is played there."""


class TurnPlan(Protocol):
    """Who plays which turns of an episode. A value that can be pickled: workers of a cluster get it."""

    @property
    def learned(self) -> Role:
        """Whose turns are learned from: those alone carry token ids."""

    @property
    def expert_watches(self) -> bool:
        """Whether the expert follows the whole episode, so that it can answer at any turn."""

    @property
    def teacher_plays(self) -> bool:
        """Whether the teacher is asked for turns, so that it must be there where episodes are played."""

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """Plan one episode.

        Args:
            spec: the episode.
            solution: gives the decisions by which the expert solves this episode alone, none where it does not; ask it
                here or never, because it plays the episode.
        """


@dataclass(frozen=True, slots=True)
class ExpertFirst:
    """The expert plays all but ``leaves`` of the last turns of its own solution; the student goes on from there.

    A task that the expert does not solve has no such turns. What the expert plays depends on the task and the seed
    only.
    """

    leaves: int
    learned: Role = "student"
    expert_watches: bool = False
    teacher_plays: bool = False

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        decisions = solution()
        ahead = decisions[: max(0, len(decisions) - self.leaves)]
        return lambda turn: ahead[turn] if turn < len(ahead) else "student"


@dataclass(frozen=True, slots=True)
class Guided:
    """A guide plays each turn with some probability, the student the others, and these are learned from.

    The coins follow from the episode's seed and the turn alone.

    Attributes:
        share: the probability, from 0 to 1.
        guide: who guides.
        learned: whose turns are learned from.
    """

    share: float
    guide: Role = "teacher"
    learned: Role = "student"

    @property
    def expert_watches(self) -> bool:
        """It guides."""
        return self.guide == "expert"

    @property
    def teacher_plays(self) -> bool:
        """It guides."""
        return self.guide == "teacher"

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        return lambda turn: self.guide if np.random.default_rng((spec.seed, turn)).random() < self.share else "student"
