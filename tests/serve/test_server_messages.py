"""What a server of environments refuses: messages too long, tokens, web pages, hostile calls; many calls at once."""

import asyncio
import contextlib
import http.client
import json
import socket

import pytest
from servers import TOY_OFFERS, running
from wire import post_call

from atod_envs.serve.client import RemoteEnv
from atod_envs.serve.transport import RemoteError


def test_oversized_messages_are_refused_and_long_actions_are_not(kind):
    with running(TOY_OFFERS, message_bytes=100_000) as (url, _):
        env = RemoteEnv(url.replace("http", kind), retries=0)
        env.reset(seed=0)
        observation, *_ = env.step("a" * 60_000)
        assert observation.endswith("a" * 60_000)
        with pytest.raises(RemoteError, match=r"more than 100000 bytes|too long"):
            env.step("a" * 200_000)
        *_, info = env.step("pear")
        assert info["turn"] == 2
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as endless:  # no length is told, and it never ends
            endless.sendall(b"POST /v1/step HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):  # the server may be gone before all is sent
                for _ in range(20):
                    endless.sendall(b"8000\r\n" + b"a" * 0x8000 + b"\r\n")
            assert endless.recv(12) == b"HTTP/1.1 413"


def test_the_token_is_asked_for(kind):
    with running(TOY_OFFERS, token="right") as (url, sessions):
        for token in ("", "wrong", "righ", "right2"):
            with pytest.raises(RemoteError, match="token"):
                RemoteEnv(url.replace("http", kind), token=token, retries=0)
        assert len(sessions) == 0
        RemoteEnv(url.replace("http", kind), token="right").reset(seed=0)
        assert post_call(url, "open", {})[0] == 401


def test_the_token_comes_from_the_environment_and_stays_out_of_specs(monkeypatch):
    with running(TOY_OFFERS, token="from the environment") as (url, _):
        monkeypatch.setenv("ATOD_TOKEN", "from the environment")
        env = RemoteEnv(url)
        assert "from the environment" not in env.spec.to_json()


def test_web_pages_are_refused_without_a_token(toy_server):
    assert post_call(toy_server, "open", {}, Origin="https://elsewhere.example")[0] == 403


@pytest.mark.parametrize(
    ("call", "body", "status"),
    [
        ("open", {"data": "/etc"}, 400),
        ("open", {"env": "odd/Odd-v0", "split": "../../etc"}, 422),
        ("open", {"env": "/etc/passwd"}, 422),
        ("open", {"env": ["odd/Odd-v0"]}, 400),
        ("open", b"{", 400),
        ("open", b"[1]", 400),
        ("open", b"\xff\xfe\x00", 400),
        ("open", b"[" * 200_000, 400),
        ("open", b'{"lists": 3}', 400),
        ("open", b'{"a":' * 600 + b"1" + b"}" * 600, 400),
        ("open", b'{"a":' * 900 + b"1" + b"}" * 900, 400),
        ("open", b'{"split": "train", "split": "valid"}', 400),
        ("open", b'{"x": ' + b"9" * 5000 + b"}", 400),
        ("reset", {"session": "guess"}, 410),
        ("reset", {}, 400),
        ("..%2f..%2fetc%2fpasswd", {}, 404),
        ("__class__", {}, 404),
        ("shutdown", {}, 404),
        ("call", {}, 404),
    ],
)
def test_hostile_calls_are_refused(toy_server, call, body, status):
    assert post_call(toy_server, call, body)[0] == status


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": -1},
        {"seed": "1"},
        {"seed": True},
        {"seed": 1 << 70},
        {"max_turns": 0},
        {"max_turns": 10**9},
        {"task_id": 5},
        {"task_id": "../../etc/passwd"},
        {"options": {}},
    ],
)
def test_hostile_arguments_of_reset_are_refused(toy_server, changed):
    name = post_call(toy_server, "open", {})[1]["session"]
    status, answer = post_call(toy_server, "reset", {"session": name, **changed})
    assert status in (400, 422) and "error" in answer
    assert post_call(toy_server, "reset", {"session": name, "seed": 1})[0] == 200
    post_call(toy_server, "close", {"session": name})


def test_nothing_else_is_served(toy_server):
    host, _, port = toy_server.removeprefix("http://").partition(":")
    for path in ("/", "/etc/passwd", "/v1/../../etc/passwd", "/v1/open", "/docs", "/static/x"):
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        connection.request("GET", path)
        assert connection.getresponse().status in (404, 405)
        connection.close()
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["status"] == "ok"


def test_many_calls_at_once_on_one_websocket(toy_server):
    websockets = pytest.importorskip("websockets", reason="websockets is not installed (extra 'serve')")

    async def flood():
        async with websockets.connect(toy_server.replace("http", "ws") + "/v1/ws") as link:
            for mark in range(400):
                await link.send(json.dumps({"id": mark, "call": "open"}))
            await link.send("no JSON")
            return [json.loads(await link.recv()) for _ in range(401)]

    answers = asyncio.run(flood())
    assert sorted(a["id"] for a in answers if a["id"] is not None) == list(range(400))
    assert [a["status"] for a in answers if a["id"] is None] == [400]
    for answer in answers:
        if answer["status"] == 200:
            post_call(toy_server, "close", {"session": answer["session"]})
