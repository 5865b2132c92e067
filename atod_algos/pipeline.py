"""How long a training step takes on a given cluster, and what holds it up: a small simulator of the pipeline.

Engines take groups as in ``atod_algos.cluster``: each holds no more than its share, and takes more as its own end. An engine serves its
running requests at once, each at the speed that so many together leave it; between two turns an environment takes its time; then
teacher and student score, the learner learns, and the new weights travel. The invariant: with one engine and rates measured on a
run, the step that was measured comes out.

    python -m atod_algos.pipeline --run runs/atod-ALFWorld-v0-seed0            # rates from a stored run: what would more workers bring?
    python -m atod_algos.pipeline --preset paper-4b --env atod/ALFWorld-v0     # rates from a GPU's data sheet, for clusters of several sizes

The second is arithmetic on published peaks and the utilisation given, not a measurement.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atod_envs.command import program
from atod_envs.errors import AtodError, DataError


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
        decode_all: tokens a second of a full engine, all requests together.
        env_seconds: of one environment step; environments of one engine's worker take turns on one core.
        learn: tokens a second of the learner, all its ranks together.
        score: tokens a second when the student scores.
        teach: tokens a second when the teacher scores; 0 for none.
        weight_bytes: of the student, as they travel.
        bandwidth: bytes a second from the learner to all engines' nodes.
        fixed: seconds of a step that nothing above explains.
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


@dataclass(frozen=True, slots=True)
class Step:
    """A simulated step.

    Attributes:
        seconds: by phase: rollout, teacher, score, update, weights, other.
        busy: share of the rollout during which the engines had something to do, over engines.
        env_share: share of an episode's own time that is the environment's.
        longest: seconds that the longest episode would take with an engine of its own.
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
    left = [group.tolist() for group in lengths[::-1]]
    share = max(work.group_size, math.ceil(work.groups * work.group_size / rates.engines))
    engines = [_Engine(work, rates) for _ in range(rates.engines)]
    while left or any(engine.active for engine in engines):
        for engine in engines:
            while left and engine.active + work.group_size <= max(work.group_size, min(rates.slots, share)):
                engine.take(left.pop())
        first = min((engine for engine in engines if engine.active), key=_Engine.next_moment)
        first.advance()
    ends = max(engine.now for engine in engines)
    busy = sum(engine.busy for engine in engines)
    env = sum(engine.env_seconds for engine in engines)
    own = float(lengths.sum()) * engines[0].cost / rates.decode_one
    phases = {
        "rollout": ends,
        "teacher": work.rows / rates.teach if rates.teach else 0.0,
        "score": work.rows / rates.score,
        "update": work.rows / rates.learn,
        "weights": rates.weight_bytes / rates.bandwidth,
        "other": rates.fixed,
    }
    longest = float(lengths.max()) * (engines[0].cost / rates.decode_one + rates.env_seconds)
    return Step(phases, busy / max(1e-9, ends * rates.engines), env / max(1e-9, own + env), longest)


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
    """One engine and the core of its environments, as far as they have come.

    A request is ``response`` tokens of work, its prefill counted as the tokens that could be decoded meanwhile. With n running each
    advances at ``decode_one`` until together they reach ``decode_all``; so all advance alike, and one number says how far.
    """

    def __init__(self, work: Workload, rates: Rates) -> None:
        self.cost = work.response + work.prefill * rates.decode_all / rates.prefill
        self._rates = rates
        self._running: list[tuple[float, int]] = []  # (progress at which it is done, turns left)
        self._stepping: list[tuple[float, int]] = []  # (time at which the environment has answered, turns left)
        self._progress = self._core = 0.0
        self.now = self.busy = self.env_seconds = 0.0

    @property
    def active(self) -> int:
        """Episodes that go on."""
        return len(self._running) + len(self._stepping)

    def take(self, group: Sequence[int]) -> None:
        """Begin a group's episodes, given by their turns."""
        for turns in group:
            heapq.heappush(self._running, (self._progress + self.cost, turns))

    def _speed(self) -> float:
        return min(self._rates.decode_one, self._rates.decode_all / max(1, len(self._running)))

    def _moments(self) -> tuple[float, float]:
        done = self.now + (self._running[0][0] - self._progress) / self._speed() if self._running else math.inf
        return done, self._stepping[0][0] if self._stepping else math.inf

    def next_moment(self) -> float:
        """When something happens next."""
        return min(self._moments())

    def advance(self) -> None:
        """Go on to that moment."""
        done, answered = self._moments()
        moment = min(done, answered)
        if self._running:
            self.busy += moment - self.now
            self._progress += (moment - self.now) * self._speed()
        self.now = moment
        if done <= answered:
            _, left = heapq.heappop(self._running)
            # One core answers one environment after the other.
            self._core = max(self._core, self.now) + self._rates.env_seconds
            self.env_seconds += self._rates.env_seconds
            heapq.heappush(self._stepping, (self._core, left - 1))
        else:
            _, left = heapq.heappop(self._stepping)
            if left:
                heapq.heappush(self._running, (self._progress + self.cost, left))


