"""``Prompted``: an environment whose observation is a prompt and whose action is a model's whole response.

``prompted(env, style=...)`` puts a prompt style (:mod:`atod_envs.styles`) around an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from atod_envs.errors import UnknownName
from atod_envs.spaces import UnicodeText
from atod_envs.styles import History, PromptStyle, read_response
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode and return its first prompt."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.history = History(info["task"], [observation], [], info["admissible"])
        return self.style.prompt(self.history), {**info, "observation": observation}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Parse a response, execute its action, and return the next prompt."""
        parsed = read_response(self.style, action, self.history)
        admissible = self.history.admissible
        observation, reward, terminated, truncated, info = self.env.step(parsed.action)
        self.history.actions.append(parsed.action)
        self.history.observations.append(observation)
        self.history.admissible = info["admissible"]
        info = {
            **info,
            "observation": observation,
            "action": parsed.action,
            "format_ok": parsed.format_ok,
            "action_admissible": matches_admissible(parsed.action, admissible),
        }
        return self.style.prompt(self.history), float(reward), terminated, truncated, info


def prompted(env: gym.Env[str, str], style: str | PromptStyle = "atod") -> Prompted:
    """Put a prompt style around an environment; ``"atod"`` is the paper's (its Figures 7 to 9)."""
    return Prompted(env, style)


def matches_admissible(action: str, admissible: Sequence[str]) -> bool:
    """Whether an action is listed, or fits a listed pattern such as ``search[<your query>]``.

    A pattern holds one slot, which any non-empty text fills: ``...`` as in ``<search>...</search>``, else ``<...>``.
    """
    if action in admissible:
        return True
    for pattern in admissible:
        before, opened, after = pattern.partition("...")
        closed = opened
        if not opened:
            before, opened, rest = pattern.partition("<")
            _, closed, after = rest.partition(">")
        fits = action.startswith(before) and action.endswith(after) and len(action) > len(before) + len(after)
        if opened and closed and fits:
            return True
    return False
