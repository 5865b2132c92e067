"""What lies under every server: slow, greedy, foreign and malformed clients, and the others that go on meanwhile."""

import asyncio
import contextlib
import json
import os
import socket
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
pytest.importorskip("torch", reason="PyTorch is not installed (extra 'train')")

from servers import TOY_OFFERS
from starlette.responses import Response
from starlette.routing import Route
from wire import any_server, connected, eventually, get, head_of, post, read, send, serving

from atod_envs.http.guard import Access, HttpLimits, make_app
from atod_envs.http.server import HttpServer, server_of
from atod_envs.serve.app import make_server
from atod_envs.serve.sessions import Limits, Sessions
from atod_envs.webshop.serve import ShopServer

SERVERS = ["environments", "search", "shop", "teacher"]


@pytest.fixture(scope="module")
def ports():
    """All four servers."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(any_server(name)) for name in SERVERS}


def plain(answer=b"ok", **limits):
    """A server that reads a body and answers with the same bytes always."""

    async def endpoint(request):
        await request.body()
        return Response(answer)

    limits = HttpLimits(**limits)
    app = make_app([Route("/", endpoint, methods=["GET", "POST"])], lambda s, m: Response(m, s), limits, Access())
    return HttpServer(server_of(app, limits), "127.0.0.1", 0)


# ---- requests of every shape ----

BODIES = [
    b"[1]", b'"x"', b"null", b"3", b"nonsense", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b"\xff\xfe\x00",
    b"[" * 100_000, b'{"a":' * 50_000, b'{"a": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:12].decode("latin-1"))
@pytest.mark.parametrize(
    ("name", "path"),
    [("environments", "/v1/open"), ("search", "/retrieve"), ("teacher", "/v1/completions"), ("teacher", "/tokenize")],
)
def test_json_of_every_shape_is_answered_with_the_reason(ports, name, path, body):
    status, answer = post(ports[name], path, body)
    said = json.loads(answer)
    assert status == 400 and ("JSON" in str(said) or "UTF-8" in str(said)) and "Traceback" not in str(said)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_tokens": "1"}, {"max_tokens": 2}, {"max_tokens": [1]}, {"temperature": 0}, {"temperature": -1}, {"temperature": "1"},
        {"temperature": True}, {"temperature": 1e-300}, {"temperature": [1]}, {"prompt": [True]}, {"prompt": [1.0]}, {"prompt": {}},
        {"prompt": [[1], 2]}, {"prompt": [100]}, {"prompt": [-1]}, {"prompt": []}, {"prompt": [[]]}, {"prompt": "text"},
        {"prompt": [1] * 65}, {"prompt_logprobs": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_teacher_says_what_is_wrong_with_a_request(ports, changed):
    body = {"prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 1, **changed}
    status, answer = post(ports["teacher"], "/v1/completions", json.dumps(body).encode())
    assert status == 400 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"prompt": 3}, {"prompt": None}, {"prompt": ["a"]}], ids=str)
def test_the_teacher_tokenizes_texts_alone(ports, body):
    assert post(ports["teacher"], "/tokenize", json.dumps(body).encode())[0] == 400
    status, answer = post(ports["teacher"], "/tokenize", b'{"prompt": "ab"}')
    assert (status, json.loads(answer)) == (200, {"count": 2, "tokens": [97, 98]})


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /v1/open HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", 400),
        ("POST /start HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        ("POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 413),
        ("POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 nonsense\r\n\r\n", 400),
        ("GET /" + "x" * 100_000 + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 431),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            + "".join(f"X-{i}: {'y' * 100}\r\n" for i in range(1000))
            + "\r\n",
            431,
        ),
    ],
    ids=["abc", "-1", "two", "huge", "coding", "no host", "tls", "long line", "many headers"],
)
def test_heads_of_every_shape_are_answered(ports, name, head, status):
    answered, said = read(send(ports[name], head.encode("latin-1")))
    assert answered in (status, 400), said
    assert said and b"Traceback" not in said
    assert get(ports[name], "/nothing/here")[0] == 404  # it goes on


# ---- whose requests ----


@pytest.mark.parametrize("name", SERVERS)
def test_foreign_hosts_and_origins_are_refused_without_a_token(ports, name):
    port = ports[name]
    for host in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{port}", "evil.example."):
        assert get(port, "/", Host=host)[0] == 403, host
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "node7:80", "LOCALHOST."):
        assert get(port, "/nothing", Host=host)[0] == 404, host
    path = {"environments": "/v1/about", "search": "/retrieve", "shop": "/start", "teacher": "/tokenize"}[name]
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}", f"http://evil.example:{port}"):
        status, said = post(port, path, b"{}", Origin=origin)
        assert status == 403 and b"web pages" in said
    same = post(port, path, b"{}", Origin=f"http://127.0.0.1:{port}")[0]
    assert same == (303 if name == "shop" else 403)  # only the shop has pages of its own


@pytest.mark.parametrize("name", SERVERS)
def test_hosts_and_headers_that_no_client_sends_are_refused(ports, name):
    port = ports[name]
    path = {"environments": "/v1/about", "search": "/retrieve", "shop": "/start", "teacher": "/tokenize"}[name]
    for host in ("[::1].evil.example", "127.0.0.1:evil.example", "evil.example%00.localhost", "[localhost]", "a b"):
        assert get(port, "/nothing", Host=host)[0] in (400, 403), host
    for scheme in ("ftp", ""):
        assert post(port, path, b"{}", Origin=f"{scheme}://127.0.0.1:{port}")[0] == 403
    two = f"http://127.0.0.1:{port}\r\nOrigin: https://evil.example"
    assert post(port, path, b"{}", Origin=two)[0] == 400
    status, said = post(port, path, b"{}", Content_Encoding="gzip")
    assert status == 415 and b"send it as it is" in said


def test_the_shop_cannot_be_framed(ports):
    head = head_of(send(ports["shop"], b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    assert "frame-ancestors 'none'" in head and "default-src 'none'" in head and "nosniff" in head


# ---- slow and greedy clients ----


def test_dripping_heads_do_not_keep_others_out():
    """25 connections without a token, against 20; a client with a request is served."""
    sessions = Sessions(list(TOY_OFFERS), Limits(connections=20))
    server = HttpServer(make_server(sessions, token="right"), "127.0.0.1", 0)
    with serving(server) as port:
        dripping = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(25)]
        for connection in dripping:
            connection.sendall(b"POST /v1/about HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        for _ in range(5):
            status, answer = post(port, "/v1/about", b"{}", Authorization="Bearer right")
            assert status == 200, answer
        for connection in dripping:
            connection.close()


def test_a_head_has_a_time():
    with serving(plain(head_seconds=0.5)) as port:
        assert send(port, b"GET / HTTP/1.1\r\nHost: local") == b""
        assert send(port) == b""  # nothing at all
        after = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTT"  # a second one that never ends
        assert send(port, after).count(b"200 OK") == 1


def test_a_body_has_a_time_and_a_size():
    with serving(plain(body_seconds=0.5, body_bytes=1000)) as port:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        assert read(send(port, head + b"10\r\n\r\nabc"))[0] == 408
        assert read(send(port, head + b"1001\r\n\r\n" + b"x" * 1001))[0] == 413
        chunked = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert read(send(port, chunked + b"3e9\r\n" + b"x" * 1001))[0] == 413
        assert post(port, "/", b"x" * 1000) == (200, b"ok")


def test_a_body_in_tiny_pieces_is_refused_before_it_costs_anything():
    """A piece of one byte costs a server as much as one of a thousand."""
    with serving(plain()) as port:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        started = time.process_time()
        status, said = read(send(port, head + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n"))
        assert status == 400 and b"send it with a Content-Length" in said and time.process_time() - started < 1
        for pieces in (
            b"1\r\n \r\n" * 999,
            b"40\r\n%b\r\n" % (b" " * 64) * 3000,
            b"400\r\n%b\r\n" % (b" " * 1024) * 900,
        ):
            assert read(send(port, head + pieces + b"0\r\n\r\n")) == (200, b"ok")


def test_bodies_have_a_size_together():
    with serving(plain(body_bytes=1000, held_bytes=1500, body_seconds=60)) as port:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as first:
            first.sendall(head + b"x" * 900)
            eventually(lambda: post(port, "/", b"x" * 700)[0] == 503, "the first body is not counted")
            first.sendall(b"x" * 100)
            assert read(first.recv(1 << 16))[0] == 200
        eventually(lambda: post(port, "/", b"x" * 1000)[0] == 200, "the first body is still counted")


def test_an_answer_that_nobody_takes_is_given_up():
    server = plain(answer=b"x" * (64 << 20), answer_seconds=0.5)
    with serving(server) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: server.connections, "the connection is not seen")
        eventually(lambda: not server.connections, "the connection is kept")


def test_a_slow_reader_gets_all_of_its_answer():
    """It takes something now and then, for longer than a client may take nothing."""
    with (
        serving(plain(answer=b"x" * (24 << 20), answer_seconds=3.0)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=60) as slow,
    ):
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        size, started = 0, time.monotonic()
        while part := slow.recv(1 << 20):
            size += len(part)
            if time.monotonic() - started < 5:
                time.sleep(0.1)
        assert size > 24 << 20


def test_pipelined_requests_that_nobody_reads_hold_up_nobody():
    """A few answers fill what lies between two sockets; the server then waits for this client, others do not."""
    server = ShopServer(("127.0.0.1", 0), {"split": "test", "goals": "synthetic"}, None)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    with serving(server) as port, connected(port, receive=1 << 12) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        for _ in range(20):
            assert get(port, "/")[0] == 200
            assert post(port, "/start", b"task=")[0] == 303


# ---- the search's queue ----


def test_a_request_has_a_limit_on_queries(ports):
    body = json.dumps({"queries": [str(n) for n in range(300_000)]}).encode()
    status, answer = post(ports["search"], "/retrieve", body)
    assert status == 413 and "at most 8192" in json.loads(answer)["detail"]
    status, answer = post(ports["search"], "/retrieve", json.dumps({"queries": ["x"] * 8000, "topk": 1000}).encode())
    assert status == 413 and "passages" in json.loads(answer)["detail"]
    status, answer = post(ports["search"], "/retrieve", json.dumps({"queries": [str(n) for n in range(8192)]}).encode())
    assert status == 200 and len(json.loads(answer)["result"]) == 8192


# ---- the end ----


def test_a_server_stops_while_clients_are_in_every_state():
    """Idle, dripping a head, dripping a body, deaf: none keeps it."""
    server = plain(answer=b"x" * (32 << 20))
    with serving(server) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(4)]
        held[1].sendall(b"GET / HT")
        held[2].sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
        held[3].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: server.connections == 4, "not all are connected")
    for connection in held:
        connection.close()


def test_a_connection_that_comes_with_the_stop_is_told_once():
    """It is accepted after the others have been told; the server would wait for it until its patience ends."""

    async def scenario():
        limits = HttpLimits()
        server = server_of(make_app([], lambda s, m: Response(m, s), limits, Access()), limits)
        connections, told = server.server_state.connections, []

        class Late:
            def shutdown(self):
                told.append(self)
                asyncio.get_running_loop().call_later(0.3, connections.discard, self)

        server.servers, server.lifespan = [], SimpleNamespace(shutdown=lambda: asyncio.sleep(0))
        asyncio.get_running_loop().call_later(0.02, connections.add, Late())
        await server.shutdown([])
        return len(told), len(connections)

    assert asyncio.run(scenario()) == (1, 0)


def test_the_file_descriptors_come_back(ports):
    """300 broken visits leave nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        connection = socket.create_connection(("127.0.0.1", ports["search"]), timeout=60)
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        connection.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 5, "connections stay open")
