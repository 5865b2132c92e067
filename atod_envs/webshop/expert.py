"""A scripted shopper that knows what the pages say and nothing else.

It searches with the instruction's own words, opens results that are not too dear in their order, and buys the first
product that offers every wanted option; where none does, the best one seen. The invariant: decisions depend on the
instruction, the pages and the actions so far, so it can take over after any agent's actions.

Example:
    >>> expert = WebShopExpert()
    >>> expert.reset(task, observation, admissible)
    >>> move = expert.act(observation, admissible)   # Move(action="search[...]", thought="find ...")
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atod_envs.experts import Move
from atod_envs.webshop.page_parser import Kind, Result, View, Wish, read_page, read_wish
from atod_envs.webshop.pages import ATTRIBUTES, BACK, BUY, FEATURES, NEXT, PREVIOUS

if TYPE_CHECKING:
    from atod_envs.webshop.env import WebShopEnv

TURNS = 15
"""Turns that it plans with by default; the environment's default limit."""
OPTION_WEIGHT = 10
"""Times that the wanted options stand in the first query, unless it is to be brief."""
TYPE_RANKS = 6
"""Places that a title gains in the order of opening if it names the type of product."""
MISPRICED_RANKS = 12
"""Places that a price loses which does not go with the instruction's limit."""
NEAREST_CAP, FARTHEST_CAP = 10.0, 40.0
"""Dollars that instructions put their limit above the price of what they describe: more than the first, at most the
second."""
_BRACKETS = re.compile(r"[\[\]\s]+")
_WORD = re.compile(r"[a-z0-9]+")
_STOP_WORDS = """
a all an and are as at be by can find for from i in is it looking me need of on or other our s show that the this to
want will with you your
"""
_EMPTY_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(slots=True)
class _Seen:
    """What is known of a product: its result line and rank, whether it was opened, what it offers, what it says."""

    result: Result
    rank: int
    opened: bool = False
    offered: int = 0
    texts: list[list[str]] = field(default_factory=list)
    tabs: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Visit:
    """The state of an episode, as far as it can be known from outside."""

    wish: Wish
    turns: int = 0
    queries: int = 0
    seen: dict[str, _Seen] = field(default_factory=dict)
    asin: str = ""
    tab: str = ""
    chosen: set[str] = field(default_factory=set)

    @property
    def closing(self) -> int:
        """Turns that choosing the options and buying take, from an item page."""
        return len(self.wish.options) + 1

    def phrases_found(self, seen: _Seen) -> float:
        """Share of the wanted attributes that stand word for word in what was read of the product."""
        wanted = self.wish.attributes
        return sum(_stands(phrase, seen.texts) for phrase in wanted) / len(wanted) if wanted else 1.0

    def alike(self, seen: _Seen) -> float:
        """Share of the words for the type of product that the title holds; all, if they stand in what was read."""
        return 1.0 if _stands(self.wish.kind, seen.texts) else self.titled(seen)

    def titled(self, seen: _Seen) -> float:
        """Share of the words for the type of product that the title holds."""
        kind = set(_words(self.wish.kind))
        return len(kind & set(_words(seen.result.title))) / len(kind) if kind else 1.0

    def too_cheap(self, seen: _Seen) -> bool:
        """The limit is too far above the price to have been set for it."""
        return self.wish.cap - seen.result.highest > FARTHEST_CAP

    def too_dear(self, seen: _Seen) -> bool:
        """The limit is too close to the price to have been set for it."""
        return seen.result.price > self.wish.cap - NEAREST_CAP

    def prior(self, seen: _Seen) -> float:
        """Order in which products are opened, smallest first."""
        mispriced = self.too_cheap(seen) or self.too_dear(seen)
        return seen.rank - TYPE_RANKS * self.alike(seen) + MISPRICED_RANKS * mispriced

    def merit(self, seen: _Seen) -> tuple[int, float]:
        """How good an opened product looks: wanted options that it offers, then the log-odds of being what is wanted.

        The weights come from logistic regressions on half of the 1,000-product catalogue's synthetic goals: one over
        what is known of a product that was read, one over what is known before.
        """
        rank, type_share = math.log1p(seen.rank), self.titled(seen)
        if not seen.tabs:
            return seen.offered, 2.6 * type_share - 1.3 * rank - 2.9 * self.too_cheap(seen) - 1.2
        missing = sum(not _stands(phrase, seen.texts) for phrase in self.wish.attributes)
        price = 1.8 * self.too_cheap(seen) + 0.9 * self.too_dear(seen)
        return seen.offered, 1.6 * type_share - 0.4 * rank - price - 1.25 * missing


