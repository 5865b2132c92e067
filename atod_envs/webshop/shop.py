"""The shop: from an action to the next page.

``Shop`` holds what all customers share, ``ShopSession`` one customer's visit. The invariant: for every action the page,
its address, its clickables and the reward are those of the original's simulated server, its quirks included; where the
original would crash, the action counts as not understood and the page stays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from atod_envs.errors import UnknownName
from atod_envs.webshop import pages
from atod_envs.webshop.catalogue.product import Product
from atod_envs.webshop.catalogue.store import Store
from atod_envs.webshop.goals import Goal, Goals
from atod_envs.webshop.nouns import noun_finder
from atod_envs.webshop.pages import Node, Page, Role
from atod_envs.webshop.reward import Nouns, RewardParts, score_purchase

RESULTS = 50
"""Results of a search."""
PER_PAGE = 10
LONGEST_QUERY = 10_000
"""Characters of a query that are searched; more is cut off (the original has no limit, only its engine's patience)."""
BASE_URL = "http://127.0.0.1:3000"
SEARCH_ENGINES = ("bm25", "lucene")

_PAGE_NAMES = ("search_results", "item_page", "item_sub_page", "done")

ObservationMode = Literal["text", "text_rich"]
OBSERVATION_MODES: tuple[ObservationMode, ...] = ("text", "text_rich")


class _Hit(Protocol):
    @property
    def docid(self) -> str: ...


class SearchEngine(Protocol):
    """What finds products: BM25 over their texts, k best first."""

    def search(self, query: str, k: int) -> Sequence[_Hit]: ...  # noqa: D102


def parse_action(action: str) -> tuple[str, str | None]:
    r"""Split ``name[argument]``; text of another form is a name without argument.

    As the original's greedy ``(.+)\[(.+)\]`` on the first line, in linear time: the argument ends at the last ``]`` and
    begins at the last ``[`` that leaves it a character.
    """
    line = action.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, end - 1) if end > 2 else -1
    return (line[:start], line[start + 1 : end]) if start > 0 else (action, None)


class Shop:
    """A catalogue with its search engine, as all customers see it.

    Args:
        store: the catalogue.
        engine: the search engine; by default the store's own index.
        nouns: noun finder of the reward; by default the best one installed.
        show_attributes: item pages have an ``Attributes`` tab.
    """

    def __init__(
        self,
        store: Store,
        engine: SearchEngine | None = None,
        nouns: Nouns | None = None,
        show_attributes: bool = False,
    ) -> None:
        self.store = store
        self.engine: SearchEngine = engine or store.index
        self.nouns: Nouns = nouns or noun_finder("auto").find
        self.show_attributes = show_attributes
        # One product's texts serve every page that shows it.
        self.card_nodes: Callable[[int], tuple[Node, ...]] = lru_cache(maxsize=1 << 14)(self._card_nodes)
        self.item_parts: Callable[[int], _ItemParts] = lru_cache(maxsize=1 << 11)(self._item_parts)
        self.ranking: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=1 << 10)(self._ranking)

    def _card_nodes(self, row: int) -> tuple[Node, ...]:
        return pages.card_nodes(self.store.card(row))

    def _item_parts(self, row: int) -> _ItemParts:
        product = self.store.product(row)
        return pages.item_body(product, self.show_attributes), pages.item_options(product)

    def _ranking(self, query: str) -> tuple[int, ...]:
        hits = self.engine.search(query[:LONGEST_QUERY], RESULTS)
        return tuple(self.store.rows([hit.docid for hit in hits]))

    def find(self, keywords: Sequence[str], rng: Callable[[], random.Random]) -> Sequence[int] | None:
        """Rows of the products that a search lists.

        Args:
            keywords: the words of the query. ``<r>`` first lists random products, ``<c>`` a category's, ``<q>`` those
                of a crawl query.
            rng: gives the source of random listings.

        Returns:
            The rows, or ``None`` where the original fails (``<a>``, and ``<c>`` without a category).
        """
        match keywords[0]:
            case "<r>":
                return rng().sample(range(len(self.store)), min(RESULTS, len(self.store)))
            case "<c>":
                return self.store.rows_where("category", keywords[1].strip()) if len(keywords) > 1 else None
            case "<q>":
                return self.store.rows_where("query", " ".join(keywords[1:]).strip())
            case "<a>":
                return None
        return self.ranking(" ".join(keywords))


