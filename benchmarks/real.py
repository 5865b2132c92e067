"""``make real``: a chat model from "it does not answer in the format" to a measured success, on two CPU cores.

    python benchmarks/real.py                            about two hours of one core in float32
    python benchmarks/real.py --data $ALFWORLD_DATA      the official games rather than generated ones of their size
    python benchmarks/real.py --plan                     the stages and their commands, nothing else

Stages, each a command that can be run by hand (``--plan`` prints them): games where there are none; SmolLM2 as it
comes, on a small panel; demonstrations of the scripted expert with the model acting in a share of the turns; more of
them for a teacher; some steps of ATOD, which ends with the table of before, after and teacher. Every stage goes on
where it was cut off, and one that is done is left alone: the same command again is how one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_algos.guard import guarded

PROMPTS = ("--style", "compact")
"""Whole conversations with short turns: about 600 tokens an official game."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        title: what it does.
        module: what ``python -m`` runs.
        arguments: its command line.
        done: whether its result is there.
        after: run when it has ended well.
    """

    title: str
    module: str
    arguments: tuple[str, ...]
    done: Callable[[], bool]
    after: Callable[[], object] = field(default=lambda: None)

    @property
    def command(self) -> list[str]:
        """As it is run."""
        return [sys.executable, "-m", self.module, *self.arguments]


def stages(options: argparse.Namespace) -> list[Stage]:
    """The whole, in order."""
    out: Path = options.out
    data, found = options.data, []
    if data is None:
        data = str(out / "games")
        for number, (split, games) in enumerate((("train", options.games), ("valid_seen", 64), ("valid_unseen", 256))):
            folder = out / "games" / "json_2.1.1" / split
            arguments = ("--out", data, "--games", str(games), "--seed", str(number), "--split", split)
            found.append(
                Stage(
                    f"{games} generated games of the official size, {split}",
                    "atod_envs.alfworld.generate",
                    arguments,
                    lambda folder=folder, games=games: len(list(folder.glob("*/*/game.tw-pddl"))) >= games,  # type: ignore[misc]
                )
            )
    limits = ("--max-turns", str(options.max_turns), "--max-response", "48", "--max-context", "2048")
    world = ("--env", "atod/ALFWorld-v0", "--data", data)
    panel = ("--temperature", "0.4", "--panels", f"valid_unseen/{options.vanilla}")
    found.append(
        Stage(
            f"{options.student} as it comes, {options.vanilla} unseen tasks",
            "atod_algos.evaluate",
            ("--agent", options.student, *world, *PROMPTS, *limits, *panel, "--out", str(out / "vanilla")),
            lambda: (out / "vanilla" / "result.json").is_file(),
        )
    )
    teacher, student = out / "teacher", out / "student"
    taught = out / "rounds"  # of the teacher that is whole; its folder has files from the student's rounds on
    lesson = (
        "--student", options.student, "--out", str(teacher), *world, *PROMPTS, *limits, "--dtype", options.dtype, "--rounds", str(options.rounds),
        "--episodes", str(options.episodes), "--epochs", "1", "--first-beta", "0.2", "--last-beta", "0.3", "--lr", str(options.lr),
        "--batch-tokens", "1536",
    )  # fmt: skip
    early = max(1, min(options.early, options.rounds - 1))
    found += [
        Stage(
            f"{early} of {options.rounds} rounds of {options.episodes} demonstrations: the student",
            "atod_algos.training.sft",
            (*lesson, "--stop", str(early)),
            lambda: (student / "config.json").is_file(),
            lambda: copy_model(teacher, student),
        ),
        Stage(
            f"the other {options.rounds - early} rounds: the teacher",
            "atod_algos.training.sft",
            lesson,
            lambda: taught.is_file() and taught.read_text() == str(options.rounds),
            lambda: taught.write_text(str(options.rounds)),
        ),
        Stage(
            f"{options.steps} steps of ATOD, and the table",
            "atod_algos.atod",
            (
                *world, *PROMPTS, *limits, "--student", str(student), "--teacher", str(teacher), "--run", str(out / "atod"), "--dtype", options.dtype,
                "--steps", str(options.steps), "--tasks-per-step", str(options.tasks), "--group-size", str(options.group), "--lr", str(options.rl_lr),
                "--minibatches", "4", "--gap", "exact", "--eval-every", "0", "--eval-tasks", "1", "--eval-temperature", "0.4",
                "--report-tasks", str(options.panel),
                "--coef-anneal-steps", str(options.steps),
            ),
            lambda: False,  # a finished run shows its table again
        ),
    ]  # fmt: skip
    return found


def copy_model(source: Path, to: Path) -> None:
    """Keep a folder's model under another name, whole or not at all."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, part / file.name)
    part.replace(to)


