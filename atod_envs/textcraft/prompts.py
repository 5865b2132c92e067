"""How TextCraft is put to a language model: a prompt in the form of the paper's, and a compact conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atod_envs.styles import History, Layout, Parsed, PromptStyle, history_lines, parse_tagged

_HEAD = """
You are an expert agent operating in TextCraft, a world of crafting recipes.
{introduction}
A command needs exactly the ingredients that it lists; where it names a kind of item, any item of that kind will do.
"""
_LATER = """Prior to this step, you have already taken {step_count} step(s). Below are the most recent {shown} observations and the corresponding actions you took: {lines}
You are now at step {step} and your current observation is: {observation}
"""  # noqa: E501
_TAIL = """Your admissible actions of the current situation are: [{actions}].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""
FALLBACK_TAIL = 30
"""Characters of a response without action tags that are sent to the environment."""


@dataclass(frozen=True, slots=True)
class AtodStyle:
    """Every turn stands alone: the commands and the goal, the last ``history_length`` turns, what can be done now."""

    history_length: int = 6
    layout: Layout = Layout.WINDOW

    def prompt(self, history: History) -> str:
        """Fill the template of the turn; in a conversation, later turns tell only what is new."""
        tail = _TAIL.format(actions=", ".join(f"'{action}'" for action in history.admissible))
        head, later = _HEAD.format(introduction=history.observations[0]), ""
        if history.actions:
            lines, shown = history_lines(history, self.history_length)
            told = {"step_count": len(history.actions), "step": len(history.actions) + 1, "shown": shown}
            later = _LATER.format(lines=lines, observation=history.observations[-1], **told)
            if self.layout is Layout.CONVERSATION:
                return f"Your current observation is: {history.observations[-1]}\n{tail}"
        return head + later + tail

    def parse(self, response: str) -> Parsed:
        """Read the action; see :func:`atod_envs.styles.parse_tagged`."""
        return parse_tagged(response, FALLBACK_TAIL)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think>\n<action>{action}</action>"


@dataclass(frozen=True, slots=True)
class CompactStyle:
    """One growing conversation in few words: the commands and the goal first, afterwards the answers alone."""

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The last observation."""
        return history.observations[-1].removeprefix("Crafting commands:\n")

    def parse(self, response: str) -> Parsed:
        """Read the action; the same rules as the long prompt."""
        return parse_tagged(response, FALLBACK_TAIL)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think><action>{action}</action>"


STYLES: Mapping[str, PromptStyle] = {"atod": AtodStyle(), "compact": CompactStyle()}
"""By name."""
