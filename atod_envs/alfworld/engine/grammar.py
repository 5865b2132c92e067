r"""The text grammar of a game file (`twl2`): which command names an action, and which text answers it.

The outer file holds `action NAME { template :: "..."; feedback :: "..."; grammar :: \"\"\"JSON\"\"\"; }` and `grammar`
blocks. A rule's text is a row of symbols: plain text, `#other rule#`, `{expression}`, `{expression | query}` and
`[...]` for a list. Invariant: symbols are read as the reference reads them, including that it stops without complaint
at the first character that fits nowhere, and drops blanks and `//` comments at the very start of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from atod_envs.errors import DataError
from atod_envs.files import parse_json


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that stands for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reference:
    """The text of another rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Expression:
    """A value computed from the entities in scope, such as `o.name`."""

    source: str


@dataclass(frozen=True, slots=True)
class Item:
    """A reference or expression, once in the current scope or once for every answer to `query`."""

    body: Reference | Expression
    query: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The items of a query put together as a list."""

    item: Item


Symbol: TypeAlias = Plain | Reference | Item | Listing


@dataclass(frozen=True, slots=True)
class Rule:
    """One alternative of a rule: it applies where its condition (a query; empty means always) has an answer."""

    condition: str
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """The command template and the feedback of one action."""

    template: tuple[Symbol, ...]
    feedback: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """Action name (lower case) to texts, rule name to alternatives in order of preference."""

    actions: Mapping[str, Texts]
    rules: Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True, slots=True)
class Query:
    """A conjunction of predicates over placeholders; each is (predicate, ((name, type), ...))."""

    literals: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_WORD = re.compile(r"[\w/-]+")
_BLOCK = re.compile(r'"""((?:.|\n)*?)"""')
_STRING = re.compile(r'"([^"]*)"')
_START = re.compile(r"^(?://.*|\s*)\n?", re.MULTILINE)
_TABS = re.compile(r"\t*")
# Possessive throughout: what follows a run is never part of it, and a broken grammar is refused in linear time.
_REFERENCE = re.compile(r"#\t*+([\w()/!<>\-\s,.]++)#")
_ITEM = re.compile(
    r"\{\t*+(?:#\t*+(?P<rule>[\w()/!<>\-\s,.]++)#|(?P<expression>[^|\[\]{}\n<>]++))"
    r"(?:\s*+\|\s*+(?P<query>[^;|{}\n\[\]#]++))?\t*+\}"
)
_LITERAL = re.compile(r'[^;|"<>\[\]#{}]+')
_QUOTED = re.compile(r'"([^;|"<>\[\]#{}]*)"')
_PREDICATE = re.compile(r"\s*([\w-]+)\s*\(([^()]*)\)\s*")
_TASK = re.compile(r'("task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*")((?:[^"\\]|\\.)*)(")')
TASK_MARK = "\0task\0"
"""Stands for the task sentence, which differs between games that otherwise share one grammar."""


def split_task(text: str) -> tuple[str, str | None]:
    """Separate the task sentence from a grammar, so that games sharing the rest share its compiled form.

    Returns:
        The grammar with `TASK_MARK` for the sentence, and the sentence; or the text unchanged and None where the rule
        `task` is not one plain sentence.
    """
    match = _TASK.search(text)
    if match is None or _TASK.search(text, match.end()):
        return text, None
    try:
        symbols = parse_symbols(json.loads(f'"{match[2]}"'))
    except json.JSONDecodeError:
        return text, None
    if not all(isinstance(symbol, Plain) for symbol in symbols):
        return text, None
    sentence = "".join(symbol.text for symbol in symbols if isinstance(symbol, Plain))
    return text[: match.start(2)] + "\\u0000task\\u0000" + text[match.end(2) :], sentence


def parse_grammar(text: str) -> Grammar:
    """Read a grammar.

    Raises:
        DataError: the text is malformed; the place is quoted.
    """
    actions: dict[str, Texts] = {}
    rules: dict[str, tuple[Rule, ...]] = {}
    at = _skip(text, 0)
    while at < len(text):
        if text.startswith("action", at):
            at = _action(text, at + len("action"), actions, rules)
        elif text.startswith("grammar", at):
            at, block = _field(text, at + len("grammar"), _BLOCK)
            _rules(block, rules)
        else:
            raise DataError(f"the game grammar has an unknown construct at {_near(text, at)}")
        at = _skip(text, at)
    return Grammar(actions, rules)


def parse_symbols(text: str) -> tuple[Symbol, ...]:
    """Read the right-hand side of a rule, a template or a feedback text."""
    symbols: list[Symbol] = []
    at = 0
    while (start := _START.match(text, at)) and start.end() > at:
        at = start.end()
    while at < len(text):
        tabs = _TABS.match(text, at)
        begin = tabs.end() if tabs else at
        if text.startswith("[", begin):
            match = _ITEM.match(text, _end(_TABS, text, begin + 1))
            close = _end(_TABS, text, match.end()) if match else begin
            if match is None or not text.startswith("]", close):
                break
            symbols.append(Listing(_item(match)))
            at = close + 1
        elif match := _ITEM.match(text, begin):
            symbols.append(_item(match))
            at = match.end()
        elif match := _REFERENCE.match(text, begin):
            symbols.append(Reference(match[1]))
            at = match.end()
        elif match := _QUOTED.match(text, begin) or _LITERAL.match(text, begin):
            symbols.append(Plain(match[1] if match.re is _QUOTED else match[0]))
            at = match.end()
        else:
            break
    return tuple(symbols)


def parse_query(text: str) -> Query:
    """Read a conjunctive query such as `atlocation(a:agent, l:location) & openable(r:receptacle)`.

    Raises:
        DataError: the text is not such a query.
    """
    literals: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    for part in text.split("&"):
        match = _PREDICATE.fullmatch(part)
        if match is None:
            raise DataError(f"the game grammar has an unsupported query {text!r}")
        names = [word.partition(":") for word in match[2].split(",")]
        arguments = tuple((name.strip(), (kind or name).strip()) for name, _, kind in names)
        if not all(_WORD.fullmatch(name) and _WORD.fullmatch(kind) for name, kind in arguments):
            raise DataError(f"the game grammar has an unsupported query {text!r}")
        literals.append((match[1], arguments))
    return Query(tuple(literals))


def _item(match: re.Match[str]) -> Item:
    body: Reference | Expression = (
        Reference(match["rule"]) if match["rule"] is not None else Expression(match["expression"])
    )
    return Item(body, match["query"])


def _action(text: str, at: int, actions: dict[str, Texts], rules: dict[str, tuple[Rule, ...]]) -> int:
    word = _WORD.match(text, _skip(text, at))
    if word is None:
        raise DataError(f"the game grammar has an action without a name at {_near(text, at)}")
    name = word[0].lower()
    at = _skip(text, word.end())
    if not text.startswith("{", at):
        raise DataError(f"the game grammar expects '{{' after action {word[0]!r}, found {_near(text, at)}")
    at = _skip(text, at + 1)
    fields: dict[str, str] = {}
    while not text.startswith("}", at):
        key = _WORD.match(text, at)
        if key is None or key[0] not in ("template", "feedback", "pddl", "grammar"):
            raise DataError(f"the game grammar has an unknown construct in action {word[0]!r}: {_near(text, at)}")
        is_block = key[0] in ("pddl", "grammar")
        at, value = _field(text, key.end(), _BLOCK if is_block else _STRING)
        fields[key[0]] = value
        at = _skip(text, at)
    if "template" not in fields or "feedback" not in fields:
        raise DataError(f"the game grammar's action {word[0]!r} lacks a template or a feedback")
    if "grammar" in fields:
        lines = fields["grammar"].split("\n")
        _rules("\n".join(line for line in lines if not line.lstrip().startswith("#")), rules)
    actions[name] = Texts(parse_symbols(fields["template"]), parse_symbols(fields["feedback"]))
    return at + 1


def _field(text: str, at: int, pattern: re.Pattern[str]) -> tuple[int, str]:
    """Read `:: VALUE ;` and return the position after it and the value."""
    at = _skip(text, at)
    match = pattern.match(text, _skip(text, at + 2)) if text.startswith("::", at) else None
    end = _skip(text, match.end()) if match else at
    if match is None or not text.startswith(";", end):
        raise DataError(f"the game grammar expects ':: value ;' at {_near(text, at)}")
    return end + 1, match[1]


def _rules(block: str, rules: dict[str, tuple[Rule, ...]]) -> None:
    data = parse_json(block, "a rule block of the game grammar", "it must be a JSON object")
    if not isinstance(data, dict):
        raise DataError(f"a rule block of the game grammar is not a JSON object: {block[:80]!r}")
    for name, alternatives in data.items():
        if not isinstance(alternatives, list) or not alternatives:
            raise DataError(f"rule {name!r} of the game grammar is not a list of alternatives")
        for alternative in alternatives:
            if not isinstance(alternative, dict) or not isinstance(alternative.get("rhs"), str):
                raise DataError(f"rule {name!r} of the game grammar has an alternative without 'rhs': {alternative!r}")
        rules[name] = tuple(
            Rule(str(alternative.get("condition", "")), parse_symbols(alternative["rhs"]))
            for alternative in alternatives
        )


def _skip(text: str, at: int) -> int:
    return _end(_SPACE, text, at)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _near(text: str, at: int) -> str:
    return repr(text[at : at + 60])
