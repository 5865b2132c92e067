"""What is checked of every request before a server's own code sees it; see :mod:`atod_envs.http.server`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from atod_envs.http.client import is_loopback
from atod_envs.http.messages import Refused, is_local_name
from atod_envs.options import needed_imports

with needed_imports("serve", __name__):
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

Refuse = Callable[[int, str], Response]
"""Says no in a server's own form: status and reason become a response."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How much of everything a server gives to its clients.

    Attributes:
        connections: connections at the same time.
        head_bytes: longest head of a request.
        body_bytes: longest body of a request, and longest message on a WebSocket.
        held_bytes: bodies of all requests under way and messages of all WebSockets together.
        head_seconds: time in which the head of a request has to arrive.
        body_seconds: time in which its body, or a message on a WebSocket, has to arrive.
        answer_seconds: longest time in which a client takes nothing of an answer that waits for it.
        idle_seconds: time that a connection is kept without a request.
    """

    connections: int = 1024
    head_bytes: int = 1 << 15
    body_bytes: int = 1 << 20
    held_bytes: int = 1 << 28
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    idle_seconds: float = 75.0


class Room:
    """What a server holds of all its clients' requests together.

    Args:
        limit: bytes.

    Attributes:
        held: bytes at present.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, size: int) -> None:
        """Count some more bytes.

        Raises:
            Refused: there is no room for them.
        """
        if self.held + size > self.limit:
            raise Refused(503, "the server has too many requests under way; try again later")
        self.held += size

    def give(self, size: int) -> None:
        """Count some bytes no more."""
        self.held -= size


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask.

    Attributes:
        token: what clients send as ``Authorization: Bearer <token>``; empty asks for none, and refuses the web pages of
            others.
        pages: the server has pages of its own, which may send forms to it.
        open_paths: what everybody may read.
    """

    token: str = ""
    pages: bool = False
    open_paths: frozenset[str] = frozenset({"/health"})

    def check(self, scope: Scope) -> None:
        """Refuse a request by its head.

        Raises:
            Refused: says why.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.token and scope["server"] and is_loopback(scope["server"][0]) and not is_local_name(host):
            # A page whose name was made to mean this machine (DNS rebinding) has its own name there.
            raise Refused(403, f"this server is not called {host[:80]!r}; use localhost or 127.0.0.1")
        if scope["path"] in self.open_paths:
            return
        for name in ("authorization", "origin"):
            if len(headers.getlist(name)) > 1:
                raise Refused(400, f"the header {name!r} stands twice")
        if self.token:
            given = headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise Refused(401, "a token is needed: send it as 'Authorization: Bearer TOKEN'")
        elif "origin" in headers and not (
            self.pages and headers["origin"].lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        ):
            raise Refused(403, "calls from web pages of others are refused, unless the server has a token")


class _Guard:
    """Checks every request, counts what arrives, and turns errors into answers; see the module's promises."""

    def __init__(self, app: ASGIApp, limits: HttpLimits, room: Room, access: Access, refuse: Refuse) -> None:
        self._app, self._limits, self._room, self._access, self._refuse = app, limits, room, access, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            try:
                self._access.check(scope)
            except Refused as error:
                log.info("a WebSocket was refused: %s", error)
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client sees HTTP 403
                return
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._limits, self._room)
        response: Response | None = None
        try:
            self._access.check(scope)
            body.declare(scope)
            await self._app(scope, body.receive, _guarded(send))
        except Refused as error:
            response = self._refuse(error.status, str(error))
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except ClientDisconnect:
            return
        except Exception:
            log.exception("a request failed")
            response = self._refuse(500, "the server failed; its log says why")
        finally:
            self._room.give(body.held)
        if response is not None:
            if not body.complete:
                await body.drain()
                response.headers["Connection"] = "close"
            await response(scope, receive, _guarded(send))


class _Body:
    """The body of one request as it arrives."""

    def __init__(self, receive: Receive, limits: HttpLimits, room: Room) -> None:
        self._receive, self._limits, self._room = receive, limits, room
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self.held, self.complete = 0, False

    def declare(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        # h11 limits what has come of a head that is not complete; this is for one that came all at once.
        head = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in headers.raw)
        if head > self._limits.head_bytes:
            raise Refused(431, f"the head of the request has more than {self._limits.head_bytes} bytes")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "the body is packed (Content-Encoding); send it as it is")
        length = int(headers.get("content-length", "0"))  # h11 lets nothing but digits through
        if length > self._limits.body_bytes:
            raise self._too_long()
        self.complete = not length and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self.complete else self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self._limits.body_seconds:g} s") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self.held + size > self._limits.body_bytes:
                raise self._too_long()
            self._room.take(size)
            self.held += size
            self.complete = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on for a moment: a client that is still sending does not read the answer."""
        left = 16 * self._limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b"")) + 1
                    if not message.get("more_body", False):
                        return

    def _too_long(self) -> Refused:
        return Refused(413, f"the message has more than {self._limits.body_bytes} bytes")


def _guarded(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            # The address of a page may be all that protects it; "no-referrer" would make a form's Origin "null".
            headers["Referrer-Policy"] = "same-origin"
            headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        await send(message)

    return guarded


def make_app(
    routes: Sequence[BaseRoute],
    refuse: Refuse,
    limits: HttpLimits,
    access: Access,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
) -> Starlette:
    """An application behind the checks. Its endpoints raise :class:`~atod_envs.http.messages.Refused` to say no.

    Its ``state.room`` is the :class:`Room` of all requests; a WebSocket's endpoint counts what it works on there.

    Args:
        routes: the server's own.
        refuse: how it says no.
        limits: how much it gives.
        access: who may ask.
        lifespan: runs around the serving.
    """

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refuse(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}")

    room = Room(limits.held_bytes)
    guard = Middleware(_Guard, limits, room, access, refuse)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: refused}, lifespan=lifespan)
    app.state.room = room
    return app
