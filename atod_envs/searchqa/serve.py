"""Serve retrieval over HTTP with Search-R1's API: `python -m atod_envs.searchqa.serve --index wiki --port 8000`.

`POST /retrieve` takes `{"queries": [...], "topk": 3, "return_scores": true}` (also `"query"` for one query) and answers
`{"result": [[{"document": {"id": ..., "contents": ...}, "score": ...}, ...], ...]}`; `GET /health` says what is
served. The invariant: requests that wait at the same time are searched together, equal queries once, and a request is
answered completely or with an error status, never in part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

from atod_envs.errors import AtodError
from atod_envs.http.messages import Refused, parse_object
from atod_envs.options import needed_imports, program
from atod_envs.retrieval.batching import Batcher
from atod_envs.retrieval.http import BATCH_SIZE, HttpSearch, ShardedSearch
from atod_envs.retrieval.protocol import LocalSearch, Passage, RetrievalError, SearchService
from atod_envs.stopping import stoppable

from .sources import load_service

with needed_imports("serve", __name__):
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from atod_envs.http.guard import Access, HttpLimits, make_app
    from atod_envs.http.server import HttpServer, server_of

_log = logging.getLogger(__name__)

TOPK: Final = 3
MAX_TOPK: Final = 1000
MAX_QUERIES: Final = 8192
"""Queries in one request."""
MAX_PASSAGES: Final = BATCH_SIZE * MAX_TOPK
"""Passages in one answer."""
MAX_WAITING: Final = 1 << 16
"""Queries of all requests together that wait for the search."""
_FIELDS: Final = frozenset({"queries", "query", "topk", "return_scores"})
LIMITS: Final = HttpLimits(connections=1024, body_bytes=16 << 20)


class RetrievalServer(HttpServer):
    """An HTTP server around a search service.

    Args:
        service: answers the queries; used by one thread at a time.
        host: address to listen on.
        port: port to listen on; 0 takes a free one (see `url`).
        topk: passages for a request that names no number.

    Raises:
        AtodError: the address cannot be had.
    """

    def __init__(self, service: SearchService, host: str = "127.0.0.1", port: int = 0, topk: int = TOPK) -> None:
        self.service = service
        self.topk = topk
        self.batcher = Batcher(lambda queries, k: service.retrieve(queries, k), workers=1, batch_size=BATCH_SIZE)
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/retrieve", self._retrieve, methods=["POST"]),
            Route("/{path:path}", self._elsewhere, methods=["GET", "POST"]),
        ]
        super().__init__(server_of(make_app(routes, _refuse, LIMITS, Access()), LIMITS), host, port)

    @property
    def url(self) -> str:
        """Address of `/retrieve`."""
        return f"{self.origin}/retrieve"

    def server_close(self) -> None:
        """Let the port go, and the search thread end."""
        super().server_close()
        self.batcher.close()

    async def _health(self, request: Request) -> Response:
        """Say what is served."""
        about: dict[str, Any] = {"status": "ok", "topk": self.topk}
        if isinstance(self.service, LocalSearch):
            about |= {"passages": len(self.service.corpus), "corpus_sha256": self.service.corpus.checksum}
        return _json(200, about)

    async def _retrieve(self, request: Request) -> Response:
        """Answer a retrieval request."""
        queries, k, scores = self._asked(await request.body())
        if self.batcher.waiting + len(queries) > MAX_WAITING:
            raise Refused(503, f"{self.batcher.waiting} queries wait already; try again later")
        try:
            found = await asyncio.wrap_future(self.batcher.submit(queries, k))
        except RetrievalError as error:
            raise Refused(503, str(error)) from error
        except Exception as error:
            _log.exception("a search failed")
            raise Refused(500, f"{type(error).__name__}: {error}") from error
        return await asyncio.to_thread(_answer, found, scores)

    async def _elsewhere(self, request: Request) -> Response:
        status = 400 if request.method == "POST" else 404
        raise Refused(status, f"path {request.url.path[:80]!r}; expected GET /health or POST /retrieve")

    def _asked(self, body: bytes) -> tuple[list[str], int, bool]:
        request = parse_object(body)
        if unknown := sorted(request.keys() - _FIELDS):
            raise Refused(400, f"unknown field {unknown[0][:40]!r}; expected {', '.join(sorted(_FIELDS))}")
        if "queries" in request and "query" in request:
            raise Refused(400, "expected 'queries' or 'query', not both")
        queries = request.get("queries", request.get("query"))
        queries = [queries] if isinstance(queries, str) else queries
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise Refused(400, "expected 'queries', a list of strings")
        if len(queries) > MAX_QUERIES:
            raise Refused(413, f"{len(queries)} queries; send at most {MAX_QUERIES} in a request")
        k = self.topk if request.get("topk") is None else request["topk"]
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_TOPK:
            raise Refused(400, f"topk={k!r}; expected a number from 1 to {MAX_TOPK}")
        if len(queries) * k > MAX_PASSAGES:
            raise Refused(413, f"{len(queries)} queries with topk={k}; ask for at most {MAX_PASSAGES} passages at once")
        # A single "query" always came with scores in the clients that send it.
        scores = request.get("return_scores")
        scores = "query" in request if scores is None else scores
        if not isinstance(scores, bool):
            raise Refused(400, f"return_scores={scores!r:.40}; expected true or false")
        return queries, k, scores


def _json(status: int, answer: dict[str, Any]) -> Response:
    return Response(json.dumps(answer, allow_nan=False), status, media_type="application/json")


def _refuse(status: int, message: str) -> Response:
    return _json(status, {"detail": message})


def _answer(found: Sequence[Sequence[Passage]], scores: bool) -> Response:
    return _json(200, {"result": [[_document(passage, scores) for passage in row] for row in found]})


def _document(passage: Passage, scores: bool) -> dict[str, Any]:
    document = {"id": passage.docid, "contents": passage.contents}
    return {"document": document, "score": passage.score} if scores else document


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=program("atod_envs.searchqa.serve"), description="Serve retrieval over HTTP.")
    parser.add_argument(
        "--index", help="folder of an index (also wiki/dense, wiki/hybrid); default: the built-in world"
    )
    parser.add_argument("--data", help="data folder with a corpus, indexed with BM25 on first use")
    parser.add_argument("--shard", action="append", default=[], help="address of a server of one part; repeat for each")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--topk", type=int, default=TOPK, help="where a request names none; default: %(default)s")
    options = parser.parse_args(arguments)
    service: SearchService
    try:
        with stoppable():
            if options.shard:
                service = ShardedSearch([HttpSearch(url, scored=True) for url in options.shard])
            else:
                service = load_service(options.data, options.index or "bm25", None)
            server = RetrievalServer(service, options.host, options.port, options.topk)
    except (AtodError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with server:
        return server.serve_command(f"serving on {server.url}")


if __name__ == "__main__":
    sys.exit(main())
