"""A catalogue on disk: memory-mapped, shared by every worker.

The invariant: a store is a function of its source files and of
``STORE_VERSION`` alone, it appears under its name only when complete, and nothing in it changes afterwards (tables of
goals are added beside it, each a function of its name).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atod_envs.errors import DataError
from atod_envs.webshop.catalogue.blobs import Blobs
from atod_envs.webshop.catalogue.product import HumanInstruction, Product
from atod_envs.webshop.catalogue.records import unpack

if TYPE_CHECKING:
    from atod_envs.retrieval import BM25Index

STORE_VERSION = 3
"""Version of the layout; raising it makes every cached store be built anew."""
KEPT_PRODUCTS = 2048
"""Decoded products that a process keeps at hand."""
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
        try:
            about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: not a WebShop store ({error}); delete the folder to have it built anew"
            ) from error
        if about.get("version") != STORE_VERSION:
            version = about.get("version")
            raise DataError(f"{folder}: store version {version!r}, expected {STORE_VERSION}; delete the folder")
        self.name = f"products/{about['content']}"
        self._cards = Blobs(folder / "cards")
        self._details = Blobs(folder / "details")
        self._asins: Array = np.load(folder / "asins.npy", mmap_mode="r")
        self._asin_rows: Array = np.load(folder / "asin_rows.npy", mmap_mode="r")
        self._codes: Array = np.load(folder / "codes.npy", mmap_mode="r")
        self._names: dict[str, list[str]] = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        self.pricing: Array = np.load(folder / "pricing.npy", mmap_mode="r")
        self.goal_counts: Array = np.load(folder / "goal_counts.npy", mmap_mode="r")
        self.goal_weights: Array = np.load(folder / "goal_weights.npy", mmap_mode="r")
        self.has_instruction: Array = np.load(folder / "has_instruction.npy", mmap_mode="r")
        self.folds: Array = np.load(folder / "folds.npy", mmap_mode="r")
        self.human_rows: Array = np.load(folder / "human_rows.npy", mmap_mode="r")
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
        found = self._products.get(row)
        if found is not None:
            self._products.move_to_end(row)
            return found
        product = self._products[row] = unpack(self._cards[row], self._details[row])
        if len(self._products) > KEPT_PRODUCTS:
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
        """A derived array, computed once and kept beside the store where that is writable.

        Args:
            name: file name without ending; must determine the content.
            make: computes it.
        """
        path = self.folder / "tables" / f"{name}.npy"
        if not path.is_file():
            array = make()
            try:
                path.parent.mkdir(exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
                    np.save(part, array)
                os.chmod(part.name, 0o644)  # temporary files are private, tables are for everybody on the node
                os.replace(part.name, path)
            except OSError:
                return array
        loaded: Array = np.load(path, mmap_mode="r")
        return loaded


def digest(value: object) -> str:
    """Twenty hex digits that stand for a JSON value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=10).hexdigest()
