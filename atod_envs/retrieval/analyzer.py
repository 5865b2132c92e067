"""The English analyzer of Anserini, without Java: text to the index terms that Lucene makes of it.

The chain is StandardTokenizer, possessive filter, lower case, stop words, Porter stemmer. The invariant of this
module is that `analyze(text)` equals what Lucene's `DefaultEnglishAnalyzer` returns, for every text, whatever its
script: the BM25 ranking is exact only if each term is. The tokenizer follows the word-break rules of UAX #29 as
Lucene runs them (Unicode 12.1, emoji sequences of UTS #51, South-East Asian runs kept whole, Han and Hiragana one
character a token, no token of more than 255 UTF-16 units).
"""

from __future__ import annotations

import bisect
import re
import sys
from functools import cache
from importlib import import_module, resources
from typing import Any, Final

from .porter import stem

MAX_TOKEN_UNITS: Final = 255
"""Longest token in UTF-16 units: Lucene cuts a longer one there and goes on with the rest."""

_STOP_WORD_TEXT: Final = """
a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was
will with
"""
STOP_WORDS: Final = frozenset(_STOP_WORD_TEXT.split())

_CACHE_LIMIT: Final = 1 << 20
_APOSTROPHES: Final = "'\u2019\uff07"


def compile_possessive(pattern: str) -> re.Pattern[str]:
    """Compile a pattern with possessive groups, which match nothing in Python before 3.11.5 (CPython issue 106052)."""
    engine: Any = re if sys.version_info >= (3, 11, 5) else import_module("regex")
    compiled: re.Pattern[str] = engine.compile(pattern)
    return compiled


# Quantifiers are possessive (they never give back) and leading runs are bounded by the longest token, so that the time
# to split a text is linear in its length whatever the text is.
_ASCII_UNIT: Final = r"(?:[A-Za-z]++(?:[:.'](?=[A-Za-z]))?|[0-9]++(?:[.,;'](?=[0-9]))?)++"
_ASCII_TOKEN: Final = compile_possessive(rf"_{{0,{MAX_TOKEN_UNITS}}}+{_ASCII_UNIT}(?:_++{_ASCII_UNIT})*+_*+")


class _Classes(dict[int, str]):
    """Code point to a letter that stands for its combination of word-break classes; filled as characters appear."""

    def __init__(self) -> None:
        super().__init__()
        self.combinations: list[str] = [""]
        starts: list[tuple[int, int, int]] = []
        table = resources.files(__package__).joinpath("wordbreak.txt").read_text(encoding="utf-8")
        for line in table.splitlines():
            if line.startswith("#"):
                continue
            combination, *ranges = line.split()
            self.combinations.append(combination)
            for item in ranges:
                first, _, last = item.partition("-")
                starts.append((int(first, 16), int(last or first, 16), len(self.combinations) - 1))
        starts.sort()
        self._firsts = [first for first, _, _ in starts]
        self.ranges = starts

    def __missing__(self, code: int) -> str:
        found = bisect.bisect_right(self._firsts, code) - 1
        number = self.ranges[found][2] if found >= 0 and code <= self.ranges[found][1] else 0
        letter = self[code] = chr(0x41 + number)
        return letter

    def any_of(self, classes: str, without: str = "") -> str:
        """A regular-expression set of the letters whose combination holds one of `classes` and none of `without`."""
        letters = (
            chr(0x41 + number)
            for number, combination in enumerate(self.combinations)
            if any(c in combination for c in classes) and not any(c in combination for c in without)
        )
        return "[" + "".join(re.escape(letter) for letter in letters) + "]"


@cache
def unicode_rules() -> tuple[_Classes, re.Pattern[str]]:
    """The class table and the pattern of one token over class letters."""
    classes = _Classes()
    one = classes.any_of
    extend = one("X") + "*+"
    sans_selectors = one("X", without="FO") + "*+"
    letter, digit, joiner = one("A"), one("N"), one("Z")
    joiners = f"{joiner}{{0,{MAX_TOKEN_UNITS}}}"
    middle_letter, middle_digit = one("LBS") + extend, one("MBS") + extend
    under = f"(?:{one('E')}{extend})"
    unit = (
        f"(?:{one('H')}{extend}{one('S')}{extend}|{one('H')}{extend}{one('D')}{extend}{one('H')}{extend}"
        f"|{letter}{extend}(?:{middle_letter}{letter}{extend})*+"
        f"|{digit}{extend}(?:{middle_digit}{digit}{extend})*+)++"
        f"|(?:{one('K')}{extend})++"
    )
    word = f"{under}{{0,{MAX_TOKEN_UNITS}}}+(?:{unit})(?:{under}++(?:{unit}))*+{under}*+"
    element = (
        f"(?:{joiners}{one('P')}{sans_selectors}{one('F')}?"
        f"|(?:{joiners}{one('b')}{sans_selectors})?{one('m')}{sans_selectors})"
    )
    # A joiner is an Extend too, so the element before may have taken it already: hence the look-behind.
    joined = f"(?:(?<={joiner})|{joiner}){element}"
    emoji = (
        f"{element}(?:{joined})*+"
        f"|{one('k')}(?:{sans_selectors}{one('F')}|{one('X', without='FOY')}*+){one('Y')}{sans_selectors}"
        f"|(?:{one('R')}{extend}){{2}}"
    )
    # Some letters are emoji too (a circled M): they begin a word, unless an emoji that is no letter is joined to them.
    lettered = (
        f"(?={letter}){element}(?:{joined})*?(?:(?<={joiner})|{joiner})(?!{joiners}{letter}){element}(?:{joined})*+"
    )
    token = f"{lettered}|{word}|{emoji}|(?:{one('C')}{extend})++|{one('IG')}{extend}"
    return classes, compile_possessive(token)