def computing_type() -> str:
    """bfloat16 where the processor has instructions for it, which halve the time; else float32."""
    import torch

    asked: Any = getattr(torch.cpu, "get_capabilities", dict)
    return "bfloat16" if any(asked().get(name) for name in ("avx512_bf16", "amx_bf16")) else "float32"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument(
        "--data",
        default=os.environ.get("ALFWORLD_DATA") or None,
        help="official games; by default $ALFWORLD_DATA, else generated",
    )
    parser.add_argument("--games", type=int, default=1000, help="generated training games")
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: what is faster here"
    )
    parser.add_argument("--max-turns", type=int, default=20)
    parser.add_argument("--vanilla", type=int, default=8, help="tasks of the panel of the model as it comes")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of demonstrations for the teacher")
    parser.add_argument("--early", type=int, default=3, help="rounds for the student")
    parser.add_argument("--episodes", type=int, default=32, help="demonstrations a round")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=3, help="steps of ATOD")
    parser.add_argument("--tasks", type=int, default=4, help="tasks of a step")
    parser.add_argument("--group", type=int, default=4, help="attempts at each")
    parser.add_argument("--rl-lr", type=float, default=1e-4)
    parser.add_argument("--panel", type=int, default=48, help="tasks of the table")
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    if options.dtype == "auto":
        options.dtype = computing_type()
    if options.rounds < 2:
        parser.error("--rounds: expected 2 or more; the student takes a part of them, the teacher all")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every stage that is not done; the status of the first that fails."""
    options = parse(arguments)
    plan = stages(options)
    threads = os.environ.get("REAL_THREADS") or str(os.cpu_count() or 1)
    if options.plan:
        for stage in plan:
            print(f"# {stage.title}\n{' '.join(stage.command)}\n")
        return 0
    left = [stage for stage in plan if not stage.done()]
    print(
        f"{len(left)} of {len(plan)} stages, {options.dtype}, {threads} threads, results in {options.out}. With the settings as they come this takes "
        "about two hours of one core in float32, less in bfloat16 or with more cores; stop it whenever you like, and run it again to go on.",
        flush=True,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in left:
        print(f"\n== {stage.title}", flush=True)
        began = time.monotonic()
        status = subprocess.run(stage.command, env={**os.environ, "OMP_NUM_THREADS": threads}).returncode
        if status:
            print(
                f"error: this stage ended with status {status}; the same command goes on from here:\n{' '.join(stage.command)}",
                file=sys.stderr,
            )
            return status
        stage.after()
        seconds = time.monotonic() - began
        print(f"== {seconds / 60:.1f} min", flush=True)
        with open(options.out / "seconds.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage.title, "seconds": round(seconds, 1)}) + "\n")
    _show_vanilla(options)
    print(f"The trained model for other programs: atod export {options.out / 'atod'} --to FOLDER --card")
    return 0


def _show_vanilla(options: argparse.Namespace) -> None:
    result = options.out / "vanilla" / "result.json"
    for name, row in json.loads(result.read_text())["panels"].items():
        print(
            f"{options.student} as it comes: {row['success']:.1%} of {row['n']} tasks of {name} ({100 * row['low']:.1f} - {100 * row['high']:.1f}), "
            f"{row['valid']:.0%} of its turns in the right form and understood"
        )


if __name__ == "__main__":
    # A signal ends the stage that runs, too: left alone it would hold its folder.
    guarded(lambda: sys.exit(main()), "the same command goes on with the stage that ran")
