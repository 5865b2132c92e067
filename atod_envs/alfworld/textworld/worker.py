"""The process in which the published engine runs; started by `textworld.backend`, not by hand.

Requests and answers are JSON, one a line. Invariant: nothing but answers is written to the pipe, although the engine
prints: the pipe is set aside before the engine is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def main() -> None:
    """Answer requests until the pipe is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("ALFWORLD_DATA", folder)  # The package would make a folder in the user's home.
        engine = make_engine()
        for line in sys.stdin:
            try:
                answer = respond(engine, json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def make_engine() -> Any:
    """The published environment as its own loader builds it, for one game at a time."""
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld import EnvInfos
    from textworld.envs import PddlEnv

    return AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))


def respond(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Load a game (`file` or `content`) or carry out a `command`; return what the engine shows."""
    if "command" in request:
        state, reward, done = engine.step(request["command"])
    else:
        engine.load(request["file"] if "file" in request else request["content"])
        state, reward, done = engine.reset(), 0, False
    return {
        "observation": state["feedback"],
        "admissible": list(state["admissible_commands"]),
        "reward": reward,
        "done": bool(done),
        "won": bool(state["won"]),
        "facts": [[fact.name, *fact.names] for fact in state["_facts"]],
    }


if __name__ == "__main__":
    main()
