"""The client under all clients: what is tried again and what is not, redirects, proxies, slow and lying servers."""

import base64
import json
import socket
import threading
import time

import pytest
from wire import Scripted, reply

from agents.api import ApiClient, ApiOptions, ChatClient
from atod_envs.errors import AtodError
from atod_envs.http import client as http_client
from atod_envs.http.client import HttpClient, Retry, ServerGone, ServerRefused
from atod_envs.http.messages import parse
from atod_envs.retrieval.http import HttpSearch
from atod_envs.retrieval.protocol import RetrievalError
from atod_envs.serve.client import RemoteEnv
from atod_envs.serve.transport import RemoteError


def asked(*answers, retries=3, **options):
    """What a client makes of a server's answers: (answer or error, requests, waits)."""
    waits = []
    with Scripted(*answers) as server:
        client = HttpClient(server.url, timeout=60, retry=Retry(retries, 1.0), sleep=waits.append, **options)
        try:
            found = client.ask("/x", {"a": 1})
        except AtodError as error:
            found = error
        return found, len(server.requests), waits


GOOD = reply(b'{"good": true}')


@pytest.mark.parametrize(
    "bad",
    [
        *(reply(b"later", f"{code} x") for code in (408, 425, 429, 500, 502, 503, 504, 529)),
        None,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a",
        reply(b'{"a": [1, 2'),
        reply(b""),
        b"what?\r\n\r\n",
    ],
    ids=lambda answer: str(answer)[:24],
)  # fmt: skip
def test_what_may_pass_is_tried_again(bad):
    found, requests, waits = asked(bad, bad, GOOD)
    assert found == {"good": True} and requests == 3
    assert 0.5 <= waits[0] <= 1.5 and 1.0 <= waits[1] <= 3.0  # doubled, give or take a half


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        *((reply(b'{"error": {"message": "no, really"}}', f"{code} x"), "no, really") for code in (400, 401, 403, 404, 413, 422, 501)),
        (reply(b"<html>welcome</html>"), "not JSON: b'<html>welcome"),
        (reply(b"{'a': 1}"), "not JSON"),
        (reply(b'{"a": NaN}'), "NaN is no JSON number"),
        (reply(b'{"a": -Infinity}'), "-Infinity"),
        (reply(b'{"a": 1e999}'), "too large"),
        (reply(b"[" * 50_000 + b"]" * 50_000), "nested too deeply"),
        (reply(b"{\xff}"), "not UTF-8"),
        (reply(b"", "302 Found", Location="http://elsewhere.example/"), "redirects to 'http://elsewhere.example/'"),
    ],
    ids=lambda answer: str(answer)[:24],
)  # fmt: skip
def test_what_does_not_pass_is_said_at_once(bad, said):
    error, requests, waits = asked(bad, GOOD)
    assert isinstance(error, ServerRefused) and said in f"{error} {error.said}", error
    assert requests == 1 and waits == []


def test_a_server_says_how_long_to_wait():
    busy = reply(b"", "503 x", Retry_After="0.25")
    assert asked(busy, GOOD)[2] == [0.25]
    assert asked(reply(b"", "503 x", Retry_After="1000000"), GOOD)[2] == [60.0]
    for nonsense in ("nan", "-5", "Fri, 31 Dec 1999 23:59:59 GMT", ""):
        (wait,) = asked(reply(b"", "503 x", Retry_After=nonsense), GOOD)[2]
        assert 0 <= wait <= 1.5


def test_a_server_that_never_answers_well_is_given_up():
    error, requests, _ = asked(reply(b"broken", "500 x"), retries=2)
    assert isinstance(error, ServerGone) and requests == 3
    assert str(error) == "no answer in 3 tries: HTTP 500: broken"


def test_an_answer_has_a_longest_length(monkeypatch):
    monkeypatch.setattr(http_client, "LONGEST_ANSWER", 1000)
    error, requests, _ = asked(reply(b'"' + b"x" * 2000 + b'"'))
    assert isinstance(error, ServerRefused) and "more than 1000 bytes" in str(error) and requests == 1
    endless, _, _ = asked(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000)
    assert "more than 1000 bytes" in str(endless)


