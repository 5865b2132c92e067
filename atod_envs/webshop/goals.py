"""The tasks: synthetic and human goals, in the original's order.

The original seeds nothing before it draws prices and price caps, then shuffles the goals with seed 233. Here the first
seed is explicit (``goal_seed``). The invariant: prices, caps, order and weights equal what the original makes after
``random.seed(goal_seed)``, and depend on the catalogue and the two seeds alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from atod_envs.errors import UnknownName
from atod_envs.webshop.catalogue.product import Product
from atod_envs.webshop.catalogue.store import Array, Store

GoalKind = Literal["synthetic", "human"]
GOAL_KINDS: tuple[GoalKind, ...] = ("synthetic", "human")
SHUFFLE_SEED = 233
"""Seed of the original's shuffle (``SimServer``)."""
NO_CAP = 1_000_000
"""Price cap of a goal whose product costs too much for the cap grid; its instruction names no cap."""
_CAPS = tuple(10.0 * i for i in range(1, 100))
_ROW_TYPE = np.dtype([("row", "<i4"), ("pick", "<i4"), ("price_upper", "<f8")])


@dataclass(frozen=True, slots=True)
class Goal:
    """What a customer wants.

    Attributes:
        asin: the product that the goal was made from.
        category: its top category.
        query: its product type.
        name: its title.
        product_category: its category path.
        instruction_text: the task, as text.
        attributes: attributes that the purchase should have.
        price_upper: highest acceptable price in dollars.
        goal_options: wanted options: name -> value for synthetic goals, values alone for human ones.
        weight: the original's sampling weight.
    """

    asin: str
    category: str
    query: str
    name: str
    product_category: str
    instruction_text: str
    attributes: tuple[str, ...]
    price_upper: float
    goal_options: Mapping[str, str] | tuple[str, ...]
    weight: float

    def record(self) -> dict[str, Any]:
        """The goal under the original's names and types."""
        record = asdict(self)
        record["attributes"] = list(self.attributes)
        options = self.goal_options
        record["goal_options"] = dict(options) if isinstance(options, Mapping) else list(options)
        return record


class Goals:
    """The goals of one kind over a catalogue, by their number in the shuffled order.

    Args:
        store: the catalogue.
        kind: ``"synthetic"`` or ``"human"``.
        goal_seed: seed of prices and price caps.
        shuffle_seed: seed of the order.

    Attributes:
        name: tells these goals from others over the same catalogue.
        prices: (rows,) the price at which each product is sold, in dollars.
    """

    def __init__(self, store: Store, kind: GoalKind, goal_seed: int = 0, shuffle_seed: int = SHUFFLE_SEED) -> None:
        if kind not in GOAL_KINDS:
            raise UnknownName("kind of goals", kind, GOAL_KINDS)
        self.store = store
        self.kind = kind
        self.name = f"{kind}-{goal_seed}-{shuffle_seed}"
        self._table = store.table(f"goals-{self.name}", lambda: _make_goals(store, kind, goal_seed, shuffle_seed))
        self.prices: Array = store.table(
            f"prices-{goal_seed}", lambda: draw_prices(store, original_generator(goal_seed))
        )

    def __len__(self) -> int:
        return len(self._table)

    @property
    def rows(self) -> Array:
        """(goals,) row of the product that each goal was made from."""
        rows: Array = self._table["row"]
        return rows

    def __getitem__(self, number: int) -> Goal:
        """The goal with a number in ``range(len(self))``."""
        row, pick, cap = self._table[number].tolist()
        product = self.store.product(row)
        if self.kind == "human":
            instruction = self.store.human(pick)
            text, attributes = instruction.text.strip("."), instruction.attributes
            options: Mapping[str, str] | tuple[str, ...] = instruction.options
            weight: float = 1
        else:
            options = combination(product, pick)
            asked = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = f"{product.annotation.instruction}{f' with {asked}' if asked else ''}"
            attributes = product.annotation.instruction_attributes
            weight = float(self.store.goal_weights[row])
        return Goal(
            asin=product.asin,
            category=product.category,
            query=product.query,
            name=product.title,
            product_category=product.product_category,
            instruction_text=text if cap == NO_CAP else f"{text}, and price lower than {cap:.2f} dollars",
            attributes=attributes,
            price_upper=cap,
            goal_options=options,
            weight=weight,
        )


def combination(product: Product, pick: int) -> dict[str, str]:
    """The ``pick``-th combination of option values; names in sorted order, the last one turning fastest."""
    chosen = {}
    for name in sorted(product.options, reverse=True):
        values = product.options[name]
        pick, place = divmod(pick, len(values))
        chosen[name] = values[place]
    return {name: chosen[name] for name in sorted(chosen)}


def original_generator(goal_seed: int) -> random.Random:
    """Python's generator as the original's loader finds it, after ``random.seed(goal_seed)``.

    One draw is already gone: the loader reports its progress through ``rich``, which takes 24 random bits to number its
    styles when the first line is printed.
    """
    rng = random.Random(goal_seed)
    rng.getrandbits(24)
    return rng


def draw_prices(store: Store, rng: random.Random) -> Array:
    """The price of every product: as stated, or drawn uniformly from its range, in catalogue order."""
    prices = np.array(store.pricing[:, 0])
    lower, upper = store.pricing[:, 0], store.pricing[:, 1]
    for row in np.flatnonzero(~np.isnan(upper)).tolist():
        prices[row] = rng.uniform(float(lower[row]), float(upper[row]))
    return prices


def _draw_cap(price: float, rng: random.Random) -> float:
    """A price cap from the grid of tens above the price; no draw is made where fewer than two caps exist."""
    above = [cap for cap in _CAPS if cap > price][:4]
    return sorted(rng.sample(above, 2))[1] if len(above) >= 2 else NO_CAP


def _make_goals(store: Store, kind: GoalKind, goal_seed: int, shuffle_seed: int) -> Array:
    rng = original_generator(goal_seed)
    prices = draw_prices(store, rng)
    if kind == "human":
        rows = np.array(store.human_rows)
        picks = np.arange(len(rows), dtype=np.int32)
        caps = np.array([_draw_cap(float(prices[row]), rng) for row in rows], dtype=np.float64)
    else:
        counts = np.array(store.goal_counts)
        # A product with an empty option has an instruction but no combination; the original draws its cap all the same.
        sold = np.flatnonzero(store.has_instruction)
        drawn = np.array([_draw_cap(float(prices[row]), rng) for row in sold.tolist()], dtype=np.float64)
        rows = np.repeat(sold, counts[sold]).astype(np.int32)
        caps = np.repeat(drawn, counts[sold])
        starts = np.cumsum(counts[sold]) - counts[sold]
        picks = (np.arange(len(rows)) - np.repeat(starts, counts[sold])).astype(np.int32)
    order = list(range(len(rows)))
    random.Random(shuffle_seed).shuffle(order)
    table = np.empty(len(rows), dtype=_ROW_TYPE)
    table["row"], table["pick"], table["price_upper"] = rows[order], picks[order], caps[order]
    return table
