"""What ScienceWorld costs: a simulator's start, reset, step, valid actions, gold path; and whether episodes leak.

    python benchmarks/scienceworld.py                    # the costs, in CPU seconds of the Java process
    python benchmarks/scienceworld.py --episodes 1000    # memory of the Java process and of this one, by episode

CPU seconds are those of the Java process; the rest is waiting. Run it on an idle machine for the ratios of wall and CPU
time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atod_envs.scienceworld.env import TASKS, ScienceWorldEnv
from atod_envs.scienceworld.simulator import SIMULATORS, gold_actions


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used."""
    with open(f"/proc/{process}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def megabytes(process: int) -> float:
    """Resident memory of a process."""
    with open(f"/proc/{process}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def costs(per_task: int, tasks: Sequence[str]) -> None:
    """Print what each thing costs."""
    spent: dict[str, list[tuple[float, float]]] = {}

    def timed(what: str, run: Callable[[], Any]) -> Any:
        before, started = cpu_seconds(process), time.perf_counter()
        value = run()
        spent.setdefault(what, []).append((cpu_seconds(process) - before, time.perf_counter() - started))
        return value

    started = time.perf_counter()
    env = ScienceWorldEnv(split="train", simulators=1)
    env.reset(seed=0)
    (process,) = SIMULATORS.processes()
    print(f"start and first reset: {cpu_seconds(process):.1f} s CPU, {time.perf_counter() - started:.1f} s wall")
    for number in range(per_task):
        for task in tasks:
            task_id = next(task_id for task_id in env.tasks if task_id.startswith(f"{task}/{number}"))
            gold = timed("gold path, not cached", lambda task=task, number=number: gold_actions(task, number, "", 1))
            timed("reset", lambda task_id=task_id: env.reset(seed=0, options={"task_id": task_id}))
            for action in gold[:40]:
                if timed("step", lambda action=action: env.step(action))[2]:
                    break
            timed("reset", lambda task_id=task_id: env.reset(seed=0, options={"task_id": task_id}))
            episode = env._episode
            assert episode is not None
            timed("list of valid actions", lambda episode=episode: episode.ask("getValidActionObjectCombinations"))
    for what, pairs in spent.items():
        cpu, wall = np.array(pairs).T
        print(
            f"{what}: {len(cpu)} times, CPU {cpu.mean() * 1e3:.1f} ms, wall {wall.mean() * 1e3:.1f} ms, of {wall.sum():.0f} s in all"
        )


def leak(episodes: int, steps: int) -> None:
    """Play random episodes, and print the memory."""
    env = ScienceWorldEnv(split="train", simulators=1, max_turns=steps)
    rng = np.random.default_rng(0)
    started, done = time.perf_counter(), 0
    for number in range(episodes):
        env.reset(seed=number)
        assert env._episode is not None
        valid, over = (
            env._episode.ask("getValidActionObjectCombinations"),
            False,
        )  # listed once: it costs more than a step
        while not over:
            _, _, terminated, truncated, _ = env.step(valid[int(rng.integers(len(valid)))])
            over, done = terminated or truncated, done + 1
        if (number + 1) % max(1, episodes // 10) == 0:
            (process,) = SIMULATORS.processes()
            print(
                f"{number + 1} episodes, {done} steps: Java {megabytes(process):.0f} MB, here {megabytes(os.getpid()):.0f} MB, "
                f"{cpu_seconds(process):.0f} s CPU, {time.perf_counter() - started:.0f} s wall",
                flush=True,
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=1, help="variations of each task; default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS), help="by default all 30")
    parser.add_argument("--episodes", type=int, default=0, help="play so many random episodes instead")
    parser.add_argument("--steps", type=int, default=10, help="of each such episode; default: %(default)s")
    given = parser.parse_args()
    if given.episodes:
        leak(given.episodes, given.steps)
    else:
        costs(given.per_task, given.tasks)


if __name__ == "__main__":
    main()
