"""Where questions and passages come from: the built-in world, files of the user, an index, or a server.

The invariant: everything is loaded once per process and shared by all its environments; an index over a corpus file
is built once per machine, kept in the cache folder under the file's name, size and date, and memory-mapped by every
process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from atod_envs.caches import build_once, cache_folder
from atod_envs.errors import DataError
from atod_envs.files import as_path, file_stamp
from atod_envs.retrieval.bm25 import BM25Index
from atod_envs.retrieval.corpus import Corpus, read_passages
from atod_envs.retrieval.protocol import LocalSearch, SearchService

from .questions import CORPUS_NAMES, Question, candidate_files, load_questions
from .sampling import QuestionSet, parse_datasets, purposes, select

if TYPE_CHECKING:
    from .builtin import Encyclopedia

_log = logging.getLogger(__name__)
_lock = threading.RLock()

BUILTIN: Final = "builtin"
"""Names the built-in world as data; with `:7` behind it, the encyclopedia of that seed."""

ENCYCLOPEDIAS: Final = 4
"""Encyclopedias that are kept in memory at a time; each takes some 10 MB."""

KEPT_FILES: Final = 16
"""Loads of question files that are kept; a file that changed is loaded anew, and the old load leaves in time."""

_CORPUS_SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".parquet")


def load_tasks(
    data: str | Path | None, split: str, dataset: str | Mapping[str, float] | Iterable[str] | None
) -> QuestionSet:
    """The questions that an environment plays; the arguments are those of `SearchQAEnv`.

    Raises:
        DataError: a file is missing or broken.
        UnknownName: no question has that split or data set.
    """
    source = _chosen(data)
    weights = parse_datasets(dataset)
    chosen = None if weights is None else tuple(weights.items())
    with _lock:
        if isinstance(source, int):
            return _selected_builtin(source, split, chosen)
        return _selected(source.resolve(), _stamp(source), split, chosen)


def load_splits(data: str | Path | None) -> tuple[str, str, str]:
    """The splits to train on, to choose checkpoints on and to report on; see `sampling.purposes`."""
    source = _chosen(data)
    with _lock:
        if isinstance(source, int):
            return purposes(_encyclopedia(source).questions)
        return purposes(_questions(source.resolve(), _stamp(source)))


def load_service(
    data: str | Path | None, retriever: str | Path | SearchService, corpus: str | Path | None
) -> SearchService:
    """The search service of an environment; the arguments are those of `SearchQAEnv`.

    Raises:
        DataError: a file is missing or broken, or no corpus is known for the retriever that was asked for.
    """
    with _lock:  # environments made in threads share one load
        return _service(_chosen(data), retriever, corpus)


def _chosen(data: str | Path | None) -> Path | int:
    """The data folder or file to use, or the seed of an encyclopedia that is made here."""
    from .builtin import SEED

    path = as_path(os.environ.get("SEARCHQA_DATA") or BUILTIN if data is None else data, "data")
    kind, colon, seed = str(path).partition(":")
    if kind != BUILTIN or (colon and not seed.isdecimal()):
        return path
    return int(seed) if colon else SEED


def _service(data: Path | int, retriever: str | Path | SearchService, corpus: str | Path | None) -> SearchService:
    if not isinstance(retriever, (str, Path)):
        return retriever
    name = str(retriever)
    if name.startswith(("http://", "https://")):
        return _remote(name)
    if name in ("bm25", "lucene"):
        if corpus is None and isinstance(data, int):
            return _builtin_search(data, name)
        file = (
            as_path(corpus, "corpus") if corpus is not None else find_corpus(data if isinstance(data, Path) else Path())
        )
        return indexed(index_folder(file, name), file.resolve(), name)
    from atod_envs.retrieval.build import open_index

    folder = as_path(retriever, "retriever")
    if not folder.is_dir():
        raise DataError(
            f"retriever={name!r}: no such folder; expected 'bm25', 'lucene', http://..., or an index folder"
        )
    return open_index(folder)


def find_corpus(data: Path) -> Path:
    """The corpus file in a data folder, or next to a question file.

    Raises:
        DataError: there is none.
    """
    folder = data if data.is_dir() else data.parent
    for name in CORPUS_NAMES:
        for suffix in _CORPUS_SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    names = ", ".join(f"{name}.jsonl" for name in CORPUS_NAMES)
    raise DataError(f"{folder} holds no corpus; expected one of {names} (also .jsonl.gz, .parquet), or give corpus=")


Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


def _stamp(path: Path) -> Stamp:
    """Name, size, dates and inode of a file, or of every file in a folder: what tells a load that it is stale."""
    files = [path] if path.is_file() else candidate_files(path)
    found = ((str(file), file.stat()) for file in files)
    return tuple((name, of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino) for name, of in found)


@lru_cache(KEPT_FILES)
def _selected(path: Path, stamp: Stamp, split: str, weights: tuple[tuple[str, float], ...] | None) -> QuestionSet:
    return select(_questions(path, stamp), split, None if weights is None else dict(weights))


@lru_cache(KEPT_FILES)
def _questions(path: Path, stamp: Stamp) -> Sequence[Question]:
    return tuple(load_questions(path))


@lru_cache(ENCYCLOPEDIAS)
def _encyclopedia(seed: int) -> Encyclopedia:
    from .builtin import SEED, encyclopedia, make_encyclopedia

    return encyclopedia() if seed == SEED else make_encyclopedia(seed)


@lru_cache(8 * ENCYCLOPEDIAS)
def _selected_builtin(seed: int, split: str, weights: tuple[tuple[str, float], ...] | None) -> QuestionSet:
    return select(_encyclopedia(seed).questions, split, None if weights is None else dict(weights))


@lru_cache(ENCYCLOPEDIAS)
def _builtin_search(seed: int, backend: str) -> SearchService:
    passages = list(_encyclopedia(seed).passages())
    corpus = Corpus.build(passages)
    if backend == "bm25":
        return LocalSearch(BM25Index.build(passages), corpus)
    from atod_envs.retrieval.lucene import LuceneIndex

    folder = cache_folder() / f"builtin-{corpus.checksum[:16]}-lucene"
    build_once(folder, lambda scratch: LuceneIndex.build(passages, scratch).close())
    return LocalSearch(LuceneIndex(folder), corpus)


@cache
def _remote(url: str) -> SearchService:
    from atod_envs.retrieval.http import HttpSearch

    return HttpSearch(url)


def index_folder(file: Path, backend: str) -> Path:
    """Where the index over a corpus file is kept; it need not be built yet."""
    found = file_stamp(file) if file.is_file() else ()
    key = hashlib.sha256(f"{file.resolve()}|{found}".encode()).hexdigest()[:16]
    return cache_folder() / f"{file.name.split('.')[0]}-{key}-{backend}"


@cache
def indexed(folder: Path, file: Path, backend: str) -> SearchService:
    """The search service of a corpus, indexed on first use."""
    from atod_envs.retrieval.build import build_index, open_index

    def build(scratch: Path) -> None:
        _log.warning("indexing %s with %s into %s (once)", file, backend, folder)
        build_index(read_passages(file), scratch, backend)

    return open_index(build_once(folder, build, "corpus/corpus.json"))
