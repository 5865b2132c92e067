"""``ChatFormat``: user messages to token ids through a tokenizer's chat template, append-only.

A conversation only ever grows: what the policy has sampled stays as it was sampled, and a new user message adds ids
behind it. Chat templates are not written for that; some rewrite earlier turns (Qwen3's drops their thoughts). So the
template is asked once per message what it puts between a response and the next one, and exactly that is appended.

Three further invariants. Text is never control: of the ids made here, control tokens are the template's own
(``agents.plain_text``). A response ends where the model's makers end one: at the template's end token, the tokenizer's,
and those of the generation configuration. And a prompt depends on nothing but the settings: dates in templates are
:data:`CHAT_DATE` or a date that is given.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Literal

from agents.plain_text import PlainText, ends_with, literal_markers
from atod_envs.styles import whole_characters

_RESPONSE = "\x02the response\x03"
_MESSAGE = "\x02the message\x03"
"""Stand in for a response and a message while the template is probed; no template treats them specially."""

_RESPONSES = ("b", "<think>\nt\n</think>\n\n<action>b</action>", " b \n")
"""What templates are known to treat differently: they drop thoughts, or blanks."""

CHAT_DATE = "2025-01-01"
"""The date that templates are told where none is given."""

ThinkingMode = Literal["off", "on", "keep"]
"""``off``: the template is asked for no thoughts of its own. ``on``: it is, and a turn's thought is dropped when the
next turn begins. ``keep``: it is, and thoughts stay in the conversation."""

_THOUGHTS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
)
"""How models mark a thought. To the environments' formats all are ``<think>``."""


_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_DATE_CODES = [*"aAwdbBmyYHIMSfjpUWcxXGuV%", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j"]
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- set at = namespace(code=none) -%}{%- for c in format -%}"
    "{%- if at.code is none and c != '%' -%}{{ c }}{%- elif at.code is none -%}{%- set at.code = '' -%}"
    "{%- elif c == '-' -%}{%- set at.code = '-' -%}"
    "{%- else -%}{{ atod_date[at.code + c] if at.code + c in atod_date else raise_exception('unknown date %' + at.code + c) }}"
    "{%- set at.code = none -%}{%- endif -%}{%- endfor -%}{%- endmacro %}\n"
)
"""Stands before a template that asks for the time: templates may bring data, not functions."""


class _Frame:
    """What a template puts around a message, found out once, because rendering a template for every turn is slow.

    Attributes:
        controls: the control tokens that the template itself writes.
    """

    def __init__(self, render: Callable[[str], str], plain: PlainText) -> None:
        self._render, self._plain = render, plain
        self.before, found, self.after = render(_MESSAGE).partition(_MESSAGE)
        if not found:
            raise ValueError("the chat template does not show a user's message; it cannot be used for a conversation")
        probe = " \n two\n\nlines \n"
        shown = render(probe)
        trims: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
        self._trim = next((trim for trim in trims if shown == self.before + trim(probe) + self.after), None)
        self.controls = plain.controls(plain.read(self.before + _MESSAGE + self.after))

    def ids(self, message: str) -> list[int]:
        """Ids of the message with what stands around it; nothing in the message is control."""
        message = whole_characters(message)  # crawled text holds halves, which no tokenizer takes
        trimmed = None if self._trim is None else self._trim(message)
        ids = self._plain.read(self._render(message) if trimmed is None else self.before + trimmed + self.after)
        if self._plain.controls(ids) == self.controls and self._plain.clean(message):
            return ids
        if trimmed is None:
            return self._plain.read_guarded(self._render(self._plain.guard(message, ends=False)))
        return self._plain.read_guarded(self.before + self._plain.guard(trimmed) + self.after)


