"""How the scripted ALFWorld expert does on whole splits, compared with the shortest plans.

    python benchmarks/alfworld_expert.py --data builtin --split valid_unseen
    python benchmarks/alfworld_expert.py --data /path/to/alfworld --split train

The expert sees observations and admissible commands only; the planner sees everything.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence

from atod_envs.alfworld.data import open_source
from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.expert import ALFWorldExpert
from atod_envs.alfworld.household import TASK_TYPES
from atod_envs.alfworld.planner.plan import plan


def turns_needed(game: Game, expert: ALFWorldExpert, limit: int) -> int | None:
    """Turns until the expert wins; None if it does not within the limit."""
    session = GameSession(game)
    step = session.reset()
    expert.reset(step.observation, step.observation, step.admissible)
    for turn in range(1, limit + 1):
        step = session.step(expert.act(step.observation, step.admissible).action)
        if step.won:
            return turn
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the data root, or builtin (default: as the environment)")
    parser.add_argument("--split", default="valid_unseen", help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=50, help="turn limit (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="vary the order of search (default: the best order)")
    options = parser.parse_args(arguments)
    source = open_source(options.data, options.split)
    expert = ALFWorldExpert(options.seed)
    results: dict[str, list[tuple[int | None, int]]] = defaultdict(list)
    for task_id in source.task_ids:
        game = source.game(task_id)
        results[source.task_type(task_id)].append((turns_needed(game, expert, options.turns), len(plan(game))))
    everything = [result for group in results.values() for result in group]
    sys.stdout.write(f"{'':32}{'games':>7}{'won':>7}{'won %':>8}{'turns':>8}{'worst':>7}{'shortest':>10}\n")
    for name, group in [*((name, results[name]) for name in TASK_TYPES if results[name]), ("all", everything)]:
        won = [turns for turns, _ in group if turns is not None]
        mean, worst = (sum(won) / len(won), max(won)) if won else (float("nan"), 0)
        shortest = sum(length for _, length in group) / len(group)
        share = 100 * len(won) / len(group)
        sys.stdout.write(f"{name:32}{len(group):7}{len(won):7}{share:8.2f}{mean:8.2f}{worst:7}{shortest:10.2f}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
