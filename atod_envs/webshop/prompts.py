"""How WebShop is put to a language model: the paper's prompt (Figure 9) and a compact conversation.

The two templates of the ``atod`` style and the way its slots are filled are a published format and are reproduced to
the byte (see NOTICE for their origin); the compact style is ours, for small models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from atod_envs.styles import History, Layout, Parsed, PromptStyle, TaggedResponses, history_lines, parse_tagged
from atod_envs.webshop.pages import BACK, BUY, NEXT, PREVIOUS, SEPARATOR

SEARCH_PATTERN = "search[<your query>]"

FIRST_TURN = """
You are an expert autonomous agent operating in the WebShop e‑commerce environment. 
Your task is to: {task_description}.
Your current observation is: {current_observation}.
Your admissible actions of the current situation are: 
[
{available_actions}
].

Now it's your turn to take one action for the current step.
You should first reason step-by-step about the current situation, then think carefully which admissible action best advances the shopping goal. This reasoning process MUST be enclosed within <think> </think> tags. 
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""  # noqa: E501 (the format has trailing blanks, and a hyphen that is U+2011)

LATER_TURN = """
You are an expert autonomous agent operating in the WebShop e‑commerce environment.
Your task is to: {task_description}.
Prior to this step, you have already taken {step_count} step(s). Below are the most recent {history_length} observations and the corresponding actions you took: {action_history}
You are now at step {current_step} and your current observation is: {current_observation}.
Your admissible actions of the current situation are:
[
{available_actions}
].

Now it's your turn to take one action for the current step.
You should first reason step-by-step about the current situation, then think carefully which admissible action best advances the shopping goal. This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""  # noqa: E501

FALLBACK_TAIL = 20
"""Characters of a response without action tags that are sent to the environment, as published."""
LONGEST_PROMPT = 13_000
"""Characters above which a prompt falls back to the form without history, as published."""


def task_of(history: History) -> str:
    """The instruction as it stands on the first page."""
    parts = history.observations[0].split(SEPARATOR)
    return parts[2] if len(parts) > 2 and parts[1] == "Instruction:" else history.task


def after_instruction(observation: str, task: str) -> list[str] | None:
    """The texts of a page that follow the instruction; ``None`` if the page does not show it."""
    parts = observation.split(SEPARATOR)
    return parts[parts.index(task) + 1 :] if task in parts else None


def quoted(observation: str, task: str) -> str:
    """A page as the published code shows it: what follows the instruction, each text in single quotes."""
    parts = after_instruction(observation, task)
    return observation if parts is None else SEPARATOR.join(f"'{part}'" for part in parts)


@dataclass(frozen=True, slots=True)
class AtodStyle(TaggedResponses):
    """The paper's prompt: every turn stands alone and shows the last ``history_length`` turns.

    In a conversation every turn is told in the form of the first, because the earlier ones stand above it.
    The action list of the search page holds ``click[search]``, which the shop lists but ignores.
    """

    history_length: int = 2
    layout: Layout = Layout.WINDOW
    tail: ClassVar[int] = FALLBACK_TAIL
    gap: ClassVar[str] = "\n"

    def prompt(self, history: History) -> str:
        """Fill the template of the turn."""
        task = task_of(history)
        listed = list(history.admissible)
        if SEARCH_PATTERN in listed:
            listed.insert(listed.index(SEARCH_PATTERN) + 1, "click[search]")
        actions = "\n".join(f"'{action}'," for action in listed)
        observation = quoted(history.observations[-1], task)
        first = FIRST_TURN.format(task_description=task, current_observation=observation, available_actions=actions)
        if not history.actions or self.history_length <= 0 or self.layout is Layout.CONVERSATION:
            return first
        shown_pages = [quoted(page, task) for page in history.observations]
        lines, shown = history_lines(replace(history, observations=shown_pages), self.history_length)
        later = LATER_TURN.format(
            task_description=task,
            step_count=len(history.actions),
            history_length=shown,
            action_history=lines,
            current_step=len(history.actions) + 1,
            current_observation=observation,
            available_actions=actions,
        )
        return first if len(later) > LONGEST_PROMPT else later


@dataclass(frozen=True, slots=True)
class CompactStyle(TaggedResponses):
    """One growing conversation in few words.

    The first message is the instruction; later ones are the page in lower case, without the instruction and without the
    navigation that every page has: results one a line and numbered, an item's options one name a line. A result is
    clicked by its number, ``click[#1]``. A page that has not changed is not told again. The response is the bare action
    after a short thought; blanks inside its brackets do not count, so that whatever can be named is written as it
    stands on the page, after a blank.
    """

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The instruction first, afterwards the last page."""
        task = task_of(history)
        if not history.actions:
            return task
        page = history.observations[-1]
        if page == history.observations[-2]:
            return UNCHANGED
        parts = _body(history)
        return _short(parts, _clickable(history)).lower() if parts else page

    def names(self, history: History) -> dict[str, str]:
        """Clicks on results by their numbers."""
        parts, clickable = _body(history), _clickable(history)
        shown = [part.lower() for part in parts[1:] if part.lower() in clickable] if _lists_results(parts) else []
        return {f"click[#{number}]": f"click[{name}]" for number, name in enumerate(shown, 1)}

    def parse(self, response: str) -> Parsed:
        """Read the action; the same rules as the paper's prompt, blanks inside the brackets aside."""
        parsed = parse_tagged(response, FALLBACK_TAIL)
        return Parsed(unpadded(parsed.action), parsed.format_ok)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think> {thought}</think><action>{action.replace('[', '[ ', 1)}</action>"


UNCHANGED = "same page"


def unpadded(action: str) -> str:
    """An action without the blanks inside its brackets."""
    name, opened, rest = action.partition("[")
    if not opened or name not in ("search", "click") or not rest.endswith("]"):
        return action
    return f"{name}[{rest[:-1].strip()}]"


def _body(history: History) -> list[str]:
    """The texts of the last page that only it has; none of a page without the instruction."""
    parts = after_instruction(history.observations[-1], task_of(history)) or []
    return [part for part in parts if part not in (BACK, PREVIOUS, NEXT)]


def _clickable(history: History) -> set[str]:
    return {action[len("click[") : -1] for action in history.admissible if action.startswith("click[")}


def _lists_results(parts: Sequence[str]) -> bool:
    return bool(parts) and parts[0].startswith("Page ")


def _short(parts: Sequence[str], clickable: set[str]) -> str:
    """A page's texts, what belongs together on one line."""
    if _lists_results(parts):
        return "\n- ".join([parts[0], *_results(parts[1:], clickable)])
    return "- " + "\n- ".join(_item(parts, clickable) if BUY.lower() in clickable else parts)


def _results(parts: Sequence[str], clickable: set[str]) -> list[str]:
    """One line a product: title, price, number."""
    lines: list[list[str]] = []
    for part in parts:
        if part.lower() in clickable:
            lines.append([])
        elif lines:
            lines[-1].append(part)
    return [" ".join([*line, f"#{number}"]) for number, line in enumerate(lines, 1)]


def _item(parts: Sequence[str], clickable: set[str]) -> list[str]:
    """One line an option name with its values, one for the title, one for the price, one for the buttons."""
    end = next((i for i, part in enumerate(parts) if part.startswith("Price: ")), len(parts))
    lines: list[str] = []
    for part in parts[:end]:
        if lines and part in clickable:
            lines[-1] += f"{',' if ': ' in lines[-1] else ':'} {part}"
        else:
            lines.append(part)
    return [*lines, " ".join(parts[end : end + 2]), " | ".join(parts[end + 2 :])]


STYLES: Mapping[str, PromptStyle] = {"atod": AtodStyle(), "compact": CompactStyle()}
"""By name, with the published settings."""
