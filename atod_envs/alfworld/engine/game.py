"""One game file, compiled: immutable, and shared by every session that plays it.

Objects are numbered in the order of their ids, which is the order in which the reference lists them. Invariant: what a
`Game` remembers between calls (texts, commands, operators) depends on the game alone, so sharing it is invisible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from atod_envs.alfworld.engine import goals
from atod_envs.alfworld.engine.facts import Facts, StaticFacts
from atod_envs.alfworld.engine.grammar import split_task
from atod_envs.alfworld.engine.operators import Key
from atod_envs.alfworld.engine.pddl import Problem, parse_problem
from atod_envs.alfworld.engine.rules import Ground, Rules, Schema, compile_goal, compiled_rules
from atod_envs.alfworld.household import TASK_TYPES as TASK_TYPES
from atod_envs.errors import DataError
from atod_envs.files import read_json

REMEMBERED = 512
"""Entries that each of a game's caches keeps; a full cache starts over."""

TASK_LEAD = "Your task is to: "
"""Words before the task sentence in the first observation."""

_ESCAPES = (("_bar_", "|"), ("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ","))


class OperatorGroup(NamedTuple):
    """Operators of one action that are possible together.

    Attributes:
        ground: the plan that found them.
        key: the key that they share.
        commands: theirs.
        table: by command, the parameters' values, or what `ground.finish` makes them from.
    """

    ground: Ground
    key: Key
    commands: Collection[str]
    table: Mapping[str, tuple[Any, ...]]


class Menu(NamedTuple):
    """Everything that can be done in a state: the commands in order, and the groups in which to look them up."""

    commands: tuple[str, ...]
    groups: tuple[OperatorGroup, ...]

    def find(self, command: str) -> tuple[Schema, tuple[int, ...]] | None:
        """The action of a command and its parameters' values, or None if it cannot be done."""
        for ground, key, _, table in self.groups:
            values = table.get(command)
            if values is not None:
                if ground.finish is not None:
                    values = ground.finish(key, values)
                    if values is None:
                        continue
                return ground.schema, values
        return None


class Game:
    """A compiled game; make one with `Game.load` or `Game.parse`.

    Attributes:
        name: what the caller calls it, usually the path of the file.
        task: the task sentence as the game words it, with its full stop, without `TASK_LEAD`.
        task_type: one of `TASK_TYPES` where it is known (from `traj_data`, else from the folder's name), else None.
        walkthrough: the stored solution; empty where the file has none.
        solvable: what the file says; None where it does not say.
        goal_facts: how many conditions the goal has (see `goals`).
        intro: the first observation.
    """

    def __init__(self, name: str, rules: Rules, problem: Problem, task_text: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.rules = rules
        self.walkthrough: tuple[str, ...] = tuple(data.get("walkthrough") or ())
        self.solvable: bool | None = data.get("solvable")
        self.task_type = _task_type(name, data.get("traj_data"))
        self.objects: tuple[str, ...] = tuple(sorted(kind[0] for kind in problem.objects))
        self.index = {name: number for number, name in enumerate(self.objects)}
        self.everything = (1 << len(self.objects)) - 1
        self._load_facts(problem)
        shape, constants = goals.abstract(problem.goal)
        self.goal = compile_goal(rules, shape, goals.conditions(shape, rules.names.fluents))
        self.goal_constants = [self.index.get(constants[number], len(self.objects)) for number in self.goal.constants]
        self.goal_facts = len(self.goal.conditions)
        self.types = self._type_sets(problem)
        self.constants = [self.index.get(name, len(self.objects)) for name in rules.names.constants]
        self._words: dict[str, dict[Any, Any]] = {}
        self._groups: dict[Key, tuple[OperatorGroup, ...]] = {}
        self._menus: dict[tuple[Key, ...], Menu] = {}
        static = StaticFacts(
            self.objects, self.names, self.types, self.unary, self.rows, self.columns, rules.changing, task_text
        )
        self.start = Facts(static)
        self.intro = rules.intro(self.start, ())
        self.task = self.intro.rpartition(TASK_LEAD)[2].strip()

    @classmethod
    def load(cls, path: str | Path) -> Game:
        """Read a `game.tw-pddl` file.

        Raises:
            DataError: the file is missing or broken, or holds a construct that the engine does not implement.
        """
        return cls.parse(read_json(Path(path), "is the file truncated? Unpack the games again"), name=str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, name: str) -> Game:
        """Compile the content of a game file.

        Args:
            data: the file's keys: `pddl_domain`, `grammar`, `pddl_problem`, and optionally `solvable`, `walkthrough`
                and `traj_data` (the content of the file of that name).
            name: the file's path or the game's id, for messages.

        Raises:
            DataError: a key is missing, or a text holds a construct that the engine does not implement; the message
                names the game and quotes the construct.
        """
        if not isinstance(data, Mapping):
            raise DataError(f"the game {name} is not a JSON object")
        texts = []
        for key in ("pddl_domain", "grammar", "pddl_problem"):
            if not isinstance(data.get(key), str):
                raise DataError(f"the game {name} lacks the text {key!r}; found the keys {sorted(data)}")
            texts.append(str(data[key]))
        if data.get("solvable") not in (None, True, False):
            raise DataError(f"the game {name} has 'solvable' {data['solvable']!r:.40}; expected true or false")
        walkthrough = data.get("walkthrough")
        if walkthrough is not None and not (
            isinstance(walkthrough, list | tuple) and all(isinstance(command, str) for command in walkthrough)
        ):
            raise DataError(
                f"the game {name} has a 'walkthrough' that is not a list of commands: {str(walkthrough)[:80]!r}"
            )
        try:
            grammar, sentence = split_task(texts[1])
            rules = compiled_rules(texts[0], grammar)
            problem = parse_problem(texts[2], rules.domain)
            return cls(name, rules, problem, sentence or "", data)
        except DataError as error:
            raise DataError(f"the game {name} cannot be played: {error}") from None
        except (RecursionError, MemoryError):
            raise DataError(f"the game {name} cannot be played: its formulas are nested too deeply") from None

    def menu(self, facts: Facts) -> Menu:
        """Everything that can be done in a state of this game."""
        keys = self.rules.keys(facts.unary, facts.rows, facts.columns, self.types, self.constants, self.everything)
        menu = self._menus.get(keys)
        if menu is None:
            if len(self._menus) >= REMEMBERED:
                self._menus.clear()
            groups = tuple(group for key in keys for group in self._expand(key))
            commands = sorted([command for group in groups for command in group.commands])
            menu = self._menus[keys] = Menu(tuple(dict.fromkeys(commands)), groups)
        return menu

    def _expand(self, key: Key) -> tuple[OperatorGroup, ...]:
        groups = self._groups.get(key)
        if groups is None:
            if len(self._groups) >= 4 * REMEMBERED:
                self._groups.clear()
            found = (self._group(ground, key) for ground in self.rules.bundles[key[0]])
            groups = self._groups[key] = tuple(group for group in found if group.commands)
        return groups

    def _group(self, ground: Ground, key: Key) -> OperatorGroup:
        schema, start = ground.schema, self.start
        words = self._words.setdefault(schema.name, {})
        relations = (self.unary, self.rows, self.columns, self.types, self.constants, self.everything)
        table = ground.expand(*relations, key, words, lambda values: schema.command(start, values))
        return OperatorGroup(ground, key, table if ground.choose is None else ground.choose(key, table), table)

    def _load_facts(self, problem: Problem) -> None:
        rules, index = self.rules, self.index
        numbers = rules.names.predicates
        self.unary = [0] * len(numbers)
        self.rows: list[dict[int, int]] = [{} for _ in numbers]
        self.columns: list[dict[int, int]] = [{} for _ in numbers]
        seen = set(problem.function_arguments)
        for fact in problem.facts:
            seen.update(fact[1:])
            number = numbers[fact[0]]
            x = index[fact[1]]
            if len(fact) == 2:
                self.unary[number] |= 1 << x
            else:
                y = index[fact[2]]
                rows, columns = self.rows[number], self.columns[number]
                rows[x] = rows.get(x, 0) | 1 << y
                columns[y] = columns.get(y, 0) | 1 << x
        names = display_names(seen)
        self.names = tuple(names.get(name, name) for name in self.objects)

    def _type_sets(self, problem: Problem) -> list[int]:
        members: dict[str, int] = {}
        for name, kind in problem.objects:
            members[kind] = members.get(kind, 0) | 1 << self.index[name]
        sets = []
        for kind in self.rules.names.types:
            sets.append(sum(members.get(subtype, 0) for subtype in self.rules.domain.subtypes(kind)))
        return sets


def display_names(ids: set[str]) -> dict[str, str]:
    """The names that a player sees, by object id.

    An id such as `cabinet_bar__minus_00_dot_60_bar_...` becomes its class and a number; within a class the first id in
    order gets the highest number. An id without a position keeps its text, followed by a blank as in the reference.
    """
    ordered = sorted(ids)
    classes: dict[str, str] = {}
    for name in ordered:
        if "_bar_" in name:
            classes[name] = name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "")
    left = Counter(classes.values())
    names: dict[str, str] = {}
    for name in ordered:
        text = classes.get(name, name)
        for escape, character in _ESCAPES:
            text = text.replace(escape, character)
        if name in classes:
            names[name] = f"{text} {left[classes[name]]}"
            left[classes[name]] -= 1
        else:
            names[name] = f"{text} "
    return names


def _task_type(name: str, traj_data: object) -> str | None:
    if isinstance(traj_data, Mapping):
        found = traj_data.get("task_type")
        if isinstance(found, str):
            return found
    for part in Path(name).parts:
        found = part.partition("-")[0]
        if found in TASK_TYPES and "-" in part:
            return found
    return None
