"""``ChatFormat``: user messages to token ids through a tokenizer's chat template, append-only.

A conversation only ever grows: what the policy has sampled stays as it was sampled, and a new user message adds ids behind
it. Chat templates are not written for that; some rewrite earlier turns (Qwen3's drops their thoughts). So the template is
asked once per message what it puts between a response and the next one, and exactly that is appended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

log = logging.getLogger(__name__)

_RESPONSE = "\x02the response\x03"
_MESSAGE = "\x02the message\x03"
"""Stand in for a response and a message while the template is probed; no template treats them specially."""

_RESPONSES = ("b", "<think>\nt\n</think>\n\n<action>b</action>", " b \n")
"""What templates are known to treat differently: they drop thoughts, or blanks."""
_REMEMBERED = 512
"""Texts of fewer characters are tokenized once and remembered."""


class _Frame:
    """What a template puts around a message, found out once, because rendering a template for every turn is slow."""

    def __init__(self, render: Callable[[str], str]) -> None:
        self._render = render
        self._before, found, self._after = render(_MESSAGE).partition(_MESSAGE)
        probe = "  two\n\nlines \n"
        self._verbatim = bool(found) and render(probe) == self._before + probe + self._after

    def fill(self, message: str) -> str:
        return self._before + message + self._after if self._verbatim else self._render(message)


class ChatFormat:
    """Renders prompts for one tokenizer.

    Args:
        tokenizer: a ``transformers`` tokenizer with a chat template. Thinking mode is switched off where the template
            knows it: the prompts ask for thoughts in their own words.

    Attributes:
        stop_ids: ids that end a response.

    Raises:
        ValueError: the tokenizer has no chat template or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model, or set "
                "tokenizer.chat_template and save it"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
        self.stop_ids: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        self._ids = lru_cache(maxsize=16384)(lambda text: tuple(self._tokenize(text)))
        self._opening = _Frame(lambda message: self._render([{"role": "user", "content": message}]))
        self._continuation = _Frame(self._between)
        self._check_stop()

    def opening(self, message: str) -> list[int]:
        """Ids of a conversation that begins with a user message, up to where the response starts."""
        return self._encode(self._opening.fill(message))

    def continuation(self, message: str, stopped: bool = True) -> list[int]:
        """Ids that follow a response and lead to the next one.

        Args:
            message: the next user message.
            stopped: the response ended with its stop token; otherwise (cut by length) the token is added here.
        """
        ids = self._encode(self._continuation.fill(message))
        return ids[1:] if stopped else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without its stop token."""
        kept = list(ids)
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands, outside of any message."""
        return self._encode(text)

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response that somebody else wrote (a demonstration), with the stop token."""
        return [*self._encode(text), self.stop_ids[0]]

    def rewrites_history(self) -> bool:
        """Whether the template would render earlier turns differently from how they were generated."""
        return self.rewritten_history() is not None

    def rewritten_history(self) -> str | None:
        """What the template makes of an earlier turn, if not what was generated; None where it keeps it.

        Tried are a plain response, one with a thought, and one with blanks around it, in a conversation of three turns.
        """
        for response in _RESPONSES:
            messages = [{"role": "user", "content": "a"}]
            for content in (response, response):
                generated = self._render(messages) + response
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "b"}]
                whole = self._render(messages)
                if not whole.startswith(generated):
                    same = next(
                        (i for i, (x, y) in enumerate(zip(whole, generated, strict=False)) if x != y), len(whole)
                    )
                    at = max(0, same - 12)
                    return f"{generated[at : at + 48]!r} becomes {whole[at : at + 48]!r}"
        return None

    def _between(self, message: str) -> str:
        whole = self._render(
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": _RESPONSE},
                {"role": "user", "content": message},
            ]
        )
        _, found, between = whole.partition(_RESPONSE)
        if not found:
            raise ValueError("the chat template drops earlier responses; it cannot be used for a growing conversation")
        return between

    def _check_stop(self) -> None:
        between = self._encode(self._between("b"))
        if not between or between[0] not in self.stop_ids:
            # Some templates end a turn with another token than the tokenizer's own end of sequence.
            log.warning(
                "responses are followed by token %s in the chat template; it is taken as a stop token", between[:1]
            )
            self.stop_ids = (between[0], *self.stop_ids)

    def _render(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(text)

    def _encode(self, text: str) -> list[int]:
        # Environments say the same short things again and again.
        return list(self._ids(text)) if len(text) < _REMEMBERED else self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]


def first_difference(a: Any, b: Any) -> str | None:
    """Say how two tokenizers differ, or None if they give the same ids for everything.

    Compared are the vocabularies (padded rows of the models' embedding do not matter), the end-of-sequence token, and the
    ids of a sample text.
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