class WebShopExpert:
    """Shops by script; see the module's docstring.

    Args:
        turns: turns that it plans with.
        brief: say each wanted thing once in the first query, as a person would. That suffices in the built-in shop;
            among real products, of which thousands share the instruction's words, it pays to say the options that tell
            them apart often.
    """

    def __init__(self, turns: int = TURNS, *, brief: bool = False) -> None:
        self._turns = turns
        self._brief = brief
        self._visit = _Visit(Wish(""))
        self._expected: str | None = None

    @classmethod
    def for_env(cls, env: WebShopEnv, *, brief: bool) -> WebShopExpert:
        """A shopper that plans with an environment's turns."""
        return cls(env.configured_max_turns, brief=brief)

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode.

        Args:
            task: the instruction.
            observation: the first page.
            admissible: what can be done there.
        """
        self._visit = _Visit(read_wish(task))
        self._expected = None
        self._remember(read_page(observation, admissible))

    def observe(self, action: str, observation: str, admissible: Sequence[str]) -> None:
        """Note what an action of any agent led to. Without this call, its own last move counts as done."""
        self._note(action)
        self._expected = None
        self._remember(read_page(observation, admissible))

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """The next action."""
        view = read_page(observation, admissible)
        if self._expected is not None:
            self._note(self._expected)
        self._remember(view)
        move = self._decide(view)
        self._expected = move.action
        return move

    # --- remembering ---

    def _note(self, action: str) -> None:
        visit = self._visit
        visit.turns += 1
        name, _, argument = action.partition("[")
        argument = argument.removesuffix("]").lower()
        if name == "search":
            visit.queries += 1
        elif name == "click" and argument in visit.seen:
            visit.asin, visit.chosen = argument, set()
        elif name == "click":
            visit.tab = argument
            visit.chosen.add(argument)

    def _remember(self, view: View) -> None:
        visit = self._visit
        for result in view.results:
            visit.seen.setdefault(result.asin, _Seen(result, rank=len(visit.seen), texts=[_words(result.title)]))
        here = visit.seen.get(visit.asin)
        if here is None:
            return
        if view.kind is Kind.ITEM:
            offered = dict(view.options)
            here.opened = True
            here.offered = sum(value in offered.get(name, ()) for name, value in visit.wish.options)
        elif view.kind is Kind.SUB and visit.tab not in here.tabs:
            here.tabs.add(visit.tab)
            here.texts.extend(_words(text) for text in view.texts)

    # --- deciding ---

    def _decide(self, view: View) -> Move:
        match view.kind:
            case Kind.SEARCH:
                return self._search()
            case Kind.RESULTS:
                return self._choose(view)
            case Kind.ITEM:
                return self._inspect(view)
        return _click(PREVIOUS, "back to it")

    def _search(self) -> Move:
        wish = self._visit.wish
        if self._brief or self._visit.queries:
            wanted = [value for _, value in wish.options]
        else:
            # A repeated word counts more, and it is the options that tell products of a kind apart.
            wanted = [wish.kind, *[f"{name} {value}" for name, value in wish.options] * OPTION_WEIGHT]
        words = " ".join([wish.text, *wanted])
        return Move(f"search[{_BRACKETS.sub(' ', words).lower()}]", "search for it")

    def _choose(self, view: View) -> Move:
        visit = self._visit
        left = self._turns - visit.turns
        shown = [visit.seen[result.asin] for result in view.results]
        fair = [seen for seen in shown if seen.result.price <= visit.wish.cap] or shown
        fresh = sorted((seen for seen in fair if not seen.opened), key=visit.prior)
        best = max((seen for seen in fair if seen.opened), key=visit.merit, default=None)
        # A look costs opening; coming back to a better one that was seen before costs two turns more.
        if fresh and left > visit.closing + (2 if best is not None and self._fits(best) else 0):
            return _click(fresh[0].result.asin, "look at it")
        if view.more and left > visit.closing + 1 and (best is None or not self._fits(best)):
            return _click(NEXT, "more results")
        if best is None:
            return _click(fresh[0].result.asin, "take it") if fresh else _click(BACK, "search again")
        return _click(best.result.asin, "take the best")

    def _inspect(self, view: View) -> Move:
        visit = self._visit
        here = visit.seen.get(visit.asin)
        spare = self._turns - visit.turns - visit.closing
        if here is not None and not (self._fits(here) and visit.phrases_found(here) == 1.0):
            rivals = [seen for seen in visit.seen.values() if self._fits(seen) and seen.opened and seen is not here]
            beaten = any(visit.merit(seen) > visit.merit(here) for seen in rivals)
            # The attributes say most, but shops mostly hide them.
            tab = ATTRIBUTES if ATTRIBUTES.lower() in view.tabs else FEATURES
            unread = self._fits(here) and tab.lower() not in here.tabs
            # Reading takes two turns, and going back to a better one another two.
            if unread and spare >= (4 if rivals else 2):
                return _click(tab, "read more")
            # Another look: back, open, back, open the best. Where nothing seen so far would do, there is nothing to
            # come back to.
            hopeless = not rivals and not self._fits(here)
            if spare >= 4 or (spare >= 2 and (beaten or hopeless)):
                return _click(PREVIOUS, "look at others")
        offered = dict(view.options)
        for name, value in visit.wish.options:
            if value in offered.get(name, ()) and value not in visit.chosen:
                return _click(value, f"choose {name}")
        return _click(BUY, "buy it")

    def _fits(self, seen: _Seen) -> bool:
        return seen.offered == len(self._visit.wish.options)


def _click(text: str, thought: str) -> Move:
    return Move(f"click[{text.lower()}]", thought)


def _words(text: str) -> list[str]:
    """Words that say something, in order, without the plural's s. Numbers go, or "50% cotton" would part phrases."""
    found = (w for w in _WORD.findall(text.lower()) if w not in _EMPTY_WORDS and not w.isdigit())
    return [word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word for word in found]


def _stands(phrase: str, texts: Sequence[Sequence[str]]) -> bool:
    """Whether a phrase's words follow each other in one of the texts."""
    wanted = f" {' '.join(_words(phrase))} "
    return any(wanted in f" {' '.join(text)} " for text in texts)
