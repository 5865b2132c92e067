"""Text that stays text: encoding a message so that nothing in it becomes one of the tokenizer's control tokens.

A tokenizer reads ``<|im_end|>`` in an observation as the token that ends a turn. The invariant: of the ids that are
made here, those of control tokens are the chat template's own. A text without control tokens is encoded as ever; only
where one would appear is the tokenizer copied with its control tokens under secret names, so that the template's can be
told from the text's.

Some templates write markers that are no tokens of their tokenizer, such as Llama 2's ``[INST]`` or Zephyr's
``<|user|>``. In a text those are spelled in single characters, which no template does, so a model can tell them, too.
What neither the template writes nor the tokenizer calls special is no control, and stays as it is.
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
_PIPED = r"<[|｜][^\s<>|｜{}]{1,40}[|｜]>|\[\|[^\s\[\]|{}]{1,40}\|\]|<</?[A-Z]+>>|\[/?[a-z_]*[A-Z][A-Za-z_]+\]"
_IN_SOURCE = re.compile(_PIPED)
"""Markers as templates hold them: ``<|user|>``, ``[|user|]``, ``<<SYS>>``, ``[INST]``."""
_WRITTEN = re.compile(_PIPED + r"|</?[|\w]{1,40}>")
"""Markers where a template has written them: tags, too."""
_LABEL = re.compile(r"#{2,} ?[A-Za-z][A-Za-z ]{0,30}:|\b[A-Z][A-Za-z]{1,20}:(?=\s|$)")
"""Names of speakers, which some templates write before what is said."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FORMATS = re.compile(r"</?(action|search|answer|information)>")
"""What the environments' own formats write."""
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


def literal_markers(template: str, shown: str, sides: Iterable[str], control: Iterable[str]) -> list[str]:
    """Markers that a template writes and that hold no control token, the longest first.

    Args:
        template: its source.
        shown: a conversation as it writes it.
        sides: what it writes right before and after what is said, where names of speakers stand.
        control: the tokenizer's control tokens.
    """
    found = {
        *_IN_SOURCE.findall(template),
        *_WRITTEN.findall(shown),
        *(x for side in sides for x in _LABEL.findall(side)),
    }
    known = set(control)
    kept = [m for m in found if not (_THOUGHT.fullmatch(m) or _FORMATS.fullmatch(m) or any(c in m for c in known))]
    return sorted(kept, key=lambda marker: (-len(marker), marker))


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
        self._literal: re.Pattern[str] | None = None
        self._guarded: re.Pattern[str] | None = None
        self._spelled: dict[int, list[int]] = {}
        self._remembered = lru_cache(maxsize=16384)(lambda text: tuple(self._tokenize(text)))

    def spell(self, markers: Sequence[str]) -> None:
        """From now on, spell these in single characters where a text holds them; see :func:`literal_markers`."""
        self._literal = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._guarded = re.compile("|".join(re.escape(m[0] + _GAP + m[1:]) for m in markers)) if markers else None

    def clean(self, text: str) -> bool:
        """Whether a text holds no marker that must be spelled."""
        return self._literal is None or self._literal.search(text) is None

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
        return ids if self.clean(text) and not self.controls(ids) else self.read_guarded(self.guard(text))

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
        if self._literal is not None:
            text = self._literal.sub(lambda found: found[0][:1] + _GAP + found[0][1:], text)
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
                return self._read_copy(kept[key], self._pattern.sub(lambda found: self._name(found[0]), text))
        ids, begin = [], 0
        for found in self._pattern.finditer(text):
            ids += self._pieces(text[begin : found.start()].replace(_GAP, ""))
            ids.append(self.control[found[0]])
            begin = found.end()
        return ids + self._pieces(text[begin:].replace(_GAP, ""))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def _read_copy(self, copy: Any, named: str) -> list[int]:
        """Ids by a copy under secret names; what was a marker in a guarded text is spelled."""
        spans: list[tuple[int, int]] = []
        plain, begin = "", 0
        for found in self._guarded.finditer(named) if self._guarded is not None else ():
            plain += named[begin : found.start()].replace(_GAP, "")
            spans.append((len(plain), len(plain) + len(found[0]) - len(_GAP)))
            plain += found[0].replace(_GAP, "")
            begin = found.end()
        read = copy.encode(plain + named[begin:].replace(_GAP, ""), add_special_tokens=False)
        ids: list[int] = []
        for index, (first, last) in zip(read.ids, read.offsets, strict=True):
            inside = any(first < end and last > start for start, end in spans)
            ids += self._letters(copy, index) if inside else [int(index)]
        return ids

    def _letters(self, copy: Any, index: int) -> list[int]:
        """A token as the tokens of its characters, and one of a single character as bytes; else as it is."""
        if index not in self._spelled:
            piece, letters = copy.id_to_token(index), list[int | None]()
            for letter in "" if _BYTE.fullmatch(piece) else piece:
                own = copy.token_to_id(letter) if len(piece) > 1 else None
                # The sign that stands for a blank would be itself as bytes.
                spelled = (
                    [own]
                    if own is not None or letter == "▁"
                    else [copy.token_to_id(f"<0x{b:02X}>") for b in letter.encode()]
                )
                letters += spelled
            known = [letter for letter in letters if letter is not None]
            whole = known and len(known) == len(letters) and self._ids.isdisjoint(known)
            self._spelled[index] = known if whole else [int(index)]
        return self._spelled[index]

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
