"""Serve retrieval over HTTP with Search-R1's API: `python -m atod_envs.searchqa.serve --index wiki --port 8000`.

`POST /retrieve` takes `{"queries": [...], "topk": 3, "return_scores": true}` (also `"query"` for one query) and answers
`{"result": [[{"document": {"id": ..., "contents": ...}, "score": ...}, ...], ...]}`; `GET /health` says what is
served. The invariant: requests that wait at the same time are searched together, equal queries once, and a request is
answered completely or with an error status, never in part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import socket
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from atod_envs.errors import AtodError
from atod_envs.options import program
from atod_envs.retrieval.batching import Batcher
from atod_envs.retrieval.http import BATCH_SIZE, HttpSearch, ShardedSearch
from atod_envs.retrieval.protocol import LocalSearch, Passage, RetrievalError, SearchService

from .sources import load_service

_log = logging.getLogger(__name__)

TOPK: Final = 3
MAX_BODY: Final = 64 << 20
MAX_TOPK: Final = 1000


class _BadRequest(Exception):
    """The client's fault; the message says what was expected."""


class RetrievalServer(ThreadingHTTPServer):
    """An HTTP server around a search service.

    Args:
        service: answers the queries; used by one thread at a time.
        host: address to listen on.
        port: port to listen on; 0 takes a free one (see `url`).
        topk: passages for a request that names no number.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, service: SearchService, host: str = "127.0.0.1", port: int = 0, topk: int = TOPK) -> None:
        super().__init__((host, port), _Handler)
        self.service = service
        self.topk = topk
        self.batcher = Batcher(lambda queries, k: service.retrieve(queries, k), workers=1, batch_size=BATCH_SIZE)

        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, and remember it."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    @property
    def url(self) -> str:
        """Address of `/retrieve`."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/retrieve"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a connection that broke off (a client that stopped waiting); the server goes on."""
        _log.info("connection with %s broke off", client_address, exc_info=True)

    def server_close(self) -> None:
        """Stop listening, end connections that are kept alive, and let the search thread end."""
        super().server_close()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        self.batcher.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RetrievalServer

    def do_GET(self) -> None:
        """Say what is served."""
        if self.path.partition("?")[0] != "/health":
            self._send(404, {"detail": "expected GET /health or POST /retrieve"})
            return
        service = self.server.service
        about = {"status": "ok", "topk": self.server.topk}
        if isinstance(service, LocalSearch):
            about |= {"passages": len(service.corpus), "corpus_sha256": service.corpus.checksum}
        self._send(200, about)

    def do_POST(self) -> None:
        """Answer a retrieval request."""
        try:
            queries, k, scores = self._request()
            found = self.server.batcher.retrieve(queries, k)
        except _BadRequest as error:
            self._send(400, {"detail": str(error)})
        except RetrievalError as error:
            self._send(503, {"detail": str(error)})
        except Exception as error:
            _log.exception("a search failed")
            self._send(500, {"detail": f"{type(error).__name__}: {error}"})
        else:
            self._send(200, {"result": [[_document(passage, scores) for passage in row] for row in found]})

    def _request(self) -> tuple[list[str], int, bool]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True  # the body is not read, so the connection cannot go on
            raise _BadRequest(f"Content-Length {length!r}; expected a body of at most {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if self.path.partition("?")[0] != "/retrieve":
            raise _BadRequest(f"path {self.path!r}; expected /retrieve")
        try:
            request = json.loads(body)
        except ValueError as error:
            raise _BadRequest(f"the body is no JSON: {error}") from error
        if not isinstance(request, dict):
            raise _BadRequest("the body is no JSON object")
        queries = request.get("queries", request.get("query"))
        queries = [queries] if isinstance(queries, str) else queries
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise _BadRequest("expected 'queries', a list of strings")
        k = request.get("topk") or self.server.topk
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_TOPK:
            raise _BadRequest(f"topk={k!r}; expected a number from 1 to {MAX_TOPK}")
        # A single "query" always came with scores in the clients that send it.
        return queries, k, bool(request.get("return_scores", "query" in request))

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Send the access log to logging instead of standard error."""
        _log.debug(format, *args)


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
    try:
        service: SearchService
        if options.shard:
            service = ShardedSearch([HttpSearch(url) for url in options.shard])
        else:
            service = load_service(options.data, options.index or "bm25", None)
        server = RetrievalServer(service, options.host, options.port, options.topk)
    except (AtodError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"serving on {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
