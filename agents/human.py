"""A person at the terminal as an agent: ``python -m agents.human --env atod/ALFWorld-v0``.

The invariant: what the person types goes to the environment as it is; only lines that begin with a colon are for this
program (``:actions``, ``:hint``, ``:quit``, ``:help``). Tab completes admissible actions, the arrow keys bring back
earlier lines, and without a terminal (input from a file or a pipe) it plays the same way, line by line.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym

import atod_envs
from agents.base import Agent, Decision
from agents.expert import expert_for
from atod_envs.errors import AtodError, UnknownName
from atod_envs.options import program, read_options
from atod_envs.stopping import stoppable

COMMANDS: Mapping[str, str] = {
    ":actions": "list what can be done now",
    ":hint": "ask the environment's scripted expert what it would do",
    ":quit": "leave (as Ctrl-D does)",
    ":help": "this list",
}
"""Lines for the program itself."""

_WIDTH = 100


class HumanAgent:
    """Asks a person what to do.

    Args:
        ask: returns the line that the person enters; raises ``EOFError`` when there will be no more.
        tell: shows text to the person.
        adviser: whom ``:hint`` asks; it sees what the person sees.
    """

    def __init__(self, ask: Callable[[], str], tell: Callable[[str], None], adviser: Agent | None = None) -> None:
        self._ask, self._tell, self._adviser = ask, tell, adviser
        self._admissible: tuple[str, ...] = ()

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Show how the episode begins."""
        self._admissible = info["admissible"]
        self._tell("Type an action, or :help. Tab completes.")
        self._tell(observation)
        if info["task"] not in observation:
            self._tell(f"Your task: {info['task']}")
        if self._adviser is not None:
            try:
                self._adviser.reset(observation, info)
            except ValueError as error:  # some tasks are beyond the expert, such as freely worded ones
                self._tell(f"(no hints in this episode: {error})")
                self._adviser = None

    def act(self) -> Decision:
        """Read the next action; answers lines for the program on the way.

        Raises:
            EOFError: the person leaves.
        """
        while True:
            line = self._ask().strip()
            if line == ":quit":
                raise EOFError
            if line.startswith(":"):
                self._tell(self._answer(line))
            elif line:
                return Decision(line)

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Show what the action led to."""
        self._admissible = info["admissible"]
        self._tell(observation)
        if self._adviser is not None:
            self._adviser.observe(action, observation, info)

    def completions(self, text: str) -> list[str]:
        """The lines that what has been typed can become; patterns such as ``search[<words>]`` up to their gap."""
        options = [action.partition("<")[0] for action in self._admissible]
        if text.startswith(":"):
            options = list(COMMANDS)
        return sorted({option for option in options if option.startswith(text)})

    def _answer(self, line: str) -> str:
        if line == ":actions":
            return textwrap.fill(", ".join(self._admissible), _WIDTH) or "(nothing)"
        if line == ":hint":
            if self._adviser is None:
                return "There is no expert to ask."
            decision = self._adviser.act()
            return f"{decision.action}   ({decision.thought})" if decision.thought else decision.action
        if line == ":help":
            return "\n".join(f"{command:10}{text}" for command, text in COMMANDS.items())
        return f"{line} is not a command; there are {', '.join(COMMANDS)}"


def play(env: gym.Env[str, str], agent: Agent, *, seed: int | None, task_id: str | None) -> dict[str, Any]:
    """Play one episode.

    Returns:
        The last ``info``; without ``stop_reason`` if the person left before the end.
    """
    observation, info = env.reset(seed=seed, options=None if task_id is None else {"task_id": task_id})
    agent.reset(observation, info)
    over = False
    while not over:
        try:
            action = agent.act().action
        except EOFError:
            break
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        agent.observe(action, observation, info)
    return info


def complete_with(completions: Callable[[str], list[str]]) -> None:
    """Let the terminal's line editor complete whole lines, where there is one."""
    try:
        import readline
    except ImportError:  # not every platform has it; everything but completion works without
        return

    found: list[str] = []

    def completer(text: str, number: int) -> str | None:
        if number == 0:
            found[:] = completions(text)
        return found[number] if number < len(found) else None

    readline.set_completer(completer)
    readline.set_completer_delims("")  # an action is one word to the editor, blanks and all
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=program("agents.human"), description="Play an episode in the terminal.")
    parser.add_argument("--env", default="atod/ALFWorld-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--split", help="which tasks (default: the environment's)")
    parser.add_argument("--task-id", help="play this task")
    parser.add_argument("--seed", type=int, help="draws the task; same seed, same episode")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any other argument of the environment"
    )
    chosen = parser.parse_args(arguments)
    try:
        options = read_options(chosen.option, chosen.split)
        if chosen.split is not None:
            options["split"] = chosen.split
        env = atod_envs.make(chosen.env, **options)
        try:
            return _sit_down(env, chosen.seed, chosen.task_id)
        finally:
            env.close()
    except (AtodError, ValueError, TypeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return 130


def _line(prompt: str) -> str:
    if sys.stdin is None:  # closed before we were started
        raise EOFError
    return input(prompt)


def _sit_down(env: gym.Env[str, str], seed: int | None, task_id: str | None) -> int:
    try:
        adviser: Agent | None = expert_for(env)
    except (UnknownName, ImportError):
        adviser = None
    prompt = "> " if sys.stdin is not None and sys.stdin.isatty() else ""
    agent = HumanAgent(lambda: _line(prompt), lambda text: print(f"{text}\n"), adviser)
    complete_with(agent.completions)
    info = play(env, agent, seed=seed, task_id=task_id)
    ending = {True: "Solved", False: "Not solved"}[bool(info["success"])]
    reason = info.get("stop_reason", "left")
    print(f"{ending} after {info['turn']} turns ({reason}); score {info['score']:.2f}; task {info['task_id']}")
    return 0


if __name__ == "__main__":
    with stoppable():
        raise SystemExit(main())
