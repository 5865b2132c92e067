"""Rollout on 1, 2 and 4 Ray workers compared with the single process, and what the planner's simulator says of them.

    python benchmarks/scale.py                    # the built-in ALFWorld student, 16 tasks x 8 attempts

The simulator is fitted to the single process (all episodes, and one group alone) and to what one worker adds to it, and
then asked about more workers. CPU seconds are those of the driver, which waits, plus the busiest worker: what the clock
would show if each had a core of its own and nothing else ran, and what the simulator predicts. Wall seconds depend on
what the machine has left. The least of ``--rounds`` rollouts each, for whatever else runs only ever adds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from cluster_plan import fit_engine
from cluster_simulator import Rates, Workload, simulate

from agents.chat import ChatFormat
from agents.models import load_model
from atod_algos.rollout.environments import describe
from atod_algos.rollout.episodes import EpisodeSpec, derive_seed
from atod_algos.rollout.pools import Conditions, RolloutPool, local_pool, worker_pool
from atod_algos.rollout.ray_pool import RayPool
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.trajectory import Trajectory

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def timed(
    pool: RolloutPool, specs: Sequence[EpisodeSpec], rounds: int, workers: Sequence[int] = ()
) -> tuple[float, float, list[Trajectory]]:
    """Least wall and CPU seconds of a rollout, and its episodes; the first one fills caches and does not count."""
    played = pool.play(specs, Conditions("train", temperature=1.0))
    wall = cpu = float("inf")
    for _ in range(rounds):
        before = [cpu_seconds(pid) for pid in workers]
        started, driver = time.perf_counter(), time.process_time()
        played = pool.play(specs, Conditions("train", temperature=1.0))
        wall = min(wall, time.perf_counter() - started)
        used = [cpu_seconds(pid) - old for pid, old in zip(workers, before, strict=True)]
        cpu = min(cpu, time.process_time() - driver + max(used, default=0.0))
    return wall, cpu, played


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers (%(default)s)")
    parser.add_argument("--tasks", type=int, default=16, help="groups of 8 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rollouts timed for each (%(default)s)")
    given = parser.parse_args()
    config = resolve(TrainConfig(env="atod/ALFWorld-v0", data="builtin"))
    facts = describe(config)
    student = load_model(config.student, "student", world=facts.env_key)
    here = local_pool(config, [facts.style], student.model, ChatFormat(student.tokenizer))
    here.load_weights(student.model.named_parameters(), 0)
    order = facts.tasks("train").order(0)
    specs = [
        EpisodeSpec(order[group], str(group), derive_seed(0, group, member))
        for group in range(given.tasks)
        for member in range(8)
    ]
    wall, seconds, episodes = timed(here, specs, given.rounds)
    turns = [turn for episode in episodes for turn in episode.turns]
    # Environments are timed by the clock, which other programs on the machine hold up as much as they hold up the
    # rollout.
    env = float(np.mean([turn.seconds_env for turn in turns])) * seconds / wall
    _, group, few = timed(here, specs[:8], 3 * given.rounds)
    turn = group / max(len(episode.turns) for episode in few)
    print(
        f"{len(specs)} episodes, {len(turns) / len(episodes):.1f} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"a turn of 8 episodes alone: {turn * 1000:.1f} ms of CPU; one environment step {env * 1000:.2f} ms")
    print(f"{'workers':>14} {'wall s':>9} {'CPU s':>9} {'simulated':>10}")
    print(f"{'in process':>14} {wall:9.2f} {seconds:9.2f}", flush=True)
    work = Workload(
        given.tasks, 8, len(turns) / len(episodes), max(len(e.turns) for e in episodes),
        float(np.mean([len(t.prompt_ids) for t in turns])) / 4, float(np.mean([len(t.response_ids) for t in turns])), 1.0,
    )  # fmt: skip
    rates = fit_engine(work, Rates(1, config.slots, 1.0, 1.0, 1.0, env, 1.0, 1.0, 0.0, 0.0, 1.0), seconds, (8, turn))
    for count in given.workers:
        pool = RayPool(partial(worker_pool, config, [facts.style]), workers=count, cpus=0.4)
        pool.load_weights(student.model.named_parameters(), 1)
        wall, used, same = timed(pool, specs, given.rounds, pool.pids)
        pool.close()
        assert [e.success for e in same] == [e.success for e in episodes], "another number of workers, another result"
        if count == 1:
            rates = replace(rates, dispatch=max(0.0, used - seconds))
        step = simulate(work, replace(rates, engines=count))
        print(f"{count:>14} {wall:9.2f} {used:9.2f} {step.seconds['rollout']:10.2f}", flush=True)


if __name__ == "__main__":
    main()
