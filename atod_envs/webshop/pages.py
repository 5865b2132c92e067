"""What each page says: its visible texts in order, what can be clicked, and the two ways of writing it down.

The original renders HTML and reads the texts back out of it. A page here is that reading: a list of text nodes, each
with the role of its parent element. The invariant: ``render_text`` and ``render_rich`` give what the original's parser
gives for the same page, white space included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from atod_envs.webshop.catalogue.product import Product
from atod_envs.webshop.catalogue.store import Card

SEPARATOR = " [SEP] "
BUY = "Buy Now"
NEXT = "Next >"
PREVIOUS = "< Prev"
BACK = "Back to Search"
SEARCH = "Search"
DESCRIPTION, FEATURES, REVIEWS, ATTRIBUTES = "Description", "Features", "Reviews", "Attributes"
SUB_PAGES = {name.lower(): name for name in (DESCRIPTION, FEATURES, REVIEWS, ATTRIBUTES)}
"""Clickable -> sub page of an item."""
_HTML_SPACE = " \t\n\f\r"


class Role(Enum):
    """What kind of element holds a text; the rich form marks buttons, options and product links."""

    TEXT = 0
    BUTTON = 1
    OPTION = 2
    PRODUCT = 3


Node = tuple[Role, str]


@dataclass(frozen=True, slots=True)
class Page:
    """A page as an agent can perceive it.

    Attributes:
        nodes: its texts.
        options: (option name, value) of every choice, in order; empty values, which have no text, included.
        searchable: it has a search bar.
    """

    nodes: tuple[Node, ...]
    options: tuple[tuple[str, str], ...] = ()
    searchable: bool = False

    def clickables(self) -> dict[str, tuple[Role, str]]:
        """Click argument -> (role, option name or product id or button), in the original's order.

        Buttons come first, then product links, then options; of equal texts the last one counts, at the first one's
        place.
        """
        found: dict[str, tuple[Role, str]] = {}
        for role in (Role.BUTTON, Role.PRODUCT):
            for kind, text in self.nodes:
                if kind is role:
                    found[text.lower()] = (role, text)
        for name, value in self.options:
            found[value] = (Role.OPTION, name)
        return found


def render_text(page: Page) -> str:
    """The page in mode ``"text"``: stripped texts joined by ``" [SEP] "``."""
    return SEPARATOR.join([text.strip() for _, text in page.nodes])


def render_rich(page: Page, url: str, seen: Iterable[str]) -> str:
    """The page in mode ``"text_rich"``: one text a line, with marks around what can be clicked.

    Args:
        page: the page.
        url: its address; an option counts as clicked if it stands there in double quotes.
        seen: ids of the products that were opened since the search page.
    """
    head, lines = "", []
    for role, text in page.nodes:
        if role is Role.TEXT:
            line = text
        elif role is Role.BUTTON:
            line = f"[button] {text} [button_]"
        elif role is Role.OPTION:
            if f'"{text}"' in url:
                line = f"  [clicked button] {text} [clicked button_]"
                head = f"You have clicked {text}.\n{head}"
            else:
                line = f"  [button] {text} [button_]"
        else:
            mark = "clicked button" if text in seen else "button"
            line = f"\n[{mark}] {text} [{mark}_]"
        lines.append(line + "\n")
    return head + "".join(lines)


# --- the pages -----------------------------------------------------------------------------------------------------


def search_page(instruction: str) -> Page:
    """The start page."""
    nodes = (*text_nodes(("WebShop", "Instruction: ", instruction)), (Role.BUTTON, SEARCH))
    return Page(nodes, searchable=True)


def result_page(instruction: str, cards: Sequence[tuple[Node, ...]], number: int, total: int) -> Page:
    """One page of results.

    Args:
        instruction: the task.
        cards: each result's :func:`card_nodes`.
        number: page number, from 1 (0 and below can be reached through the original's quirks).
        total: results in all.
    """
    nodes = [*_head(instruction), (Role.TEXT, f"Page {number} (Total results: {total})")]
    if number > 1:
        nodes.append((Role.BUTTON, PREVIOUS))
    nodes.append((Role.BUTTON, NEXT))
    for card in cards:
        nodes.extend(card)
    return Page(tuple(nodes))


def card_nodes(card: Card) -> tuple[Node, ...]:
    """The texts of one result."""
    return text_nodes((card.asin,), Role.PRODUCT) + text_nodes((card.title, card.price_tag))


def item_page(instruction: str, body: tuple[Node, ...], options: tuple[tuple[str, str], ...]) -> Page:
    """The page of a product, from its :func:`item_body` and :func:`item_options`."""
    return Page((*_head(instruction), (Role.BUTTON, PREVIOUS), *body), options)


def item_body(product: Product, show_attributes: bool) -> tuple[Node, ...]:
    """The texts of an item page below its navigation."""
    nodes: list[Node] = []
    for name, values in product.options.items():
        nodes.extend(text_nodes((name,)))
        nodes.extend(text_nodes(values, Role.OPTION))
    nodes.extend(text_nodes((product.title, f"Price: {product.price_tag}", f"Rating: {product.rating}")))
    tabs = (DESCRIPTION, FEATURES, REVIEWS, *((ATTRIBUTES,) if show_attributes else ()), BUY)
    nodes.extend((Role.BUTTON, tab) for tab in tabs)
    return tuple(nodes)


def item_options(product: Product) -> tuple[tuple[str, str], ...]:
    """Every (option name, value) of a product, in order."""
    return tuple((name, value) for name, values in product.options.items() for value in values)


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """A product's description, features, reviews or attributes."""
    if name == DESCRIPTION:
        body = text_nodes((product.description,))
    elif name == FEATURES:
        body = text_nodes(f" {bullet}" for bullet in product.bullets)
    elif name == REVIEWS:
        body = text_nodes(text for r in product.reviews for text in (f'"{r.title}"', r.score, r.body))
    else:
        about = (product.category, product.query, product.product_category)
        body = text_nodes((*(f" {attribute}" for attribute in product.attributes), *about))
    return Page((*_head(instruction), (Role.BUTTON, PREVIOUS), *body))


def done_page(asin: str, options: Mapping[str, str], reward: float) -> Page:
    """The page after a purchase. Its hidden fields are visible to the original's parser, mostly as ``None``."""
    shown = json.dumps(dict(options), sort_keys=True)
    for mark in "<>&'":  # escaped so that they are safe inside a page
        shown = shown.replace(mark, f"\\u{ord(mark):04x}")
    return Page(
        text_nodes(
            (
                *("Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"),
                *("Purchased", "asin", asin, "options", shown, "attrs", "None", "category", "None", "query", "None"),
                *("product category", "None", "Target", "asin", "options", "attrs", "price upper", "instuction text"),
                *("category", "product category", "query", "Goal ", "None", "Reward"),
                *("Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"),
            )
        )
    )


def _head(instruction: str) -> tuple[Node, ...]:
    return (*text_nodes(("Instruction:", instruction)), (Role.BUTTON, BACK))


def text_nodes(texts: Iterable[str], role: Role = Role.TEXT) -> tuple[Node, ...]:
    """Text nodes as an HTML parser leaves them: empty ones vanish, and so does white space that holds a line break."""
    found = []
    for text in texts:
        if not text.strip(_HTML_SPACE):
            if not text or "\n" in text:
                continue
            text = " "
        found.append((role, text))
    return tuple(found)
