"""The data of a BM25 index: how it is made, kept on disk and looked up.

Layout: for each term, in order of its number, the ascending documents that hold it, its frequency there, and the
float32 score of that occurrence. The build works in runs of documents and writes each run's postings to their final
place, so memory grows with the vocabulary and one run, not with the corpus. The invariant: an index that is built on
disk, built in memory, or saved and opened again holds the same bytes, and names the checksum of the corpus it was
made from.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atod_envs.errors import DataError

from .analyzer import term_of, tokenize
from .storage import SCRATCH, begin_anew, load_array, read_description, write_description
from .strings import Digest, Strings, StringTable, pack_strings

DEFAULT_K1: Final = 0.9
DEFAULT_B: Final = 0.4
VERSION: Final = 1
RUN_DOCUMENTS: Final = 100_000
"""Documents of one run of the build: about half a gigabyte of working memory for 100-word passages."""

_TOKEN_CACHE: Final = 2_000_000
_FREE_LENGTHS: Final = 24

_ARRAYS: Final = (
    "docs",
    "frequencies",
    "impacts",
    "bounds",
    "offsets",
    "norms",
    "ranks",
    "hashes",
    "hash_terms",
    "term_bytes",
    "term_offsets",
    "docid_bytes",
    "docid_offsets",
)


def quantised_length(length: int) -> int:
    """Lucene's one-byte code of a length (`SmallFloat.intToByte4`): exact up to 40, then four leading bits."""
    if length < _FREE_LENGTHS:
        return length
    rest = length - _FREE_LENGTHS
    bits = rest.bit_length()
    if bits < 4:
        return _FREE_LENGTHS + rest
    shift = bits - 4
    return _FREE_LENGTHS + ((rest >> shift) & 7 | (shift + 1) << 3)


def length_of_code(code: int) -> int:
    """The length that a code stands for (`SmallFloat.byte4ToInt`)."""
    if code < _FREE_LENGTHS:
        return code
    rest = code - _FREE_LENGTHS
    low, shift = rest & 7, (rest >> 3) - 1
    return _FREE_LENGTHS + (low if shift < 0 else (low | 8) << shift)


@dataclass(frozen=True, slots=True)
class IndexArrays:
    """Everything a search needs; plain arrays, possibly memory-mapped.

    Attributes:
        k1: BM25's saturation.
        b: BM25's length normalisation.
        count: documents that hold at least one term.
        total: tokens of the corpus.
        checksum: SHA-256 of the corpus.
        arrays: the arrays of `_ARRAYS` by name.
    """

    k1: float
    b: float
    count: int
    total: int
    checksum: str
    arrays: dict[str, npt.NDArray[Any]]
    docids: Strings = field(init=False)
    ranks: npt.NDArray[np.int32] = field(init=False)
    _terms: StringTable = field(init=False)
    _inverse: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        # np.asarray: a plain view of a memory map; slicing the map itself costs microseconds a time.
        for name in self.arrays:
            self.arrays[name] = np.asarray(self.arrays[name])
        object.__setattr__(self, "docids", Strings(self.arrays["docid_bytes"], self.arrays["docid_offsets"]))
        object.__setattr__(self, "ranks", self.arrays["ranks"])
        terms = Strings(self.arrays["term_bytes"], self.arrays["term_offsets"])
        object.__setattr__(self, "_terms", StringTable(terms, self.arrays["hashes"], self.arrays["hash_terms"]))
        object.__setattr__(self, "_inverse", inverse_norms(self.k1, self.b, self.total, self.count))

    def term_number(self, term: str) -> int | None:
        """The number of a term, or None where the corpus does not hold it."""
        return self._terms.find(term)

    def postings(self, number: int, boost: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], float]:
        """Documents of a term, its score in each for a query that holds it `boost` times, and the best such score."""
        start, end = (int(offset) for offset in self.arrays["offsets"][number : number + 2])
        docs = self.arrays["docs"][start:end]
        if boost == 1:
            return docs, self.arrays["impacts"][start:end], float(self.arrays["bounds"][number])
        weight = np.float32(boost) * idf(self.count, end - start)
        inverse = self._inverse[self.arrays["norms"][docs]]
        scores = term_scores(weight, self.arrays["frequencies"][start:end], inverse)
        return docs, scores, float(scores.max())


def idf(count: int, holding: int) -> np.float32:
    """Lucene's inverse document frequency, ln(1 + (N - n + 0.5) / (n + 0.5)), as a float."""
    return np.float32(np.log(1.0 + (count - holding + 0.5) / (holding + 0.5)))


