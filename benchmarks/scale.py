"""Rollout on 1, 2 and 4 Ray workers beside the single process, and what the planner's simulator says of them.

    python benchmarks/scale.py                    # the built-in ALFWorld student, 16 tasks x 8 attempts

The simulator is fitted to one worker alone and then asked about the others; workers that share a core share its speed. Wall seconds: the best of
``--rounds``, because whatever else runs on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from functools import partial

import numpy as np

from agents.models import load_model
from atod_algos.cluster import Fleet, RayPlayers
from atod_algos.config import TrainConfig, resolve
from atod_algos.pipeline import Rates, Workload, simulate
from atod_algos.plan import fit_engine
from atod_algos.player import local_players, worker_players
from atod_algos.rollout import EpisodeSpec, derive_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers (%(default)s)")
    parser.add_argument("--tasks", type=int, default=16, help="groups of 8 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rollouts timed for each (%(default)s)")
    given = parser.parse_args()
    config = resolve(TrainConfig(env="atod/ALFWorld-v0", data="builtin"))
    student = load_model(config.student, "student", world="alfworld")
    alone = local_players(config, student.model, student.tokenizer)
    alone.load_weights(student.model.named_parameters(), 0)
    probe = alone.on("train", 1.0)._make_env()
    order = probe.unwrapped.tasks.order(0)
    specs = [
        EpisodeSpec(order[group], str(group), derive_seed(0, group, member))
        for group in range(given.tasks)
        for member in range(8)
    ]

    def timed(rollout) -> tuple[float, list]:
        rollout.play(specs)  # the first one starts environments and fills caches
        best, played = float("inf"), []
        for _ in range(given.rounds):
            started = time.perf_counter()
            played = rollout.play(specs)
            best = min(best, time.perf_counter() - started)
        return best, played

    seconds, episodes = timed(alone.on("train", 1.0))
    turns = [turn for episode in episodes for turn in episode.turns]
    print(f"{len(specs)} episodes, {len(turns) / len(episodes):.1f} turns, {os.cpu_count()} cores")
    print(f"{'workers':>14} {'seconds':>9} {'simulated':>10}")
    print(f"{'in process':>14} {seconds:9.2f}")
    work = Workload(
        given.tasks, 8, len(turns) / len(episodes), max(len(e.turns) for e in episodes),
        float(np.mean([len(t.prompt_ids) for t in turns])) / 4, float(np.mean([len(t.response_ids) for t in turns])), 1.0,
    )  # fmt: skip
    env = float(np.mean([turn.seconds_env for turn in turns]))
    blank = Rates(1, config.slots, 1.0, 1.0, 1.0, env, 1.0, 1.0, 0.0, 0.0, 1.0)
    fitted = None
    for workers in given.workers:
        players = RayPlayers(partial(worker_players, config, "alfworld"), Fleet(workers, cpus=0.4))
        players.load_weights(student.model.named_parameters(), 1)
        measured, same = timed(players.on("train", 1.0))
        players.close()
        assert [e.success for e in same] == [e.success for e in episodes], "another number of workers, another result"
        if fitted is None:
            fitted = fit_engine(work, replace(blank, engines=workers), measured)
        slow = min(1.0, (os.cpu_count() or 1) / workers)
        rates = replace(
            fitted, engines=workers, decode_all=fitted.decode_all * slow, decode_one=fitted.decode_one * slow, prefill=fitted.prefill * slow
        )  # fmt: skip
        print(f"{workers:>14} {measured:9.2f} {simulate(work, rates).seconds['rollout']:10.2f}", flush=True)


if __name__ == "__main__":
    main()
