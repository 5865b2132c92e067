"""Prompt styles: from what an agent has seen to one user message, and from a response back to an action.

A ``PromptStyle`` belongs to one environment and is a pair of pure functions. The invariant: a style never sees more
than the agent has seen, and parsing never raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

LONGEST_ACTION = 1 << 16
"""Characters that an action may have; a longer one is answered with a sentence that says so, and does nothing."""

_LONGEST_TOLD = 200
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")


def whole_characters(text: str) -> str:
    """The text with half characters (lone surrogates) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Layout(StrEnum):
    """How the turns of an episode become model input."""

    WINDOW = "window"
    """Each turn stands alone: one user message with a sliding window of the history (the paper's)."""
    CONVERSATION = "conversation"
    """Turns follow each other in one growing conversation; each message tells only what is new."""


@dataclass(slots=True)
class History:
    """What the agent has seen and done in the episode so far.

    Attributes:
        task: the instruction.
        observations: o_1 .. o_k, the environment's own text.
        actions: a_1 .. a_(k-1), the parsed actions that were executed.
        admissible: admissible actions now.
    """

    task: str
    observations: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    admissible: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a response asks for.

    Attributes:
        action: text that goes to the environment.
        format_ok: the response had the form that the prompt asks for; says nothing about the action being admissible.
    """

    action: str
    format_ok: bool


class PromptStyle(Protocol):
    """One way to put an environment to a language model."""

    @property
    def layout(self) -> Layout:
        """Whether prompts stand alone or continue one conversation."""

    def prompt(self, history: History) -> str:
        """The user message for the current turn."""

    def parse(self, response: str) -> Parsed:
        """The action in a response."""

    def respond(self, action: str, thought: str) -> str:
        """A response that asks for ``action``; ``parse`` gives it back. Used for demonstrations."""


@runtime_checkable
class NamingStyle(PromptStyle, Protocol):
    """A style whose messages call some things by short names of their own."""

    def names(self, history: History) -> Mapping[str, str]:
        """Action as the current message lets the model say it -> the environment's own, where the two differ."""


def read_response(style: PromptStyle, response: str, history: History) -> Parsed:
    """The environment's action in a response to the style's message for ``history``."""
    parsed = style.parse(response)
    names = style.names(history) if isinstance(style, NamingStyle) else {}
    return Parsed(names.get(parsed.action, parsed.action), parsed.format_ok)


def phrase_response(style: PromptStyle, action: str, thought: str, history: History) -> str:
    """A response to the style's message for ``history``; :func:`read_response` gives the action back."""
    names = style.names(history) if isinstance(style, NamingStyle) else {}
    return style.respond(next((said for said, meant in names.items() if meant == action), action), thought)


@dataclass(frozen=True, slots=True)
class _AsConversation:
    """A prompt style whose messages follow each other in one growing conversation."""

    inner: PromptStyle
    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The inner style's message."""
        return self.inner.prompt(history)

    def parse(self, response: str) -> Parsed:
        """As the inner style."""
        return self.inner.parse(response)

    def respond(self, action: str, thought: str) -> str:
        """As the inner style."""
        return self.inner.respond(action, thought)

    def names(self, history: History) -> Mapping[str, str]:
        """As the inner style."""
        return self.inner.names(history) if isinstance(self.inner, NamingStyle) else {}


def as_conversation(style: PromptStyle) -> PromptStyle:
    """The style for one growing conversation, in which each turn sees all that went before.

    A dataclass with a field ``layout``, such as the styles that come with the environments, is told so and leaves out
    what the conversation already holds; of any other style, the messages stay as they are.
    """
    if style.layout is Layout.CONVERSATION:
        return style
    given = cast("Any", style)
    if is_dataclass(given) and any(part.name == "layout" for part in fields(given)):
        return cast("PromptStyle", replace(given, layout=Layout.CONVERSATION))  # type: ignore[type-var]
    return _AsConversation(style)


def history_action(action: str) -> str:
    """An executed action as a history tells it: whole, or the beginning of one that was too long to be read."""
    return action if len(action) <= LONGEST_ACTION else f"{action[:_LONGEST_TOLD]} ..."


