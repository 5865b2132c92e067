"""Asks real Lucene in a process of its own: Java in the test process would forbid other tests to fork.

Reads one JSON request from standard input, writes one JSON answer to the file named in it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

from atod_envs.errors import DataError
from atod_envs.retrieval.lucene import LuceneIndex, find_jar, find_java, lucene_terms


def ask(scratch: Path, **request) -> object:
    """Run a request in a child; skips the calling test where Lucene is not installed."""
    pytest.importorskip("jnius_config", reason="pyjnius is not installed")
    try:
        find_jar(), find_java()
    except DataError as error:
        pytest.skip(str(error))
    answer = scratch / "answer.json"
    body = json.dumps({**request, "answer": str(answer)})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, __file__], input=body, text=True, capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text())


def _episode() -> list[str]:
    """What the same search shows with Lucene and with our own ranking."""
    from atod_envs.searchqa.env import SearchQAEnv

    shown = []
    for retriever in ("lucene", "bm25", "lucene"):
        env = SearchQAEnv("dev", retriever=retriever)
        env.reset(seed=4)
        shown.append(env.step("<search>who founded the school on the river</search>")[0])
    return shown


def _after_fork() -> str:
    """What a forked child is told when it uses the parent's Java."""
    lucene_terms(["start Java"])
    reading, writing = os.pipe()
    if not os.fork():
        try:
            lucene_terms(["again"])
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.wait()
    return os.read(reading, 1000).decode()


def _serve() -> None:
    request = json.load(sys.stdin)
    if request.get("what") == "episode":
        result = _episode()
    elif request.get("what") == "fork":
        result = _after_fork()
    elif "texts" in request:
        result = lucene_terms(request["texts"])
    else:
        index = LuceneIndex.build(map(tuple, request["docs"]), request["folder"])
        found = index.search_batch(request["queries"], request["k"])
        result = {"checksum": index.checksum, "hits": [[[hit.docid, hit.score] for hit in hits] for hits in found]}
    Path(request["answer"]).write_text(json.dumps(result))


if __name__ == "__main__":
    _serve()
