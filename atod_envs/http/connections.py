"""uvicorn's connections, watched: what a client owes (a head, or the taking of an answer) it owes for a limited time.

uvicorn times idle connections only, and keeps reading from a client that takes no answers; see
:mod:`atod_envs.http.server` for what is promised.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from atod_envs.http.guard import HttpLimits, Room
from atod_envs.http.messages import Refused

log = logging.getLogger(__name__)

FREE_PIECES, SMALLEST_PIECE = 1000, 64
"""Pieces of a body that may be of any size, and bytes that those of a longer one have on average."""


class Watched:
    """The watch that is kept on a connection.

    Attributes:
        since: when its client last got on, on the loop's clock: it connected, began a request, was answered, or took
            something.
    """

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    since: float = 0.0
    _unsent: int = 0
    _taken: float = 0.0

    def look(self, now: float, limits: HttpLimits) -> None:
        """End the connection if its client has let the server wait too long.

        Args:
            now: on the loop's clock.
            limits: the times that it has.
        """
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent or not self._unsent:
            self._taken = now
        self._unsent = unsent
        waited = now - self.since
        if (
            (unsent and now - self._taken > limits.answer_seconds)
            or (self.owes_head() and waited > limits.head_seconds)
            or (self.owes_message() and waited > limits.body_seconds)
        ):
            self.transport.abort()

    def owes_head(self) -> bool:
        """Whether a request has begun (or should have) and its head is not there."""
        return False

    def owes_message(self) -> bool:
        """Whether a message has begun and its rest is awaited."""
        return False


class _Reader(h11.Connection):
    """Reads requests; a body in thousands of tiny pieces, each of which costs as much as a large one, is none."""

    _pieces = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > FREE_PIECES and self._bytes < SMALLEST_PIECE * self._pieces:
                raise h11.RemoteProtocolError(
                    f"a body in {self._pieces} pieces of less than {SMALLEST_PIECE} bytes; send it with a Content-Length"
                )
        return event


class ServedHttp(H11Protocol, Watched):
    """An HTTP connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = _Reader(h11.SERVER, self.config.h11_max_incomplete_event_size or 1 << 16)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch a new connection; where all are taken, the one that owes longest makes room for it."""
        super().connection_made(transport)
        self.since = self.loop.time()
        limit = (self.config.limit_concurrency or sys.maxsize) - 1
        if len(self.connections) > limit:
            owing = [c for c in self.connections if isinstance(c, ServedHttp) and c is not self and c.is_waiting()]
            if owing:
                longest = min(owing, key=lambda connection: connection.since)
                self.connections.discard(longest)  # at once: the loss is noticed a moment later
                longest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Note when a request begins."""
        if self.timeout_keep_alive_task is not None:
            self.since = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Note when a request ends."""
        self.since = self.loop.time()
        super().on_response_complete()

    def owes_head(self) -> bool:
        """Whether the head of a request is awaited; a connection that is idle after an answer owes none."""
        begun = self.timeout_keep_alive_task is None or bool(self.conn.trailing_data[0])
        return begun and (self.cycle is None or self.cycle.response_complete)

    def is_waiting(self) -> bool:
        """Whether the server waits for this client: for a request, the rest of one, or the taking of an answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.transport.get_write_buffer_size() > 0

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that is no HTTP."""
        error = sys.exc_info()[1]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(f"{msg} ({str(error)!a})" if error else msg)
        else:  # an answer is already under way
            self.transport.close()


class ServedWebSocket(WebSocketsSansIOProtocol, Watched):
    """A WebSocket. Answers wait while its client takes none, which uvicorn has itself since 0.53.

    Until the application takes a message, it is counted here, whole or not; then the application counts it.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._room: Room = cast("Any", self.config.app).state.room
        self._queued = self._unfinished = self._counted = 0

    def data_received(self, data: bytes) -> None:
        """Count what has come; where there is no room for it, the connection ends."""
        if not self._unfinished:
            self.since = self.loop.time()
        super().data_received(data)
        self._unfinished = len(self.conn.reader.buffer) + sum(map(len, self.frames))
        try:
            self._count(self._queued + self._unfinished)
        except Refused as error:
            log.info("a WebSocket was given up: %s", error)
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        """Let a whole message wait for the application."""
        self._queued += sum(map(len, self.frames))
        super().send_receive_event_to_app()

    async def receive(self) -> Any:
        """Give the application a message, and go on reading."""
        message = await super().receive()
        self.since = self.loop.time()
        if self.queue.empty():
            self._queued = 0
            self._count(self._unfinished)
        return message

    def owes_message(self) -> bool:
        """Whether a part of a message has come; nothing is owed while the server does not read."""
        return self._unfinished > 0 and not self.read_paused

    def _count(self, size: int) -> None:
        self._room.take(size - self._counted)
        self._counted = size

    def handle_cont(self, event: Frame) -> None:
        """Take a piece of a message; one of thousands of pieces, which no length of a message limits, is given up."""
        if len(self.frames) < FREE_PIECES:
            super().handle_cont(event)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Let answers wait."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Let answers go on."""
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let answers end that waited for the client."""
        super().connection_lost(exc)
        self.writable.set()
        self._queued = self._unfinished = 0
        self._count(0)

    def handle_ping(self) -> None:
        """Answer a ping, unless its client takes no answers: they would pile up."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()
