"""Text that stays text: encoding a message so that nothing in it becomes one of the tokenizer's control tokens.

A tokenizer reads ``<|im_end|>`` in an observation as the token that ends a turn. The invariant: of the ids that are
made here, those of control tokens are the chat template's own. A text without control tokens is encoded as ever; only
where one would appear is the tokenizer copied with its control tokens under secret names, so that the template's can be
told from the text's.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

_REMEMBERED = 512
"""Texts of fewer characters are tokenized once and remembered."""
_MARKER = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_THOUGHT = re.compile(r"</?\W*(seed:)?(think|thinking|thought)\W*>|\[/?THINK\]", re.IGNORECASE)
"""Tokens that open and close a thought."""


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are no words: the special ones, and markers that the chat template writes.

    Tokens that open or close a thought are left out: prompts speak of them, and models write them themselves.
    """
    found: dict[str, int] = {}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    special = set(tokenizer.all_special_ids)
    for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        text = str(token.content)
        marker = _MARKER.fullmatch(text) is not None
        own = marker and (text in template or (text.startswith("<|") and text.endswith("|>")))
        if text and (index in special or token.special or own) and not _THOUGHT.fullmatch(text):
            found[text] = int(index)
    for index in special:
        found.setdefault(str(tokenizer.convert_ids_to_tokens(index)), int(index))
    return found


_SECRET = secrets.token_hex(8)
"""No text can know it; no id depends on it."""
_GAP = f"\ue000{_SECRET}\ue001"
"""Stands inside and around a text's own control tokens until the template's are found."""
_COPIES: WeakKeyDictionary[Any, dict[tuple[tuple[str, int], ...], Any]] = WeakKeyDictionary()
"""Tokenizer -> its copies under secret names; one of a large vocabulary takes seconds to make."""


class PlainText:
    """Encodes with one tokenizer; says which ids are control tokens.

    Args:
        tokenizer: a ``transformers`` tokenizer.

    Attributes:
        control: text -> id of every control token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self._ids = frozenset(self.control.values())
        longest = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        self._remembered = lru_cache(maxsize=16384)(lambda text: tuple(self._tokenize(text)))

    def controls(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among some ids, in order."""
        return [i for i in ids if i in self._ids]

    def read(self, text: str) -> list[int]:
        """Ids of what a template wrote; a control token's text becomes the token."""
        # Environments say the same short things again and again.
        return list(self._remembered(text)) if len(text) < _REMEMBERED else self._tokenize(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is control."""
        ids = self.read(text)
        return self.read_guarded(self.guard(text)) if self.controls(ids) else ids

    def guard(self, text: str, *, ends: bool = True) -> str:
        """The text with a gap in each of its control tokens, so that they can be told from a template's.

        Args:
            text: any text.
            ends: gaps before and after it as well, so that none arises together with what stands next to it.
        """
        before = None
        while self._pattern is not None and before != text:
            before = text
            text = self._pattern.sub(lambda found: found[0][:1] + _GAP + found[0][1:], text)
        return _GAP + text + _GAP if ends else text

    def read_guarded(self, text: str) -> list[int]:
        """Ids of what a template wrote around guarded texts: its own control tokens are control, the texts' are not."""
        if self._pattern is None:
            return self.read(text.replace(_GAP, ""))
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            kept = _COPIES.setdefault(self._tokenizer, {})
            key = tuple(sorted(self.control.items()))
            if key not in kept:
                kept[key] = self.renamed(backend)
            if kept[key] is not None:
                named = self._pattern.sub(lambda found: self._name(found[0]), text).replace(_GAP, "")
                return [int(i) for i in kept[key].encode(named, add_special_tokens=False).ids]
        ids, begin = [], 0
        for found in self._pattern.finditer(text):
            ids += self._pieces(text[begin : found.start()].replace(_GAP, ""))
            ids.append(self.control[found[0]])
            begin = found.end()
        return ids + self._pieces(text[begin:].replace(_GAP, ""))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def _name(self, token: str) -> str:
        return f"\ue002{_SECRET}:{self.control[token]}\ue003"

    def renamed(self, backend: Any) -> Any:
        """The tokenizer with other names for its control tokens, or None where it cannot be copied so."""
        from tokenizers import Tokenizer

        data = json.loads(backend.to_str())
        for token in data["added_tokens"]:
            if token["content"] in self.control:
                token["content"] = self._name(token["content"])
        model = data["model"]
        words = model.get("vocab")
        if isinstance(words, dict):
            model["vocab"] = {self._name(w) if w in self.control else w: i for w, i in words.items()}
        elif words:
            model["vocab"] = [[self._name(w) if w in self.control else w, score] for w, score in words]
        if model.get("unk_token") in self.control:
            model["unk_token"] = self._name(model["unk_token"])
        data["post_processor"] = data["truncation"] = data["padding"] = None
        try:
            copy = Tokenizer.from_str(json.dumps(data))
        except Exception:  # a merge that makes a control token, say; the tokenizers package raises nothing narrower
            return None
        same = all(copy.token_to_id(self._name(token)) == index for token, index in self.control.items())
        return copy if same else None

    def _pieces(self, text: str) -> list[int]:
        """Ids of a text without control tokens, cut in two wherever the tokenizer finds one all the same."""
        if not text:
            return []
        ids = [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
        if not self.controls(ids) or len(text) < 2:
            return [i for i in ids if i not in self._ids]
        found = self._pattern.search(text) if self._pattern is not None else None
        middle = found.start() + 1 if found is not None else len(text) // 2
        return self._pieces(text[:middle]) + self._pieces(text[middle:])


def ends_with(ids: Sequence[int], tail: Sequence[int]) -> bool:
    """Whether some ids end with others."""
    return not tail or list(ids[-len(tail) :]) == list(tail)
