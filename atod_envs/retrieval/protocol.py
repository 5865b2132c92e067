"""What every retriever offers: queries in, ranked document ids out.

The invariant: `search_batch` answers queries in their order, gives each the same hits as a single `search`, and never
turns a failure into an empty result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atod_envs.errors import AtodError

from .corpus import Corpus


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved document.

    Attributes:
        docid: the document's id in the corpus.
        score: the backend's own score; larger is better, comparable within one result only.
    """

    docid: str
    score: float


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved passage with its text.

    Attributes:
        docid: the passage's id in the corpus.
        contents: title line and text.
        score: the backend's own score.
    """

    docid: str
    contents: str
    score: float


class RetrievalError(AtodError, RuntimeError):
    """A search could not be answered: the server is down, too slow, or answers nonsense. Nothing was returned."""


class Retriever(Protocol):
    """Ranks documents of one corpus for queries."""

    def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` documents, best first; fewer where fewer match."""

    def search_batch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """`search` for many queries, in their order; equal queries are answered once."""


class SearchService(Protocol):
    """Answers queries with passages: a retriever with its corpus, or a server that has both."""

    def retrieve(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` passages for each query, in the order of the queries.

        Raises:
            RetrievalError: the queries could not be answered.
        """


@dataclass(frozen=True, slots=True)
class LocalSearch:
    """A retriever and the corpus it ranks, in this process."""

    retriever: Retriever
    corpus: Corpus

    def retrieve(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` passages for each query."""
        found = self.retriever.search_batch(queries, k)
        return [[Passage(hit.docid, self.corpus[hit.docid], hit.score) for hit in hits] for hits in found]


def answer_once(retriever: Retriever, queries: Sequence[str], k: int) -> list[list[Hit]]:
    """`search_batch` for a backend that answers one query at a time: equal queries are searched once."""
    found: dict[str, list[Hit]] = {}
    for query in queries:
        if query not in found:
            found[query] = retriever.search(query, k)
    return [list(found[query]) for query in queries]


def check_depth(k: int) -> None:
    """Refuse a depth below one.

    Raises:
        ValueError: `k` is not at least 1.
    """
    if k < 1:
        raise ValueError(f"k={k}; expected the number of hits wanted, at least 1")
