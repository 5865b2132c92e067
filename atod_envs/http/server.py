"""What lies under every HTTP server of this project: limits, checks, and a stop that loses nothing.

- **A slow client costs nothing but its own connection.** Headers, bodies and the taking of answers have a time; where all connections
  are taken, the one that has kept the server waiting longest makes room.
- **No more is read of a client than is answered.** A connection has one request under way, and bodies have a size, each and together.
- **Web pages of others cannot use a server without a token**: no foreign ``Origin``, on this machine no foreign ``Host``, no frames.
- **No request gets a traceback**: what is wrong with it is said in the server's own form, with status and reason.
- ``SIGTERM`` and ``SIGINT`` end a server after the answers under way; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Self

from atod_envs.errors import AtodError
from atod_envs.http.client import is_loopback
from atod_envs.http.messages import Refused, is_local_name
from atod_envs.options import needed_imports

with needed_imports("serve", __name__):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from atod_envs.http.connections import ServedHttp, ServedWebSocket, Watched

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
        held_bytes: bodies of all requests under way together.
        head_seconds: time in which the head of a request has to arrive.
        body_seconds: time in which its body has to arrive.
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


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask.

    Attributes:
        token: what clients send as ``Authorization: Bearer <token>``; empty asks for none, and refuses the web pages of others.
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
        if self.token:
            given = headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise Refused(401, "a token is needed: send it as 'Authorization: Bearer TOKEN'")
        elif "origin" in headers and not (self.pages and headers["origin"].partition("://")[2] == host):
            raise Refused(403, "calls from web pages of others are refused, unless the server has a token")


class _Guard:
    """Checks every request, counts what arrives, and turns errors into answers; see the module's promises."""

    def __init__(self, app: ASGIApp, limits: HttpLimits, access: Access, refuse: Refuse) -> None:
        self._app, self._limits, self._access, self._refuse = app, limits, access, refuse
        self._held = 0

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
            self._held -= body.held
        if response is not None:
            if not body.complete:
                await body.drain()
                response.headers["Connection"] = "close"
            await response(scope, receive, _guarded(send))

    def _room(self, size: int) -> None:
        if self._held + size > self._limits.held_bytes:
            raise Refused(503, "the server has too many requests under way; try again later")
        self._held += size


class _Body:
    """The body of one request as it arrives."""

    def __init__(self, receive: Receive, limits: HttpLimits, room: Callable[[int], None]) -> None:
        self._receive, self._limits, self._room = receive, limits, room
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self.held, self.complete = 0, False

    def declare(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        # h11 limits what has come of a head that is not complete; this is for one that came all at once.
        head = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in headers.raw)
        if head > self._limits.head_bytes:
            raise Refused(431, f"the head of the request has more than {self._limits.head_bytes} bytes")
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
            self._room(size)
            self.held += size
            self.complete = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on for a moment: whoever is still sending does not read the answer."""
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

    guard = Middleware(_Guard, limits, access, refuse)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: refused}, lifespan=lifespan)


class Server(uvicorn.Server):
    """uvicorn, with an eye on every connection, and signals that end it without killing the process.

    Args:
        config: uvicorn's own.
        limits: how much the server gives.

    Attributes:
        ready: called as soon as requests are answered.
    """

    def __init__(self, config: uvicorn.Config, limits: HttpLimits) -> None:
        super().__init__(config)
        self.limits = limits
        self.ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and say so when requests are answered."""
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()

    async def on_tick(self, counter: int) -> bool:
        """Look at the connections twice a second."""
        if counter % 5 == 0:
            now = asyncio.get_running_loop().time()
            for connection in [c for c in self.server_state.connections if isinstance(c, Watched)]:
                connection.look(now, self.limits.head_seconds, self.limits.answer_seconds)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after the answers under way; at a second signal, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def server_of(
    app: ASGIApp,
    limits: HttpLimits,
    *,
    websocket: bool = False,
    certificate: str | None = None,
    key: str | None = None,
) -> Server:
    """The server of an application; ``run(sockets=[listen(host, port)])`` serves until it is stopped.

    Args:
        app: from :func:`make_app`.
        limits: how much it gives.
        websocket: whether it speaks WebSocket, too.
        certificate: file with the TLS certificate; ``None`` for plain HTTP.
        key: file with its key.
    """
    config = uvicorn.Config(
        app,
        http=ServedHttp,
        ws=ServedWebSocket if websocket else "none",
        h11_max_incomplete_event_size=limits.head_bytes,
        ws_max_size=limits.body_bytes,
        ws_per_message_deflate=False,
        # One more than there are: the last one may be that for which another makes room.
        limit_concurrency=limits.connections + 1,
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # it goes to call_later
        timeout_graceful_shutdown=5,
        backlog=2048,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    return Server(config, limits)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; they wait until a server runs on it.

    It names its protocol: asyncio switches off the delay of small packets only where it is named.

    Raises:
        AtodError: the address cannot be had; says why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AtodError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from error
    return listening


class HttpServer:
    """A server on a port, with the calls of :class:`socketserver.BaseServer`.

    Args:
        server: from :func:`server_of`.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Attributes:
        socket: where connections arrive.
        server_address: its host and port.

    Raises:
        AtodError: the address cannot be had.
    """

    def __init__(self, server: Server, host: str, port: int) -> None:
        self._server = server
        self.socket = listen(host, port)
        self.server_address: tuple[str, int] = self.socket.getsockname()[:2]
        self._stopped = threading.Event()
        self._stopped.set()

    @property
    def origin(self) -> str:
        """Address of the server, without a path."""
        host, port = self.server_address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def connections(self) -> int:
        """Connections at present."""
        return len(self._server.server_state.connections)

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until :meth:`shutdown` or a signal.

        Args:
            poll_interval: as in the standard library; plays no part here.
        """
        self._stopped.clear()
        try:
            self._server.run(sockets=[self.socket])
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """Stop serving, after the answers under way."""
        self._server.should_exit = True
        self._stopped.wait()

    def server_close(self) -> None:
        """Let the port go."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server_close()

    def serve_command(self, announcement: str) -> int:
        """Serve as a command does, until a signal; returns its exit status.

        Args:
            announcement: printed as soon as requests are answered.
        """
        return serve_command(self._server, self.socket, announcement)


def serve_command(server: Server, listening: socket.socket, announcement: str) -> int:
    """Serve until ``SIGTERM`` or ``SIGINT``; returns the exit status of a command.

    Args:
        server: from :func:`server_of`.
        listening: from :func:`listen`.
        announcement: printed as soon as requests are answered.
    """
    server.ready = lambda: announce(announcement)
    server.run(sockets=[listening])
    listening.close()
    _leave_no_thread()
    return 0


def announce(text: str) -> None:
    """Print a line, or log it where nobody reads: a server outlives the terminal that started it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a closed pipe; a closed file
        log.warning("standard output is closed; %s", text)
        # Else the interpreter fails at its end, when it flushes.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _leave_no_thread() -> None:
    """End the process where a call still hangs in a thread, which the interpreter would wait for."""
    if threading.current_thread() is not threading.main_thread():
        return
    others = [t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon]
    for thread in others:
        thread.join(1.0)
    if any(thread.is_alive() for thread in others):
        log.warning("a call still hangs; it is given up")
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(0)