def parse_tagged(response: str, tail: int) -> Parsed:
    """Read ``<action> ... </action>`` as the published code does.

    The action is the text between the first ``<action>`` and the first ``</action>``, lower-cased and stripped. Without
    both tags the last ``tail`` characters are sent instead. The form is right if both action tags and both think tags
    are there and no CJK ideograph (U+4E00 to U+9FFF) occurs. A ``</action>`` before ``<action>`` gives an empty action
    that still counts as well-formed, as published.
    """
    lowered = response.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return Parsed(lowered[-tail:], False)
    thinks = "<think>" in response and "</think>" in response
    return Parsed(lowered[start + len("<action>") : end].strip(), thinks and not _IDEOGRAPH.search(response))


def history_lines(history: History, length: int) -> tuple[str, int]:
    """The most recent turns as ``[Observation k: '...', Action k: '...']`` lines, k counted from 1 over the episode.

    Returns:
        The lines joined by newlines, and how many there are.
    """
    turns = list(enumerate(zip(history.observations, history.actions, strict=False), 1))[-length:]
    lines = [f"[Observation {k}: '{observation}', Action {k}: '{action}']" for k, (observation, action) in turns]
    return "\n".join(lines), len(lines)


# --- styles for any environment -----------------------------------------------------------------------------------


class TaggedResponses:
    """The part of a style that reads and writes ``<think> ... </think><action> ... </action>``."""

    __slots__ = ()
    tail: ClassVar[int] = 30
    """Characters of a response without action tags that are sent to the environment, as published for ALFWorld."""
    gap: ClassVar[str] = ""
    """What a demonstration has between its thought and its action."""

    def parse(self, response: str) -> Parsed:
        """Read the action; see :func:`parse_tagged`."""
        return parse_tagged(response, self.tail)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think>{self.gap}<action>{action}</action>"


@dataclass(frozen=True, slots=True)
class GeneralStyle(TaggedResponses):
    """A prompt in the form of the paper's, for any environment: every turn stands alone.

    Attributes:
        about: what the environment is, as it follows "an expert agent operating in".
        keep_first: the first observation is shown at every turn; for environments that tell their rules in it.
        history_length: turns that are shown.
        layout: in a conversation, later turns tell only what is new.
    """

    about: str
    keep_first: bool = False
    history_length: int = 6
    layout: Layout = Layout.WINDOW
    gap: ClassVar[str] = "\n"

    def prompt(self, history: History) -> str:
        """Fill the template of the turn."""
        shown, later, now = list(history.admissible), len(history.actions), history.observations[-1]
        forms = " (write words of your own in place of <...>)" if any("<" in action for action in shown) else ""
        actions = ", ".join(f"'{action}'" for action in shown)
        lines = [f"Your admissible actions of the current situation are{forms}: [{actions}].", "", *_INSTRUCTIONS]
        if not later or self.layout is Layout.CONVERSATION:
            lines.insert(0, f"Your current observation is: {now}")
        if not later or self.layout is Layout.WINDOW:
            head = ["", f"You are an expert agent operating in {self.about}.", f"Your task: {history.task}"]
            if later:
                head += [history.observations[0]] if self.keep_first else []
                told, count = history_lines(history, self.history_length)
                head += [_LATER.format(done=later, count=count, told=told, step=later + 1, now=now)]
            lines = head + lines
        return "\n".join(lines)


_LATER = (
    "Prior to this step, you have already taken {done} step(s). Below are the most recent {count} observations and the "
    "corresponding actions you took: {told}\nYou are now at step {step} and your current observation is: {now}"
)
_INSTRUCTIONS = (
    "Now it's your turn to take an action.",
    "You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within "
    "<think> </think> tags.",
    "Once you've finished your reasoning, you should choose an admissible action for current step and present it within "
    "<action> </action> tags.",
    "",
)


@dataclass(frozen=True, slots=True)
class CompactStyle(TaggedResponses):
    """One growing conversation in few words, for any environment: the task first, then what is observed."""

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The last observation, at first with the task if it does not tell it."""
        observation = history.observations[-1]
        told = bool(history.actions) or history.task in observation
        return observation if told else f"{history.task}\n{observation}"