def test_connections_are_kept_and_opened_anew():
    with Scripted(GOOD, close=False) as server:
        client = HttpClient(server.url)
        for _ in range(3):
            client.ask("/x", {})
        assert server.connections == 1
        client.close()
        client.ask("/x")
        assert server.connections == 2 and server.requests[-1].startswith("GET /x HTTP/1.1")
    with Scripted(GOOD, close=True) as server:  # it says nothing of closing, and does
        client = HttpClient(server.url, retry=Retry(0))
        for _ in range(3):
            client.ask("/x", {})
        assert len(server.requests) == 3


@pytest.mark.parametrize("part", ["head", "body"])
def test_bytes_that_drip_are_given_up(part):
    """Each byte comes in time, and all of them never."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 900\r\n\r\n" if part == "body" else b"X: ")
                )
                try:
                    for _ in range(900):
                        connection.sendall(b"{")
                        time.sleep(0.1)
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        client = HttpClient(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5, retry=Retry(0))
        started = time.monotonic()
        with pytest.raises(ServerGone, match=r"timed out: no answer within 0\.5 s"):
            client.ask("/x", {})
        assert time.monotonic() - started < 45  # all of them would take a minute and a half


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://x", "http://", "http://a b/", "http://x:99999", "http://x:0", "http://\u0430"]
)
def test_what_is_no_address_is_refused(url, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="expected an address"):
        HttpClient(url)
    with pytest.raises(ValueError, match="expected an address"):
        HttpSearch(url)
    with pytest.raises(AtodError, match=r"give --api-base"):
        ApiClient(ApiOptions(url))


# ---- keys ----


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
    monkeypatch.setenv("ATOD_TOKEN", "s3cret")


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
@pytest.mark.parametrize("who", ["chat", "search", "environment", "websocket"])
def test_a_key_never_goes_where_a_redirect_points(who, status, key):
    with Scripted(reply(b"{}")) as elsewhere, Scripted(reply(b"", status, Location=elsewhere.url + "/v1/x")) as server:
        with pytest.raises((AtodError, ServerRefused), match=r"redirect|did not answer"):
            if who == "chat":
                chat = ChatClient("m", ApiOptions(server.url + "/v1", retries=0), temperature=1.0, max_tokens=5)
                chat.complete([{"role": "user", "content": "hello"}], 1)
            elif who == "search":
                HttpSearch(server.url, retries=0).retrieve(["x"], 1)
            else:
                RemoteEnv(server.url if who == "environment" else server.url.replace("http", "ws"), retries=0)
        assert len(server.requests) == 1
        if who != "search":
            assert "authorization: bearer s3cret" in server.requests[0].lower()
        assert not any("s3cret" in request for request in elsewhere.requests)
        if who != "websocket":
            assert elsewhere.requests == []


@pytest.mark.parametrize("bad", ["a\nb", "a\x00b", "sch\u00fc\u00dfel"])
def test_a_key_that_no_header_can_hold_is_refused(bad, monkeypatch):
    with pytest.raises(ValueError, match="no HTTP header can") as caught:
        HttpClient("http://127.0.0.1:1", token=bad)
    assert bad not in str(caught.value)
    if "\x00" not in bad:
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(AtodError, match="no HTTP header can"):
            ApiClient(ApiOptions("http://127.0.0.1:1/v1"))


def test_models_elsewhere_are_asked_through_the_proxy_and_models_here_are_not(monkeypatch):
    with Scripted(reply(b'{"data": []}')) as proxy, Scripted(reply(b'{"data": [1]}')) as here:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        options = {"timeout": 60, "retries": 0}
        assert ApiClient(ApiOptions("http://models.example:81/v1", **options)).ask("/models", None) == {"data": []}
        assert proxy.requests[0].startswith("GET http://models.example:81/v1/models HTTP/1.1")
        assert ApiClient(ApiOptions(here.url + "/v1", **options)).ask("/models", None) == {"data": [1]}
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("who", "sent"), [("us%40er:p%3Ass@", "us@er:p:ss"), ("us%C3%A9r@", "usér:"), ("", None)])
def test_a_proxy_gets_the_name_and_password_of_its_address_and_the_server_does_not(scheme, who, sent, monkeypatch):
    with Scripted(reply(b"{}", "407 Proxy Authentication Required")) as proxy:
        for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.setenv(name, proxy.url.replace("//", f"//{who}"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        client = HttpClient(f"{scheme}://models.example:81", token="key", retry=Retry(0), proxies=True)
        with pytest.raises(AtodError, match="407"):
            client.ask("/models")
    (head,) = proxy.requests
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    assert head.startswith("GET http://models.example:81/models " if scheme == "http" else "CONNECT models.example:81 ")
    expected = sent and f"Basic {base64.b64encode(sent.encode()).decode()}"
    assert lines.get("Proxy-Authorization") == expected and ("Authorization" in lines) == (scheme == "http")
    assert ("Proxy-Authorization" in client._headers) == (scheme == "http" and sent is not None)


# ---- answers of another shape ----


@pytest.mark.parametrize(
    "answer",
    [
        {}, [], 3, None, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": "hi"}]}}]}, {"choices": {"0": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_is_no_chat_is_no_response(answer):
    with Scripted(reply(json.dumps(answer).encode())) as server:
        chat = ChatClient("m", ApiOptions(server.url + "/v1", retries=3), temperature=1.0, max_tokens=5)
        with pytest.raises(AtodError, match="no chat completion"):
            chat.complete([{"role": "user", "content": "hello"}], 1)
        assert len(server.requests) == 1


def test_counts_that_are_none_count_nothing():
    answer = {
        "choices": [{"message": {"content": None}}],
        "usage": {"prompt_tokens": "many", "completion_tokens": None},
    }
    with Scripted(reply(json.dumps(answer).encode())) as server:
        chat = ChatClient("m", ApiOptions(server.url + "/v1"), temperature=1.0, max_tokens=5)
        assert chat.complete([], 1) == "" and (chat.prompt_tokens, chat.completion_tokens) == (0, 0)


def test_a_page_instead_of_passages_costs_one_request():
    with Scripted(reply(b"<html>Sign in</html>")) as server:
        waits = []
        with pytest.raises(RetrievalError, match=r"\(1 attempt\): not JSON: b'<html>Sign in"):
            HttpSearch(server.url, sleep=waits.append).retrieve(["x"], 1)
        assert len(server.requests) == 1 and waits == []


def test_a_page_instead_of_an_environment_is_named():
    with Scripted(reply(b"<html>Sign in</html>")) as server:
        with pytest.raises(RemoteError, match=r"not JSON.*is it a server of environments"):
            RemoteEnv(server.url, retries=3)
        assert len(server.requests) == 1


def test_whole_numbers_are_read_as_far_as_a_float_reaches():
    for given, read in ((b"9" * 308, int("9" * 308)), (b'"' + b"9" * 400 + b'"', "9" * 400), (b"-7", -7)):
        assert parse(given) == parse(given.decode()) == read
    for given in (b"9" * 310, b"[1, -" + b"9" * 400 + b"]"):
        with pytest.raises(ValueError, match="too large"):
            parse(given)


def test_half_characters_are_not_sent():
    with Scripted(reply(b'{"choices": [{"message": {"content": "\\ud800 hi"}}]}')) as server:
        chat = ChatClient("m", ApiOptions(server.url + "/v1"), temperature=1.0, max_tokens=5)
        assert chat.complete([{"role": "user", "content": "a\ud800\ud83e\udd8a"}], 1) == "\ud800 hi"
        (sent,) = server.requests
        assert "a\\ufffd\\ud83e\\udd8a" in sent and "\\ud800" not in sent
