"""``atod``: one command over the modules that ``python -m`` runs.

It holds no behaviour of its own: ``atod play ...`` is ``python -m agents.human ...``, and so on. Modules are named, not
imported, so nothing heavy is loaded before it is needed. A module that is run here has ``main(arguments)``, which
returns an exit status or None.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import MappingProxyType
from typing import Any

from atod_algos import foreign_agents
from atod_envs import ENVIRONMENTS
from atod_envs.errors import file_trouble
from atod_envs.stopping import stoppable


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        about: what it does, in a few words.
        modules: what it can run: first word after the command -> module, and the words to put before the user's own;
            ``""`` where there is no such word.
    """

    about: str
    modules: Mapping[str, str]


def commands() -> dict[str, Command]:
    """Every command; the algorithms are those that are installed, other packages' included."""
    algorithms = {point.name: f"{ALGORITHM}{point.name}" for point in entry_points(group="atod.algorithms")}
    return {
        "play": Command("play an episode in the terminal", {"": "agents.human"}),
        "train": Command(
            "train an agent: atod train ALGORITHM [options]",
            {
                **dict(sorted(algorithms.items())),
                "sft": "atod_algos.training.sft",
                "imitation": "atod_algos.training.sft",
            },
        ),
        "eval": Command("play fixed panels of tasks, or compare two results", {"": "atod_algos.evaluate.command"}),
        "export": Command("write a run's model for other programs", {"": "atod_algos.export.command"}),
        "report": Command("show every turn of a run, and why it was weighted", {"": "atod_algos.report.command"}),
        "study": Command("compare methods over environments and seeds", {"": "atod_algos.study.command"}),
        "leaderboard": Command(
            "put a run on the leaderboard: atod leaderboard add RUN", {"add": "atod_algos.study.leaderboard"}
        ),
        "data": Command(
            "what data is there, and where it comes from: atod data status|get|verify|build",
            {word: f"atod_envs.datasets.command {word}" for word in ("status", "get", "verify", "build")},
        ),
        "serve": Command(
            "environments, the shop, a search engine or a teacher over HTTP: atod serve env|shop|search|teacher",
            {
                "env": "atod_envs.serve.command",
                "shop": "atod_envs.webshop.serve",
                "search": "atod_envs.searchqa.serve",
                "teacher": "atod_algos.teachers.server",
            },
        ),
        "make": Command(
            "write fresh data: atod make games|catalogue|encyclopedia|recipes|index",
            {
                "games": "atod_envs.alfworld.generate",
                "catalogue": "atod_envs.webshop.generate",
                "encyclopedia": "atod_envs.searchqa.builtin",
                "recipes": "atod_envs.textcraft.generate",
                "index": "atod_envs.retrieval.build",
            },
        ),
    }


ALIASES: Mapping[str, str] = MappingProxyType({"evaluate": "eval"})
"""Other names of commands."""

MOVED: Mapping[str, str] = MappingProxyType({"plan": "python benchmarks/cluster_plan.py, in a clone of the repository"})
"""Commands of earlier versions, and where they are now."""

ALGORITHM = "algorithm:"
"""Before the name of an algorithm, which is run by its entry point rather than by its module."""

EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "torch": "train",
        "transformers": "train",
        "safetensors": "train",
        "tyro": "train",
        "rich": "train",
        "scipy": "evaluate",
        "matplotlib": "report",
        "starlette": "serve",
        "uvicorn": "serve",
        "websockets": "serve",
        "pyarrow": "parquet",
        "faiss": "dense",
        "shtab": "train",
    }
)
"""Module that may be missing -> extra that brings it."""

