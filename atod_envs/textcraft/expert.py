"""A scripted crafter: reads the commands, works back from the goal, fetches and crafts.

The invariant: it knows what this episode has shown and nothing else. It works out its next step from what is held, so
it can take over after any agent's actions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

_COMMAND = re.compile(r"craft (\d+) (.+) using (.+)")
_AMOUNT = re.compile(r"(\d+) (.+)")


@dataclass(frozen=True, slots=True)
class Move:
    """What to do, and why in a few words."""

    action: str
    thought: str


@dataclass(frozen=True, slots=True)
class _Command:
    output: str
    count: int
    inputs: tuple[tuple[int, str], ...]


class TextCraftExpert:
    """Plays TextCraft; see the module's docstring."""

    def __init__(self) -> None:
        self._goal = ""
        self._commands: list[_Command] = []
        self._held: dict[str, int] = {}
        self._fetched: frozenset[str] = frozenset()
        self._unfit: set[tuple[str, str]] = set()

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode: read its commands and its goal."""
        self._goal, self._held, self._unfit = task.removeprefix("craft ").removesuffix("."), {}, set()
        self._fetched = frozenset(action.removeprefix("get <number> ") for action in admissible)
        found = [_COMMAND.fullmatch(line) for line in observation.splitlines()]
        self._commands = [_Command(made[2], int(made[1]), _amounts(made[3])) for made in found if made]

    def observe(self, action: str, observation: str, admissible: Sequence[str] = ()) -> None:
        """Take note of what an action of any agent has changed."""
        if got := re.fullmatch(r"Got (\d+) (.+)", observation):
            self._add(got[2], int(got[1]))
        elif made := re.fullmatch(r"Crafted (\d+) minecraft:(.+)", observation):
            for count, name in _amounts(action.partition(" using ")[2]):
                self._add(name, -count)
            self._add(made[2], int(made[1]))
        elif observation.startswith("Could not find a valid recipe") and (tried := _COMMAND.fullmatch(action)):
            given = _amounts(tried[3])
            for command in (command for command in self._commands if command.output == tried[2]):
                swapped = {
                    (item, kind) for (_, item), (_, kind) in zip(given, command.inputs, strict=False) if item != kind
                }
                if len(swapped) == 1 and [n for n, _ in given] == [n for n, _ in command.inputs]:
                    self._unfit |= swapped  # the item is not of the kind that its name says

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """The next step towards the goal."""
        return self._make(self._goal, 1, ()) or Move("inventory", "nothing leads to the goal")

    def _add(self, name: str, count: int) -> None:
        name = name.replace("_", " ")
        self._held[name] = self._held.get(name, 0) + count

    def _make(self, name: str, count: int, above: Collection[str]) -> Move | None:
        """The first step towards ``count`` more of a thing; None if nothing leads there."""
        ways = [command for command in self._commands if command.output == name]
        for way in sorted(ways, key=lambda way: self._effort(way, {name, *above})):
            if self._effort(way, {name, *above}) < float("inf"):
                return self._follow(way, {name, *above})
        if name in self._fetched:
            return Move(f"get {count} {name}", f"{name} can be fetched")
        return None

    def _follow(self, way: _Command, above: Collection[str]) -> Move | None:
        """The first step of a command: its ingredients one after another, then itself."""
        used = []
        for count, name in way.inputs:
            item = self._choice(count, name, above)
            if self._held.get(item, 0) < count:
                return self._make(item, count - self._held.get(item, 0), above)
            used.append(f"{count} {item}")
        return Move(f"craft {way.count} {way.output} using {', '.join(used)}", f"everything for {way.output} is held")

    def _choice(self, count: int, name: str, above: Collection[str]) -> str:
        """The item for an ingredient: of that name, or of that kind where nothing has the name itself."""
        if name in self._fetched or any(command.output == name for command in self._commands):
            return name
        kinds = {command.output: None for command in self._commands if _akin(command.output, name)}
        fit = [kind for kind in kinds if kind not in above and (kind, name) not in self._unfit]
        return min(fit, key=lambda kind: self._need(count, kind, above), default=name)

    def _effort(self, way: _Command, above: Collection[str]) -> float:
        return 1 + sum(self._need(count, self._choice(count, name, above), above) for count, name in way.inputs)

    def _need(self, count: int, name: str, above: Collection[str]) -> float:
        """About how many steps lead to holding ``count`` of a thing."""
        lacking = count - self._held.get(name, 0)
        if lacking <= 0:
            return 0
        ways = [command for command in self._commands if command.output == name]
        if name in self._fetched:
            return 1
        if name in above:
            return float("inf")
        crafts = (-(-lacking // way.count) * self._effort(way, {name, *above}) for way in ways)
        return min(crafts, default=float("inf"))


def _amounts(text: str) -> tuple[tuple[int, str], ...]:
    found = (_AMOUNT.fullmatch(part.strip()) for part in text.split(","))
    return tuple((int(amount[1]), amount[2]) for amount in found if amount)


def _akin(item: str, kind: str) -> bool:
    """Whether an item's name says that it is of a kind: ``oak planks`` and ``planks``."""
    return item.split()[-1].rstrip("s") == kind.split()[-1].rstrip("s")