_ItemParts = tuple[tuple[Node, ...], tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Purchase:
    """What was bought at the end of a session."""

    product: Product
    options: dict[str, str]
    price: float
    parts: RewardParts


class ShopSession:
    """One customer's visit.

    Args:
        shop: the shop.
        goals: where prices come from.
        goal: what the customer wants.
        name: stands in the addresses; the original uses the goal's number.
        seed: of random listings.

    Attributes:
        page: the present page.
        url: its address.
        purchase: what was bought; ``None`` until the session has ended.
    """

    def __init__(self, shop: Shop, goals: Goals, goal: Goal, name: str, seed: int = 0) -> None:
        self.shop = shop
        self.goals = goals
        self.goal = goal
        self.name = name
        self.purchase: Purchase | None = None
        self._seed = seed
        self._rng: random.Random | None = None  # made when a listing is drawn, which hardly an episode does
        self._shown: dict[str, int] = {}
        self._open_search()

    # --- perceiving ---

    @property
    def page(self) -> Page:
        """The present page."""
        return self._page

    @page.setter
    def page(self, page: Page) -> None:
        self._page = page
        self._clickables: dict[str, tuple[Role, str]] | None = None

    @property
    def options(self) -> dict[str, str]:
        """Options chosen for the product that is open, by name."""
        return dict(self._options)

    @property
    def clickables(self) -> dict[str, tuple[Role, str]]:
        """Arguments that ``click[...]`` takes here (``search`` among them, which is listed but does nothing)."""
        if self._clickables is None:
            self._clickables = self._page.clickables()
        return self._clickables

    def observe(self, mode: ObservationMode) -> str:
        """The page as text."""
        if mode == "text":
            return pages.render_text(self._page)
        if mode == "text_rich":
            return pages.render_rich(self._page, self.url, self._seen)
        raise UnknownName("observation mode", mode, OBSERVATION_MODES)

    # --- acting ---

    def act(self, action: str) -> bool:
        """Carry out an action.

        Returns:
            Whether the shop understood it; if not, the page stays as it is.
        """
        name, argument = parse_action(action)
        if argument is None:
            return False
        argument = argument.lower()
        if name == "search" and argument:
            return self._search(argument.split(" "), 1)
        if name == "click" and argument != "search" and argument in self.clickables:
            return self._click(argument)
        return False

    def _click(self, name: str) -> bool:
        place = next((page for page in _PAGE_NAMES if page in self.url), "")
        if name == pages.BUY.lower():
            return self._buy()
        if name == pages.BACK.lower():
            self._open_search()
            return True
        if name == pages.NEXT.lower() and place == "search_results":
            return self._search(self._keywords, self._number + 1)
        if name == pages.PREVIOUS.lower() and place == "search_results":
            return self._search(self._keywords, self._number - 1)
        if name == pages.PREVIOUS.lower() and place == "item_page":
            return self._search(self._keywords, self._number)
        if name in pages.SUB_PAGES:
            return self._open_sub_page(pages.SUB_PAGES[name])
        return self._open_item(name)

    def _open_search(self) -> None:
        self._keywords: Sequence[str] = ()
        self._number = 0
        self._row: int | None = None
        self._asin = ""
        self._seen: set[str] = set()
        self._options: dict[str, str] = {}
        self.url = f"{BASE_URL}/{self.name}"
        self.page = pages.search_page(self.goal.instruction_text)

    def _search(self, keywords: Sequence[str], number: int) -> bool:
        rows = self.shop.find(keywords, self._generator)
        if rows is None:
            return False
        self._keywords, self._number = keywords, number
        self._row, self._asin, self._options = None, "", {}
        shown = rows[(number - 1) * PER_PAGE : number * PER_PAGE]
        cards = [self.shop.card_nodes(row) for row in shown]
        self._shown = {
            text.lower(): row
            for card, row in zip(cards, shown, strict=True)
            for role, text in card
            if role is Role.PRODUCT
        }
        self.url = f"{BASE_URL}/search_results/{self.name}/{'+'.join(keywords)}/{number}"
        self.page = pages.result_page(self.goal.instruction_text, cards, number, len(rows))
        return True

    def _open_item(self, name: str) -> bool:
        role, text = self.clickables[name]
        if role is Role.PRODUCT:
            self._row, self._asin = self._shown[name], name.upper()
            self._seen.add(self._asin)
        elif role is Role.OPTION:
            self._options[text.lower()] = name
        if self._row is None:
            return False
        self.url = (
            f"{BASE_URL}/item_page/{self.name}/{self._asin}/{'+'.join(self._keywords)}/"
            f"{self._number}/{json.dumps(self._options)}"
        )
        self.page = pages.item_page(self.goal.instruction_text, *self.shop.item_parts(self._row))
        return True

    def _open_sub_page(self, name: str) -> bool:
        if self._row is None:  # a product id can read like a button
            return False
        self.url = (
            f"{BASE_URL}/item_sub_page/{self.name}/{self._asin}/{'+'.join(self._keywords)}/"
            f"{self._number}/{name}/{self._options}"
        )
        self.page = pages.sub_page(self.goal.instruction_text, self.shop.store.product(self._row), name)
        return True

    def _buy(self) -> bool:
        if self._row is None:
            return False
        product = self.shop.store.product(self._row)
        price = float(self.goals.prices[self._row])
        parts = score_purchase(product, self._options.values(), price, self.goal, self.shop.nouns)
        self.purchase = Purchase(product, dict(self._options), price, parts)
        self.url = f"{BASE_URL}/done/{self.name}/{self._asin}/{self._options}"
        self.page = pages.done_page(self._asin, self._options, parts.reward)
        return True

    # --- keeping a moment ---

    def moment(self) -> dict[str, Any]:
        """A copy of everything that changes, for :meth:`return_to`."""
        return {
            "keywords": self._keywords,
            "number": self._number,
            "row": self._row,
            "asin": self._asin,
            "seen": frozenset(self._seen),
            "options": dict(self._options),
            "shown": self._shown,  # made anew by every search, never changed
            "url": self.url,
            "page": self._page,
            "purchase": self.purchase,
            "generator": None if self._rng is None else self._rng.getstate(),
        }

    def return_to(self, moment: Mapping[str, Any]) -> None:
        """Go back to a state of this goal's session that :meth:`moment` gave."""
        self._keywords, self._number = moment["keywords"], moment["number"]
        self._row, self._asin, self._shown = moment["row"], moment["asin"], moment["shown"]
        self._seen, self._options = set(moment["seen"]), dict(moment["options"])
        self.url, self.page, self.purchase = moment["url"], moment["page"], moment["purchase"]
        self._rng = None
        if moment["generator"] is not None:
            self._generator().setstate(moment["generator"])

    def _generator(self) -> random.Random:
        if self._rng is None:
            self._rng = random.Random(self._seed)
        return self._rng