class ChatFormat:
    """Renders prompts for one tokenizer.

    Args:
        tokenizer: a ``transformers`` tokenizer with a chat template.
        model: the model that answers; its generation configuration may name further end tokens.
        thinking: what the template is asked for, and what stays of earlier turns' thoughts.
        date: what templates that tell the date are told, as ISO 8601 (``2025-01-01``).

    Attributes:
        stop_ids: ids that end a response; the first is the one that is written behind a response that was not sampled.
        opened: text of a thought that the template opens for the model; it counts as said by it.

    Raises:
        ValueError: the tokenizer has no chat template, the template cannot be rendered, or nothing ends a response.
    """

    def __init__(
        self, tokenizer: Any, *, model: Any = None, thinking: ThinkingMode = "off", date: str = CHAT_DATE
    ) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model, or set "
                "tokenizer.chat_template and save it"
            )
        if thinking not in ("off", "on", "keep"):
            raise ValueError(f"thinking={thinking!r}; expected off, on or keep")
        try:
            self._date = datetime.datetime.fromisoformat(date)
        except ValueError as error:
            raise ValueError(f"chat date {date!r}; expected a date such as {CHAT_DATE}") from error
        self.thinking = thinking
        self._told = self._facts()
        self._plain = PlainText(tokenizer)
        self._listed = False
        self._listed = self._wants_parts()
        self._opening = _Frame(lambda message: self._render([self._said("user", message)]), self._plain)
        self._continuation = _Frame(self._between, self._plain)
        sides = [self._opening.after, self._continuation.before, self._continuation.after]
        source = str(tokenizer.get_chat_template())
        self._plain.spell(literal_markers(source, self._conversation(), sides, self._plain.control))
        self.opened, self._closes = _opened(self._opening.after)
        self._end, self._next, final = self._ends()
        further = _generation_ends(model, set(self._plain.control.values()))
        stops = [self._end, tokenizer.eos_token_id, self._next, final, *further]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(int(i) for i in stops if i is not None))
        if not self.stop_ids:
            raise ValueError(
                f"nothing ends a response: the chat template of {tokenizer.name_or_path!r} puts no special token behind one, and the "
                "tokenizer has no end-of-sequence token; set tokenizer.eos_token"
            )

    def opening(self, message: str) -> list[int]:
        """Ids of a conversation that begins with a user message, up to where the response starts."""
        return self._opening.ids(message)

    def continuation(self, message: str, stopped: bool = True, last: int | None = None) -> list[int]:
        """Ids that follow a response and lead to the next one.

        Args:
            message: the next user message.
            stopped: the response ended with a stop token; otherwise (cut by length) the end token is added here.
            last: the response's last id. Without it, a response that stopped is taken to have ended as the template
                ends one.
        """
        ids = self._continuation.ids(message)
        if not stopped:
            return ids
        # What the response has said itself is not said again: the end of its turn, or else the beginning of the next.
        said = self._end
        if said is None and self._next in (last, self.stop_ids[0] if last is None else None):
            said = self._next
        return ids if said is None else ids[ids.index(said) + 1 :]

    def extend(self, conversation: Sequence[int], message: str) -> list[int]:
        """The next prompt: a conversation that ends with a response (see :meth:`remember`), then the user's message."""
        last = conversation[-1]
        return [*conversation, *self.continuation(message, last in self.stop_ids, last)]

    def remember(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        """The conversation after a response, as later turns see it: without its thought under ``thinking="on"``."""
        if self.thinking != "on":
            return [*prompt, *response]
        text, stop = self._split(response)
        said = text.rpartition(self._closes)[2] if self._closes in text else "" if self.opened else text
        opened = self._plain.read(self.opened) if self.opened else []
        kept = prompt[: -len(opened)] if opened and ends_with(prompt, opened) else prompt
        return [*kept, *self.encode(said.lstrip("\n")), *stop]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without its stop token; a thought that the template opened stands before it."""
        text = self.opened + self._split(ids)[0]
        for opens, closes in _THOUGHTS[1:]:
            if opens in text and closes in text:
                text = text.replace(opens, "<think>").replace(closes, "</think>")
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands, outside of any message; nothing in it is control."""
        return self._plain.encode(whole_characters(text))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response that was not sampled (a demonstration), with the stop token.

        Where the template opens a thought, the response goes on from there, or closes it at once.
        """
        if self.opened:
            opens = self.opened.strip()
            text = text.removeprefix(opens).lstrip("\n") if text.startswith(opens) else f"{self._closes}\n\n{text}"
        return [*self.encode(text), self.stop_ids[0]]

    def rewritten_history(self) -> str | None:
        """What the template makes of an earlier turn, if not what was generated; None where it keeps it.

        Tried are a plain response, one with a thought, and one with blanks around it, in a conversation of three turns.
        """
        for response in _RESPONSES:
            messages = [self._said("user", "a")]
            for content in (response, response):
                generated = self._render(messages) + response
                messages += [self._said("assistant", content), self._said("user", "b")]
                whole = self._render(messages)
                if not whole.startswith(generated):
                    same = next(
                        (i for i, (x, y) in enumerate(zip(whole, generated, strict=False)) if x != y), len(whole)
                    )
                    at = max(0, same - 12)
                    return f"{generated[at : at + 48]!r} becomes {whole[at : at + 48]!r}"
        return None

    # --- the template ---------------------------------------------------------------------------------------------

    def _said(self, role: str, content: str) -> dict[str, Any]:
        """A message, its content as text or, for templates of multimodal models, as a list of parts."""
        return {"role": role, "content": [{"type": "text", "text": content}] if self._listed else content}

    def _exchange(self, message: str | None) -> list[dict[str, Any]]:
        messages = [self._said("user", "a"), self._said("assistant", _RESPONSE)]
        return messages if message is None else [*messages, self._said("user", message)]

    def _between(self, message: str) -> str:
        _, found, between = self._render(self._exchange(message)).partition(_RESPONSE)
        if not found:
            raise ValueError("the chat template drops earlier responses; it cannot be used for a growing conversation")
        return between

    def _conversation(self) -> str:
        """A whole conversation as the template writes it, with a system's message where it takes one."""
        said = [*self._exchange(_MESSAGE), self._said("assistant", _RESPONSE)]
        try:
            return self._render([self._said("system", _MESSAGE), *said], generates=False)
        except ValueError:
            return self._render(said, generates=False)

    def _facts(self) -> dict[str, Any]:
        """What templates are told besides the messages: the date, and "" for special tokens that it lacks."""
        template, known = str(self.tokenizer.get_chat_template()), self.tokenizer.special_tokens_map
        facts: dict[str, Any] = {name: "" for name in _SPECIAL if name not in known}
        if "strftime_now" in template:
            codes = {code: self._date.strftime(f"%{code}") for code in _DATE_CODES}
            facts |= {"chat_template": _STRFTIME + template, "atod_date": codes}
        return facts

    def _wants_parts(self) -> bool:
        """Whether the template shows messages only as lists of parts."""
        for self._listed in (False, True):
            try:
                shown = self._render(self._exchange(_MESSAGE))
            except ValueError:
                continue
            if _RESPONSE in shown and _MESSAGE in shown:
                return self._listed
        return False

    def _ends(self) -> tuple[int | None, int | None, int | None]:
        """The token that ends an earlier response, or else begins the next message; and what ends the last one."""
        last = self._render(self._exchange(None), generates=False).partition(_RESPONSE)[2]
        between = self._continuation.before
        first = next(iter(self._plain.controls(self._plain.read(between))), None)
        final = next(iter(self._plain.controls(self._plain.read(last))), None)
        if first is None or final == first:
            return first, None, final
        # Some templates end only such turns as are followed by another, some end the last one with another token.
        begins = self._plain.controls(self._plain.read(self._opening.before))
        ends = first not in begins or (final is not None and not between.startswith(last))
        return (first, None, final) if ends else (None, first, final)

    def _render(self, messages: list[dict[str, Any]], generates: bool = True) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generates,
                enable_thinking=self.thinking != "off",
                thinking=self.thinking != "off",
                **self._told,
            )
        except Exception as error:  # whatever a template raises, with whatever class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot be rendered: {reason}"
            ) from error
        return str(text)

    def _split(self, response: Sequence[int]) -> tuple[str, list[int]]:
        """Text of a response, and its stop token."""
        ids, stop = list(response), []
        if ids and ids[-1] in self.stop_ids:
            stop = [ids.pop()]
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), stop


