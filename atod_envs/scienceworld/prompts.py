"""How ScienceWorld is put to a language model: a prompt in the form of the paper's, and a compact conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atod_envs.styles import History, Layout, Parsed, PromptStyle, history_lines, parse_tagged

_HEAD = """
You are an expert agent operating in ScienceWorld, a text world of science experiments. {task}
"""
_LATER = """Prior to this step, you have already taken {step_count} step(s). Below are the most recent {shown} observations and the corresponding actions you took: {lines}
You are now at step {step}.
"""  # noqa: E501
_TAIL = """Your current observation is: {observation}
Your admissible actions of the current situation are of these forms: [{actions}].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, you should choose an action of one of these forms and present it within <action> </action> tags.
"""
FALLBACK_TAIL = 30
"""Characters of a response without action tags that are sent to the environment."""


@dataclass(frozen=True, slots=True)
class AtodStyle:
    """Every turn stands alone: the task, the last ``history_length`` turns, the observation, the forms of action."""

    history_length: int = 6
    layout: Layout = Layout.WINDOW

    def prompt(self, history: History) -> str:
        """Fill the template of the turn; in a conversation, later turns tell only what is new."""
        actions = ", ".join(f"'{action}'" for action in history.admissible)
        tail = _TAIL.format(observation=history.observations[-1], actions=actions)
        if not history.actions:
            return _HEAD.format(task=history.task) + tail
        if self.layout is Layout.CONVERSATION:
            return tail
        lines, shown = history_lines(history, self.history_length)
        step = len(history.actions)
        return (
            _HEAD.format(task=history.task)
            + _LATER.format(step_count=step, shown=shown, lines=lines, step=step + 1)
            + tail
        )

    def parse(self, response: str) -> Parsed:
        """Read the action; see :func:`atod_envs.styles.parse_tagged`. The simulator ignores the case of letters."""
        return parse_tagged(response, FALLBACK_TAIL)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think>\n<action>{action}</action>"


@dataclass(frozen=True, slots=True)
class CompactStyle:
    """One growing conversation in few words: the task and the room first, afterwards the answers alone."""

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The task at first, and the last observation."""
        observation = history.observations[-1]
        return observation if history.actions else f"{history.task}\n{observation}"

    def parse(self, response: str) -> Parsed:
        """Read the action; the same rules as the long prompt."""
        return parse_tagged(response, FALLBACK_TAIL)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think><action>{action}</action>"


STYLES: Mapping[str, PromptStyle] = {"atod": AtodStyle(), "compact": CompactStyle()}
"""By name."""
