"""``Prompted``: an environment whose observation is a prompt and whose action is a model's whole response.

``prompted(env, style=...)`` puts a prompt style (:mod:`atod_envs.styles`) around an environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from atod_envs import snapshots
from atod_envs.errors import EpisodeError, UnknownName
from atod_envs.spaces import UnicodeText
from atod_envs.styles import History, PromptStyle, history_action, read_response
from atod_envs.text_env import TextEnv


def named_style(env: TextEnv, style: str | PromptStyle) -> PromptStyle:
    """A prompt style of an environment, by name; a style of your own is handed back.

    Raises:
        UnknownName: the environment has no style of that name.
    """
    if not isinstance(style, str):
        return style
    styles = env.prompt_styles()
    if style not in styles:
        raise UnknownName("prompt style", style, styles)
    return styles[style]


class Prompted(gym.Wrapper[str, str, str, str], RecordConstructorArgs):
    """An environment whose observation is a prompt and whose action is a whole response.

    ``info`` gains ``observation`` (the environment's own text), ``action`` (what was executed), ``format_ok``, and
    ``action_admissible`` (the action was in the list of admissible ones).

    Args:
        env: a :class:`TextEnv`, wrapped or not.
        style: name of one of its prompt styles, or a style of your own.
    """

    def __init__(self, env: gym.Env[str, str], style: str | PromptStyle = "atod") -> None:
        RecordConstructorArgs.__init__(self, style=style)  # so that Gymnasium can make the wrapped environment again
        super().__init__(env)
        self.style: PromptStyle = named_style(cast("TextEnv", env.unwrapped), style)
        self.history = History("")
        self.observation_space = UnicodeText()
        self.action_space = UnicodeText()
        self._info: dict[str, Any] = {}
        self._restores = self._base.restores

    @property
    def _base(self) -> TextEnv:
        return cast("TextEnv", self.env.unwrapped)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode and return its first prompt."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.history = History(info["task"], [observation], [], info["admissible"])
        self._restores = self._base.restores
        self._info = {"observation": observation}
        return self.style.prompt(self.history), {**info, **self._info}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Parse a response, execute its action, and return the next prompt.

        Raises:
            EpisodeError: the environment was restored without this wrapper, whose history is of another moment.
        """
        if self._base.restores != self._restores:
            raise EpisodeError(
                "the environment under this prompt was restored by itself, and the history is of another moment; "
                "use snapshot() and restore() of the prompted environment"
            )
        parsed = read_response(self.style, action, self.history)
        admissible = self.history.admissible
        observation, reward, terminated, truncated, info = self.env.step(parsed.action)
        self.history.actions.append(history_action(parsed.action))
        self.history.observations.append(observation)
        self.history.admissible = info["admissible"]
        self._info = {
            "observation": observation,
            "action": parsed.action,
            "format_ok": parsed.format_ok,
            "action_admissible": matches_admissible(parsed.action, admissible),
        }
        return self.style.prompt(self.history), float(reward), terminated, truncated, {**info, **self._info}

    def snapshot(self) -> tuple[Any, History, dict[str, Any]]:
        """The present moment with its history, for :meth:`restore`; see :mod:`atod_envs.snapshots`."""
        return snapshots.snapshot(self.env), _copied(self.history), self._info

    def restore(self, state: tuple[Any, History, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        """Go back to a moment that :meth:`snapshot` gave.

        Returns:
            The prompt and ``info`` of that moment.

        Raises:
            EpisodeError: the state is not of a prompted environment, or of other data.
        """
        if not (isinstance(state, tuple) and len(state) == 3 and isinstance(state[1], History)):
            raise EpisodeError(
                "the state is not a snapshot of a prompted environment; take it with snapshot() of the same wrappers"
            )
        inner, history, about = state
        _, info = snapshots.restore(self.env, inner)
        self.history, self._info = _copied(history), about
        self._restores = self._base.restores
        return self.style.prompt(self.history), {**info, **about}


def _copied(history: History) -> History:
    return replace(history, observations=list(history.observations), actions=list(history.actions))


def prompted(env: gym.Env[str, str], style: str | PromptStyle = "atod") -> Prompted:
    """Put a prompt style around an environment; ``"atod"`` is the paper's (its Figures 7 to 9)."""
    return Prompted(env, style)


def matches_admissible(action: str, admissible: Sequence[str]) -> bool:
    """Whether an action is listed, or fits a listed pattern such as ``search[<your query>]``.

    Any non-empty text fills a slot: ``...`` as in ``<search>...</search>``, else every ``<...>``.
    """
    if action in admissible:
        return True
    for pattern in admissible:
        parts = pattern.split("...", 1) if "..." in pattern else _SLOT.split(pattern)
        if len(parts) > 1 and _fits(action, parts):
            return True
    return False


def fill_pattern(pattern: str, text: str) -> str:
    """A listed action with its slots, if it has any, filled: one that :func:`matches_admissible` takes for it."""
    return pattern.replace("...", text, 1) if "..." in pattern else _SLOT.sub(lambda _: text, pattern)


def _fits(action: str, parts: Sequence[str]) -> bool:
    """Whether an action is these parts with a text of at least a character between each two, in linear time."""
    first, *inner, last = parts
    if not action.startswith(first):
        return False
    end = len(first)
    for part in inner:
        place = action.find(part, end + 1)
        if place < 0:
            return False
        end = place + len(part)
    return action.endswith(last) and len(action) - len(last) > end


_SLOT = re.compile(r"<[^>]*>")
