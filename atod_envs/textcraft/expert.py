"""A scripted crafter: reads the commands, works back from the goal, fetches and crafts.

The invariant: it knows what this episode has shown and nothing else. It works out its next step from what is held, so
it can take over after any agent's actions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from atod_envs.experts import Move

from .recipes import Amount, Recipe


class TextCraftExpert:
    """Plays TextCraft; see the module's docstring. Its thoughts say what is lacking, from the goal downwards."""

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode: read its commands and its goal."""
        self._goal = task.removeprefix("craft ").removesuffix(".")
        self._fetched = {action.removeprefix("get <number> ") for action in admissible}
        self._held: dict[str, int] = {}
        self._unfit: set[tuple[str, str]] = set()
        self._ways: dict[str, list[Recipe]] = {}
        for recipe in filter(None, map(_read, observation.splitlines())):
            self._ways.setdefault(recipe.output.name, []).append(recipe)

    def observe(self, action: str, observation: str, admissible: Sequence[str] = ()) -> None:
        """Take note of what an action of any agent has changed."""
        tried = _read(action)
        if got := re.fullmatch(r"Got (\d+) (.+)", observation):
            self._add(got[2], int(got[1]))
        elif made := re.fullmatch(r"Crafted (\d+) minecraft:(.+)", observation):
            for use in _amounts(action.partition(" using ")[2]):
                self._add(use.name, -use.count)
            self._add(made[2].replace("_", " "), int(made[1]))
        elif tried and observation.startswith("Could not find a valid recipe"):
            for way in self._ways.get(tried.output.name, ()):
                pairs = list(zip(tried.inputs, way.inputs, strict=False))
                swapped = {(given.name, use.name) for given, use in pairs if given.name != use.name}
                if len(swapped) == 1 and [g.count for g in tried.inputs] == [use.count for use in way.inputs]:
                    self._unfit |= swapped  # the item is not of the kind that its name says

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """The next step towards the goal."""
        move = self._make(self._goal, 1, ()) or Move("inventory", "nothing leads there")
        return Move(move.action, f"for {self._goal}: {move.thought}")

    def _add(self, name: str, count: int) -> None:
        self._held[name] = self._held.get(name, 0) + count

    def _make(self, name: str, count: int, above: Collection[str]) -> Move | None:
        """The first step towards ``count`` more of a thing; None if nothing leads there."""
        above = {name, *above}
        way = min(self._ways.get(name, ()), key=lambda way: self._effort(way, above), default=None)
        if way is not None and self._effort(way, above) < float("inf"):
            return self._follow(way, above)
        return Move(f"get {count} {name}", "fetch") if name in self._fetched else None

    def _follow(self, way: Recipe, above: Collection[str]) -> Move | None:
        """The first step of a command: its ingredients one after another, then itself."""
        used = []
        for use in way.inputs:
            item = self._choice(use, above)
            held = self._held.get(item, 0)
            if held < use.count:
                move = self._make(item, use.count - held, above)
                return move and Move(move.action, f"{item} {held} of {use.count}, {move.thought}")
            used.append(Amount(item, use.count))
        return Move(str(Recipe(way.output, tuple(used))), "craft")

    def _choice(self, use: Amount, above: Collection[str]) -> str:
        """The item for an ingredient: of that name, or of that kind where nothing has the name itself."""
        if use.name in self._fetched or use.name in self._ways:
            return use.name
        fit = [i for i in self._ways if _akin(i, use.name) and i not in above and (i, use.name) not in self._unfit]
        return min(fit, key=lambda item: self._need(use.count, item, above), default=use.name)

    def _effort(self, way: Recipe, above: Collection[str]) -> float:
        return 1 + sum(self._need(use.count, self._choice(use, above), above) for use in way.inputs)

    def _need(self, count: int, name: str, above: Collection[str]) -> float:
        """About how many steps lead to holding ``count`` of a thing."""
        lacking = count - self._held.get(name, 0)
        if lacking <= 0:
            return 0
        if name in self._fetched:
            return 1
        if name in above:
            return float("inf")
        ways = self._ways.get(name, ())
        crafts = (-(-lacking // way.output.count) * self._effort(way, {name, *above}) for way in ways)
        return min(crafts, default=float("inf"))


def _read(command: str) -> Recipe | None:
    found = re.fullmatch(r"craft (\d+) (.+) using (.+)", command)
    return Recipe(Amount(found[2], int(found[1])), _amounts(found[3])) if found else None


def _amounts(text: str) -> tuple[Amount, ...]:
    return tuple(Amount(name.strip(), int(count)) for count, name in re.findall(r"(\d+) ([^,]+)", text))


def _akin(item: str, kind: str) -> bool:
    """Whether an item's name says that it is of a kind: ``oak planks`` and ``planks``."""
    return item.split()[-1].rstrip("s") == kind.split()[-1].rstrip("s")
