"""From a policy's text to a search or an answer, and from passages to text that cannot pass for the policy's own.

The parsing rules are the published ones (Search-R1 through verl-agent): a response is cut at the first closing tag, the
first search block counts, else the first answer block; more than one block spoils the form but not the action. The
invariant: `project` is idempotent and never raises, and nothing that `defuse` returns contains a tag that `project`,
a chat template or a prompt of this package gives a meaning to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from atod_envs.retrieval.protocol import Passage

from .scoring import last_answer

SEARCH_PATTERN: Final = "<search>...</search>"
ANSWER_PATTERN: Final = "<answer>...</answer>"
NO_RESULTS: Final = "No search results found."

_SEARCH_TAG: Final = re.compile(r"<search>", re.IGNORECASE)
_SEARCH_END: Final = re.compile(r"</search>", re.IGNORECASE)
_ANSWER_TAG: Final = re.compile(r"<answer>", re.IGNORECASE)
_ANSWER_END: Final = re.compile(r"</answer>", re.IGNORECASE)

# Our tags and those of tool calls, sentence marks of tokenizers, <|...|> tokens of chat templates, Llama's brackets.
_LIVE: Final = re.compile(
    r"<(?=[\s/]*(?:think|search|information|answer|action|tool_call|tool_response|s|bos|eos|pad|unk|mask|"
    r"start_of_turn|end_of_turn|begin_of_text|end_of_text)\b)|<(?=\s*[|｜])|\[(?=/?INST\])",
    re.IGNORECASE,
)
_DEAD: Final = {"<": "&lt;", "[": "&#91;"}


@dataclass(frozen=True, slots=True)
class Action:
    """What a text asks for.

    Attributes:
        text: the action in its one form, `<search>q</search>` or `<answer>a</answer>`; empty where there is none.
        query: what to search for; `None` where the text does not search.
        answer: the final answer; `None` where the text gives none.
        format_ok: exactly one block of one kind.
    """

    text: str
    query: str | None
    answer: str | None
    format_ok: bool


def project(response: str) -> Action:
    """Read the action in a response, or in an action; see the module's docstring.

    A search whose query holds a whole answer block ends the episode with that answer, as published.
    """
    trimmed = response
    for closing in ("</search>", "</answer>"):
        before, found, _ = response.partition(closing)
        if found:
            trimmed = before + found
            break
    searches, answers = len(_SEARCH_TAG.findall(response)), len(_ANSWER_TAG.findall(response))
    format_ok = searches + answers == 1
    query = _block(trimmed, _SEARCH_TAG, _SEARCH_END)
    if query is not None:
        text = f"<search>{query}</search>"
        if "<answer>" in query and "</answer>" in query:
            return Action(text, None, last_answer(text), format_ok)
        return Action(text, query, None, format_ok)
    answer = _block(trimmed, _ANSWER_TAG, _ANSWER_END)
    if answer is not None:
        return Action(f"<answer>{answer}</answer>", None, answer, format_ok)
    return Action("", None, None, False)


def _block(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str | None:
    """What stands between the first opening tag and the first closing tag after it, stripped.

    If that opening tag is never closed, no later one is: two searches do, and the time is linear.
    """
    begun = opening.search(text)
    ended = closing.search(text, begun.end()) if begun else None
    return text[begun.end() : ended.start()].strip() if begun and ended else None


def defuse(text: str) -> str:
    """Make every tag and template token in a foreign text inert, by writing out its first character."""
    return _LIVE.sub(lambda found: _DEAD[found[0]], text)


def information(passages: Sequence[Passage]) -> str:
    """The observation after a search, in the published form: numbered passages in JSON between information tags."""
    listed = "".join(f"Doc {n}: {defuse(passage.contents.strip())}\n" for n, passage in enumerate(passages, 1))
    return f"<information>{json.dumps({'result': listed or NO_RESULTS})}</information>"


def read_information(observation: str) -> list[tuple[str, str]]:
    """Titles and texts in an observation, the inverse of `information`; empty where it holds no passages."""
    body = observation.strip().removeprefix("<information>").removesuffix("</information>")
    try:
        listed = json.loads(body)["result"]
    except (ValueError, KeyError, TypeError):
        return []
    if not isinstance(listed, str) or listed == NO_RESULTS:
        return []
    parts = re.split(r"(?:^|\n)Doc \d+: ", listed)[1:]
    pairs = (part.strip().partition("\n") for part in parts)
    return [(title.strip().strip('"'), text) for title, _, text in pairs]
