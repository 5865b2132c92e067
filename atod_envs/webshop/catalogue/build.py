"""Building a store from the official files, in one pass over the products.

The invariant: memory holds a few numbers and a packed annotation for each product, never the products; the store
appears under its name only when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from atod_envs.caches import sealed
from atod_envs.errors import DataError
from atod_envs.webshop.catalogue.blobs import BlobWriter
from atod_envs.webshop.catalogue.files import CatalogueFiles, stream_array, stream_object
from atod_envs.webshop.catalogue.forms import check_annotation, check_human, check_item, check_reviews
from atod_envs.webshop.catalogue.product import (
    Annotation,
    BrokenProduct,
    Product,
    clean_product,
    read_annotation,
    read_human_instructions,
    read_reviews,
)
from atod_envs.webshop.catalogue.records import pack
from atod_envs.webshop.catalogue.store import FOLDS, STORE_VERSION, Array, Store, digest

MOST_COMBINATIONS = 1_000_000
"""A product with more combinations of options than this gets no synthetic goals."""

_log = logging.getLogger(__name__)


def build_store(files: CatalogueFiles, folder: Path) -> Store:
    """Build a store from the official files.

    Args:
        files: the source.
        folder: where it shall appear; replaced if it exists.

    Raises:
        DataError: a file is broken, or there is not one product.
    """
    from atod_envs.retrieval import BM25Index

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part-"))
    try:
        _write_products(read_products(files), _read_packed(files.human, check_human), part)
        about = {"version": STORE_VERSION, "content": _content(files)}
        _write_json(part / "store.json", sealed(part, about, [file.name for file in part.iterdir()]))
        store = Store(part)
        if not len(store):
            raise DataError(f"{files.items}: holds no usable product")
        documents = ((p.asin, p.contents()) for p in map(store.product, range(len(store))))
        BM25Index.build(documents, directory=part / "bm25")
        part.chmod(0o755)  # temporary folders are private, a store is for everybody on the node
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Store(folder)


def _content(files: CatalogueFiles) -> str:
    """A digest of the official files' content, in a fixed order."""
    found = hashlib.blake2b(digest_size=6)
    for path in files.present():
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def read_products(files: CatalogueFiles) -> Iterator[Product]:
    """Clean the products of a catalogue in order.

    As in the original, a duplicate and an id that is too long are left out; they are counted in the log.

    Raises:
        DataError: a record is not of the published form; see :mod:`atod_envs.webshop.catalogue.forms`.
    """
    annotations = _read_packed(files.attributes, check_annotation)
    reviews = {}
    if files.reviews is not None:
        for number, entry in enumerate(stream_array(files.reviews), 1):
            reviews[check_reviews(entry, f"{files.reviews}, record {number}")["asin"]] = json.dumps(entry)
    seen: set[str] = set()
    refused: Counter[str] = Counter()
    for number, raw in enumerate(stream_array(files.items), 1):
        asin = check_item(raw, f"{files.items}, record {number}")["asin"]
        if asin in seen:
            refused["a duplicate id"] += 1
            continue
        packed, packed_reviews = annotations.get(asin), reviews.get(asin)
        try:
            product = clean_product(
                raw,
                read_annotation(json.loads(packed)) if packed else None,
                *(read_reviews(json.loads(packed_reviews)) if packed_reviews else ()),
            )
        except BrokenProduct as error:
            refused[str(error)] += 1
            continue
        seen.add(product.asin)
        yield product
    for reason, count in refused.most_common(5):
        _log.warning("%s: %d product(s) left out: %s", files.items, count, reason)


def _read_packed(path: Path | None, check: Callable[[object, str], object]) -> dict[str, str]:
    """Entries by product id, kept as JSON text: a fifth of the memory of decoded ones."""
    if path is None:
        return {}
    return {asin: json.dumps(check(entry, f"{path}, entry {asin!r}")) for asin, entry in stream_object(path)}


