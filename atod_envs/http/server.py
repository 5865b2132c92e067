"""What lies under every HTTP server of this project: limits, checks, and a stop that loses nothing.

- **A slow client costs nothing but its own connection.** Headers, bodies and the taking of answers have a time; where
  all connections are taken, the one that has kept the server waiting longest makes room.
- **No more is read of a client than is answered.** A connection has one request under way, and bodies have a size, each
  and together.
- **Web pages of others cannot use a server without a token**: no foreign ``Origin``, on this machine no foreign
  ``Host``, no frames.
- **No request gets a traceback**: what is wrong with it is said in the server's own form, with status and reason.
- ``SIGTERM`` and ``SIGINT`` end a server after the answers under way; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

from atod_envs.errors import AtodError
from atod_envs.options import needed_imports

with needed_imports("serve", __name__):
    import uvicorn
    from starlette.types import ASGIApp

    from atod_envs.http.connections import ServedHttp, ServedWebSocket, Watched
    from atod_envs.http.guard import HttpLimits

log = logging.getLogger(__name__)


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
                connection.look(now, self.limits)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all connections, those included that were accepted a moment too late to be told by uvicorn."""
        told = set(self.server_state.connections)

        async def tell() -> None:
            while True:
                await asyncio.sleep(0.05)
                for connection in self.server_state.connections - told:
                    told.add(connection)
                    connection.shutdown()

        telling = asyncio.create_task(tell())
        try:
            await super().shutdown(sockets)
        finally:
            telling.cancel()

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
        app: from :func:`atod_envs.http.guard.make_app`.
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


def require_free(host: str, port: int) -> None:
    """Say now that an address cannot be had: before seconds are spent on making what is to be served there.

    Raises:
        AtodError: says why.
    """
    listen(host, port).close()


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
    """Print a line, or log it where no terminal reads: a server outlives the terminal that started it."""
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
