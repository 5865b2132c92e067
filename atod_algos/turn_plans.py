"""Who plays a turn: the seam through which an algorithm lets others play parts of a training episode.

A turn is played by the student, by its teacher, by the environment's scripted expert, or again as it was played before
(a stored episode). A plan can also end an episode. The invariant: a plan depends on the episode's spec alone, so that
every worker and every resumed run plans alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from agents.base import Decision
from atod_envs.trajectory import Turn


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


@dataclass(frozen=True, slots=True)
class Replay:
    """A turn of a stored episode, to be played again.

    Attributes:
        observation: what the environment must show before it; another observation is an error.
        action: what was executed.
        response: what was said; where the prompt style reads another action in it, the style phrases the action.
        ids: token ids of the response where the same tokenizer sampled them; without them the text is encoded.
    """

    observation: str
    action: str
    response: str
    ids: tuple[int, ...] = ()

    @staticmethod
    def of(turn: Turn, *, ids: bool) -> Replay:
        """A recorded turn; with its token ids only where they are this run's."""
        return Replay(turn.observation, turn.action, turn.response, turn.response_ids if ids else ())


TurnActor = Callable[[int], Role | Decision | Replay | None]
"""Number of a turn (from 0) -> who plays it, or what is played there; None ends the episode before it."""


class TurnPlan(Protocol):
    """Who plays which turns of an episode. A value that can be pickled: workers of a cluster get it.

    A plan that derives from it says only what differs from the defaults.
    """

    @property
    def learned(self) -> tuple[Role, ...]:
        """Whose turns are learned from: those alone carry token ids. By default the student's."""
        return ("student",)

    @property
    def expert_watches(self) -> bool:
        """Whether the expert follows the whole episode, so that it can answer at any turn. Not by default."""
        return False

    @property
    def teacher_plays(self) -> bool:
        """Whether the teacher is asked for turns, so that it must be where episodes are played. Not by default."""
        return False

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """Plan one episode.

        Args:
            spec: the episode.
            solution: gives the decisions by which the expert solves this episode alone, none where it does not; ask it
                here or never, because it plays the episode.
        """


@dataclass(frozen=True)
class ExpertFirst(TurnPlan):
    """The expert plays all but ``leaves`` of the last turns of its own solution; the student goes on from there.

    A task that the expert does not solve has no such turns. What the expert plays depends on the task and the seed
    only.

    Attributes:
        leaves: the turns left to the student.
        teacher_plays: the teacher plays turns of branches (``Algorithm.branch``).
    """

    leaves: int
    teacher_plays: bool = False

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        decisions = solution()
        ahead = decisions[: max(0, len(decisions) - self.leaves)]
        return lambda turn: ahead[turn] if turn < len(ahead) else "student"


@dataclass(frozen=True)
class Guided(TurnPlan):
    """A guide plays each turn with some probability, the student the others.

    The coins follow from the episode's seed and the turn alone.

    Attributes:
        share: the probability, from 0 to 1.
        guide: who guides.
        guide_learned: the guide's turns are learned from, too, so they carry token ids like the student's.
    """

    share: float
    guide: Role = "teacher"
    guide_learned: bool = False

    @property
    def learned(self) -> tuple[Role, ...]:
        """The student's turns, and the guide's where they are learned from."""
        return ("student", self.guide) if self.guide_learned else ("student",)

    @property
    def expert_watches(self) -> bool:
        """It guides."""
        return self.guide == "expert"

    @property
    def teacher_plays(self) -> bool:
        """It guides."""
        return self.guide == "teacher"

    def guides(self, seed: int, turn: int) -> bool:
        """Whether a turn (from 0) of the episode with this seed is the guide's."""
        return bool(np.random.default_rng((seed, turn)).random() < self.share)

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        return lambda turn: self.guide if self.guides(spec.seed, turn) else "student"


@dataclass(frozen=True)
class Stored(TurnPlan):
    """A stored episode is played again up to a drawn turn; the student goes on from there.

    With K turns stored, the student's first turn is turn t (from 0) with a probability proportional to ``decay`` to the
    power t, for t below K. Episode and turn follow from the task and the episode's seed alone. A task without a stored
    episode is the student's from its start.

    Attributes:
        decay: above 0; 1 draws all turns alike.
        turns: how many turns the student plays; 0 lets it play on.
        episodes: the stored episodes of each task; None takes the expert's solution of the episode itself.
    """

    decay: float
    turns: int = 0
    episodes: Mapping[str, Sequence[Sequence[Replay]]] | None = None

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        rng = np.random.default_rng((spec.seed, _POSITION))
        stored: Sequence[Decision | Replay] = ()
        if self.episodes is None:
            stored = solution()
        elif own := self.episodes.get(spec.task_id):
            stored = own[int(rng.integers(len(own)))]
        weights = self.decay ** np.arange(max(1, len(stored)))
        first = int(rng.choice(len(weights), p=weights / weights.sum()))
        last = first + self.turns if self.turns else np.inf
        return lambda turn: stored[turn] if turn < first else "student" if turn < last else None


_POSITION = 2607
"""Sets the draw of a position apart from other draws of the same episode."""


@dataclass(frozen=True, slots=True)
class Branch:
    """An episode that repeats the beginning of another, goes on differently, and ends.

    Attributes:
        beginning: the turns that are repeated.
        players: who plays each turn after them.
    """

    beginning: tuple[Replay, ...]
    players: tuple[Role, ...]


@dataclass(frozen=True)
class Branches(TurnPlan):
    """Each episode is a branch, which its group id names.

    Attributes:
        branches: by group id.
        learned: whose turns carry token ids.
    """

    branches: Mapping[str, Branch]
    learned: tuple[Role, ...] = ("student",)

    @property
    def teacher_plays(self) -> bool:
        """It does in the branches."""
        return True

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        branch = self.branches[spec.group_id]
        turns = (*branch.beginning, *branch.players, None)
        return lambda turn: turns[min(turn, len(turns) - 1)]
