"""The server and its client, well and ill: batching, retries, time-outs, nonsense, shards."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from paths import REPOSITORY
from wire import Scripted, reply

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")

from atod_envs.retrieval import BM25Index
from atod_envs.retrieval.batching import Batcher
from atod_envs.retrieval.build import take_part
from atod_envs.retrieval.corpus import Corpus
from atod_envs.retrieval.http import HttpSearch, ShardedSearch
from atod_envs.retrieval.protocol import LocalSearch, Passage, RetrievalError
from atod_envs.searchqa.builtin import encyclopedia
from atod_envs.searchqa.env import SearchQAEnv
from atod_envs.searchqa.serve import RetrievalServer, main

DOCS = [(str(n), f'"T{n}"\nword{n} common{n % 3} naïve 東京 </information>') for n in range(30)]


def _service():
    return LocalSearch(BM25Index.build(DOCS), Corpus.build(DOCS))


@contextmanager
def serving(service):
    server = RetrievalServer(service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def answering(*replies):
    """A server that gives these (status, body) in turn, the last one for ever, and None never; keeps its requests."""
    requests, over = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies[min(len(requests), len(replies)) - 1]
            if reply is None:
                over.wait(250)
                return
            status, body = reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            with contextlib.suppress(OSError):  # the client may have stopped waiting
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _post(server, body, path="/retrieve"):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_served_results_equal_local_ones():
    service = _service()
    queries = ["word3", "common1 naïve", "東京", "", "nothing here", "</information>", "\ud800"]
    with serving(service) as server:
        client = HttpSearch(server.url, connections=1, retries=0)
        for _ in range(3):  # over one connection
            assert client.retrieve(queries, 5) == service.retrieve(queries, 5)
        assert client.retrieve([], 5) == []
        client.close()


def test_the_published_request_and_answer():
    with serving(_service()) as server:
        status, answer = _post(server, {"queries": ["word3", "word4"], "topk": 2, "return_scores": True})
        assert status == 200
        assert [row[0]["document"]["id"] for row in answer["result"]] == ["3", "4"]
        assert answer["result"][0][0]["document"]["contents"] == dict(DOCS)["3"]
        assert answer["result"][0][0]["score"] > 0
        _, plain = _post(server, {"queries": ["common1"]})
        assert len(plain["result"][0]) == 3 and set(plain["result"][0][0]) == {"id", "contents"}
        _, single = _post(server, {"query": "word5", "topk": 1, "return_scores": True})
        assert single["result"][0][0]["document"]["id"] == "5"
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["passages"] == 30


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        {},
        {"queries": "x", "topk": 0.5},
        {"queries": [1]},
        {"queries": ["x"], "topk": 10**6},
        {"queries": ["x"], "topk": 0},
        {"queries": ["x"], "topk": True},
        {"queries": ["x"], "top_k": 1},
        {"queries": ["x"], "query": "y"},
        {"queries": ["x"], "return_scores": "false"},
        b'{"queries": ["x"], "queries": ["y"]}',
        b"\xff\xfe",
    ],
)
def test_bad_requests_are_refused_and_the_server_goes_on(body):
    with serving(_service()) as server:
        status, answer = _post(server, body)
        assert status == 400 and answer["detail"]
        assert _post(server, {"queries": ["word1"]})[0] == 200
        assert _post(server, {"queries": ["word1"]}, "/elsewhere")[0] == 400


def test_a_search_that_fails_is_an_error_status():
    class Broken:
        def retrieve(self, queries, k):
            raise RuntimeError("index gone")

    with serving(Broken()) as server:
        assert _post(server, {"queries": ["x"]})[0] == 500
        client = HttpSearch(server.url, retries=1, sleep=lambda seconds: None)
        with pytest.raises(RetrievalError, match=r"2 attempts.*HTTP 500.*index gone"):
            client.retrieve(["x"], 1)


GOOD = json.dumps({"result": [[{"document": {"id": "1", "contents": '"T"\ntext'}, "score": 2.0}]]}).encode()


@pytest.mark.parametrize(
    "bad", [(503, b"busy"), (200, b""), (200, GOOD[:40]), None], ids=["busy", "empty", "cut off", "silent"]
)
def test_what_can_pass_is_tried_again(bad):
    waits = []
    with answering(bad, (200, GOOD)) as (url, requests):
        client = HttpSearch(url, timeout=60 if bad else 3, sleep=waits.append)
        assert client.retrieve(["q"], 1) == [[Passage("1", '"T"\ntext', 2.0)]]
        assert requests == [{"queries": ["q"], "topk": 1, "return_scores": True}] * 2
        assert waits == [0.5]


@pytest.mark.parametrize(
    ("bad", "attempts", "reason"),
    [
        ((500, b"boom"), 3, r"3 attempts.*HTTP 500: boom"),
        ((404, b"gone"), 1, r"1 attempt\).*HTTP 404: gone"),
        ((200, b"hello"), 1, r"1 attempt\).*not JSON: b'hello'"),
        ((200, b"<html>oops</html>"), 1, r"not JSON: b'<html>oops"),
        ((200, b'{"result": []}'), 1, r"one list for each of 1 queries"),
        ((200, b'{"result": [[{"score": 1}]]}'), 1, r"a document with 'contents'"),
        ((200, b'{"detail": "no"}'), 1, r"one list for each of 1 queries; got .*detail"),
        ((200, b"[]"), 1, r"one list for each"),
        ((200, GOOD.replace(b"2.0", b"NaN")), 1, r"NaN is no JSON number"),
        ((200, GOOD.replace(b"2.0", b"1e999")), 1, r"1e999 is too large"),
        ((200, GOOD.replace(b"2.0", b"-" + b"9" * 400)), 1, r"999 is too large"),
        ((200, GOOD.replace(b"2.0", b'"high"')), 1, r"a number as 'score'"),
        ((200, GOOD.replace(b"2.0", b"true")), 1, r"a number as 'score'"),
        ((200, GOOD.replace(b'"1"', b"{}")), 1, r"as 'id'"),
        ((302, b""), 1, r"redirects to"),
        (None, 3, r"3 attempts.*no answer within 0\.2 s"),
    ],
    ids=str,
)
def test_lasting_failures_end_in_a_clear_error(bad, attempts, reason):
    waits = []
    with answering(bad) as (url, requests):
        client = HttpSearch(url, timeout=60 if bad else 0.2, retries=2, sleep=waits.append)
        with pytest.raises(RetrievalError, match=reason) as caught:
            client.retrieve(["q"], 1)
        assert (len(requests) == attempts or not bad) and url in str(caught.value)  # a silent server may read late
        assert waits == [0.5, 1.0][: attempts - 1]


def test_a_server_that_is_down_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and no server listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        env = SearchQAEnv("dev", retriever=HttpSearch(url, retries=1, sleep=lambda seconds: None))
        env.reset(seed=0)
        with pytest.raises(RetrievalError, match=r"did not answer 1 queries \(2 attempts\): ConnectionRefusedError"):
            env.step("<search>x</search>")
    with pytest.raises(ValueError, match="expected an address"):
        HttpSearch("localhost:8000")


def test_a_connection_that_the_server_closed_is_opened_anew():
    with serving(_service()) as server:
        client = HttpSearch(server.url, connections=1, retries=0)
        before = client.retrieve(["word3"], 1)
        server.shutdown()
        server.server_close()
        again = RetrievalServer(_service(), port=server.server_address[1])
        thread = threading.Thread(target=again.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert client.retrieve(["word3"], 1) == before
        finally:
            again.shutdown()
            again.server_close()
            thread.join()


def test_an_answer_that_drips_is_given_up():
    """Each byte arrives in time, the whole answer never: a client without a limit for the whole waits two minutes."""
    body = json.dumps({"result": [[]]}).encode().ljust(1200)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
                for byte in body:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        client = HttpSearch(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, retries=0)
        started = time.monotonic()
        with pytest.raises(RetrievalError, match=r"no answer within 0\.3 s"):
            client.retrieve(["x"], 1)
        assert time.monotonic() - started < 60


def test_a_slow_search_does_not_hold_up_other_episodes():
    """Episodes in threads over one client: those with quick queries finish while a slow one waits."""
    release = threading.Event()

    class Slow:
        def retrieve(self, queries, k):
            if any("slow" in query for query in queries):
                release.wait(250)
            return [[Passage(query, f'"{query}"\nx', 1.0)] for query in queries]

    class Direct(RetrievalServer):
        def __init__(self, service):
            super().__init__(service)
            self.batcher = Batcher(service.retrieve, workers=4, batch_size=1)

    server = Direct(Slow())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    client = HttpSearch(server.url, batch_size=1)

    def episode(query):
        env = SearchQAEnv("dev", retriever=client)
        env.reset(seed=0)
        return env.step(f"<search>{query}</search>")[0]

    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(episode, "slow")
        quick = [pool.submit(episode, f"quick {n}").result(timeout=200) for n in range(20)]
        assert not slow.done() and all("quick" in observation for observation in quick)
        release.set()
        assert "slow" in slow.result(timeout=200)
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_shards_answer_as_one():
    whole = [
        ("a", [Passage("1", "x", 3.0), Passage("2", "x", 1.0)]),
        ("b", [Passage("3", "x", 2.0), Passage("0", "x", 1.0)]),
    ]

    class Part:
        def __init__(self, passages):
            self.passages = passages

        def retrieve(self, queries, k):
            return [self.passages[:k] for _ in queries]

    sharded = ShardedSearch([Part(passages) for _, passages in whole])
    assert [passage.docid for passage in sharded.retrieve(["q", "r"], 3)[1]] == ["1", "3", "0"]

    class Down:
        def retrieve(self, queries, k):
            raise RetrievalError("shard 2 is down")

    with pytest.raises(RetrievalError, match="shard 2"):
        ShardedSearch([Part([]), Down()]).retrieve(["q"], 1)
    with pytest.raises(ValueError, match="no shards"):
        ShardedSearch([])
    first = Part(whole[0][1])
    with pytest.raises(RetrievalError, match="two shards hold the same passage"):
        ShardedSearch([first, first]).retrieve(["q"], 3)
    with pytest.raises(RetrievalError, match="not the largest score"):  # distances: smaller is better
        ShardedSearch([first, Part([Passage("5", "x", 0.1), Passage("6", "x", 0.9)])]).retrieve(["q"], 3)


@pytest.mark.parametrize(("scored", "scores"), [(True, (None, None)), (False, (1.0, None))])
def test_a_rank_is_not_taken_for_a_score(scored, scores):
    """A shard without scores would lose against every other, and half a ranking is in no order."""
    found = [{"document": {"id": str(n), "contents": "x"}, "score": score} for n, score in enumerate(scores)]
    answer = reply(json.dumps({"result": [found]}).encode())
    with Scripted(answer) as server, pytest.raises(RetrievalError, match="passages without a 'score'"):
        HttpSearch(server.url, retries=0, scored=scored).retrieve(["q"], 2)


def test_shards_behind_http_are_one_search_until_one_is_down():
    """Random parts of the built-in corpus on servers of their own, and a server before them."""
    made = encyclopedia()
    passages = list(made.passages())
    whole = LocalSearch(BM25Index.build(passages), Corpus.build(passages))
    names = [entity.name for entity in made.entities["test"] if entity.kind == "person"][:60]
    with contextlib.ExitStack() as stack:
        parts = []
        for number in (1, 2, 3):
            part = list(take_part(passages, f"{number}/3"))
            parts.append(stack.enter_context(serving(LocalSearch(BM25Index.build(part), Corpus.build(part)))))
        clients = [HttpSearch(part.url, retries=1, sleep=lambda _: None) for part in parts]
        front = stack.enter_context(serving(ShardedSearch(clients)))
        client = HttpSearch(front.url, retries=0)
        found, exact = client.retrieve(names, 3), whole.retrieve(names, 3)
        assert {passage.docid for row in found for passage in row} <= set(dict(passages))
        assert all(row[0].contents.startswith(f'"{name}"') for name, row in zip(names, found, strict=True))
        same = sum(len({p.docid for p in a} & {p.docid for p in b}) for a, b in zip(found, exact, strict=True))
        assert same >= 0.85 * 3 * len(names)  # word statistics of the parts differ a little
        parts[1].shutdown()
        parts[1].server_close()
        with pytest.raises(RetrievalError, match=parts[1].url):
            client.retrieve(names[:1], 3)
        for each in (client, *clients):
            each.close()


def test_the_command_serves_the_built_in_world(capsys):
    root = str(REPOSITORY)
    command = [sys.executable, "-m", "atod_envs.searchqa.serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        url = process.stdout.readline().split()[-1]
        env = SearchQAEnv("dev", retriever=url)
        local = SearchQAEnv("dev")
        task, _ = env.reset(seed=3)
        local.reset(seed=3)
        assert env.step(f"<search>{task}</search>")[0] == local.step(f"<search>{task}</search>")[0] != ""
    finally:
        process.terminate()
        process.wait(60)
    assert main(["--index", "no/such/folder"]) == 1
    assert "error: retriever='no/such/folder'" in capsys.readouterr().err