def _utf16_length(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)


def _prefix_of_units(text: str, start: int, units: int) -> int:
    """The end of the longest piece of text from `start` that has at most `units` UTF-16 units."""
    end = start
    while end < len(text):
        units -= 2 if text[end] > "\uffff" else 1
        if units < 0:
            break
        end += 1
    return end


def _pieces(text: str, classes: str, pattern: re.Pattern[str], start: int, end: int) -> tuple[list[str], int]:
    """Split an overlong match: each token is what matches within the next 255 units, as in Lucene's buffer.

    Returns:
        The tokens, and where scanning goes on (at or after `end`).
    """
    tokens = []
    while start < end:
        found = pattern.match(classes[start : _prefix_of_units(text, start, MAX_TOKEN_UNITS)])
        if found is None:
            start += 1
            continue
        tokens.append(text[start : start + found.end()])
        start += found.end()
    return tokens, start


def tokenize(text: str) -> list[str]:
    """Split a text as Lucene's StandardTokenizer does.

    Args:
        text: anything; lone surrogates count as characters without a class.

    Returns:
        The tokens in order, as written, each at most `MAX_TOKEN_UNITS` UTF-16 units long.
    """
    if text.isascii():
        simple: list[str] = _ASCII_TOKEN.findall(text)
        if not simple or max(map(len, simple)) <= MAX_TOKEN_UNITS:
            return simple
        classes, pattern = text, _ASCII_TOKEN
    else:
        table, pattern = unicode_rules()
        classes = text.translate(table)
    tokens: list[str] = []
    position = 0
    while found := pattern.search(classes, position):
        start, position = found.span()
        if position - start > MAX_TOKEN_UNITS // 2 and _utf16_length(text[start:position]) > MAX_TOKEN_UNITS:
            pieces, position = _pieces(text, classes, pattern, start, position)
            tokens += pieces
        else:
            tokens.append(text[start:position])
    return tokens


@cache
def _lower_character(character: str) -> str:
    """Java's one-to-one lower case of a code point (`str.lower` makes two characters of a dotted capital I)."""
    lowered = character.lower()
    return lowered if len(lowered) == 1 else lowered[0]


def _lower(token: str) -> str:
    if token.isascii():
        return token.lower()
    return "".join(map(_lower_character, token))


def term_of(token: str) -> str | None:
    """The index term of one token, or None for a stop word."""
    if len(token) >= 2 and token[-1] in "sS" and token[-2] in _APOSTROPHES:
        token = token[:-2]
    token = _lower(token)
    if token in STOP_WORDS:
        return None
    if any(character > "\uffff" for character in token):
        return _stem_utf16(token)
    return stem(token)


def _stem_utf16(token: str) -> str:
    """Stem a token with characters beyond U+FFFF: each counts as two letters, because Java sees two."""
    units = token.encode("utf-16-be", "surrogatepass")
    letters = "".join(chr(int.from_bytes(units[i : i + 2], "big")) for i in range(0, len(units), 2))
    stemmed = stem(letters)
    return b"".join(ord(letter).to_bytes(2, "big") for letter in stemmed).decode("utf-16-be", "surrogatepass")


_terms: dict[str, str | None] = {}


def analyze(text: str) -> list[str]:
    """The terms of a text in order, stop words left out, repetitions kept.

    Args:
        text: a passage or a query.

    Returns:
        Terms as Anserini's `DefaultEnglishAnalyzer` (Porter) produces them.
    """
    if len(_terms) > _CACHE_LIMIT:
        _terms.clear()
    terms = []
    for token in tokenize(text):
        try:
            term = _terms[token]
        except KeyError:
            term = _terms[token] = term_of(token)
        if term is not None:
            terms.append(term)
    return terms
