"""BM25 against recorded Lucene results, against a direct computation, and against hostile input."""

import gzip
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_envs.errors import DataError
from atod_envs.retrieval import BM25Index
from atod_envs.retrieval import bm25_build as build_module
from atod_envs.retrieval.analyzer import analyze
from atod_envs.retrieval.bm25 import spread_ties
from atod_envs.retrieval.bm25_build import length_of_code, quantised_length


def _lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_recorded_lucene_results(realdata):
    """All recorded queries: ids, order and scores."""
    products = _lines(realdata / "webshop" / "documents_1k.jsonl.gz")
    index = BM25Index.build((product["id"], product["contents"]) for product in products)
    recorded = _lines(realdata / "webshop" / "golden_lucene_search_1k.jsonl.gz")
    assert len(recorded) >= 588
    for row in recorded:
        hits = index.search(row["query"], 50)
        assert [hit.docid for hit in hits] == [docid for docid, _ in row["hits"]], row["query"]
        found = [np.float32(hit.score) for hit in hits]
        assert found == [np.float32(score) for _, score in row["hits"]], row["query"]


def _plain_scores(docs, query):
    """The formula in plain double precision, document by document."""
    bags = {docid: Counter(analyze(text)) for docid, text in docs}
    lengths = {docid: sum(bag.values()) for docid, bag in bags.items()}
    count = sum(length > 0 for length in lengths.values())
    average = sum(lengths.values()) / max(count, 1)
    scores = {}
    for docid, bag in bags.items():
        total = 0.0
        for term, times in Counter(analyze(query)).items():
            if bag[term]:
                holding = sum(term in other for other in bags.values())
                idf = math.log(1 + (count - holding + 0.5) / (holding + 0.5))
                length = length_of_code(quantised_length(lengths[docid]))
                total += times * idf * bag[term] / (bag[term] + 0.9 * (0.6 + 0.4 * length / average))
        if total:
            scores[docid] = total
    return scores


words = st.sampled_from(["alpha", "beta", "gamma", "delta", "eta", "iota", "kappa", "omega", "the", "Zürich", "東京"])
texts = st.lists(words, max_size=60).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=40), texts, st.integers(1, 12))
def test_skipping_changes_nothing(contents, query, k):
    """Hits equal those of a direct computation over all documents."""
    docs = [(f"d{number * 7919 % 101:03d}", text) for number, text in enumerate(contents)]
    hits = BM25Index.build(docs).search(query, k)
    plain = _plain_scores(docs, query)
    assert len(hits) == min(k, len(plain))
    best = sorted(plain.values(), reverse=True)[: len(hits)]
    for hit, score in zip(hits, best, strict=True):
        assert hit.score == pytest.approx(score, abs=2e-4)
        assert plain[hit.docid] == pytest.approx(score, abs=2e-4)


def test_a_larger_k_only_appends():
    rng = random.Random(1)
    vocabulary = [f"w{int(rng.paretovariate(0.7)) % 500}" for _ in range(4000)]
    docs = [(f"{number}", " ".join(rng.choices(vocabulary, k=rng.randint(1, 80)))) for number in range(3000)]
    index = BM25Index.build(docs)
    for _ in range(100):
        query = " ".join(rng.choices(vocabulary, k=rng.randint(1, 9)))
        deep = [hit.docid for hit in index.search(query, 400)]
        for k in (1, 3, 50):
            assert [hit.docid for hit in index.search(query, k)] == deep[:k]


def test_a_search_that_is_broken_off_leaves_nothing_behind(monkeypatch):
    """Ctrl-C in the middle: what was added up so far must not count in the next search."""
    from atod_envs.retrieval import bm25

    index = BM25Index.build([("a", "red hat"), ("b", "red hat red"), ("c", "blue coat hat")])
    before = index.search("red hat", 3)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bm25.np, "concatenate", stop)
        with pytest.raises(KeyboardInterrupt):
            index.search("red hat", 3)
    assert index.search("red hat", 3) == before


def test_equal_scores_are_ordered_by_document_id():
    docs = [(docid, "same words here") for docid in ("b", "a", "10", "9", "ä", "Z")]
    hits = BM25Index.build(docs).search("words", 6)
    assert [hit.docid for hit in hits] == ["10", "9", "Z", "a", "b", "ä"]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len({hit.score for hit in hits}) == 6


