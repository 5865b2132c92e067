"""The published engine (`alfworld` on `textworld`) behind the same interface as ours.

It keeps global state, prints, and is not thread-safe, so it runs in a process of its own, one per environment, which
speaks JSON lines over its pipes. Invariant: what a player is shown is what that package answers; only the score, which
it does not have, is computed here, from the facts that it reports.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atod_envs.alfworld.engine.facts import Facts
from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import NOTHING, Step
from atod_envs.errors import DataError

CLOSING_SECONDS = 5.0
"""How long a worker may take to end before it is killed."""


class Reference:
    """One worker process with the published engine; plays one game at a time.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("alfworld") is None:
            raise ImportError("backend='textworld' needs the published package; install it with: pip install alfworld")
        self.process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def open(self, content: Mapping[str, object] | Path, game: Game) -> ReferencePlayer:
        """Load a game.

        Args:
            content: the game's file, or the content of one.
            game: the same game compiled by us; only its goal is used, for the score.
        """
        return ReferencePlayer(self, content, game)

    def close(self) -> None:
        """End the process. A later episode starts another."""
        if self._end is not None:
            self._end()
        self.process = self._end = None

    def ask(self, **request: object) -> Mapping[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            DataError: the engine refused the game.
            RuntimeError: the process has died.
        """
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        except BaseException:
            self.close()  # Interrupted in the middle of an answer: the next question must not get it.
            raise
        if not line:
            self.close()
            raise RuntimeError("the textworld worker process has ended unexpectedly; reset() starts another")
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise DataError(f"the published engine cannot play {request.get('name')}: {answer['error']}")
        return answer

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", "atod_envs.alfworld.textworld.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self.process = process
        self._end = weakref.finalize(self, _end_process, process)
        return process


class ReferencePlayer:
    """One episode on the published engine."""

    def __init__(self, reference: Reference, content: Mapping[str, object] | Path, game: Game) -> None:
        self.reference = reference
        self._game = game
        self._progress = 0.0
        if isinstance(content, Path):
            self._request: dict[str, object] = {"file": str(content.absolute())}
        else:
            self._request = {"content": {key: value for key, value in content.items() if key != "traj_data"}}

    def reset(self) -> Step:
        """Load the game, and show the introduction."""
        self._progress = 0.0
        return self._step(self.reference.ask(name=self._game.name, **self._request), True)

    def step(self, command: str) -> Step:
        """Carry out a command."""
        answer = self.reference.ask(name=self._game.name, command=command)
        return self._step(answer, answer["observation"] != NOTHING)

    def _step(self, answer: Mapping[str, Any], understood: bool) -> Step:
        won = bool(answer["won"])
        self._progress = max(self._progress, goal_progress(self._game, answer["facts"]))
        admissible = tuple(answer["admissible"])
        return Step(
            answer["observation"],
            admissible,
            float(answer["reward"]),
            bool(answer["done"]),
            won,
            understood,
            self._progress,
        )


def goal_progress(game: Game, reported: list[list[str]]) -> float:
    """The share of a game's goal conditions that reported facts, (predicate, object, ...), meet."""
    facts = Facts(game.start.static)
    facts.unary = [0] * len(facts.unary)
    facts.rows = [{} for _ in facts.rows]
    facts.columns = [{} for _ in facts.columns]
    for name, *arguments in reported:
        number = game.rules.names.predicates.get(name)
        if number is None or not all(argument in game.index for argument in arguments):
            continue
        x, *others = (game.index[argument] for argument in arguments)
        if not others:
            facts.unary[number] |= 1 << x
        else:
            y = others[0]
            facts.rows[number][x] = facts.rows[number].get(x, 0) | 1 << y
            facts.columns[number][y] = facts.columns[number].get(y, 0) | 1 << x
    state = (facts.unary, facts.rows, facts.columns, game.types, game.goal_constants, game.everything)
    return float(sum(condition(*state) for condition in game.goal.conditions) / game.goal_facts)


def _end_process(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # Already broken: the process is gone.
                pipe.close()
    try:
        process.wait(CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
