"""The HTTP and WebSocket server around :class:`~atod_envs.serve.sessions.Sessions`.

Every call is ``POST /v1/<call>`` with a JSON object, or a message ``{"id": ..., "call": ..., ...}`` on the WebSocket ``/v1/ws``,
answered with the same ``id``. Sessions belong to no connection: a client that lost its connection goes on over another one.
The invariant: nothing is read beyond the limit on size, and nothing is done for a client without the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

from atod_envs.serve.codec import dumps, loads
from atod_envs.serve.sessions import Limits, Refused, Sessions, answer_of

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise ImportError("the server needs starlette, uvicorn and websockets: pip install 'atod[serve]'") from error

log = logging.getLogger(__name__)

READ_SECONDS = 30.0
"""Seconds in which the body of a request has to arrive."""
CALLS_UNDER_WAY = 256
"""Calls that one WebSocket may have under way; more have to wait until some are answered."""


def make_app(sessions: Sessions, token: str = "") -> Starlette:
    """The ASGI application.

    Args:
        sessions: carries out the calls.
        token: what clients send as ``Authorization: Bearer <token>``; empty asks for none, and then refuses browsers (a page
            of somebody else's could otherwise speak to a server on this machine).
    """
    limits = sessions.limits

    def check(headers: Mapping[str, str]) -> None:
        if token:
            given = headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise Refused(401, "a token is needed: send it as 'Authorization: Bearer TOKEN'")
        elif "origin" in headers:
            raise Refused(403, "calls from web pages need a token; start the server with one")

    async def health(request: Request) -> Response:
        return _response(200, {"status": "ok", "sessions": len(sessions)})

    async def http(request: Request) -> Response:
        try:
            check(request.headers)
            body = await asyncio.wait_for(_body(request, limits), READ_SECONDS)
            return _response(200, await sessions.call(request.path_params["call"], _message(body)))
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError:
            return _response(*answer_of(Refused(408, f"the request did not arrive within {READ_SECONDS:g} s")))
        except Exception as error:
            return _response(*answer_of(error))

    async def websocket(socket: WebSocket) -> None:
        try:
            check(socket.headers)
        except Refused as error:
            log.info("a WebSocket was refused: %s", error)
            await socket.close(1008)  # before it is accepted: the client sees HTTP 403
            return
        await socket.accept()
        room = asyncio.Semaphore(CALLS_UNDER_WAY)
        under_way: set[asyncio.Task[None]] = set()

        async def answer(received: str | bytes) -> None:
            mark: Any = None
            try:
                message = _message(received)
                mark = message.pop("id", None)
                if not (mark is None or isinstance(mark, int | str)):
                    mark = None
                    raise Refused(400, "id: expected a number or a string")
                status, body = 200, await sessions.call(str(message.pop("call", "")), message)
            except Exception as error:
                status, body = answer_of(error)
            finally:
                room.release()
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client is gone; its session stays
                status, text = _encoded(status, body, id=mark)
                await socket.send_text(text.decode("ascii"))

        try:
            while True:
                await room.acquire()
                received = await socket.receive()
                if received["type"] == "websocket.disconnect":
                    break
                task = asyncio.create_task(answer(received.get("text") or received.get("bytes") or ""))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
        finally:
            await asyncio.gather(*under_way, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(sessions))
        yield
        sweeper.cancel()
        sessions.shutdown()

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/{call}", http, methods=["POST"]),
        WebSocketRoute("/v1/ws", websocket),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def make_server(
    sessions: Sessions, *, token: str = "", certificate: str | None = None, key: str | None = None
) -> uvicorn.Server:
    """The server; ``run(sockets=[listen(host, port)])`` serves until it is stopped.

    Args:
        sessions: carries out the calls.
        token: see :func:`make_app`.
        certificate: file with the TLS certificate; ``None`` for plain HTTP.
        key: file with its key.
    """
    config = uvicorn.Config(
        make_app(sessions, token),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=sessions.limits.message_bytes,
        ws_per_message_deflate=False,
        limit_concurrency=sessions.limits.connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=2048,
        server_header=False,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for :func:`make_server`'s ``run(sockets=[...])``.

    It names its protocol: asyncio switches off the delay of small packets only where it is named.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


async def _body(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "0")
    parts: list[bytes] = []
    size = int(declared) if declared.isdigit() else 0
    if size <= limits.message_bytes:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limits.message_bytes:
                break
            parts.append(part)
    if size > limits.message_bytes:
        raise Refused(413, f"the message has more than {limits.message_bytes} bytes")
    return b"".join(parts)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(min(15.0, sessions.limits.idle_seconds / 4))
        closed = sessions.expire()
        if closed:
            log.info("closed %d idle sessions", closed)


def _message(data: str | bytes) -> dict[str, Any]:
    try:
        return loads(data or b"{}")
    except ValueError as error:  # also text that is not UTF-8
        raise Refused(400, f"not a JSON object: {error}") from error


def _encoded(status: int, message: dict[str, Any], **mark: Any) -> tuple[int, bytes]:
    """A message's bytes; ``mark`` and the status are added for a WebSocket, which has no other place for them."""
    try:
        return status, dumps({**message, **mark, "status": status} if mark else message)
    except TypeError as error:
        status, message = answer_of(error)
        return status, dumps({**message, **mark, "status": status} if mark else message)


def _response(status: int, message: dict[str, Any]) -> Response:
    status, body = _encoded(status, message)
    headers = (
        {"Connection": "close"} if status in (408, 413) else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    )
    return Response(body, status, headers, "application/json")