# --- rates --------------------------------------------------------------------------------------------------------


def from_run(folder: Path) -> tuple[Workload, Rates]:
    """Workload and rates of a stored run on one machine.

    Raises:
        DataError: the folder holds no finished steps with their trajectories.
    """
    from atod_envs.trajectory import read_jsonl

    try:
        settings = json.loads((folder / "config.json").read_text())["settings"]["train"]
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-20:]
        files = sorted((folder / "trajectories").glob("step_*.jsonl.gz"))[-min(5, len(steps)) :]
        episodes = [trajectory for file in files for trajectory in read_jsonl(file)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is not a run with steps to learn rates from ({error})") from error
    turns = [turn for episode in episodes for turn in episode.turns]
    if not turns or not steps:
        raise DataError(f"{folder} holds no stored episodes; run with --keep-trajectories 1")

    def mean(name: str) -> float:
        return float(np.mean([step.get(name, 0.0) for step in steps]))

    fresh = [
        len(turn.prompt_ids) - (len(before.prompt_ids) + len(before.response_ids) if before else 0)
        for episode in episodes
        for before, turn in zip((None, *episode.turns), episode.turns, strict=False)
    ]
    work = Workload(
        groups=settings["tasks_per_step"],
        group_size=settings["group_size"],
        turns=len(turns) / len(episodes),
        longest=max(len(episode.turns) for episode in episodes),
        prefill=float(np.mean(np.maximum(fresh, 0))),
        response=float(np.mean([len(turn.response_ids) for turn in turns])),
        rows=mean("speed/tokens_per_second") * mean("time/step"),
    )
    env_seconds = float(np.mean([turn.seconds_env for turn in turns]))
    # Scoring is one pass for each model, the update three passes' worth of work; the log has the two times.
    rates = Rates(
        engines=1,
        slots=settings["slots"],
        prefill=math.inf,
        decode_one=math.inf,
        decode_all=1.0,
        env_seconds=env_seconds,
        learn=work.rows / mean("time/update"),
        score=2 * work.rows / mean("time/score"),
        teach=2 * work.rows / mean("time/score"),
        weight_bytes=0.0,
        bandwidth=1.0,
        fixed=mean("time/step") - mean("time/rollout") - mean("time/score") - mean("time/update"),
    )
    return work, _fit_engine(work, rates, mean("time/rollout"))


def _fit_engine(work: Workload, rates: Rates, rollout: float) -> Rates:
    """The speed of the engine with which one worker takes as long as was measured."""
    low, high = 1e-3, 1e9
    for _ in range(60):
        speed = math.sqrt(low * high)
        tried = replace(rates, decode_all=speed, decode_one=speed / 8, prefill=speed * 8)
        low, high = (speed, high) if simulate(work, tried).seconds["rollout"] > rollout else (low, speed)
    return tried


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet, and how much of that is reached.

    Attributes:
        name: its name.
        flops: peak operations a second in bfloat16, dense.
        memory: bytes a second of its memory.
        reached: share of the peak arithmetic in prefill, scoring and learning.
        read: share of the memory bandwidth in decoding.
    """

    name: str
    flops: float
    memory: float
    reached: float
    read: float


H100 = Device("H100 SXM", 989e12, 3.35e12, 0.35, 0.6)
"""The maker's figures; the two shares are assumptions, to be replaced by what is measured (--reached, --read)."""


def from_data_sheet(
    work: Workload,
    device: Device,
    *,
    engines: int,
    learners: int,
    student: int,
    teacher: int,
    cache: float,
    network: float,
) -> Rates:
    """Rates of GPUs by arithmetic.

    Args:
        work: the workload (its context decides what decoding reads).
        device: the GPU.
        engines: GPUs with an engine.
        learners: GPUs that learn and score.
        student: the student's weights (active ones).
        teacher: the teacher's active weights.
        cache: bytes of keys and values of one token.
        network: bytes a second into a node.
    """
    slots = 128
    context = work.prefill + work.response
    read = device.memory * device.read
    one = read / (2 * student + context * cache)
    together = slots * read / (2 * student + slots * context * cache)
    work_rate = device.flops * device.reached
    return Rates(
        engines=engines,
        slots=slots,
        prefill=work_rate / (2 * student),
        decode_one=one,
        decode_all=together,
        env_seconds=2e-4,
        learn=learners * work_rate / (6 * student),
        score=learners * work_rate / (2 * student),
        teach=learners * work_rate / (2 * teacher) if teacher else 0.0,
        weight_bytes=2.0 * student,
        bandwidth=network,
    )


# --- the command --------------------------------------------------------------------------------------------------

_ACTIVE = {"Qwen/Qwen3-30B-A3B": 3_300_000_000}
"""Weights that one token goes through, where that is not all of them (the model's card)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of steps; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=program("atod_algos.pipeline"), description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder to take workload and rates from")
    parser.add_argument("--preset", help="paper-0.6b, paper-1.7b or paper-4b, on GPUs")
    parser.add_argument("--env", default="atod/ALFWorld-v0", help="environment of the preset (%(default)s)")
    parser.add_argument("--turns", type=float, help="mean turns of an episode of the preset; by default half its limit")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of engines (%(default)s)")
    parser.add_argument("--learners", type=int, default=8, help="GPUs that learn, for a preset (%(default)s)")
    parser.add_argument("--reached", type=float, default=H100.reached, help="share of peak arithmetic (%(default)s)")
    parser.add_argument("--read", type=float, default=H100.read, help="share of memory bandwidth (%(default)s)")
    parser.add_argument("--network", type=float, default=25e9, help="bytes a second into a node (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        if (given.run is None) == (given.preset is None):
            raise AtodError("give either --run FOLDER or --preset NAME")
        if given.run is not None:
            work, one = from_run(given.run)
            tried = [replace(one, engines=count) for count in given.engines]
        else:
            device = replace(H100, reached=given.reached, read=given.read)
            work, tried = _of_preset(given, device)
    except AtodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{work.groups} groups of {work.group_size}, {work.turns:.1f} turns, {work.prefill:.0f} + {work.response:.0f} tokens a turn"
    )
    print(
        f"{'engines':>7} {'step s':>9} {'rollout':>9} {'teacher':>9} {'score':>9} {'update':>9} {'weights':>9} {'busy':>6}  held up by"
    )
    for rates in tried:
        step = simulate(work, rates)
        phases = "".join(f" {step.seconds[name]:9.2f}" for name in ("rollout", "teacher", "score", "update", "weights"))
        print(f"{rates.engines:>7} {step.total:9.2f}{phases} {step.busy:6.0%}  {step.bottleneck}")
    return 0


def _of_preset(given: argparse.Namespace, device: Device) -> tuple[Workload, list[Rates]]:
    from atod_algos.estimate import cache_bytes, shape_of
    from atod_algos.presets import preset_config

    config = preset_config(given.preset, given.env)
    student, teacher = shape_of(config.student, "", "student"), shape_of(config.teacher, "", "teacher")
    if (
        student is None
        or teacher is None
        or config.max_turns is None
        or config.max_context is None
        or config.max_response is None
    ):
        raise AtodError(f"preset {given.preset} on {given.env} leaves open what the arithmetic needs")
    turns = given.turns or config.max_turns / 2
    # Half of each limit: prompts and answers are rarely as long as they may be.
    response, prompt = config.max_response / 2, (config.max_context - config.max_response) / 2
    episodes = config.tasks_per_step * config.group_size
    work = Workload(
        config.tasks_per_step,
        config.group_size,
        turns,
        config.max_turns,
        prompt,
        response,
        episodes * turns * (prompt + response),
    )
    active = _ACTIVE.get(config.teacher.partition(" ")[0].split("+")[0], teacher.parameters)
    rates = [
        from_data_sheet(
            work, device, engines=count, learners=given.learners, student=student.parameters, teacher=active,
            cache=float(cache_bytes(student, 1, 1, 2)), network=given.network,
        )
        for count in given.engines
    ]  # fmt: skip
    return work, rates


if __name__ == "__main__":
    sys.exit(main())
