"""Speed and memory of the native ALFWorld engine compared with the published one: same games, same commands, same run.

    python benchmarks/alfworld.py                        the table
    python benchmarks/alfworld.py --differential 200000  no speeds: compare the two engines step by step

Real games are taken from --realdata (default: $ATOD_REALDATA, else ../shared/realdata next to the repository); without
them only the built-in games are played. Rows of one process count CPU time (so that other work on the machine does not
count), rows of more processes count wall time. The published engine is installed with `pip install alfworld`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # This file bears the published package's name and must not be found in its place.

from alfworld_differential import compare
from alfworld_reference import Reference, accelerated, real_games

from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.generator import builtin

STEPS = 50
"""Length of an episode."""

Script = tuple[Path, tuple[str, ...]]
"""A game and the commands to play on it."""


def main() -> None:
    """Run the benchmark or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = Path(__file__).resolve().parents[1]
    default = os.environ.get("ATOD_REALDATA", root.parent / "shared" / "realdata")
    parser.add_argument("--realdata", type=Path, default=Path(default), help="folder of the real games")
    parser.add_argument("--differential", type=int, metavar="STEPS", help="compare this many steps instead")
    parser.add_argument("--reference-steps", type=int, default=60, help="steps that the published engine plays per row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with real_games(options.realdata) as real, tempfile.TemporaryDirectory() as scratch:
        if options.differential:
            sys.exit(differential(real, options.differential, options.seed))
        table(real, write_builtin(Path(scratch), 140), options.reference_steps, options.seed)


def table(real: Mapping[str, list[Path]], small: list[Path], reference_steps: int, seed: int) -> None:
    """Measure everything and print it."""
    present = real.get("present", [])
    seen = [path for path in present if "valid_seen" in path.parts] or present
    if present:
        memory(present[-1000:])
    sizes = {"built-in games": small} | ({"real valid_seen games": seen} if seen else {})
    for label, files in sizes.items():
        print(f"\n{label} ({len(files)})")
        scripts = write_scripts(files, seed)
        first, later = resets(files)
        print(
            f"  native     new game: load, parse, compile, reset  {first * 1e3:9.2f} ms   again: {later * 1e6:.1f} us"
        )
        native = [play_native(scripts, rounds) for rounds in (1, 3, 10)]
        for rounds, rate in zip(("first episodes", "3 episodes each", "10 episodes each"), native, strict=True):
            print(f"  native     1 process, {rounds:17} {rate:12,.0f} steps/s")
        print(f"  native     2 processes                  {play_processes(scripts, 2):12,.0f} steps/s (wall)")
        rate, reset = play_reference(scripts, reference_steps)
        print(f"  reference  1 process                    {rate:12,.1f} steps/s   load and reset {reset:.2f} s")
        for name, asynchronous in (("sync", False), ("async", True)):
            batch, batch_reset = play_batch(scripts[:4], reference_steps // 4, asynchronous)
            row = f"reference  batch of 4, {name}"
            print(f"  {row:38} {batch:12,.1f} steps/s (wall)   reset {batch_reset:.2f} s")
        print(f"  ratio, 1 process: {native[0] / rate:,.0f} (first episodes) to {native[-1] / rate:,.0f}")


def differential(real: Mapping[str, list[Path]], steps: int, seed: int) -> int:
    """Compare the engines; return the process's exit code."""
    sources: list[tuple[str, Any]] = [(f"real, {release}", path) for release, paths in real.items() for path in paths]
    sources += [
        ("built-in", builtin.game(task_id)) for split in builtin.SIZES for task_id in builtin.task_ids(split)[:60]
    ]
    random.Random(seed).shuffle(sources)
    start = time.perf_counter()
    with accelerated():
        report = compare(sources * (1 + steps // (300 * max(len(sources), 1))), Reference(), steps, 100, seed)
    print(f"{report.steps} steps and {report.resets} resets compared in {time.perf_counter() - start:.0f} s")
    print(f"games: {dict(report.games)}; won: {report.wins}; refused by the reference: {len(report.refused)}")
    print("commands: " + ", ".join(f"{verb} {count}" for verb, count in report.verbs.most_common()))
    print(f"differences: {len(report.differences)}")
    for difference in report.differences:
        print(difference)
    return 1 if report.differences or report.steps < steps else 0


def write_builtin(folder: Path, games: int) -> list[Path]:
    """Write built-in games as files, so that both engines load them the same way."""
    paths = []
    for task_id in builtin.task_ids("valid_seen")[:games]:
        path = folder / task_id / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({key: value for key, value in builtin.game(task_id).items() if key != "traj_data"}))
        paths.append(path)
    return paths


def write_scripts(files: Sequence[Path], seed: int) -> list[Script]:
    """Random admissible commands for every game, fixed before anything is measured."""
    scripts = []
    for path in files:
        rng, session = random.Random(f"{seed}/{path.name}/{path.parent.name}"), GameSession(Game.load(path))
        admissible, commands = session.reset().admissible, []
        for _ in range(STEPS):
            commands.append(rng.choice(admissible))
            admissible = session.step(commands[-1]).admissible
        scripts.append((path, tuple(commands)))
    return scripts


def resets(files: Sequence[Path]) -> tuple[float, float]:
    """Mean seconds until a game file that was never seen shows its first observation, and of a later reset."""
    GameSession(Game.load(files[0])).reset()  # The shared domain and grammar are compiled once per process.
    start = time.process_time()
    sessions = [GameSession(Game.load(path)) for path in files]
    for session in sessions:
        session.reset()
    middle = time.process_time()
    for _ in range(10):
        for session in sessions:
            session.reset()
    return (middle - start) / len(files), (time.process_time() - middle) / len(files) / 10


def play_native(scripts: Sequence[Script], rounds: int) -> float:
    """Steps per second of CPU time on freshly compiled games; round by round other commands of the same length."""
    gc.collect()
    gc.freeze()  # What other rows have left in this process is not this row's to collect.
    games = [(Game.load(path), commands) for path, commands in scripts]
    seconds = 0.0
    for turn in range(rounds):
        for game, commands in games:
            session = GameSession(game)
            admissible = session.reset().admissible
            choices = commands
            if turn:  # Other commands than before, or the caches would know every situation.
                choices = other_commands(game, turn)
            start = time.process_time()
            for command in choices:
                admissible = session.step(command).admissible
            seconds += time.process_time() - start
            assert admissible
    gc.unfreeze()
    return rounds * len(games) * STEPS / seconds


def other_commands(game: Game, seed: int) -> tuple[str, ...]:
    """Random admissible commands of a game, found on a separate copy so that its caches stay as they are."""
    copy = COPIES.setdefault(game.name, Game.load(game.name))
    rng, session = random.Random(f"{seed}/{game.name}"), GameSession(copy)
    admissible, commands = session.reset().admissible, []
    for _ in range(STEPS):
        commands.append(rng.choice(admissible))
        admissible = session.step(commands[-1]).admissible
    return tuple(commands)


COPIES: dict[str, Game] = {}


def _worker(scripts: Sequence[Script], start: Any, done: Any) -> None:
    sessions = [(GameSession(Game.load(path)), commands) for path, commands in scripts]
    start.wait()
    for _ in range(20):
        for session, commands in sessions:
            session.reset()
            for command in commands:
                session.step(command)
    done.put(20 * sum(len(commands) for _, commands in scripts))


def play_processes(scripts: Sequence[Script], count: int) -> float:
    """Steps per second of wall time of several processes together."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(count + 1), context.Queue()
    workers = [context.Process(target=_worker, args=(scripts[index::count], start, done)) for index in range(count)]
    for worker in workers:
        worker.start()
    start.wait()
    begin = time.perf_counter()
    steps = sum(done.get() for _ in workers)
    seconds = time.perf_counter() - begin
    for worker in workers:
        worker.join()
    return float(steps / seconds)


def play_reference(scripts: Sequence[Script], steps: int) -> tuple[float, float]:
    """Steps per second of CPU time of the published engine, and its seconds to load and reset a game."""
    reference = Reference()
    step_seconds = reset_seconds = 0.0
    played = games = 0
    for path, commands in scripts:
        if played >= steps:
            break
        start = time.process_time()
        reference.load(str(path))
        shown = reference.reset()
        reset_seconds += time.process_time() - start
        session = GameSession(Game.load(path))
        assert session.reset().observation == shown.observation
        start = time.process_time()
        answers = [reference.step(command) for command in commands[: max(steps // 3, 1)]]
        step_seconds += time.process_time() - start
        for command, answer in zip(commands, answers, strict=False):
            ours = session.step(command)
            assert (ours.observation, ours.admissible) == (answer.observation, answer.admissible), (path, command)
        played += len(answers)
        games += 1
    return played / step_seconds, reset_seconds / games


def play_batch(scripts: Sequence[Script], steps: int, asynchronous: bool) -> tuple[float, float]:
    """Steps per second of wall time of the published engine's own batch environment, and its seconds to reset.

    In a process of its own, because the batch environment leaves its workers behind, which complain when they are cut
    off.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_batch, args=(scripts, steps, asynchronous, answers))
    process.start()
    rate, reset = answers.get(timeout=600)
    process.join()
    return float(rate), float(reset)


def _batch(scripts: Sequence[Script], steps: int, asynchronous: bool, answers: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())
    import textworld
    import textworld.gym
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    env_id = textworld.gym.register_games(
        [str(path) for path, _ in scripts],
        infos,
        batch_size=len(scripts),
        asynchronous=asynchronous,
        max_episode_steps=STEPS,
        wrappers=[AlfredDemangler, AlfredInfos],
    )
    env = textworld.gym.make(env_id)
    start = time.perf_counter()
    _, shown = env.reset()
    middle = time.perf_counter()
    by_file = {str(path): commands for path, commands in scripts}
    chosen = [by_file[path] for path in shown["extra.gamefile"]]
    for turn in range(steps):
        env.step([commands[turn] for commands in chosen])
    answers.put((steps * len(scripts) / (time.perf_counter() - middle), middle - start))
    env.close()


def memory(files: Sequence[Path]) -> None:
    """Print the memory of 1,000 live episodes, each some way into its game."""
    before = resident()
    games = [Game.load(path) for path in files]
    sessions = [GameSession(games[index % len(games)]) for index in range(1000)]
    loaded = resident()
    rng = random.Random(0)
    for session in sessions:
        admissible = session.reset().admissible
        for _ in range(30):
            admissible = session.step(rng.choice(admissible)).admissible
    print(
        f"memory of 1,000 live episodes of {len(games)} real games: {loaded - before:.0f} MB at the start, "
        f"{resident() - before:.0f} MB after 30 steps each (process: {resident():.0f} MB)"
    )


def resident() -> float:
    """Resident memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