def _write_products(products: Iterable[Product], human: dict[str, str], folder: Path) -> None:
    asins: list[bytes] = []
    pricing: list[tuple[float, float]] = []
    codes: list[tuple[int, int]] = []
    names: dict[str, dict[str, int]] = {"category": {}, "query": {}}
    combinations: list[int] = []
    instructed: list[bool] = []
    wanted: list[tuple[int, ...]] = []
    attribute_ids: dict[str, int] = {}
    human_rows: list[int] = []
    families = _Families()
    with (
        BlobWriter(folder / "cards") as cards,
        BlobWriter(folder / "details") as details,
        BlobWriter(folder / "human") as instructions,
    ):
        for row, product in enumerate(products):
            card, detail = pack(product)
            cards.append(card)
            details.append(detail)
            asins.append(product.asin.encode("utf-8", "surrogatepass"))
            pricing.append((product.pricing[0], product.pricing[1] if len(product.pricing) > 1 else np.nan))
            codes.append((_code(names["category"], product.category), _code(names["query"], product.query)))
            count = count_goals(product)
            combinations.append(count)
            families.add(product)
            instructed.append(_is_instructed(product.annotation))
            asked = product.annotation.instruction_attributes if count else ()
            wanted.append(tuple(_code(attribute_ids, attribute) for attribute in asked))
            if product.asin in human:
                for instruction in read_human_instructions(json.loads(human[product.asin])):
                    human_rows.append(row)
                    instructions.append(list(asdict(instruction).values()))
    order = np.argsort(np.array(asins, dtype=bytes)) if asins else np.zeros(0, dtype=np.int64)
    np.save(folder / "asins.npy", np.array(asins, dtype=bytes)[order] if asins else np.zeros(0, dtype="S1"))
    np.save(folder / "asin_rows.npy", order.astype(np.int32))
    np.save(folder / "pricing.npy", np.array(pricing, dtype=np.float64).reshape(-1, 2))
    np.save(folder / "codes.npy", np.array(codes, dtype=np.int32).reshape(-1, 2))
    _write_json(folder / "names.json", {field: list(table) for field, table in names.items()})
    np.save(folder / "goal_counts.npy", np.array(combinations, dtype=np.int64))
    np.save(folder / "has_instruction.npy", np.array(instructed, dtype=bool))
    np.save(folder / "goal_weights.npy", _goal_weights(combinations, wanted, len(attribute_ids)))
    np.save(folder / "folds.npy", families.folds())
    np.save(folder / "human_rows.npy", np.array(human_rows, dtype=np.int32))


def count_goals(product: Product) -> int:
    """Number of synthetic goals: one for each combination of option values, if the product has an instruction."""
    if not _is_instructed(product.annotation):
        return 0
    count = 1
    for values in product.options.values():
        count *= len(values)
    if count > MOST_COMBINATIONS:
        _log.warning("product %s: %d combinations of options; it gets no synthetic goals", product.asin, count)
        return 0
    return count


class _Families:
    """Products that may not be told apart by a split: linked by an equal title or an equal instruction."""

    def __init__(self) -> None:
        self._asins: list[str] = []
        self._parent: list[int] = []
        self._first: dict[str, int] = {}

    def add(self, product: Product) -> None:
        row = len(self._parent)
        self._asins.append(product.asin)
        self._parent.append(row)
        instruction = product.annotation.instruction
        for key in (f"title {product.title.lower()}", instruction and f"instruction {instruction.lower()}"):
            if key:
                # A digest of the text, not the text: a million titles would fill the memory.
                other = self._first.setdefault(hashlib.blake2b(key.encode("utf-8", "replace")).hexdigest()[:16], row)
                self._parent[self._root(row)] = self._root(other)

    def _root(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def folds(self) -> Array:
        """A fold for every product, drawn by the digest of its family's smallest id."""
        smallest: dict[int, str] = {}
        for row, asin in enumerate(self._asins):
            root = self._root(row)
            smallest[root] = min(smallest.get(root, asin), asin)
        fold = {root: int(digest(asin), 16) % FOLDS for root, asin in smallest.items()}
        return np.array([fold[self._root(row)] for row in range(len(self._asins))], dtype=np.uint8)


def _is_instructed(annotation: Annotation) -> bool:
    return annotation.instruction is not None and bool(annotation.instruction_attributes)


def _goal_weights(combinations: list[int], wanted: list[tuple[int, ...]], n_attributes: int) -> Array:
    """Mean over a goal's attributes of one over the number of goals that ask for each (``get_synthetic_goals``)."""
    counts = [0] * n_attributes
    for count, attributes in zip(combinations, wanted, strict=True):
        for attribute in attributes:
            counts[attribute] += count
    # Added one after another in the attributes' order, so that the last bit is the original's: from Python 3.12 on,
    # sum() is more exact.
    return np.array(
        [reduce(add, (1.0 / counts[a] for a in w)) / len(w) if w else 0.0 for w in wanted], dtype=np.float64
    )


def _code(table: dict[str, int], name: str) -> int:
    return table.setdefault(name, len(table))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
