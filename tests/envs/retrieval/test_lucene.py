"""Our BM25 against real Lucene on real Wikipedia passages."""

import gzip
import json

import numpy as np
import pytest
from lucene_child import ask

from atod_envs.retrieval import BM25Index

pytestmark = pytest.mark.slow

QUERIES = 2000


def test_the_environment_shows_the_same_with_lucene(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    first, ours, again = ask(tmp_path, what="episode")
    assert first.count("Doc ") == 3 and first == ours == again
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_fork_of_java_is_refused(tmp_path):
    assert "start workers with the 'spawn' method" in ask(tmp_path, what="fork")


def test_rankings_and_scores_equal_on_all_passages(realdata, tmp_path):
    """41,007 passages, 2,000 of the questions, top 10: ids, order and scores without a difference."""
    with gzip.open(realdata / "searchqa" / "passages.jsonl.gz", "rt", encoding="utf-8") as lines:
        docs = [(row["id"], row["title"] + "\n" + row["text"]) for row in map(json.loads, lines)]
    with (realdata / "searchqa" / "questions.jsonl").open(encoding="utf-8") as lines:
        queries = [json.loads(line)["question"] for line in lines][::2][:QUERIES]
    queries += ["born born born 1912", "who wrote who wrote who wrote it", "</information> naïve 東京", ""]
    answer = ask(tmp_path, docs=docs, queries=queries, k=10, folder=str(tmp_path / "lucene"))
    index = BM25Index.build(docs)
    assert index.checksum == answer["checksum"]
    different = []
    for query, expected in zip(queries, answer["hits"], strict=True):
        found = [(hit.docid, np.float32(hit.score)) for hit in index.search(query, 10)]
        if found != [(docid, np.float32(score)) for docid, score in expected]:
            different.append(query)
    assert different == []
