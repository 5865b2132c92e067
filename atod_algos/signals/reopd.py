"""ReOPD: the student plays single turns of stored episodes and learns on them (arXiv 2607.04763).

Along its own episodes a student drifts into states in which its teacher's advice is poor; along the teacher's, states
are those that the student will not meet. Both shifts grow with the turn. So a stored episode is played again up to a
drawn turn, early ones more often, and the student plays and learns from there.

Objective
    p_t  ~ kappa^t                                                 t = 0 .. K - 1, over the K turns of a stored episode
    turns 0 .. t - 1 are the stored ones; turn t is the student's, and then the episode ends
    A_t   = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)            on the tokens of the student's turns, detached
    L     = the clipped surrogate with A_t, as in opd.py

What to watch: ``reopd/first_turn`` is the mean t, ``reopd/replayed_turns`` the share of turns that were stored ones. An
episode that ends after one turn of the student says nothing of success; ``val/success_rate`` does.

Differences: schedule and kappa are the authors' (their code's page of data preparation; the script itself is not
published). Their student's turn is not executed, and nothing runs an environment; here stored actions are executed
again, which costs microseconds and checks that the environment shows what was stored. Their pool is the teacher's
rollouts of its own training; here it is the scripted expert's solutions (``--episodes expert``) or any stored episodes
(``--episodes RUN``), failed ones included, as theirs may be. Their loss is slime's reverse KL; here it is OPD's
surrogate, or the exact divergence (``--gap exact``). ``--student-turns`` lets the student play more than one turn.
``--rules released`` presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.signals.reopd --env atod/ALFWorld-v0
    python -m atod_algos.signals.reopd --env atod/ALFWorld-v0 --episodes RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from atod_algos.algorithm import RELEASED, Advantages, Algorithm, RolloutLimits
from atod_algos.batch import Scores, TokenBatch
from atod_algos.turn_plans import Replay, Stored
from atod_envs.errors import AtodError
from atod_envs.files import hash_of
from atod_envs.stored import episode_files, read_episodes
from atod_envs.trajectory import StopReason


@dataclass(frozen=True)
class ReOPD(Algorithm):
    """On-policy distillation on turns that follow a stored episode's beginning."""

    name: ClassVar[str] = "reopd"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    episodes: str = "expert"
    """The stored episodes: 'expert' for the scripted expert's solutions, a file of episodes, or the folder of a run or
    an evaluation."""
    decay: float = 0.6
    """kappa: how much rarer each later turn is drawn (paper); 1 draws all alike."""
    student_turns: int = 1
    """Turns that the student plays after the stored ones: 1 (paper), or 0 for all that follow."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.decay <= 1 or self.student_turns < 0:
            raise AtodError(
                f"--decay {self.decay} and --student-turns {self.student_turns}: expected a decay above 0 and at most 1, and a number of "
                "turns from 0 (all that follow)"
            )

    def reads(self) -> Mapping[str, str]:
        """The stored episodes."""
        if self.episodes == "expert":
            return {}
        return {
            f"--episodes {self.episodes}": hash_of(episode_files(self.episodes, "--episodes", "'expert', ")).hexdigest()
        }

    def limits(self, step: int) -> RolloutLimits:
        """A stored beginning, and the student's turns."""
        return RolloutLimits(who=Stored(self.decay, self.student_turns, stored_turns(self.episodes)))

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = log pi_T - log pi_old on the student's own turns.

        Raises:
            AtodError: no task of the first step has a stored episode.
        """
        stored = stored_turns(self.episodes)
        if step == 1 and stored is not None and not any(t.task_id in stored for t in batch.trajectories):
            raise AtodError(
                f"--episodes {self.episodes}: it has episodes of {len(stored)} tasks, and none of them is a task of this run's first step "
                f"(such as {batch.trajectories[0].task_id!r}); store episodes of the training split, or use --episodes expert"
            )
        first_K = np.flatnonzero(np.diff(batch.trajectory_K, prepend=-1))
        played = sum(len(trajectory.turns) for trajectory in batch.trajectories)
        return Advantages(
            distillation_M=scores.require("teacher") - scores.student_M,
            teacher_weight_M=np.ones(batch.n_tokens),
            coefficients={"replayed_turns": 1 - len(batch.trajectory_K) / max(1, played)},
            notes={"first_turn": batch.index_K[first_K]},
        )


@lru_cache(maxsize=4)
def stored_turns(place: str) -> Mapping[str, Sequence[Sequence[Replay]]] | None:
    """The turns of stored episodes by task, in the order of their files; None for the expert's.

    Raises:
        AtodError: there are none.
        DataError: a file is broken.
    """
    if place == "expert":
        return None
    found: dict[str, list[tuple[Replay, ...]]] = {}
    for file in episode_files(place, "--episodes", "'expert', "):
        for episode in read_episodes(file):
            if episode.turns and episode.stop_reason is not StopReason.ABORTED:
                turns = tuple(Replay.of(turn, ids=False) for turn in episode.turns)
                found.setdefault(episode.task_id, []).append(turns)
    if not found:
        raise AtodError(f"--episodes {place}: there is no episode with a turn; give other files, or 'expert'")
    return found


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(ReOPD)
