"""WebSockets whose clients read nothing, send thousands of pieces or pings, or say nothing at all."""

import contextlib
import struct
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")

from servers import TOY_OFFERS
from wire import connected, eventually, post, serving

from atod_envs.http.server import HttpServer
from atod_envs.serve.app import CALLS_UNDER_WAY, make_server
from atod_envs.serve.sessions import Limits, Sessions


def open_websocket(port, receive=1 << 20):
    connection = connected(port, receive)
    connection.sendall(
        b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    assert head.startswith(b"HTTP/1.1 101")
    return connection


def frame(opcode, data):
    """A client's frame, masked with zeros."""
    assert len(data) < 126
    return struct.pack("!BB", 0x80 | opcode, 0x80 | len(data)) + bytes(4) + data


class Counting(Sessions):
    """Answers every call with 100 KB."""

    calls = 0

    async def call(self, name, request):
        self.calls += 1
        return {"text": "x" * 100_000}


def test_a_websocket_that_reads_nothing_is_not_read_from():
    sessions = Counting(list(TOY_OFFERS))
    with serving(HttpServer(make_server(sessions), "127.0.0.1", 0)) as port:
        connection = open_websocket(port, receive=1 << 16)
        asked = 1000
        threading.Thread(
            target=connection.sendall, args=(frame(1, b'{"id": 1, "call": "about"}') * asked,), daemon=True
        ).start()
        before = -1
        while sessions.calls != before:
            before = sessions.calls
            time.sleep(1.5)
        # What is under way, and what fits between the two sockets.
        assert CALLS_UNDER_WAY <= sessions.calls < CALLS_UNDER_WAY + 200
        size = 0
        while sessions.calls < asked or size < asked * 100_000:
            size += len(connection.recv(1 << 20))
        assert sessions.calls == asked
        connection.close()


def test_a_message_in_thousands_of_pieces_is_given_up():
    """Empty ones add nothing to its length, and would be kept for ever."""
    with serving(HttpServer(make_server(Sessions(list(TOY_OFFERS))), "127.0.0.1", 0)) as port:
        connection = open_websocket(port)
        call = b'{"id": 1, "call": "about"}'
        more = [bytes([0, 0x80]) + bytes(4)] * 900 + [frame(0, b"")]
        connection.sendall(bytes([1, 0x80 | len(call)]) + bytes(4) + call + b"".join(more))
        answer = connection.recv(1 << 16)
        assert answer[:1] == b"\x81" and b'"id"' in answer
        with contextlib.suppress(ConnectionError):
            connection.sendall(bytes([1, 0x80]) + bytes(4) + more[0] * 20_000)
            answer = connection.recv(1 << 16)
            assert answer == b"", "it is still open"
        connection.close()
        assert post(port, "/v1/about", b"{}")[0] == 200


def test_pings_that_nobody_hears_pile_up_nowhere():
    server = make_server(Sessions(list(TOY_OFFERS)))
    with serving(HttpServer(server, "127.0.0.1", 0)) as port:
        connection = open_websocket(port, receive=1 << 14)
        for _ in range(100):
            connection.sendall(frame(9, b"x" * 125) * 1000)
        (served,) = server.server_state.connections
        eventually(lambda: served.transport.get_write_buffer_size() > 0, "the pongs fit between the sockets")
        assert served.transport.get_write_buffer_size() < 1 << 20
        connection.close()


def test_an_idle_websocket_is_closed():
    sessions = Sessions(list(TOY_OFFERS), Limits(idle_seconds=0.3))
    with serving(HttpServer(make_server(sessions), "127.0.0.1", 0)) as port:
        connection = open_websocket(port)
        assert connection.recv(100)[:4] == b"\x88\x13" + struct.pack("!H", 1001)
        connection.close()