def test_ties_are_spread_by_millionths():
    scores = np.array([2.0, 1.23456, 1.23456, 1.23456, 0.5], dtype=np.float32)
    assert spread_ties(scores) == pytest.approx([2.0, 1.2346, 1.234599, 1.234598, 0.5], abs=1e-7)


def test_length_codes_round_down_to_what_a_byte_holds():
    assert [length_of_code(quantised_length(length)) for length in range(41)] == list(range(41))
    assert length_of_code(quantised_length(41)) == 40
    for length in (100, 1000, 10**6, 2**31 - 1):
        code = quantised_length(length)
        assert code < 256
        assert length_of_code(code) <= length < length * 1.125 + 1 and length_of_code(code) > length * 0.88


def test_saved_opened_and_built_on_disk_are_the_same(tmp_path, monkeypatch):
    """Several runs, so that the merge is exercised."""
    monkeypatch.setattr(build_module, "RUN_DOCUMENTS", 7)
    rng = random.Random(2)
    docs = [(f"id-{number}", " ".join(rng.choices("abcdefgh", k=rng.randint(0, 12)))) for number in range(50)]
    memory = BM25Index.build(docs)
    memory.save(tmp_path / "saved")
    on_disk = BM25Index.build(iter(docs), directory=tmp_path / "direct")
    opened = BM25Index.open(tmp_path / "saved")
    again = BM25Index.open(tmp_path / "direct")
    assert memory.checksum == on_disk.checksum == opened.checksum == again.checksum
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files == {path.name for path in (tmp_path / "direct").iterdir()}
    for name in files:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    for query in ("a b", "c c c h", "d", "zz"):
        assert memory.search(query, 9) == on_disk.search(query, 9) == opened.search(query, 9) == again.search(query, 9)


def test_the_checksum_tells_corpora_apart():
    first = BM25Index.build([("1", "ab"), ("2", "c")]).checksum
    assert first == BM25Index.build([("1", "ab"), ("2", "c")]).checksum
    for other in ([("1", "a"), ("2", "bc")], [("1a", "b"), ("2", "c")], [("2", "c"), ("1", "ab")]):
        assert BM25Index.build(other).checksum != first


def test_empty_corpora_and_queries():
    assert BM25Index.build([]).search("anything", 3) == []
    index = BM25Index.build([("1", ""), ("2", "the of"), ("3", "word")])
    assert len(index) == 3
    assert index.search("", 3) == index.search("the", 3) == index.search("!!! \x00 \ud800", 3) == []
    assert [hit.docid for hit in index.search("WORD's", 3)] == ["3"]


@pytest.mark.parametrize(
    "query",
    [
        "</information>",
        "<|im_start|>system",
        "x" * 200_000,
        "wort " * 50_000,
        "\x00\x1b[31m\u202e",
        "' OR 1=1 --",
        "東" * 9999,
    ],
)
def test_any_query_is_only_text(query):
    index = BM25Index.build([("1", "im_start system information wort"), ("2", "東 x 1")])
    for hit in index.search(query, 5):
        assert hit.docid in ("1", "2")


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"'7'.*own id"):
        BM25Index.build([("7", "a"), ("7", "b")])
    with pytest.raises(DataError, match=r"index\.json does not exist"):
        BM25Index.open(tmp_path)
    BM25Index.build([("7", "a")]).save(tmp_path)
    with pytest.raises(ValueError, match="k=0"):
        BM25Index.open(tmp_path).search("a", 0)
    (tmp_path / "norms.npy").unlink()
    with pytest.raises(DataError, match=r"norms\.npy is missing"):
        BM25Index.open(tmp_path)


def test_a_batch_answers_equal_queries_once(monkeypatch):
    index = BM25Index.build([("1", "a b"), ("2", "b c")])
    asked = []
    search = index.search
    monkeypatch.setattr(index, "search", lambda query, k: asked.append(query) or search(query, k))
    answers = index.search_batch(["b", "c", "b", "b"], 2)
    assert asked == ["b", "c"]
    assert answers[0] == answers[2] == answers[3] == search("b", 2)
    assert answers[0] is not answers[2]
