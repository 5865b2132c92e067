"""How Search-QA is put to a language model: the published prompts and a compact conversation.

Style `atod` is the prompt of the published code to the byte (see NOTICE for its origin); `figure8` has the wording of
the paper's Figure 8, which differs in a few words ("MUST call" for "can call"), in the same layout. The compact style
is ours, for small models. In all of them, tags inside queries and passages are inert: only the environment's own tags
are live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atod_envs.styles import History, Layout, Parsed, PromptStyle

from .actions import defuse, project, read_information

_HEAD = """
You are an expert agent tasked with answering the given question step-by-step.
Your question: {task_description}
"""
_HISTORY = """
Prior to this step, you have already taken {step_count} step(s). Below is the interaction history where <search> </search> wrapped your past search queries and <information> </information> wrapped the corresponding search results returned by the external search engine. History:
{memory_context}
"""  # noqa: E501
_RELEASED = """
Now it's your turn to respond for the current step.
You should first conduct reasoning process. This process MUST be enclosed within <think> </think> tags. 
After completing your reasoning, choose only one of the following actions (do not perform both):
(1) If you find you lack some knowledge, you can call a search engine to get more external information using format: <search> your query </search>.
(2) If you have enough knowledge to answer the question confidently, provide your final answer within <answer> </answer> tags, without detailed illustrations. For example, <answer>Beijing</answer>.
"""  # noqa: E501 (the format has a trailing blank)
_FIGURE = """
Now it's your turn to respond for the current step.
You should first conduct a reasoning process. This process MUST be enclosed within <think> </think> tags.
After completing your reasoning, choose only one of the following actions (do not perform both):
1. If you find you lack some knowledge, you MUST call a search engine to get more external information using format: <search> your query </search>.
2. If you have enough knowledge to answer the question confidently, provide your final answer within <answer> </answer> tags, without detailed illustrations. For example, <answer>Beijing</answer>.
"""  # noqa: E501

COMPACT_HINT = "Write <search> query </search> or <answer> answer </answer>."
"""What the compact conversation says after a response without an action."""


@dataclass(frozen=True, slots=True)
class AtodStyle:
    """The published prompt: every turn stands alone and shows the last `history_length` searches with their results."""

    instructions: str = _RELEASED
    history_length: int = 4
    layout: Layout = Layout.WINDOW

    def prompt(self, history: History) -> str:
        """Fill the template of the turn."""
        head = _HEAD.format(task_description=history.task)
        # In a conversation the earlier searches stand above; only the last one's results are new.
        length = 1 if self.layout is Layout.CONVERSATION else self.history_length
        if not history.actions or length <= 0:
            return head + self.instructions
        steps = list(enumerate(zip(history.actions, history.observations[1:], strict=False), 1))
        memory = "\n".join(f"Step {k}:{_inert(action)} {observation}\n" for k, (action, observation) in steps[-length:])
        told = _HISTORY.format(step_count=len(history.actions), memory_context=memory)
        return head + told + self.instructions

    def parse(self, response: str) -> Parsed:
        """Read the action; see :func:`atod_envs.searchqa.actions.project`."""
        action = project(response)
        return Parsed(action.text, action.format_ok)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration."""
        return f"<think>{thought}</think>\n{action}"


def _inert(action: str) -> str:
    """An executed action with everything inside its outer tags made inert."""
    for name in ("search", "answer"):
        opening, closing = f"<{name}>", f"</{name}>"
        if action.startswith(opening) and action.endswith(closing):
            return opening + defuse(action[len(opening) : -len(closing)]) + closing
    return defuse(action)


@dataclass(frozen=True, slots=True)
class CompactStyle:
    """One growing conversation in few words: the question, then after each search a line for every passage."""

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The question first, afterwards the passages of the last search."""
        if not history.actions:
            return history.task
        observation = history.observations[-1]
        passages = read_information(observation)
        if passages:
            # The blank before the title makes a name the same tokens here as inside a sentence, so it can be copied.
            return "\n".join(f"- {title}: {' '.join(text.split())}" for title, text in passages)
        return "No results." if observation else COMPACT_HINT

    def parse(self, response: str) -> Parsed:
        """Read the action; the same rules as the published prompt."""
        action = project(response)
        return Parsed(action.text, action.format_ok)

    def respond(self, action: str, thought: str) -> str:
        """Phrase a demonstration, with blanks around every tag so that words keep their own tokens."""
        spaced = action.replace("<search>", "<search> ").replace("</search>", " </search>")
        spaced = spaced.replace("<answer>", "<answer> ").replace("</answer>", " </answer>")
        return f"<think> {thought} </think>{spaced}"


STYLES: Mapping[str, PromptStyle] = {
    "atod": AtodStyle(),
    "figure8": AtodStyle(_FIGURE),
    "compact": CompactStyle(),
}
"""By name, with the published settings."""
