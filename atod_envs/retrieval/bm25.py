"""Lucene's BM25 ranking in numpy: the same documents, the same order, the same scores to the last bit of a float.

The invariant of this module is parity with Anserini (k1 0.9, b 0.4, English analyzer): idf and term scores in float32
as Lucene's `BM25Similarity` computes them, document lengths quantised to its one-byte form, sums in double cast to
float, hits ordered by score and then by document id, the final scores rounded and ties spread as Anserini's output
does.

Speed comes from skipping without approximation (MaxScore): terms are taken by falling upper bound; once the sum of the
remaining bounds cannot lift a new document into the top k, the remaining terms are only looked up for the candidates
left.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .analyzer import analyze
from .bm25_build import DEFAULT_B, DEFAULT_K1, IndexArrays, build_arrays, load_arrays, save_arrays
from .protocol import Hit, answer_once, check_depth

_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]
_Docs = npt.NDArray[np.int32]

# Upper bounds are compared with this slack, so that no document is dropped that differs from the k-th by less than the
# final rounding to float: such documents count as equal and are ordered by id.
_SLACK = 1e-5
_TERM_CACHE = 1 << 17


@dataclass(frozen=True, slots=True)
class _Postings:
    """One query term: where it occurs (ascending documents) and what each occurrence scores."""

    docs: _Docs
    impacts: _Floats
    bound: float


class BM25Index:
    """An inverted index with exact Lucene BM25 scores.

    Build one with `build`, keep it with `save`, and share it between processes with `open` (memory-mapped).

    Args:
        arrays: the index data.
    """

    def __init__(self, arrays: IndexArrays) -> None:
        self._arrays = arrays
        self._terms: dict[str, _Postings] = {}
        self._local = threading.local()

    @classmethod
    def build(
        cls,
        docs: Iterable[tuple[str, str]],
        *,
        k1: float = DEFAULT_K1,
        b: float = DEFAULT_B,
        directory: str | Path | None = None,
    ) -> BM25Index:
        """Index documents.

        Args:
            docs: pairs of document id and text; ids must be unique.
            k1: BM25's term-frequency saturation.
            b: BM25's length normalisation.
            directory: where to write the index as it is built; the large arrays then never stand in memory. Without it
                the index is built in memory.

        Returns:
            The index, ready to search.

        Raises:
            DataError: a document id occurs twice.
        """
        return cls(build_arrays(docs, k1=k1, b=b, directory=None if directory is None else Path(directory)))

    def save(self, directory: str | Path) -> None:
        """Write the index as plain numpy files plus `index.json`."""
        save_arrays(self._arrays, Path(directory))

    @classmethod
    def open(cls, directory: str | Path) -> BM25Index:
        """Open a saved index memory-mapped: processes of one machine share its pages.

        Raises:
            DataError: the folder does not hold an index of this version.
        """
        return cls(load_arrays(Path(directory)))

    def __len__(self) -> int:
        return len(self._arrays.docids)

    @property
    def checksum(self) -> str:
        """SHA-256 of the corpus (ids and texts in order) that was indexed."""
        return self._arrays.checksum

    def docid(self, number: int) -> str:
        """The id of the document with this number (order of indexing)."""
        return self._arrays.docids[number]

    def search(self, query: str, k: int) -> list[Hit]:
        """Rank documents as Anserini's searcher would.

        Args:
            query: free text; every distinct term is weighted by how often it occurs.
            k: hits wanted, at least 1.

        Returns:
            Up to `k` hits, best first; empty where no term of the query occurs in the corpus.
        """
        check_depth(k)
        terms = [
            postings for term, count in Counter(analyze(query)).items() if (postings := self._postings(term, count))
        ]
        if not terms:
            return []
        terms.sort(key=lambda postings: -postings.bound)
        numbers, scores = self._rank(terms, k)
        return self._hits(numbers, scores, k)

    def search_batch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """`search` for many queries; equal queries are answered once."""
        return answer_once(self, queries, k)

    def _postings(self, term: str, count: int) -> _Postings | None:
        if count == 1 and term in self._terms:
            return self._terms[term]
        number = self._arrays.term_number(term)
        if number is None:
            return None
        postings = _Postings(*self._arrays.postings(number, count))
        if count == 1:
            if len(self._terms) >= _TERM_CACHE:
                self._terms.clear()
            self._terms[term] = postings
        return postings

    def _rank(self, terms: list[_Postings], k: int) -> tuple[_Docs, _Doubles]:
        """Documents that can be among the best `k`, with their exact scores.

        `totals` is a zero array kept between calls: only the touched places are written and cleared again.
        """
        totals: _Doubles | None = getattr(self._local, "totals", None)
        if totals is None:
            totals = self._local.totals = np.zeros(len(self), dtype=np.float64)
        try:
            remaining = np.cumsum([postings.bound for postings in reversed(terms)])[::-1]
            floor = 0.0  # a lower bound of the k-th best score
            fresh: list[_Docs] = []  # by term, the documents that no earlier term held
            seen = done = 0
            for postings in terms:
                if remaining[done] < floor * (1.0 - _SLACK):
                    break
                values = totals[postings.docs]
                fresh.append(postings.docs[values == 0.0] if done else postings.docs)
                values += postings.impacts
                totals[postings.docs] = values
                seen += len(fresh[-1])
                done += 1
                if done < len(terms) and seen >= k:
                    if len(values) < k:  # too few of their own: look at all documents so far
                        values = totals[np.concatenate(fresh)]
                    floor = max(floor, float(np.partition(values, len(values) - k)[len(values) - k]))
            left = float(remaining[done]) if done < len(terms) else 0.0
            numbers = np.concatenate(fresh)
            scores = totals[numbers]
            totals[numbers] = 0.0
        except BaseException:  # also Ctrl-C: what is left in the array would count in every later search
            del self._local.totals
            raise
        if floor > left:
            keep = scores >= floor * (1.0 - _SLACK) - left
            numbers, scores = numbers[keep], scores[keep]
        for place in range(done, len(terms)):
            keep = scores >= floor * (1.0 - _SLACK) - float(remaining[place])
            numbers, scores = numbers[keep], scores[keep]
            postings = terms[place]
            found = np.searchsorted(postings.docs, numbers)
            found[found == len(postings.docs)] = 0
            matches = postings.docs[found] == numbers
            scores[matches] += postings.impacts[found[matches]]
            if len(scores) > k:
                floor = max(floor, float(np.partition(scores, len(scores) - k)[len(scores) - k]))
        return numbers, scores

    def _hits(self, numbers: _Docs, totals: _Doubles, k: int) -> list[Hit]:
        scores = totals.astype(np.float32)
        if len(scores) > k:
            worst = np.partition(scores, len(scores) - k)[len(scores) - k]
            keep = scores >= worst
            numbers, scores = numbers[keep], scores[keep]
        order = np.lexsort((self._arrays.ranks[numbers], -scores))[:k]
        docids = self._arrays.docids
        spread = spread_ties(scores[order])
        return [Hit(docids[number], score) for number, score in zip(numbers[order].tolist(), spread, strict=True)]


def spread_ties(scores: _Floats) -> list[float]:
    """Anserini's output form of falling scores: four decimals, each further tie lower by a millionth, in float32.

    Scores that differ by one in the fourth decimal can count as tied, because the published comparison is made on
    rounded binary floats; that is part of the format.
    """
    rounded = (np.floor(scores.astype(np.float64) * 1e4 + 0.5) / 1e4).astype(np.float32)
    result: list[float] = []
    previous = np.float32(0.0)
    ties = 0
    for place, score in enumerate(rounded):
        if place == 0 or previous - score > np.float32(1e-4):
            ties = 0
        else:
            ties += 1
            score = score - np.float32(1e-6) * np.float32(ties)
        previous = score
        result.append(float(score))
    return result
