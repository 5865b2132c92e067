"""The HTTP and WebSocket server around :class:`~atod_envs.serve.sessions.Sessions`.

Every call is ``POST /v1/<call>`` with a JSON object, or a message ``{"id": ..., "call": ..., ...}`` on the WebSocket
``/v1/ws``, answered with the same ``id``. Sessions belong to no connection: a client that lost its connection goes on
over another one. The invariant: nothing is done for a client without the token, and nothing more is read of a client
while its answers wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from atod_envs.http.messages import Refused, parse_object
from atod_envs.options import needed_imports
from atod_envs.serve.codec import dumps
from atod_envs.serve.sessions import Sessions, answer_of

with needed_imports("serve", __name__):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    from atod_envs.http.guard import Access, HttpLimits, Room, make_app
    from atod_envs.http.server import Server, listen, server_of

__all__ = ["listen", "make_server"]

log = logging.getLogger(__name__)

CALLS_UNDER_WAY = 64
"""Calls of one WebSocket that are not answered yet; the next is read when one of them is."""


def make_server(
    sessions: Sessions, *, token: str = "", certificate: str | None = None, key: str | None = None
) -> Server:
    """The server; ``run(sockets=[listen(host, port)])`` serves until it is stopped.

    Args:
        sessions: carries out the calls.
        token: what clients send as ``Authorization: Bearer <token>``; empty asks for none, and then refuses the pages
            of others.
        certificate: file with the TLS certificate; ``None`` for plain HTTP.
        key: file with its key.
    """

    async def health(request: Request) -> Response:
        return _response(200, {"status": "ok", "sessions": len(sessions)})

    async def call(request: Request) -> Response:
        body = await request.body()
        try:
            return _response(200, await sessions.call(request.path_params["call"], _message(body)))
        except Exception as error:
            return _response(*answer_of(error))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(sessions))
        yield
        sweeper.cancel()
        sessions.shutdown()

    async def websocket(socket: WebSocket) -> None:
        await _converse(socket, sessions)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/{call}", call, methods=["POST"]),
        WebSocketRoute("/v1/ws", websocket),
    ]
    limits = HttpLimits(connections=sessions.limits.connections, body_bytes=sessions.limits.message_bytes)
    app = make_app(routes, _refuse, limits, Access(token), lifespan)
    return server_of(app, limits, websocket=True, certificate=certificate, key=key)


async def _converse(socket: WebSocket, sessions: Sessions) -> None:
    """Answer the calls of one WebSocket, several at the same time."""
    await socket.accept()
    places = asyncio.Semaphore(CALLS_UNDER_WAY)
    room: Room = socket.app.state.room
    under_way: set[asyncio.Task[None]] = set()

    async def answer(received: str | bytes) -> None:
        mark: Any = None
        held = 0
        try:
            message = _message(received)
            mark = message.pop("id", None)
            if not (mark is None or isinstance(mark, int | str)):
                mark = None
                raise Refused(400, "id: expected a number or a string")
            room.take(len(received))
            held = len(received)
            status, body = 200, await sessions.call(str(message.pop("call", "")), message)
        except Exception as error:
            status, body = answer_of(error)
        try:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client is gone; its session stays
                status, text = _encoded(status, body, id=mark)
                await socket.send_text(text.decode("ascii"))
        finally:  # only now: an answer that waits for its client is not answered
            room.give(held)
            places.release()

    try:
        while True:
            await places.acquire()
            async with asyncio.timeout(sessions.limits.idle_seconds):
                received = await socket.receive()
            if received["type"] == "websocket.disconnect":
                break
            task = asyncio.create_task(answer(received.get("text") or received.get("bytes") or ""))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    except TimeoutError:
        await socket.close(1001, "idle for too long")
    finally:
        await asyncio.gather(*under_way, return_exceptions=True)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(min(15.0, sessions.limits.idle_seconds / 4))
        closed = sessions.expire()
        if closed:
            log.info("closed %d idle sessions", closed)


def _message(data: str | bytes) -> dict[str, Any]:
    return parse_object(data or b"{}")  # arguments are flat: there is no list to restore


def _encoded(status: int, message: dict[str, Any], **mark: Any) -> tuple[int, bytes]:
    """A message's bytes; ``mark`` and the status are added for a WebSocket, which has no other place for them."""
    try:
        return status, dumps({**message, **mark, "status": status} if mark else message)
    except TypeError as error:
        status, message = answer_of(error)
        return status, dumps({**message, **mark, "status": status} if mark else message)


def _response(status: int, message: dict[str, Any]) -> Response:
    status, body = _encoded(status, message)
    return Response(body, status, media_type="application/json")


def _refuse(status: int, message: str) -> Response:
    return _response(*answer_of(Refused(status, message)))
