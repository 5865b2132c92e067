"""A catalogue on disk: memory-mapped, shared by every worker.

The invariant: a store is a function of its source files and of
``STORE_VERSION`` alone, it appears under its name only when complete, and nothing in it changes afterwards (tables of
goals are added next to it, each a function of its name).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atod_envs.caches import build_once, check_sealed, sealed
from atod_envs.errors import DataError
from atod_envs.files import load_array, read_object
from atod_envs.webshop.catalogue.blobs import Blobs
from atod_envs.webshop.catalogue.product import HumanInstruction, Product
from atod_envs.webshop.catalogue.records import unpack

if TYPE_CHECKING:
    from atod_envs.retrieval import BM25Index

STORE_VERSION = 5
"""Version of the layout; raising it makes every cached store be built anew."""
KEPT_PRODUCTS = 2048
"""Decoded products that a process keeps in memory."""
_ANEW = "delete the folder to have it built anew"
FOLDS = 20
"""Number of parts from which splits are made."""

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Card:
    """What a result page shows of a product."""

    asin: str
    title: str
    price_tag: str


class Store:
    """A built catalogue, read only.

    Products are numbered by their row, the order of the items file.

    Args:
        folder: where it was built.

    Attributes:
        pricing: (rows, 2) lower and upper price in dollars; the upper is NaN for a single price.
        goal_counts: (rows,) synthetic goals of each product.
        goal_weights: (rows,) the original's sampling weight of those goals.
        has_instruction: (rows,) whether the product has a synthetic instruction.
        folds: (rows,) a number below ``FOLDS`` that products with the same title or instruction share.
        human_rows: (instructions,) row of the product of every human instruction, in catalogue order.
        name: stands for the content: equal files give equal names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = read_object(folder / "store.json", _ANEW)
        if about.get("version") != STORE_VERSION:
            version = about.get("version")
            raise DataError(f"{folder}: store version {version!r}, expected {STORE_VERSION}; delete the folder")
        if not isinstance(about.get("files"), dict) or not isinstance(about.get("content"), str):
            raise DataError(f"{folder / 'store.json'} does not describe a store; {_ANEW}")
        check_sealed(folder, about, folder / "store.json", _ANEW)
        self.name = f"products/{about['content']}"
        self._cards = Blobs(folder / "cards")
        self._details = Blobs(folder / "details")
        self._asins: Array = load_array(folder / "asins.npy", _ANEW)
        self._asin_rows: Array = load_array(folder / "asin_rows.npy", _ANEW)
        self._codes: Array = load_array(folder / "codes.npy", _ANEW)
        self._names: dict[str, list[str]] = read_object(folder / "names.json", _ANEW)
        self.pricing: Array = load_array(folder / "pricing.npy", _ANEW)
        self.goal_counts: Array = load_array(folder / "goal_counts.npy", _ANEW)
        self.goal_weights: Array = load_array(folder / "goal_weights.npy", _ANEW)
        self.has_instruction: Array = load_array(folder / "has_instruction.npy", _ANEW)
        self.folds: Array = load_array(folder / "folds.npy", _ANEW)
        self.human_rows: Array = load_array(folder / "human_rows.npy", _ANEW)
        self._human = Blobs(folder / "human")
        self._products: OrderedDict[int, Product] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cards)

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, {len(self)} products)"

    def card(self, row: int) -> Card:
        """What a result page shows of a product."""
        return Card(*self._cards[row])

    def product(self, row: int) -> Product:
        """A whole product."""
        # Other threads do the same: each operation stands alone, and what another has taken out is read again.
        product = self._products.pop(row, None)
        if product is None:
            product = unpack(self._cards[row], self._details[row])
        self._products[row] = product
        if len(self._products) > KEPT_PRODUCTS:
            with contextlib.suppress(KeyError):
                self._products.popitem(last=False)
        return product

    def human(self, number: int) -> HumanInstruction:
        """A human instruction by its number in catalogue order."""
        text, attributes, options = self._human[number]
        return HumanInstruction(text, tuple(attributes), tuple(options))

    def rows(self, asins: Sequence[str]) -> list[int]:
        """Rows of product ids, in their order; unknown ids are left out."""
        if not asins or not len(self):
            return []
        wanted = np.array([asin.encode("utf-8", "surrogatepass") for asin in asins])
        places = np.minimum(np.searchsorted(self._asins, wanted), len(self._asins) - 1)
        known = self._asins[places] == wanted
        rows: list[int] = self._asin_rows[places[known]].tolist()
        return rows

    def rows_where(self, field: str, value: str) -> list[int]:
        """Rows whose ``"category"`` or ``"query"`` is ``value``, in catalogue order."""
        column = ("category", "query").index(field)
        try:
            code = self._names[field].index(value)
        except ValueError:
            return []
        rows: list[int] = np.flatnonzero(self._codes[:, column] == code).tolist()
        return rows

    @functools.cached_property
    def index(self) -> BM25Index:
        """The search index, memory-mapped."""
        from atod_envs.retrieval import BM25Index

        return BM25Index.open(self.folder / "bm25")

    def table(self, name: str, make: Callable[[], Array]) -> Array:
        """A derived array, computed once and kept next to the store where that is writable.

        Args:
            name: of its folder; must determine the content.
            make: computes it.

        Raises:
            DataError: what was kept is not what was computed.
        """
        folder = self.folder / "tables" / name
        about = folder / "table.json"

        def build(scratch: Path) -> None:
            np.save(scratch / "table.npy", make())
            (scratch / "table.json").write_text(json.dumps(sealed(scratch, {}, ["table.npy"])), encoding="utf-8")

        try:
            build_once(folder, build, about.name)
        except (DataError, OSError):  # a store that cannot be written, or a full disk
            return make()
        check_sealed(folder, read_object(about, _ANEW), about, _ANEW)
        return load_array(folder / "table.npy", _ANEW)


def digest(value: object) -> str:
    """Twenty hex digits that stand for a JSON value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=10).hexdigest()
