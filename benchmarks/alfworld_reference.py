"""The published ALFWorld engine, as it is or with caches that leave its answers alone, and games to play on it.

Invariant: `accelerated` changes how often the engine repeats a computation, never its result: parsers are remembered by
their text, translations of a game by the game, and copies that are only read are made shallow.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ARCHIVES = {
    "present": ("alfworld_valid_full.tar.xz", "alfworld_train_games.tar.xz"),
    "older": ("alfworld_oldgrammar_valid_382.tar.xz",),
}


class Shown(NamedTuple):
    """What the published engine shows."""

    observation: str
    admissible: tuple[str, ...]
    reward: float
    done: bool
    won: bool


class Reference:
    """The published engine in this process; it keeps global state, so do not make two in two threads."""

    def __init__(self) -> None:
        os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())  # Else it makes a folder in the user's home.
        arguments = list(sys.argv)
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs import PddlEnv

        self._engine = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
        sys.argv = arguments

    def load(self, game: str | Mapping[str, Any]) -> None:
        """Load a game file or the content of one."""
        with _arguments_kept():
            self._engine.load(game)

    def reset(self) -> Shown:
        """Begin an episode of the loaded game."""
        with _arguments_kept():
            state = self._engine.reset()
        return Shown(state["feedback"], tuple(state["admissible_commands"]), 0.0, False, bool(state["won"]))

    def step(self, command: str) -> Shown:
        """Carry out a command."""
        state, reward, done = self._engine.step(command)
        return Shown(
            state["feedback"], tuple(state["admissible_commands"]), float(reward), bool(done), bool(state["won"])
        )


@contextlib.contextmanager
def _arguments_kept() -> Iterator[None]:
    arguments = list(sys.argv)  # The translator overwrites them at every load.
    try:
        yield
    finally:
        sys.argv = arguments


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Within this context the published engine repeats less; see the module."""
    import fast_downward
    import textworld.logic as logic
    from textworld.envs.pddl import logic as pddl_logic
    from textworld.envs.pddl import textgen

    parse_text, parse_rules = textgen._parse_and_convert, pddl_logic._parse_and_convert
    parse_query, translate = logic.Rule.parse_conjunctive_query, fast_downward.pddl2sas
    texts: dict[str, Any] = {}

    def remembered_text(text: str, **options: Any) -> Any:
        if text not in texts:
            texts[text] = parse_text(text, **options)
        return [_clone(symbol) for symbol in texts[text]]

    def shallow(value: Any) -> Any:
        if isinstance(value, list):
            return [_clone(symbol) for symbol in value]
        return dict(value) if isinstance(value, dict) else _clone(value)

    @functools.lru_cache(maxsize=4)
    def translated(domain: str, problem: str) -> Any:
        return translate(domain, problem)

    derive = textgen.ContextSensitiveGrammar.derive
    commands: dict[Any, Any] = {}

    def remembered_command(grammar: Any, start: str, context: Any) -> str:
        # A command's wording asks at most where a receptacle stands, which no action changes; feedback has a "#" or
        # no placeholder at all.
        if "#" in start or not context["mapping"]:
            return str(derive(grammar, start, context))
        if game[0] is not context["entity_infos"]:
            game[0] = context["entity_infos"]  # Made anew for every game that is loaded.
            commands.clear()
        key = (start, tuple(variable.name for variable in context["mapping"].values()))
        if key not in commands:
            commands[key] = derive(grammar, start, context)
        return commands[key]

    game: list[Any] = [None]
    # The second, optimised translation serves only the planner, which is not used here.
    fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: translated(domain, problem)
    textgen._parse_and_convert, textgen.deepcopy = remembered_text, shallow
    textgen.ContextSensitiveGrammar.derive = remembered_command
    pddl_logic._parse_and_convert = functools.lru_cache(maxsize=4)(parse_rules)
    logic.Rule.parse_conjunctive_query = staticmethod(functools.cache(parse_query))
    try:
        yield
    finally:
        fast_downward.pddl2sas = translate
        textgen._parse_and_convert, textgen.deepcopy = parse_text, copy.deepcopy
        textgen.ContextSensitiveGrammar.derive = derive
        pddl_logic._parse_and_convert = parse_rules
        logic.Rule.parse_conjunctive_query = parse_query


def _clone(symbol: Any) -> Any:
    """A copy of a grammar symbol whose own context may be replaced."""
    twin = copy.copy(symbol)
    for part in ("symbol", "expression"):
        if not isinstance(getattr(twin, part, ""), str):
            setattr(twin, part, copy.copy(getattr(twin, part)))
    return twin


@contextlib.contextmanager
def real_games(realdata: Path) -> Iterator[dict[str, list[Path]]]:
    """Unpack the recorded real games for a while.

    Args:
        realdata: folder that holds `alfworld/` with the archives, or at least the unpacked sample.

    Yields:
        Game files by release, `present` and `older`; whatever is not there is left out.
    """
    folder = realdata / "alfworld"
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[Path]] = {}
        for release, archives in ARCHIVES.items():
            target = Path(scratch) / release
            for name in archives:
                if (folder / name).is_file():
                    with tarfile.open(folder / name) as archive:
                        members = [item for item in archive.getmembers() if item.name.endswith("game.tw-pddl")]
                        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # as of Python 3.11.4
                        archive.extractall(target, members=members)
            found[release] = sorted(target.rglob("game.tw-pddl"))
        found["present"] = found["present"] or sorted(folder.glob("sample_12/**/game.tw-pddl"))
        yield {release: files for release, files in found.items() if files}


def content(game: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a game file."""
    if isinstance(game, Mapping):
        return game
    data: Mapping[str, Any] = json.loads(Path(game).read_text(encoding="utf-8"))
    return data