def _opened(prompt: str) -> tuple[str, str]:
    """The thought that the end of a prompt leaves open and what closes it; what closes one where none is open."""
    for opens, closes in _THOUGHTS:
        _, found, after = prompt.rpartition(opens)
        if found and closes not in after:
            return found + after, closes
    return "", next((closes for opens, closes in _THOUGHTS if opens in prompt), "</think>")


def _generation_ends(model: Any, special: set[int]) -> list[int]:
    """End tokens of a model's generation configuration, as far as they are special tokens of the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
    return [int(i) for i in ids if int(i) in special]


def first_difference(a: Any, b: Any) -> str | None:
    """Say how two tokenizers differ, or None if they give the same ids for everything.

    Compared are the vocabularies (padded rows of the models' embedding do not matter), the end-of-sequence token, and
    the ids of a sample text.
    """
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    if vocabulary_a != vocabulary_b:
        by_id_a = {i: t for t, i in vocabulary_a.items()}
        by_id_b = {i: t for t, i in vocabulary_b.items()}
        place = min(i for i in by_id_a.keys() | by_id_b.keys() if by_id_a.get(i) != by_id_b.get(i))
        return f"token {place} is {by_id_a.get(place)!r} in one and {by_id_b.get(place)!r} in the other"
    if a.eos_token_id != b.eos_token_id:
        return f"the end-of-sequence token is {a.eos_token!r} in one and {b.eos_token!r} in the other"
    sample = "<think>take apple 1 from cabinet 12</think><action> Größe, 你好 </action>\n"
    ids_a, ids_b = a.encode(sample, add_special_tokens=False), b.encode(sample, add_special_tokens=False)
    if ids_a != ids_b:
        return f"the same text becomes {ids_a[:8]} in one and {ids_b[:8]} in the other"
    return None
