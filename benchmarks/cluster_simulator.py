"""How long a training step takes on a given cluster, and what holds it up: a small simulator of the pipeline.

Engines take groups as in ``atod_algos.rollout.ray_pool``: each holds no more than its share, and takes more as its own
end. An engine serves its running requests at once, each at the speed that so many together leave it: few requests leave
an engine half idle, so twice the engines are less than twice as fast. Between two turns an environment takes its time,
and the engine waits, for both are driven by one thread; then teacher and student score, the learner learns, and the new
weights travel.

The invariant: with one engine and rates measured on a run, the step that was measured comes out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step has to do.

    Attributes:
        groups: tasks.
        group_size: attempts at each.
        turns: mean turns of an episode.
        longest: turn limit.
        prefill: prompt tokens of a turn that the engine has not yet seen.
        response: tokens sampled in a turn.
        rows: tokens that go through a model when the step is scored once.
    """

    groups: int
    group_size: int
    turns: float
    longest: int
    prefill: float
    response: float
    rows: float


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast things are; tokens and seconds.

    Attributes:
        engines: rollout engines.
        slots: requests that an engine runs at the same time.
        prefill: prompt tokens a second of one engine.
        decode_one: tokens a second of a request that runs alone.
        decode_all: tokens a second of a full engine, all requests together; between one and ``slots`` requests a step
            of the engine takes time in a straight line (the weights are read once, and something for each request).
        env_seconds: of one environment step; environments of one worker and its engine take turns.
        learn: tokens a second of the learner, all its ranks together.
        score: tokens a second when the student scores.
        teach: tokens a second when the teacher scores; 0 for none.
        weight_bytes: of the student, as they travel.
        bandwidth: bytes a second from the learner to all engines' nodes.
        fixed: seconds of a step that nothing above explains.
        dispatch: seconds of a rollout in which no worker plays: work on its way to workers, and episodes on theirs.
    """

    engines: int
    slots: int
    prefill: float
    decode_one: float
    decode_all: float
    env_seconds: float
    learn: float
    score: float
    teach: float
    weight_bytes: float
    bandwidth: float
    fixed: float = 0.0
    dispatch: float = 0.0

    def turn(self, work: Workload, running: int) -> float:
        """Seconds in which every one of so many running episodes gets one turn on.

        T(n) = response (a + b n) + n (prefill / speed of reading + environment).
        """
        last = max(2, self.slots)
        each = max(0.0, (last / self.decode_all - 1 / self.decode_one) / (last - 1))
        step = max(0.0, 1 / self.decode_one - each) + each * running
        return work.response * step + running * (work.prefill / self.prefill + self.env_seconds)


@dataclass(frozen=True, slots=True)
class Step:
    """A simulated step.

    Attributes:
        seconds: by phase: rollout, teacher, score, update, weights, other.
        busy: share of the rollout during which the engines had something to do, over engines.
        env_share: share of a lone episode's time that is the environment's.
        longest: seconds that the slowest group would take with an engine of its own.
    """

    seconds: dict[str, float]
    busy: float
    env_share: float
    longest: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """What to speed up first."""
        name = max(self.seconds, key=lambda phase: self.seconds[phase])
        if name != "rollout":
            return {"update": "learner", "score": "learner", "weights": "network"}.get(name, name)
        if self.env_share > 0.5:
            return "environment"
        return "engine" if self.longest < 0.8 * self.seconds["rollout"] else "the longest episodes"


def simulate(work: Workload, rates: Rates, seed: int = 0) -> Step:
    """Simulate one step.

    Args:
        work: what is to be done.
        rates: how fast.
        seed: of the episodes' lengths.
    """
    lengths = episode_lengths(work, np.random.default_rng(seed))
    left = [[int(turns) for turns in group] for group in lengths[::-1]]
    share = max(work.group_size, math.ceil(work.groups * work.group_size / rates.engines))
    engines = [_Engine(work, rates) for _ in range(rates.engines)]
    while left or any(engine.active for engine in engines):
        for engine in engines:
            while left and engine.active + work.group_size <= max(work.group_size, min(rates.slots, share)):
                engine.take(left.pop())
        first = min((engine for engine in engines if engine.active), key=_Engine.next_moment)
        first.advance()
    ends = rates.dispatch + max(engine.now for engine in engines)
    busy = sum(engine.busy for engine in engines)
    slowest = 0.0
    for group in lengths:
        lone = _Engine(work, rates)
        lone.take([int(turns) for turns in group])
        while lone.active:
            lone.advance()
        slowest = max(slowest, lone.now)
    phases = {
        "rollout": ends,
        "teacher": work.rows / rates.teach if rates.teach else 0.0,
        "score": work.rows / rates.score,
        "update": work.rows / rates.learn,
        "weights": rates.weight_bytes / rates.bandwidth,
        "other": rates.fixed,
    }
    return Step(phases, busy / max(1e-9, ends * rates.engines), rates.env_seconds / rates.turn(work, 1), slowest)


def episode_lengths(work: Workload, rng: np.random.Generator) -> np.ndarray:
    """[groups, group_size] turns: some end early, the rest run into the limit, with the mean that is given."""
    low, high = 0.0, 1.0
    draws = rng.random((work.groups, work.group_size))
    for _ in range(50):  # the share of episodes that end at each turn, found by bisection
        share = (low + high) / 2
        turns = np.minimum(1 + np.floor(np.log1p(-draws) / math.log1p(-min(share, 1 - 1e-12))), work.longest)
        low, high = (low, share) if turns.mean() < work.turns else (share, high)
    return np.asarray(np.maximum(turns, 1)).astype(int)


class _Engine:
    """One engine and its environments, as far as they have come.

    All running episodes advance alike, so one number, in turns, says how far; its speed depends on how many they are.
    """

    def __init__(self, work: Workload, rates: Rates) -> None:
        self._work, self._rates = work, rates
        self._running: list[float] = []  # progress at which each is at its end
        self._progress = 0.0
        self.now = self.busy = 0.0

    @property
    def active(self) -> int:
        """Episodes that go on."""
        return len(self._running)

    def take(self, group: Sequence[int]) -> None:
        """Begin a group's episodes, given by their turns."""
        for turns in group:
            heapq.heappush(self._running, self._progress + turns)

    def next_moment(self) -> float:
        """When an episode ends next."""
        return self.now + (self._running[0] - self._progress) * self._rates.turn(self._work, self.active)

    def advance(self) -> None:
        """Go on to that moment."""
        moment = self.next_moment()
        self.busy += moment - self.now
        self.now, self._progress = moment, heapq.heappop(self._running)