def inverse_norms(k1: float, b: float, total: int, count: int) -> npt.NDArray[np.float32]:
    """1 / (k1 * (1 - b + b * length / average)) for each of the 256 length codes, in Lucene's float32 order."""
    one, saturation, weight = np.float32(1), np.float32(k1), np.float32(b)
    average = np.float32(total / count) if count else one
    lengths = np.array([length_of_code(code) for code in range(256)], dtype=np.float32)
    with np.errstate(divide="ignore"):
        inverse: npt.NDArray[np.float32] = one / (saturation * ((one - weight) + weight * lengths / average))
    return inverse


def term_scores(
    weight: npt.NDArray[np.float32] | np.float32, frequencies: npt.NDArray[Any], inverse: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The term score in float32, w - w / (1 + f * inverse norm)."""
    scores: npt.NDArray[np.float32] = weight - weight / (np.float32(1) + frequencies.astype(np.float32) * inverse)
    return scores


class _TermNumbers(dict[str, int]):
    """Token to term number (-1 for a stop word); bounded, the vocabulary behind it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary: dict[str, int] = {}

    def __missing__(self, token: str) -> int:
        if len(self) > _TOKEN_CACHE:
            self.clear()
        term = term_of(token)
        number = -1 if term is None else self.vocabulary.setdefault(term, len(self.vocabulary))
        self[token] = number
        return number


@dataclass(slots=True)
class _Corpus:
    """What the first pass over the documents collects besides the runs."""

    terms: _TermNumbers
    docids: list[str]
    lengths: array[int]
    checksum: str = ""


def _runs(docs: Iterable[tuple[str, str]], corpus: _Corpus) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Postings run by run: (terms, documents, frequencies), sorted by term and then document."""
    digest = Digest()
    numbers = array("i")
    owners: list[int] = []
    first = 0

    def flush() -> tuple[npt.NDArray[Any], ...]:
        terms = np.frombuffer(numbers, dtype=np.int32) if numbers else np.zeros(0, np.int32)
        documents = np.repeat(np.arange(first, first + len(owners), dtype=np.int64), owners)
        kept = terms >= 0
        corpus.lengths.extend(np.bincount(documents[kept] - first, minlength=len(owners)).tolist())
        keys = (terms[kept].astype(np.int64) << 32) | documents[kept]
        keys, frequencies = np.unique(keys, return_counts=True)
        return (keys >> 32).astype(np.int32), (keys & 0xFFFFFFFF).astype(np.int32), frequencies.astype(np.int32)

    for docid, text in docs:
        digest.add(docid, text)
        corpus.docids.append(docid)
        tokens = tokenize(text)
        numbers.extend(map(corpus.terms.__getitem__, tokens))
        owners.append(len(tokens))
        if len(owners) == RUN_DOCUMENTS:
            yield flush()
            first += len(owners)
            numbers, owners = array("i"), []
    if owners:
        yield flush()
    corpus.checksum = digest.value()


def build_arrays(docs: Iterable[tuple[str, str]], *, k1: float, b: float, directory: Path | None) -> IndexArrays:
    """Index documents in memory, or straight into `directory` (see `BM25Index.build`)."""
    corpus = _Corpus(_TermNumbers(), [], array("i"))
    scratch = Path(
        tempfile.mkdtemp(
            prefix=SCRATCH,
            dir=None if directory is None else begin_anew(directory, "index.json", [f"{name}.npy" for name in _ARRAYS]),
        )
    )
    try:
        sizes = _write_runs(_runs(docs, corpus), scratch, corpus)
        return _merge(sizes, scratch, corpus, k1, b, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_runs(runs: Iterator[tuple[npt.NDArray[Any], ...]], scratch: Path, corpus: _Corpus) -> list[int]:
    sizes = []
    for number, run in enumerate(runs):
        for name, values in zip(("terms", "docs", "frequencies"), run, strict=True):
            np.save(scratch / f"{number}-{name}.npy", values)
        sizes.append(len(run[0]))
    return sizes


def _merge(
    sizes: list[int], scratch: Path, corpus: _Corpus, k1: float, b: float, directory: Path | None
) -> IndexArrays:
    """Place every run's postings where they belong and score them."""
    ranks = _rank_ids(corpus.docids)
    vocabulary = corpus.terms.vocabulary
    holding = np.zeros(len(vocabulary), dtype=np.int64)
    largest = 0
    for number in range(len(sizes)):
        terms = np.load(scratch / f"{number}-terms.npy")
        holding += np.bincount(terms, minlength=len(vocabulary))
        largest = max(largest, int(np.load(scratch / f"{number}-frequencies.npy", mmap_mode="r").max(initial=0)))
    offsets = np.concatenate([[0], np.cumsum(holding)]).astype(np.int64)
    lengths = np.frombuffer(corpus.lengths, dtype=np.int32) if corpus.lengths else np.zeros(0, np.int32)
    norms = _norm_codes(lengths)
    count, total = int((lengths > 0).sum()), int(lengths.sum(dtype=np.int64))
    kind = np.min_scalar_type(largest)
    postings = int(offsets[-1])
    docs = _allocate(directory, "docs", postings, np.int32)
    frequencies = _allocate(directory, "frequencies", postings, kind)
    impacts = _allocate(directory, "impacts", postings, np.float32)
    inverse = inverse_norms(k1, b, total, count)
    weights = np.log(1.0 + (count - holding + 0.5) / (holding + 0.5)).astype(np.float32)
    cursor = offsets[:-1].copy()
    for number in range(len(sizes)):
        terms, run_docs, run_frequencies = (
            np.load(scratch / f"{number}-{name}.npy") for name in ("terms", "docs", "frequencies")
        )
        here, starts, counts = np.unique(terms, return_index=True, return_counts=True)
        places = np.repeat(cursor[here] - starts, counts) + np.arange(len(terms))
        docs[places] = run_docs
        frequencies[places] = run_frequencies
        impacts[places] = term_scores(weights[terms], run_frequencies, inverse[norms[run_docs]])
        cursor[here] += counts
    small = _small_arrays(corpus, offsets, norms, ranks)
    small["bounds"] = np.maximum.reduceat(impacts, offsets[:-1]) if postings else np.zeros(0, np.float32)
    arrays = {"docs": docs, "frequencies": frequencies, "impacts": impacts, **small}
    for name, values in (("docs", docs), ("frequencies", frequencies), ("impacts", impacts)):
        if isinstance(values, np.memmap):
            values.flush()
        else:
            small[name] = values
    result = IndexArrays(k1, b, count, total, corpus.checksum, arrays)
    if directory is not None:
        for name, values in small.items():
            np.save(directory / f"{name}.npy", values)
        _write_description(result, directory)
    return result


def _rank_ids(docids: list[str]) -> npt.NDArray[np.int32]:
    """The place of each id in the order by which ties are broken: Lucene's of UTF-8 bytes, which is Python's."""
    order = sorted(range(len(docids)), key=docids.__getitem__)
    for one, other in pairwise(order):
        if docids[one] == docids[other]:
            raise DataError(f"document id {docids[one]!r} occurs twice; give every document its own id")
    ranks = np.empty(len(docids), dtype=np.int32)
    ranks[order] = np.arange(len(docids), dtype=np.int32)
    return ranks


def _norm_codes(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    distinct, inverse = np.unique(lengths, return_inverse=True)
    return np.array([quantised_length(int(length)) for length in distinct], dtype=np.uint8)[inverse]


def _small_arrays(
    corpus: _Corpus, offsets: npt.NDArray[np.int64], norms: npt.NDArray[np.uint8], ranks: npt.NDArray[np.int32]
) -> dict[str, npt.NDArray[Any]]:
    hashes, hash_terms = StringTable.arrays(corpus.terms.vocabulary)
    term_bytes, term_offsets = pack_strings(corpus.terms.vocabulary)
    docid_bytes, docid_offsets = pack_strings(corpus.docids)
    return {
        "offsets": offsets,
        "norms": norms,
        "ranks": ranks,
        "hashes": hashes,
        "hash_terms": hash_terms,
        "term_bytes": term_bytes,
        "term_offsets": term_offsets,
        "docid_bytes": docid_bytes,
        "docid_offsets": docid_offsets,
    }


def _allocate(directory: Path | None, name: str, size: int, kind: Any) -> npt.NDArray[Any]:
    if directory is None or size == 0:
        return np.empty(size, dtype=kind)
    return np.lib.format.open_memmap(directory / f"{name}.npy", mode="w+", dtype=kind, shape=(size,))


def _write_description(arrays: IndexArrays, directory: Path) -> None:
    description = {
        "version": VERSION,
        "kind": "bm25",
        "k1": arrays.k1,
        "b": arrays.b,
        "documents": len(arrays.docids),
        "count": arrays.count,
        "total": arrays.total,
        "corpus_sha256": arrays.checksum,
    }
    write_description(directory / "index.json", description, [f"{name}.npy" for name in _ARRAYS])


def save_arrays(arrays: IndexArrays, directory: Path) -> None:
    """Write an index to a folder, made if need be."""
    begin_anew(directory, "index.json", [f"{name}.npy" for name in _ARRAYS])
    for name in _ARRAYS:
        np.save(directory / f"{name}.npy", arrays.arrays[name])
    _write_description(arrays, directory)


def load_arrays(directory: Path) -> IndexArrays:
    """Open a saved index memory-mapped.

    Raises:
        DataError: the folder holds no index of this version.
    """
    description = read_description(directory / "index.json", kind="bm25", version=VERSION)
    arrays = {name: load_array(directory / f"{name}.npy") for name in _ARRAYS}
    return IndexArrays(
        description["k1"],
        description["b"],
        description["count"],
        description["total"],
        description["corpus_sha256"],
        arrays,
    )
