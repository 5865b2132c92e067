"""Trajectories as chat messages: the prompts that the policy was shown, and what it answered.

Prompts are not stored as text; a prompt style is a pure function of what the agent has seen, so they are written again
by the style that the episode was played with. Text that no text format can hold (half a character, which a policy can
sample) becomes U+FFFD; the ids, where they are wanted, stay exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TypeAlias, cast

import gymnasium as gym

from atod_envs.prompting import named_style
from atod_envs.styles import History, Layout, PromptStyle, history_action, phrase_response, whole_characters
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory, Turn

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
    return _named(env_id, style) if isinstance(style, str) else style


@functools.lru_cache(maxsize=16)
def _named(env_id: str, style: str) -> PromptStyle:
    env: gym.Env[str, str] = gym.make(env_id)
    try:
        return named_style(cast("TextEnv", env.unwrapped), style)
    finally:
        env.close()


def turn_prompts(trajectory: Trajectory, style: PromptStyle) -> list[str]:
    """The user message of each turn, as the style wrote it."""
    return [style.prompt(history) for _, history in _moments(trajectory)]


def responses(trajectory: Trajectory, style: PromptStyle) -> list[str]:
    """What the policy answered in each turn; an episode of bare actions is phrased by the style.

    A model's bare action, which did not have the form that its prompt asked for, stays as it is.
    """
    return [
        phrase_response(style, turn.action, "", history)
        if turn.response == turn.action and turn.format_ok and not turn.response_ids
        else turn.response
        for turn, history in _moments(trajectory)
    ]


def _moments(trajectory: Trajectory) -> Iterator[tuple[Turn, History]]:
    """Each turn with what had been seen and done before it; the history is the same object, which grows."""
    history = History(trajectory.task)
    for turn in trajectory.turns:
        history.observations.append(turn.observation)
        history.admissible = turn.admissible
        yield turn, history
        history.actions.append(history_action(turn.action))


def conversations(trajectory: Trajectory, style: PromptStyle) -> list[list[Message]]:
    """The chats that the policy had: one for the episode, or one a turn where each prompt stands alone."""
    pairs = zip(turn_prompts(trajectory, style), responses(trajectory, style), strict=True)
    turns = [[user(prompt), assistant(response)] for prompt, response in pairs]
    if style.layout is Layout.CONVERSATION:
        return [[message for turn in turns for message in turn]] if turns else []
    return turns