_FILES = frozenset(
    {"--data", "--run", "--out", "--to", "--student", "--teacher", "--corpus", "--index", "--record", "--like"}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    known = commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(known))
        return 0
    if words[0] == "--version":
        print(_version())
        return 0
    name, rest = ALIASES.get(words[0], words[0]), words[1:]
    if name == "completion":
        return _completion(rest)
    if name in MOVED:
        print(f"error: atod {name} is {MOVED[name]}", file=sys.stderr)
        return 2
    if name not in known:
        return _wrong(f"unknown command {name!r}", name, [*known, "completion"])
    modules = known[name].modules
    chosen = ""
    if rest and rest[0] in modules:
        chosen, rest = rest[0], rest[1:]
    elif "" not in modules:
        if not rest or rest[0] in ("-h", "--help"):
            print(
                f"atod {name}: {known[name].about}\n\none of: {', '.join(modules)}\noptions of each: atod {name} NAME --help"
            )
            return 0 if rest else 2
        return _wrong(f"atod {name}: unknown name {rest[0]!r}", rest[0], list(modules))
    return run_module(modules[chosen], " ".join(filter(None, ["atod", name, chosen])), rest)


def run_module(module: str, called: str, arguments: Sequence[str]) -> int:
    """Run a module's ``main``, or an algorithm; returns the exit status.

    Args:
        module: the module's full name and leading arguments, or ``ALGORITHM`` and an algorithm's name.
        called: what the user typed, for the usage line.
        arguments: its command line.
    """
    before = sys.argv
    sys.argv = [called, *arguments]
    try:
        if module.startswith(("agents", "atod_algos", ALGORITHM)) and (problem := foreign_agents()):
            print(f"error: {problem}", file=sys.stderr)
            return 1
        with stoppable():
            if module.startswith(ALGORITHM):
                name = module.removeprefix(ALGORITHM)
                status = importlib.import_module("atod_algos.training.cli").main_by_name(name, arguments)
            else:
                name, *leading = module.split()
                status = importlib.import_module(name).main([*leading, *arguments])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"error: {called} needs {error.name}, which is not installed: pip install 'atod[{extra}]'", file=sys.stderr
        )
        return 1
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (trouble := file_trouble(error)) is None:
            raise
        print(f"error: {trouble}", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
    return int(status or 0)


def _overview(known: Mapping[str, Command]) -> str:
    lines = [f"  {name:<11} {command.about}" for name, command in known.items()]
    lines.append(f"  {'completion':<11} a script that completes all this: atod completion bash|zsh")
    algorithms = ", ".join(known["train"].modules)
    return "\n".join(
        [
            "atod COMMAND [options]",
            "",
            *lines,
            "",
            f"algorithms: {algorithms}",
            "options of a command: atod COMMAND --help",
        ]
    )


def _version() -> str:
    try:
        return f"atod {version('atod')}"
    except PackageNotFoundError:
        return "atod (not installed)"


def _wrong(message: str, name: str, allowed: Sequence[str]) -> int:
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"error: {message}{hint} (one of: {', '.join(allowed)})", file=sys.stderr)
    return 2


# --- completion ----------------------------------------------------------------------------------------------------


def _completion(rest: Sequence[str]) -> int:
    """Print a completion script: the options are those that each module's own ``--help`` names."""
    try:
        import shtab
    except ModuleNotFoundError:
        print("error: atod completion needs shtab, which is not installed: pip install shtab", file=sys.stderr)
        return 1
    if len(rest) != 1 or rest[0] not in shtab.SUPPORTED_SHELLS:
        print(f"usage: atod completion {'|'.join(shtab.SUPPORTED_SHELLS)}", file=sys.stderr)
        return 2
    print(shtab.complete(_tree(), rest[0]))
    return 0


def _tree() -> Any:
    import argparse

    top = argparse.ArgumentParser(prog="atod", add_help=False)
    places = top.add_subparsers()
    for name, command in commands().items():
        here = places.add_parser(name, help=command.about, add_help=False)
        below = here.add_subparsers() if set(command.modules) != {""} else None
        for word, module in command.modules.items():
            parser = here if below is None or not word else below.add_parser(word, help=module, add_help=False)
            _add_options(parser, module, f"atod {name} {word}".strip())
    shells = places.add_parser("completion", help="completion script", add_help=False)
    shells.add_argument("shell", choices=("bash", "zsh"))
    return top


def _add_options(parser: Any, module: str, called: str) -> None:
    import shtab

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        run_module(module, called, ["--help"])
    for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.getvalue()))):
        choices = list(ENVIRONMENTS) if option == "--env" else None
        added = parser.add_argument(option, choices=choices)
        if option in _FILES:
            added.complete = shtab.FILE


if __name__ == "__main__":
    sys.exit(main())
