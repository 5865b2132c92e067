"""Retrieval over HTTP, in the form of Search-R1's `/retrieve`: the client, and shards behind it.

A request is `{"queries": [...], "topk": 3, "return_scores": true}`; the answer `{"result": [[{"document":
{"contents": ...}, "score": ...}, ...], ...]}`. The invariant: a search either returns what the server ranked or
raises `RetrievalError` that names the server and the reason; what can pass (a refused connection, a time-out, a 5xx,
an answer that is cut off) is tried again first, and what cannot (a 4xx, a page, another shape, a score that is no
number) is said at once.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from atod_envs.http.client import HttpClient, Retry, ServerGone, ServerRefused, address_of

from .batching import Batcher
from .protocol import Passage, RetrievalError, SearchService, check_depth

TIMEOUT_SECONDS: Final = 60.0
RETRIES: Final = 5
BACKOFF_SECONDS: Final = 0.5
BATCH_SIZE: Final = 256
CONNECTIONS: Final = 8


class HttpSearch:
    """A client of a `/retrieve` server, safe to share between threads.

    Queries of many threads that wait at the same time travel in one request, equal ones once.

    Args:
        url: the server's address; without a path, `/retrieve` is meant.
        timeout: seconds for one attempt.
        retries: further attempts after the first.
        backoff: seconds before the second attempt; doubled each time.
        batch_size: most queries in a request.
        connections: requests under way at a time.
        scored: refuse passages without a score, in whose place the rank would stand.
        sleep: waits between attempts.

    Raises:
        ValueError: the address is not http or https.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT_SECONDS,
        retries: int = RETRIES,
        backoff: float = BACKOFF_SECONDS,
        batch_size: int = BATCH_SIZE,
        connections: int = CONNECTIONS,
        scored: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = address_of(url)
        self.url, self._scored = url, scored
        self._path = (parts.path if parts.path.strip("/") else "/retrieve") + (f"?{parts.query}" if parts.query else "")
        self._client = HttpClient(url, timeout=timeout, retry=Retry(retries, backoff, jitter=0.0), sleep=sleep)
        self._batcher = Batcher(self._answer, workers=connections, batch_size=batch_size)

    def retrieve(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The server's best `k` passages for each query.

        Raises:
            RetrievalError: the server did not answer, or gave something that is no answer.
        """
        check_depth(k)
        return self._batcher.retrieve(queries, k)

    def close(self) -> None:
        """Let the worker threads end."""
        self._batcher.close()
        self._client.close()

    def _answer(self, queries: list[str], k: int) -> list[list[Passage]]:
        clean = [query.encode("utf-8", "replace").decode("utf-8") for query in queries]
        tries = 1
        try:
            answer = self._client.ask(self._path, {"queries": clean, "topk": k, "return_scores": True})
            return _passages(answer, len(queries), k, self._scored)
        except ServerGone as gone:
            tries, reason = gone.tries, gone.reason
        except (ServerRefused, ValueError) as no:
            reason = str(no)
        tried = f"{tries} attempt{'s' if tries > 1 else ''}"
        raise RetrievalError(f"{self.url} did not answer {len(queries)} queries ({tried}): {reason}")


def _passages(answer: Any, queries: int, k: int, scored: bool) -> list[list[Passage]]:
    """Check the shape of an answer and read its passages."""
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list) or len(result) != queries or not all(isinstance(row, list) for row in result):
        shown = json.dumps(answer)[:80]
        raise ValueError(f"expected 'result' with one list for each of {queries} queries; got {shown}")
    rows = [[_passage(item, rank) for rank, item in enumerate(row[:k])] for row in result]
    given = {item.get("score") is not None for row in result for item in row[:k]}
    if len(given) > 1 or (scored and False in given):
        raise ValueError("there are passages without a 'score'; expected one for each")
    return rows


def _passage(item: Any, rank: int) -> Passage:
    """One passage, with or without its score; a document without an id is named by its title line."""
    document = item.get("document", item) if isinstance(item, dict) else None
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str) or not isinstance(document, dict):
        raise ValueError(f"expected a document with 'contents'; got {json.dumps(item)[:80]}")
    score, docid = item.get("score"), document.get("id")
    if type(score) not in (int, float, type(None)):
        raise ValueError(f"expected a number as 'score'; got {json.dumps(score)[:80]}")
    if type(docid) not in (int, str, type(None)):
        raise ValueError(f"expected a text or a number as 'id'; got {json.dumps(docid)[:80]}")
    return Passage(
        contents.partition("\n")[0] if docid is None else str(docid),
        contents,
        -float(rank) if score is None else float(score),
    )


class ShardedSearch:
    """One search over several services that hold parts of a corpus: all are asked at once, the best scores win.

    Scores of the parts must be comparable: inner products are; BM25 scores are to the degree that the parts have the
    same word statistics, as random parts of a large corpus do.

    Args:
        services: at least one.
    """

    def __init__(self, services: Sequence[SearchService]) -> None:
        if not services:
            raise ValueError("no shards; expected at least one service")
        self._services = tuple(services)
        self._pool = ThreadPoolExecutor(len(services) * CONNECTIONS, "shard")

    def retrieve(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best `k` passages over all shards; equal scores are ordered by id.

        Raises:
            RetrievalError: a shard did not answer, and a ranking without it would be wrong; or the shards' passages
                cannot be merged.
        """
        parts = list(self._pool.map(lambda service: service.retrieve(queries, k), self._services))
        return [_merged([part[place] for part in parts])[:k] for place in range(len(queries))]


def _merged(parts: Sequence[Sequence[Passage]]) -> list[Passage]:
    """The parts' passages of one query in one order.

    Raises:
        RetrievalError: that order would be wrong: a part ranks by something that is smaller for better, or two parts
            hold the same passage.
    """
    if any(low.score > high.score for part in parts for high, low in itertools.pairwise(part)):
        raise RetrievalError(
            "a shard's best passage has not the largest score; expected scores that fall, such as BM25's"
        )
    found = [passage for part in parts for passage in part]
    if sum(len({(p.docid, p.contents) for p in part}) for part in parts) > len({(p.docid, p.contents) for p in found}):
        raise RetrievalError("two shards hold the same passage; expected parts that share none (is one given twice?)")
    return sorted(found, key=lambda passage: (-passage.score, passage.docid))
