"""Reading a page back: what a customer sees, from the text and the clickables alone.

The invariant: nothing here knows the catalogue; both observation modes read the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from atod_envs.webshop.pages import BUY, NEXT, PREVIOUS, SEPARATOR, SUB_PAGES
from atod_envs.webshop.prompts import SEARCH_PATTERN

_RESULTS = re.compile(r"Page (-?\d+) \(Total results: (\d+)\)")
_MARK = re.compile(r"^\s*\[(?:clicked )?button\] (.*) \[(?:clicked )?button_\]$")
_PRICE = re.compile(r"\$(\d[\d,]*\.?\d*)")
_CAP = re.compile(r",? and price lower than (\d+(?:\.\d+)?) dollars\.?$")
_OPENING = re.compile(r"^find me ", re.IGNORECASE)
_JOINT = re.compile(r" with | for ")
_NEXT_OPTION = re.compile(r", and (?=[^:,]+: )")


class Kind(Enum):
    """Which page it is."""

    SEARCH = "search"
    RESULTS = "results"
    ITEM = "item"
    SUB = "sub"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of a result page: id as it is clicked, title, lowest and highest price in dollars."""

    asin: str
    title: str
    price: float
    highest: float


@dataclass(frozen=True, slots=True)
class View:
    """A page as read.

    Attributes:
        kind: which page.
        number: number of a result page.
        results: its results.
        options: an item's options: name -> values.
        texts: an item's title, or the texts of a sub page.
        tabs: sub pages that can be opened.
        more: a further result page may exist.
    """

    kind: Kind
    number: int = 0
    results: tuple[Result, ...] = ()
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    texts: tuple[str, ...] = ()
    tabs: tuple[str, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class Wish:
    """What an instruction asks for.

    Attributes:
        text: the instruction without "find me", options and price cap.
        attributes: what its phrases ask for, as far as its wording tells them from the type of product.
        kind: the type of product, likewise.
        options: wanted options of a synthetic instruction, by name.
        cap: highest price in dollars.
    """

    text: str
    attributes: tuple[str, ...] = ()
    kind: str = ""
    options: tuple[tuple[str, str], ...] = ()
    cap: float = float("inf")


def read_wish(task: str) -> Wish:
    """Take an instruction apart: ``... with color: red, and size: large, and price lower than 30.00 dollars``."""
    found = _CAP.search(task)
    cap = float(found.group(1)) if found else float("inf")
    body = task[: found.start()] if found else task
    colon = body.find(": ")
    start = body.rfind(" with ", 0, colon) if colon >= 0 else -1
    if start < 0:
        return _read_type(body, (), cap)
    options = []
    for part in _NEXT_OPTION.split(body[start + len(" with ") :]):
        name, _, value = part.partition(": ")
        options.append((name, value))
    return _read_type(body[:start], tuple(options), cap)


def _read_type(body: str, options: tuple[tuple[str, str], ...], cap: float) -> Wish:
    """Attributes are mostly two words, the type follows the last one that stands before it."""
    text = _OPENING.sub("", body)
    first, *others = _JOINT.split(text)
    phrases = first.split(", ")
    # The type may hold commas itself ("women's coats, jackets & vests"): it begins at the first phrase that is too long
    # for an attribute.
    start = next((i for i, phrase in enumerate(phrases) if len(phrase.split()) > 2), len(phrases) - 1)
    attributes, words = phrases[:start], ", ".join(phrases[start:]).split()
    if len(words) > 2:
        attributes.append(" ".join(words[:2]))
        words = words[2:]
    attributes.extend(phrase for other in others for phrase in other.split(", "))
    return Wish(text, tuple(phrase for phrase in attributes if phrase), " ".join(words), options, cap)


def read_page(observation: str, admissible: Sequence[str]) -> View:
    """Read a page in either observation mode."""
    clickable = {action[len("click[") : -1] for action in admissible if action.startswith("click[")}
    parts = [part.strip() for part in observation.split(SEPARATOR)]
    if len(parts) < 3:
        lines = [_MARK.sub(r"\1", line).strip() for line in observation.split("\n")]
        parts = [line for line in lines if line and not line.startswith("You have clicked ")]
    if SEARCH_PATTERN in admissible:
        return View(Kind.SEARCH)
    if BUY.lower() in clickable:
        return _read_item(parts, clickable)
    header = next((i for i, part in enumerate(parts) if _RESULTS.fullmatch(part)), None)
    if header is not None:
        return _read_results(parts, header, clickable)
    if PREVIOUS.lower() in clickable and PREVIOUS in parts:
        return View(Kind.SUB, texts=tuple(parts[parts.index(PREVIOUS) + 1 :]))
    return View(Kind.OTHER, texts=tuple(parts))


def _read_results(parts: list[str], header: int, clickable: set[str]) -> View:
    found = _RESULTS.fullmatch(parts[header])
    assert found is not None  # the caller has matched it
    number, total = int(found.group(1)), int(found.group(2))
    results: list[Result] = []
    texts: list[str] = []
    for part in parts[header + 1 :]:
        if part in (NEXT, PREVIOUS):
            continue
        if part.lower() in clickable:
            results.append(Result(part.lower(), "", 0.0, 0.0))
            texts = []
        elif results:
            texts.append(part)
            prices = [float(price.replace(",", "")) for price in _PRICE.findall(texts[-1])] if len(texts) > 1 else []
            results[-1] = Result(results[-1].asin, texts[0], min(prices, default=0.0), max(prices, default=0.0))
    return View(Kind.RESULTS, number, tuple(results), more=number * 10 < total)


def _read_item(parts: list[str], clickable: set[str]) -> View:
    start = parts.index(PREVIOUS) + 1 if PREVIOUS in parts else 0
    end = max((i for i, part in enumerate(parts) if part.startswith("Price: ")), default=len(parts))
    body = parts[start:end]
    title = body[-1] if body else ""
    options: list[tuple[str, list[str]]] = []
    for part in body[:-1]:
        # A value can be clicked; a name cannot, unless it happens to read like a button.
        if part in clickable and part not in SUB_PAGES and options:
            options[-1][1].append(part)
        else:
            options.append((part, []))
    tabs = tuple(tab for tab in SUB_PAGES if tab in clickable)
    return View(Kind.ITEM, options=tuple((name, tuple(values)) for name, values in options), texts=(title,), tabs=tabs)
