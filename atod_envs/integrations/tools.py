"""The environments as objects whose methods are tools, for trainers that let a model call functions.

TRL's ``environment_factory`` takes them as they are: public methods become the tools, ``reset(**row)`` begins the
episode of a data set's row, ``get_reward()`` is the episode's return. Nothing here imports TRL. The invariant: a tool
call is one action of the environment and answers with its text; a call after the end says that the episode is over and
changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import gymnasium as gym

from atod_envs.errors import AtodError, UnknownName
from atod_envs.recording import RecordTurns
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory

OVER = "The episode is over."


def require_episode(columns: Iterable[str], task_id: object, seed: object) -> None:
    """Refuse a data set's row that names no episode: each attempt of a group would play another task.

    Args:
        columns: the row's other columns; without any there is no row.
        task_id: of the row, or None.
        seed: of the row, or None.

    Raises:
        AtodError: names the columns.
    """
    if (named := ", ".join(columns)) and task_id is None and seed is None:
        raise AtodError(
            f"the data set's row has the columns {named}, but neither task_id nor seed, so each attempt of a group would play another "
            "task; add a column task_id or seed"
        )


class ToolEnv:
    """What the tool sets share; its subclasses' public methods are the tools.

    Args:
        **options: of the environment (``split``, ``data``, ``max_turns``, ...).
    """

    _env_id: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self._env = RecordTurns(gym.make(self._env_id, **options))
        self._over = True
        self._return = 0.0

    def reset(self, task_id: str | None = None, seed: int | None = None, **row: Any) -> str:
        """Begin an episode; further columns of the data set's row are ignored.

        Raises:
            AtodError: a row names neither task nor seed: attempts at it would be attempts at different tasks.
        """
        require_episode(row, task_id, seed)
        observation, info = self._env.reset(seed=seed, options=None if task_id is None else {"task_id": task_id})
        self._over, self._return = False, 0.0
        return observation if info["task"] in observation else f"{info['task']}\n\n{observation}"

    def get_reward(self) -> float:
        """The return of the episode so far, on the environment's scale."""
        return self._return

    @property
    def trajectory(self) -> Trajectory:
        """The episode so far."""
        return self._env.trajectory

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The tasks of the split."""
        return tuple(cast("TextEnv", self._env.unwrapped).tasks)

    def _act(self, action: str) -> str:
        if self._over:
            return OVER
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._return += reward
        self._over = terminated or truncated
        return f"{observation}\n{OVER}".strip() if self._over else observation


class ALFWorldTools(ToolEnv):
    """A household game: one tool for each kind of command."""

    _env_id = "atod/ALFWorld-v0"

    def go_to(self, place: str) -> str:
        """Walk to a place and see what is there.

        Args:
            place: the place, e.g. "fridge 1".

        Returns:
            What you see.
        """
        return self._act(f"go to {place}")

    def open(self, place: str) -> str:
        """Open a place that you stand at.

        Args:
            place: the place, e.g. "fridge 1".

        Returns:
            What you see.
        """
        return self._act(f"open {place}")

    def close(self, place: str) -> str:
        """Close a place that you stand at.

        Args:
            place: the place, e.g. "fridge 1".

        Returns:
            What happened.
        """
        return self._act(f"close {place}")

    def take(self, thing: str, place: str) -> str:
        """Take a thing from the place that you stand at. You can hold one thing.

        Args:
            thing: the thing, e.g. "apple 1".
            place: the place, e.g. "fridge 1".

        Returns:
            What happened.
        """
        return self._act(f"take {thing} from {place}")

    def put(self, thing: str, place: str) -> str:
        """Put the thing that you hold in or on the place that you stand at.

        Args:
            thing: the thing, e.g. "apple 1".
            place: the place, e.g. "fridge 1".

        Returns:
            What happened.
        """
        return self._act(f"move {thing} to {place}")

    def clean(self, thing: str, place: str) -> str:
        """Clean the thing that you hold at a basin.

        Args:
            thing: the thing, e.g. "apple 1".
            place: the basin, e.g. "sinkbasin 1".

        Returns:
            What happened.
        """
        return self._act(f"clean {thing} with {place}")

    def heat(self, thing: str, place: str) -> str:
        """Heat the thing that you hold with a microwave.

        Args:
            thing: the thing, e.g. "apple 1".
            place: the microwave, e.g. "microwave 1".

        Returns:
            What happened.
        """
        return self._act(f"heat {thing} with {place}")

    def cool(self, thing: str, place: str) -> str:
        """Cool the thing that you hold with a fridge.

        Args:
            thing: the thing, e.g. "apple 1".
            place: the fridge, e.g. "fridge 1".

        Returns:
            What happened.
        """
        return self._act(f"cool {thing} with {place}")

    def slice(self, thing: str, knife: str) -> str:
        """Slice a thing with the knife that you hold.

        Args:
            thing: the thing, e.g. "apple 1".
            knife: the knife, e.g. "knife 1".

        Returns:
            What happened.
        """
        return self._act(f"slice {thing} with {knife}")

    def use(self, thing: str) -> str:
        """Switch on a thing, for example a lamp.

        Args:
            thing: the thing, e.g. "desklamp 1".

        Returns:
            What happened.
        """
        return self._act(f"use {thing}")

    def examine(self, thing: str) -> str:
        """Look closely at a place that you stand at or a thing that you hold.

        Args:
            thing: the place or thing, e.g. "apple 1".

        Returns:
            What you see.
        """
        return self._act(f"examine {thing}")

    def look(self) -> str:
        """Look around.

        Returns:
            What you see.
        """
        return self._act("look")

    def inventory(self) -> str:
        """Say what you hold.

        Returns:
            What you hold.
        """
        return self._act("inventory")


class WebShopTools(ToolEnv):
    """A web shop: search, and click what the page shows."""

    _env_id = "atod/WebShop-v0"

    def search(self, words: str) -> str:
        """Search the shop, where the page has a search bar.

        Args:
            words: what to search for.

        Returns:
            The page of results.
        """
        return self._act(f"search[{words}]")

    def click(self, text: str) -> str:
        """Click a button, a product or an option of the page.

        Args:
            text: its text, e.g. "buy now".

        Returns:
            The page that follows.
        """
        return self._act(f"click[{text}]")


class SearchQATools(ToolEnv):
    """Questions with a search engine: search, then answer."""

    _env_id = "atod/SearchQA-v0"

    def search(self, query: str) -> str:
        """Search the encyclopedia.

        Args:
            query: what to search for.

        Returns:
            The best passages.
        """
        return self._act(f"<search>{query}</search>")

    def answer(self, text: str) -> str:
        """Answer the question; this ends the episode.

        Args:
            text: the answer, in a few words.

        Returns:
            That the episode is over.
        """
        return self._act(f"<answer>{text}</answer>")


class TextCraftTools(ToolEnv):
    """Crafting: fetch what no command makes, craft the rest."""

    _env_id = "atod/TextCraft-v0"

    def get(self, count: int, item: str) -> str:
        """Fetch things that cannot be crafted.

        Args:
            count: how many.
            item: of what, e.g. "oak logs".

        Returns:
            What happened.
        """
        return self._act(f"get {count} {item}")

    def craft(self, item: str, ingredients: str) -> str:
        """Craft an item from things that you hold.

        Args:
            item: how many of what, as its command says, e.g. "4 oak planks".
            ingredients: with their counts and commas between them, e.g. "1 oak logs".

        Returns:
            What happened.
        """
        return self._act(f"craft {item} using {ingredients}")

    def inventory(self) -> str:
        """Say what you hold.

        Returns:
            What you hold.
        """
        return self._act("inventory")


class ScienceWorldTools(ToolEnv):
    """Science experiments: one tool, because the world knows 26 forms of action."""

    _env_id = "atod/ScienceWorld-v0"

    def act(self, action: str) -> str:
        """Do something in the world.

        Args:
            action: such as "open door to kitchen", "go to kitchen", "pick up thermometer", "use thermometer on water",
                "wait1".

        Returns:
            What happened.
        """
        return self._act(action)


TOOLS: dict[str, type[ToolEnv]] = {
    kind._env_id: kind for kind in (ALFWorldTools, WebShopTools, SearchQATools, TextCraftTools, ScienceWorldTools)
}
"""Registered id -> tool set."""


def tool_factory(env_id: str, **options: Any) -> Callable[[], ToolEnv]:
    """What TRL's ``environment_factory`` takes: makes an environment's tool set.

    Args:
        env_id: registered id of the environment.
        **options: of the environment.

    Raises:
        UnknownName: there is no tool set for it; ``prompted`` and the rollout function serve any environment.
    """
    if env_id not in TOOLS:
        raise UnknownName("environment with a tool set", env_id, TOOLS)
    return functools.partial(TOOLS[env_id], **options)
