"""Build an index once, open it everywhere: `python -m atod_envs.retrieval.build --corpus wiki-18.jsonl --out wiki`.

A folder holds one corpus (`corpus/`) and any number of indexes over it (`bm25/`, `lucene/`, `dense/`). The invariant:
every index in a folder names the checksum of the corpus next to it, and opening one that does not match is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from atod_envs.caches import one_at_a_time
from atod_envs.errors import AtodError, DataError, file_trouble
from atod_envs.options import program
from atod_envs.stopping import stoppable

from .bm25 import BM25Index
from .corpus import Corpus, read_passages
from .dense import KINDS, MINILM, DenseIndex, TransformersEncoder, settings_for
from .hybrid import HybridRetriever
from .lucene import LuceneIndex
from .progress import progress
from .protocol import LocalSearch, Retriever
from .storage import verify

BACKENDS: Final = ("bm25", "lucene", "dense")
HYBRID: Final = "hybrid"
"""Opens as the fusion of `bm25` and `dense`, which must both be there."""


def build_index(
    passages: Iterable[tuple[str, str]] | None,
    root: str | Path,
    backend: str,
    *,
    model: str = MINILM,
    kind: str = "flat",
    half: bool = False,
) -> None:
    """Write a corpus (unless the folder has one) and one index over it, with a progress bar on standard error.

    Args:
        passages: pairs of id and contents; `None` takes the corpus that the folder holds.
        root: the folder.
        backend: one of `BACKENDS`.
        model: encoder of a dense index.
        kind: faiss index of a dense index, one of `KINDS` or a factory string.
        half: encode in bfloat16.

    Raises:
        DataError: there is no corpus, or the backend's parts are missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):  # two would write into the same files
        if passages is not None:
            Corpus.write(progress(passages, "corpus: passages"), folder / "corpus")
        corpus = Corpus.open(folder / "corpus")
        counted = progress(corpus, f"{backend}: passages", len(corpus))
        if backend == "bm25":
            BM25Index.build(counted, directory=folder / backend)
        elif backend == "lucene":
            LuceneIndex.build(counted, folder / backend).close()
        else:
            encoder = TransformersEncoder(settings_for(model), half=half)
            DenseIndex.build(counted, folder / backend, encoder, kind=kind)


def take_part(passages: Iterable[tuple[str, str]], part: str) -> Iterator[tuple[str, str]]:
    """One of n random parts of a corpus; the n parts together are the corpus.

    Where a passage goes depends on its id alone, so that each machine can cut its own part.

    Args:
        passages: pairs of id and contents.
        part: `"i/n"`, i from 1 to n.

    Raises:
        ValueError: the part is not of that form.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part={part!r}; expected I/N with I from 1 to N, such as 1/4")
    mine, parts = int(number) - 1, int(count)

    def place(docid: str) -> int:
        return int.from_bytes(hashlib.blake2b(docid.encode("utf-8", "surrogatepass"), digest_size=8).digest()) % parts

    return (passage for passage in passages if place(passage[0]) == mine)


def open_index(path: str | Path) -> LocalSearch:
    """Open an index with its corpus, memory-mapped.

    Args:
        path: a folder written by `build_index` (its only index, or bm25 where there are several), or one index in it
            (`wiki/dense`, `wiki/hybrid`).

    Returns:
        A search service.

    Raises:
        DataError: nothing is there, or the index belongs to another corpus.
    """
    path = Path(path)
    root, name = (path.parent, path.name) if path.name in (*BACKENDS, HYBRID) else (path, "")
    present = [backend for backend in BACKENDS if (root / backend / "index.json").is_file()]
    if not name:
        if not present:
            raise DataError(f"{root} holds no index; expected one written by python -m atod_envs.retrieval.build")
        name = present[0]
    corpus = Corpus.open(root / "corpus")
    parts = ("bm25", "dense") if name == HYBRID else (name,)
    for part in parts:
        if part not in present:
            raise DataError(f"{root} holds no {part} index (it holds {', '.join(present) or 'none'}); build it first")
    retrievers = [_open_one(root / part, part, corpus) for part in parts]
    return LocalSearch(HybridRetriever(retrievers) if name == HYBRID else retrievers[0], corpus)


def _open_one(folder: Path, backend: str, corpus: Corpus) -> Retriever:
    index: BM25Index | LuceneIndex | DenseIndex
    if backend == "bm25":
        index = BM25Index.open(folder)
    elif backend == "lucene":
        index = LuceneIndex(folder)
    else:
        index = DenseIndex.open(folder)
    if index.checksum != corpus.checksum:
        raise DataError(
            f"{folder} was built over another corpus (checksum {index.checksum[:12]}, next to it lies "
            f"{corpus.checksum[:12]}); build it again"
        )
    return index


def _verified(root: Path) -> int:
    descriptions = [root / "corpus" / "corpus.json", *(root / backend / "index.json" for backend in BACKENDS)]
    present = [file for file in descriptions if file.is_file()]
    if not present:
        raise DataError(f"{root} holds no corpus and no index; expected a folder written by this command")
    for file in present:
        count = verify(file)
        print(f"{file.parent}: " + (f"{count} files as built" if count else "built before there were checksums"))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=program("atod_envs.retrieval.build"), description="Build a retrieval index.")
    parser.add_argument("--corpus", help="corpus file (.jsonl, .jsonl.gz, .parquet); not needed where --out has one")
    parser.add_argument("--part", metavar="I/N", help="index one of N random parts, to be served as a shard")
    parser.add_argument("--out", required=True, help="folder of the corpus and its indexes")
    parser.add_argument("--backend", choices=BACKENDS, default="bm25", help="default: %(default)s")
    parser.add_argument("--model", default=MINILM, help="encoder of a dense index; default: %(default)s")
    parser.add_argument(
        "--kind", default="flat", help=f"faiss index: {', '.join(KINDS)}, or a factory string; default: %(default)s"
    )
    parser.add_argument(
        "--verify", action="store_true", help="build nothing: compare every file in --out with its checksum"
    )
    parser.add_argument("--half", action="store_true", help="encode in bfloat16: faster, a little less exact")
    options = parser.parse_args(arguments)
    with stoppable("what was begun is not opened; run the same command again"):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        if options.verify:
            return _verified(Path(options.out))
        passages = read_passages(options.corpus) if options.corpus else None
        if options.part:
            if passages is None:
                raise ValueError("--part cuts a corpus file; give it with --corpus")
            passages = take_part(passages, options.part)
        build_index(passages, options.out, options.backend, model=options.model, kind=options.kind, half=options.half)
        opened = open_index(Path(options.out) / options.backend)
    except (AtodError, ValueError, OSError) as error:
        trouble = file_trouble(error) if isinstance(error, OSError) else None
        print(f"error: {trouble or error}", file=sys.stderr)
        return 1
    print(f"{options.out}/{options.backend}: {len(opened.corpus):,} passages, corpus {opened.corpus.checksum[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
