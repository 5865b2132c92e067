"""Trajectories as chat messages: the prompts that the policy was shown, and what it answered.

Prompts are not stored as text; a prompt style is a pure function of what the agent has seen, so they are written again
by the style that the episode was played with. Text that no text format can hold (half a character, which a policy can
sample) becomes U+FFFD; the ids, where they are wanted, stay exact.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeAlias, cast

import gymnasium as gym

from atod_envs.errors import UnknownName
from atod_envs.styles import History, Layout, PromptStyle, history_action, whole_characters
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory

Message: TypeAlias = dict[str, str]


def user(content: str) -> Message:
    """A message of the environment."""
    return {"role": "user", "content": whole_characters(content)}


def assistant(content: str) -> Message:
    """A message of the policy."""
    return {"role": "assistant", "content": whole_characters(content)}


def find_style(env_id: str, style: str | PromptStyle) -> PromptStyle:
    """A prompt style of an environment, by name; ``as_conversation`` styles are given as objects.

    Raises:
        UnknownName: the environment has no such style.
    """
    if not isinstance(style, str):
        return style
    styles = _styles(env_id)
    if style not in styles:
        raise UnknownName("prompt style", style, styles)
    return styles[style]


@functools.lru_cache(maxsize=16)
def _styles(env_id: str) -> Mapping[str, PromptStyle]:
    env: gym.Env[str, str] = gym.make(env_id)
    try:
        return cast("TextEnv", env.unwrapped).prompt_styles()
    finally:
        env.close()


def turn_prompts(trajectory: Trajectory, style: PromptStyle) -> list[str]:
    """The user message of each turn, as the style wrote it."""
    history = History(trajectory.task)
    prompts = []
    for turn in trajectory.turns:
        history.observations.append(turn.observation)
        history.admissible = turn.admissible
        prompts.append(style.prompt(history))
        history.actions.append(history_action(turn.action))
    return prompts


def responses(trajectory: Trajectory, style: PromptStyle) -> list[str]:
    """What the policy answered in each turn; an episode of bare actions is phrased by the style."""
    return [
        style.respond(turn.action, "") if turn.response == turn.action and not turn.response_ids else turn.response
        for turn in trajectory.turns
    ]


def conversations(trajectory: Trajectory, style: PromptStyle) -> list[list[Message]]:
    """The chats that the policy had: one for the episode, or one a turn where each prompt stands alone."""
    pairs = zip(turn_prompts(trajectory, style), responses(trajectory, style), strict=True)
    turns = [[user(prompt), assistant(response)] for prompt, response in pairs]
    if style.layout is Layout.CONVERSATION:
        return [[message for turn in turns for message in turn]] if turns else []
    return turns
