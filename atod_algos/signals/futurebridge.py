"""FutureBridge-OPD: the teacher shows one turn where it helps the turns that follow (arXiv 2608.01953).

In an episode of several turns a student's mistake leads it where its teacher's advice is worth little. So at the turn
on which the two disagree most the teacher plays instead, and the student goes on from there. If the teacher likes the
student's next turns better than those that the student had played, its turn, the bridge, is learned from, too.

Objective
    d_k   = mean over turn k's tokens of log pi_S - log pi_T        k*: the largest, the last turn aside
    bridge: the teacher's turn in the place of turn k*; then H turns of the student
    q     = share of tokens of H turns with log pi_T > log pi_S     q_own: of the episode's own turns k*+1 .. k*+H
    the bridge is kept if q_bridge > q_own                          and both have H understood turns
    A_t   = log pi_T(a_t | s_t) - log pi_old(a_t | s_t)             on the student's turns and on kept bridges, detached
    L     = the clipped surrogate with A_t, as in opd.py

Episodes begin as in TCOD's back to front: the expert plays all but the last 1 + floor((s - 1) / eta) turns of its
solution, the student goes on from there.

What to watch: ``futurebridge/tried`` is the share of episodes with a bridge that could be compared, ``kept`` the share
with one that was kept, ``bridge_tokens`` the share of learned tokens that are the teacher's. ``episode/*`` is of the
episodes that were played from their start; ``val/success_rate`` is the student's alone.

Differences from the authors' code: there the student plays the turns after its own turn k* a second time, with another
draw, and q_own is of those; here it is of the turns that it has played, which have smaller d_k than k* by its choice,
so the gate is stricter. There k* is the largest d_k among turns with an action tag, and an episode has no bridge if the
action of k*, or of any turn before it, could not be executed; here k* is the largest among the turns that were
understood, whatever the turns before it were. There a task without a reference solution has no bridge; here the
environment's scripted expert gives one, and ``--turns-every 0`` needs none. The bridged turns draw from the random
streams of those that they are compared with. The state of a branch is reached by playing its turns again, which is
exact and checked, not by an expert's actions alone. A bridge counts in the average of the loss as an episode of one
turn. Under ``--gap exact`` a kept bridge is learned by the reverse KL in the places of its tokens. The authors'
asynchronous training is not used: the teacher plays in this process alone, and several ranks, Ray and ``--staleness``
are refused. ``--rules released`` presets OPD's token mean, dual clip and entropy bonus.

    python -m atod_algos.signals.futurebridge --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atod_algos.advantages import turn_mean
from atod_algos.algorithm import RELEASED, Advantages, Algorithm, Branching, RolloutLimits
from atod_algos.batch import Scores, TokenBatch
from atod_algos.turn_plans import Branch, ExpertFirst, Guided, Replay, Role
from atod_envs.errors import AtodError
from atod_envs.trajectory import StopReason, Trajectory


@dataclass(frozen=True)
class FutureBridge(Algorithm):
    """On-policy distillation, with turns of the teacher that have helped the student's next ones."""

    name: ClassVar[str] = "futurebridge"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "released": RELEASED}

    horizon: int = 3
    """H: turns of the student that are compared (authors' code)."""
    turns_every: int = 5
    """eta: steps until the expert leaves one turn more (authors' code); 0 lets the student play whole episodes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.horizon < 1 or self.turns_every < 0:
            raise AtodError(
                f"--horizon {self.horizon} and --turns-every {self.turns_every}: expected at least one turn to compare, and a number of "
                "steps from 0 (no expert)"
            )

    def limits(self, step: int) -> RolloutLimits:
        """The expert's beginning; the teacher must be where episodes are played."""
        if not self.turns_every:
            return RolloutLimits(who=Guided(0.0))
        return RolloutLimits(who=ExpertFirst(1 + (step - 1) // self.turns_every, teacher_plays=True))

    def branch(
        self, batch: TokenBatch, scores: Scores, step: int, branching: Branching
    ) -> tuple[Sequence[Trajectory], Mapping[str, float]]:
        """The bridges that are kept: branches whose one turn with tokens is the teacher's."""
        own_K = preferred(batch, scores)
        beginnings: dict[int, tuple[Replay, ...]] = {}
        base: dict[int, float] = {}
        for n, k in self.places(batch, scores).items():
            turns = batch.trajectories[n].turns
            at = int(batch.index_K[k])
            beginnings[n] = tuple(Replay.of(turn, ids=True) for turn in turns[:at])
            base[n] = share(own_K, range(k + 1, k + 1 + self.horizon))
        bridges = branching.play({n: Branch(past, ("teacher",)) for n, past in beginnings.items()}, "teacher")
        students = tuple[Role, ...]("student" for _ in range(self.horizon))
        further = {
            n: Branch((*beginnings[n], Replay.of(bridge.turns[-1], ids=True)), students)
            for n, bridge in bridges.items()
            if bridge.stop_reason is StopReason.TURN_LIMIT and understood(bridge) == 1
        }
        continued = branching.play(further, "student")
        played = {n: t for n, t in continued.items() if understood(t) == self.horizon}
        if not played:
            return (), {"tried": 0.0, "kept": 0.0}
        part, part_scores = branching.score(list(played.values()))
        after_K = preferred(part, part_scores)
        after = {n: share(after_K, np.flatnonzero(part.trajectory_K == place)) for place, n in enumerate(played)}
        kept = [bridges[n] for n in played if after[n] > base[n]]
        episodes = len(batch.trajectories)
        return kept, {
            "tried": len(played) / episodes,
            "kept": len(kept) / episodes,
            "bridge_tokens": sum(t.n_tokens for t in kept) / (batch.n_tokens + sum(t.n_tokens for t in kept)),
            "preferred_own": float(np.mean([base[n] for n in played])),
            "preferred_bridged": float(np.mean(list(after.values()))),
        }

    def places(self, batch: TokenBatch, scores: Scores) -> dict[int, int]:
        """Where bridges are tried: trajectory (axis N) -> its turn (axis K) of the largest d_k, the last one aside.

        Only turns that were understood count, and H understood turns must follow, as something to compare with.
        """
        d_K = turn_mean(scores.student_M - scores.require("teacher"), batch.turn_M, len(batch.trajectory_K))
        found = {}
        for n in range(len(batch.trajectories)):
            turns = np.flatnonzero(batch.trajectory_K == n)
            earlier = [int(k) for k in turns[:-1] if batch.valid_K[k]]
            if not earlier:
                continue
            k = max(earlier, key=lambda k: d_K[k])
            following = turns[turns > k][: self.horizon]
            if len(following) == self.horizon and batch.valid_K[following].all():
                found[n] = k
        return found

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A_t = log pi_T - log pi_old on the student's turns and on bridges."""
        return Advantages(
            distillation_M=scores.require("teacher") - scores.student_M, teacher_weight_M=np.ones(batch.n_tokens)
        )


def understood(trajectory: Trajectory) -> int:
    """Turns with tokens, if all of them were understood; else 0."""
    own = [turn for turn in trajectory.turns if turn.response_ids]
    return len(own) if all(turn.valid and turn.format_ok for turn in own) else 0


def preferred(batch: TokenBatch, scores: Scores) -> np.ndarray:
    """For each turn, its tokens that the teacher likes better than the student does, and all of them (axes K, 2)."""
    better_M = scores.require("teacher") > scores.student_M
    return np.stack([np.bincount(batch.turn_M, better_M, len(batch.trajectory_K)), batch.n_K], axis=1)


def share(count_K: np.ndarray, turns: Sequence[int] | np.ndarray | range) -> float:
    """Share of some turns' tokens that the teacher likes better."""
    better, total = count_K[list(turns)].sum(axis=0)
    return float(better / max(1, total))


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(FutureBridge)
