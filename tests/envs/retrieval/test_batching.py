"""Queries that wait at the same time are searched together, and no caller waits for another's thousands."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from wire import eventually

from atod_envs.retrieval.batching import Batcher
from atod_envs.retrieval.protocol import Passage, RetrievalError


def test_waiting_queries_travel_together_and_equal_ones_once():
    asked, gate = [], threading.Event()

    def answer(queries, k):
        asked.append((queries, k))
        gate.wait(200)
        return [[Passage(query, query, float(k))] for query in queries]

    batcher = Batcher(answer, workers=1, batch_size=4)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(batcher.retrieve, ["first"], 1)
        while not asked:
            time.sleep(0.001)
        jobs = [pool.submit(batcher.retrieve, [query, "same"], 1) for query in "abcdef"]
        other = pool.submit(batcher.retrieve, ["a"], 2)
        while batcher.waiting < 13:
            time.sleep(0.001)
        gate.set()
        assert first.result()[0][0].docid == "first"
        assert [[row[0].docid for row in job.result()] for job in jobs] == [[query, "same"] for query in "abcdef"]
        assert other.result() == [[Passage("a", "a", 2.0)]]
    batcher.close()
    batches = [queries for queries, k in asked if k == 1][1:]
    assert sum(map(len, batches)) == 7 and all(len(batch) <= 4 for batch in batches)
    assert sorted(query for batch in batches for query in batch) == ["a", "b", "c", "d", "e", "f", "same"]


def test_an_error_reaches_every_caller_of_its_batch_and_no_other():
    def answer(queries, k):
        if k == 2:
            raise RetrievalError("down")
        return [[] for _ in queries]

    batcher = Batcher(answer, workers=2, batch_size=8)
    with pytest.raises(RetrievalError, match="down"):
        batcher.retrieve(["a", "b"], 2)
    assert batcher.retrieve(["a"], 1) == [[]]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.retrieve(["a"], 1)


def test_a_caller_with_one_query_does_not_wait_for_one_with_thousands():
    gate, batches = threading.Event(), []

    def answer(queries, k):
        gate.wait(120)
        batches.append(queries)
        return [[Passage(query, query, 1.0)] for query in queries]

    batcher = Batcher(answer, workers=1, batch_size=64)
    many = batcher.submit([f"many {n}" for n in range(4000)], 3)
    eventually(lambda: batcher.waiting < 4000, "no worker has begun")
    few = [batcher.submit([f"few {n}"], 3) for n in range(3)]
    other = batcher.submit(["other depth"], 1)
    gate.set()
    assert [call.result(60)[0][0].docid for call in few] == ["few 0", "few 1", "few 2"]
    assert other.result(60)[0][0].docid == "other depth"
    assert [row[0].docid for row in many.result(60)] == [f"many {n}" for n in range(4000)]
    late = next(number for number, queries in enumerate(batches) if "few 2" in queries)
    assert late <= 2 and batches.index(["other depth"]) <= 4 and len(batches) > 60
    batcher.close()
