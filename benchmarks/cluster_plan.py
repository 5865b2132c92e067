"""How long a training step would take on other machines: arithmetic and a small simulator.

    python benchmarks/cluster_plan.py --run runs/atod-ALFWorld-v0-seed0    # rates from a stored run
    python benchmarks/cluster_plan.py --preset paper-4b --env atod/ALFWorld-v0  # rates from a GPU's data sheet

The second is arithmetic on published peaks and the utilisation given, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cluster_simulator import Rates, Workload, simulate

from atod_envs.errors import AtodError, DataError


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
        raise DataError(f"{folder} holds no stored episodes; run with --store trajectories")

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
    return work, fit_engine(work, rates, mean("time/rollout"))


def fit_engine(work: Workload, rates: Rates, rollout: float, few: tuple[int, float] | None = None) -> Rates:
    """Find the speed of the engine with which a rollout takes as long as was measured.

    Args:
        work: what was played.
        rates: everything but the engine's three speeds, which are replaced; prompts are read eight times as fast as
            answers are written.
        rollout: seconds that were measured.
        few: so many episodes, and the seconds that a turn of each took when they played alone; where that was not
            measured, a request alone gets an eighth of what many get together.
    """
    low, high = 1e-3, 1e9
    for _ in range(60):
        speed = math.sqrt(low * high)
        one = speed / 8
        if few is not None:  # a token of the few, and of a full engine, give the straight line
            count, turn = few
            full, some = rates.slots / speed, turn - count * (work.prefill / (8 * speed) + rates.env_seconds)
            some = min(full, max(full * count / rates.slots, some / work.response))
            one = 1 / (some - (count - 1) * (full - some) / max(1, rates.slots - count))
        tried = replace(rates, decode_all=speed, decode_one=one, prefill=speed * 8)
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
        prog="python benchmarks/cluster_plan.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    from atod_algos.training.memory_estimate import cache_bytes, shape_of
    from atod_algos.training.presets import preset_config

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
