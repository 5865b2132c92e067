"""A scripted shopper that knows what the pages say and nothing else.

It searches with the instruction's own words, opens results that are not too dear in their order, and buys the first
product that offers every wanted option; where none does, the best one seen. The invariant: decisions depend on the
instruction, the pages and the actions so far, so it can take over after anybody's actions.

Example:
    >>> expert = WebShopExpert()
    >>> expert.reset(task, observation, admissible)
    >>> move = expert.act(observation, admissible)   # ExpertMove(action="search[...]", thought="find ...")
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from atod_envs.webshop.pages import ATTRIBUTES, BACK, BUY, FEATURES, NEXT, PREVIOUS
from atod_envs.webshop.reading import Kind, Result, View, Wish, read_page, read_wish

TURNS = 15
"""Turns that it plans with; the environment's default limit."""
OPTION_WEIGHT = 5
"""Times that the wanted options stand in the first query by default."""
TYPE_RANKS = 6
"""Places that a title gains in the order of opening if it names the type of product."""
CAP_MARGIN = 40.0
FAR_RANKS = 12
M_ALIKE = 0.3
M_RANK = 0.02
GAMBLE = 1
Q = 3
KW = 1
OW = 10
P_RANK = 2.1
P_ALIKE = 2.3
P_FAR = 4.3
P_NEAR = 3.4
R_RANK = 0.44
R_ALIKE = 1.6
R_FAR = 1.76
R_NEAR = 0.92
R_MISS = 1.25
U_CONST = -1.2
NEAR = 10.0
PAGES = 1
M_FAR = 0.5
_BRACKETS = re.compile(r"[\[\]\s]+")
_WORD = re.compile(r"[a-z0-9]+")
_STOP_WORDS = """
a all an and are as at be by can find for from i in is it looking me need of on or other our s show that the this to
want will with you your
"""
_EMPTY_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """What to do, and why, in a few words."""

    action: str
    thought: str


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
        kind = set(_words(self.wish.kind))
        if not kind or _stands(self.wish.kind, seen.texts):
            return 1.0
        return len(kind & set(_words(seen.result.title))) / len(kind)

    def prior(self, seen: _Seen) -> float:
        """Order in which products are opened, smallest first: by rank, titles that name the type of product before."""
        return seen.rank - TYPE_RANKS * self.alike(seen) + FAR_RANKS * self.far(seen)

    def far(self, seen: _Seen) -> bool:
        return self.wish.cap - seen.result.highest > CAP_MARGIN or seen.result.price > self.wish.cap - NEAR

    def merit(self, seen: _Seen) -> tuple[float, float]:
        """How good an opened product looks: wanted options that it offers, then the log-odds of being what is wanted."""
        wish, cap = self.wish, self.wish.cap
        far = cap - seen.result.highest > CAP_MARGIN
        near = seen.result.price > cap - 10
        title = len(set(_words(wish.kind)) & set(_words(seen.result.title))) / max(1, len(set(_words(wish.kind))))
        if seen.tabs:
            missing = sum(not _stands(phrase, seen.texts) for phrase in wish.attributes)
            score = -R_RANK * math.log1p(seen.rank) + R_ALIKE * title - R_FAR * far - R_NEAR * near - R_MISS * missing
        else:
            score = U_CONST - 1.28 * math.log1p(seen.rank) + 2.6 * title - 2.9 * far
        return seen.offered, score


class WebShopExpert:
    """Shops by script; see the module's docstring.

    Args:
        turns: turns that it plans with.
        option_weight: times that the wanted options stand in the first query. The default is for real products, of which
            thousands share the instruction's words; 1 gives short queries that suffice in the built-in shop.
    """

    def __init__(self, turns: int = TURNS, option_weight: int = OPTION_WEIGHT) -> None:
        self._turns = turns
        self._option_weight = option_weight
        self._visit = _Visit(Wish(""))
        self._expected: str | None = None

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
        """Note what an action, anybody's, led to. Without this call, its own last move counts as done."""
        self._note(action)
        self._expected = None
        self._remember(read_page(observation, admissible))

    def act(self, observation: str, admissible: Sequence[str]) -> ExpertMove:
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

    def _decide(self, view: View) -> ExpertMove:
        match view.kind:
            case Kind.SEARCH:
                return self._search()
            case Kind.RESULTS:
                return self._choose(view)
            case Kind.ITEM:
                return self._inspect(view)
        return _click(PREVIOUS, "back to it")

    def _search(self) -> ExpertMove:
        wish = self._visit.wish
        # A repeated word counts more, and it is the options that tell products of a kind apart.
        if Q == 0:
            wanted = [value for _, value in wish.options] * (self._option_weight if self._visit.queries == 0 else 1)
        elif Q == 1:
            wanted = [wish.kind] + [value for _, value in wish.options] * OW
        elif Q == 2:
            wanted = [f"{name} {value}" for name, value in wish.options] * OW
        elif Q == 3:
            wanted = [wish.kind]*KW+[f"{name} {value}" for name, value in wish.options] * OW
        words = " ".join([wish.text, *wanted])
        return ExpertMove(f"search[{_BRACKETS.sub(' ', words).lower()}]", "search for it")

    def _choose(self, view: View) -> ExpertMove:
        visit = self._visit
        left = self._turns - visit.turns
        shown = [visit.seen[result.asin] for result in view.results]
        fair = [seen for seen in shown if seen.result.price <= visit.wish.cap] or shown
        fresh = sorted((seen for seen in fair if not seen.opened), key=visit.prior)
        best = max((seen for seen in fair if seen.opened), key=visit.merit, default=None)
        if fresh and visit.far(fresh[0]) and view.more and view.number < PAGES and (best is None or not self._fits(best)):
            if left > visit.closing + 1:
                return _click(NEXT, "more results")
        # A look costs opening; coming back to the best of the others costs two turns more.
        if fresh and left > visit.closing + (2 if best is not None and (self._fits(best) or not GAMBLE) else 0):
            return _click(fresh[0].result.asin, "look at it")
        if view.more and left > visit.closing + 1 and (best is None or not self._fits(best)):
            return _click(NEXT, "more results")
        if best is None:
            return _click(fresh[0].result.asin, "take it") if fresh else _click(BACK, "search again")
        return _click(best.result.asin, "take the best")

    def _inspect(self, view: View) -> ExpertMove:
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
            # Another look: back, open, back, open the best.
            if spare >= 4 or (beaten and spare >= 2) or (GAMBLE and spare >= 2 and not rivals and not self._fits(here)):
                return _click(PREVIOUS, "look at others")
        offered = dict(view.options)
        for name, value in visit.wish.options:
            if value in offered.get(name, ()) and value not in visit.chosen:
                return _click(value, f"choose {value}")
        return _click(BUY, "buy it")

    def _fits(self, seen: _Seen) -> bool:
        return seen.offered == len(self._visit.wish.options)


def _click(text: str, thought: str) -> ExpertMove:
    return ExpertMove(f"click[{text.lower()}]", thought)


def _words(text: str) -> list[str]:
    """Words that say something, in order, without the plural's s. Numbers go, or "50% cotton" would part phrases."""
    found = (w for w in _WORD.findall(text.lower()) if w not in _EMPTY_WORDS and not w.isdigit())
    return [word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word for word in found]


def _stands(phrase: str, texts: Sequence[Sequence[str]]) -> bool:
    """Whether a phrase's words follow each other in one of the texts."""
    wanted = f" {' '.join(_words(phrase))} "
    return any(wanted in f" {' '.join(text)} " for text in texts)
