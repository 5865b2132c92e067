"""WebSockets whose clients read nothing, send thousands of pieces or pings, or say nothing at all."""

import contextlib
import json
import struct
import threading
import time
from dataclasses import replace

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
    short = len(data) < 126
    length = struct.pack("!B", 0x80 | len(data)) if short else struct.pack("!BH", 0x80 | 126, len(data))
    return bytes([0x80 | opcode]) + length + bytes(4) + data


def call_of(size, **call):
    """A call's frame, with blanks that make it so long."""
    return frame(1, json.dumps(call).encode().ljust(size))


def answer(connection):
    data = connection.recv(1 << 16)
    return json.loads(data[data.index(b"{") :])


def closed(connection):
    with contextlib.suppress(ConnectionError):
        return connection.recv(1 << 16) == b""
    return True


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


@pytest.mark.parametrize("pieces", [False, True])
def test_a_message_has_a_time(pieces):
    server = make_server(Sessions(list(TOY_OFFERS)))
    server.limits = replace(server.limits, body_seconds=1.0)
    begun = bytes([1, 0x80 | 1]) + bytes(4) + b"{" if pieces else call_of(2000, id=1, call="about")[:1000]
    with serving(HttpServer(server, "127.0.0.1", 0)) as port:
        idle, slow = open_websocket(port), open_websocket(port)
        slow.sendall(call_of(100, id=1, call="about") + begun)
        assert answer(slow)["status"] == 200
        started = time.monotonic()
        assert closed(slow) and time.monotonic() - started > 0.4
        idle.sendall(call_of(2000, id=1, call="about"))
        assert answer(idle)["status"] == 200, "one that owes nothing stays"
        idle.close()
        slow.close()


def test_messages_have_a_size_together_with_bodies():
    """Parts of messages, messages that wait, and calls under way."""
    server = make_server(Sessions(list(TOY_OFFERS)))
    room = server.config.app.state.room
    room.limit = 5000
    with serving(HttpServer(server, "127.0.0.1", 0)) as port:
        first, second = open_websocket(port), open_websocket(port)
        whole = call_of(3000, id=1, call="about")  # after 8 bytes of the frame's head
        first.sendall(whole[:2508])
        eventually(lambda: room.held == 2500, "the part is not counted")
        assert post(port, "/v1/about", b"{}".ljust(3000))[0] == 503
        second.sendall(whole[:2600])
        assert closed(second)
        eventually(lambda: room.held == 2500, "the part of the one that was given up is still counted")
        first.sendall(whole[2508:])
        assert answer(first)["status"] == 200
        eventually(lambda: room.held == 0, "the message is still counted")
        first.sendall(whole[:2508])
        eventually(lambda: room.held == 2500, "the part is not counted")
        first.close()
        eventually(lambda: room.held == 0, "the part of the one that is gone is still counted")
        assert post(port, "/v1/about", b"{}".ljust(3000))[0] == 200
        second.close()


def test_calls_under_way_are_counted(gate):
    server = make_server(Sessions(list(TOY_OFFERS)))
    room = server.config.app.state.room
    with serving(HttpServer(server, "127.0.0.1", 0)) as port:
        connection, other = open_websocket(port), open_websocket(port)

        def ask(size=0, **call):
            connection.sendall(call_of(size, **call))
            return answer(connection)

        session = ask(id=1, call="open", env="odd/Blocking-v0")["session"]
        ask(id=2, call="reset", session=session, seed=0)
        room.limit = 5000
        connection.sendall(call_of(3000, id=3, call="step", session=session, action="wait"))
        gate.until_waiting(1)
        assert room.held == 3000
        assert ask(1900, id=4, call="about")["status"] == 200
        other.sendall(call_of(2500, id=1, call="about"))
        assert closed(other)
        gate.open()
        assert answer(connection)["id"] == 3
        eventually(lambda: room.held == 0, "a call that is answered is still counted")
        connection.close()
        other.close()
