"""Evaluation of a model behind a server that the test starts."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from toyworld import TOY

from agents.api import ApiClient
from atod_algos.evaluate.command import run
from atod_algos.evaluate.settings import EvaluateConfig, episodes_path
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import read_jsonl


class Server:
    """A chat-completions server with a model that says the right word; ``plan`` is what it does before answering."""

    def __init__(self):
        self.plan, self.requests, self.running, self.most = [], [], 0, 0
        self.lock, self.together, self.over = threading.Lock(), None, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.running += 1
                    outer.most = max(outer.most, outer.running)
                    trouble = outer.plan.pop(0) if outer.plan else None
                if outer.together is not None:
                    outer.together.wait(120)
                with outer.lock:
                    outer.running -= 1
                if trouble == "drop":
                    self.close_connection = True
                    return
                if trouble == "hang":
                    outer.over.wait(250)
                    return
                status, payload, headers = trouble or (200, outer.answer(body), {})
                blob = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(blob)))
                self.end_headers()
                self.wfile.write(blob)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body):
        word = body["messages"][-1]["content"].split(":")[0].removeprefix("say ")
        # The wrong word in the first turn: conversations and windows differ from the second turn on.
        first = "Speak (" in body["messages"][-1]["content"]
        text = f"<think>so</think><action>{'nothing' if first else word}</action>"
        return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = Server()
    yield found
    found.over.set()
    found.http.shutdown()
    found.http.server_close()


def config_of(server, out, **changes):
    values = {"api_base": server.url, "panels": ("test",), "out": out, "temperature": 0.4, "max_response": 20}
    return EvaluateConfig(**{"env": TOY, "agent": "api:some/model", **values, **changes})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setitem(ApiClient.__init__.__kwdefaults__, "wait", waits.append)
    return waits


@pytest.mark.parametrize("style", ["atod", "compact"])
def test_a_server_plays_a_panel(server, style, tmp_path):
    result = run(config_of(server, tmp_path / "e", style=style, api_extra='{"top_k": 3}'))
    assert result["panels"]["test/4"]["success"] == 1.0 and result["panels"]["test/4"]["length"] == 2
    assert result["usage"] == {"prompt_tokens": 7 * 8, "completion_tokens": 5 * 8}
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_k"]) == ("some/model", 0.4, 20, 3)
    longest = max(len(body["messages"]) for _, _, body in server.requests)
    assert longest == (3 if style == "compact" else 1)  # a conversation grows, a window stands alone
    stored = next(iter(read_jsonl(episodes_path(tmp_path / "e", "test/4", 0))))
    assert stored.turns[0].response.startswith("<think>") and stored.turns[1].action in stored.task
    assert "secret" not in (tmp_path / "e" / "config.json").read_text()


def test_requests_run_at_the_same_time(server, tmp_path):
    server.together = threading.Barrier(4)  # answers when four are there
    run(config_of(server, tmp_path / "e", concurrency=4))
    assert server.most == 4
    server.most, server.together = 0, None
    run(config_of(server, tmp_path / "f", concurrency=1))
    assert server.most == 1


def test_what_passes_is_tried_again(server, tmp_path, no_waiting):
    busy = {"error": {"message": "slow down"}}
    server.plan = [(429, busy, {"Retry-After": "0.25"}), (503, b"", {}), "drop", "hang", (200, b'{"choi', {})]
    result = run(config_of(server, tmp_path / "e", concurrency=1, api_timeout=3))
    assert result["panels"]["test/4"]["success"] == 1.0
    assert no_waiting[0] == 0.25 and len(no_waiting) == 5
    assert no_waiting[1] < no_waiting[3] < 24  # the pause doubles


def test_a_server_that_stays_away_is_an_error_not_a_failure(server, tmp_path):
    run_before = config_of(server, tmp_path / "e", concurrency=1, api_retries=2)
    server.plan = [None] * 4 + [(500, {"error": "broken"}, {})] * 3
    with pytest.raises(AtodError, match="did not answer after 3 tries; the last said: 500 broken"):
        run(run_before)
    assert not (tmp_path / "e" / "result.json").exists()
    asked = len(server.requests)
    whole = run(run_before)
    assert whole["panels"]["test/4"]["success"] == 1.0
    assert len(server.requests) - asked == 4  # the two finished episodes are not asked for again
    assert whole["usage"] == {"prompt_tokens": 7 * 8, "completion_tokens": 5 * 8}, "of both starts together"
    assert run(run_before) == whole, "shown again, nothing is asked"
    (tmp_path / "e" / "usage.json").write_text('{"prompt_tokens": -1}')
    with pytest.raises(DataError, match=r"usage\.json: expected whole numbers; delete it"):
        run(run_before)


def test_another_server_is_another_evaluation(server, tmp_path, monkeypatch):
    asked = config_of(server, tmp_path / "e")
    run(asked)
    with pytest.raises(AtodError, match=r"holds an evaluation with api_base=.*but now it is 'http://elsewhere/v1'"):
        run(dataclasses.replace(asked, api_base="http://elsewhere/v1"))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    assert run(dataclasses.replace(asked, api_base=""))["usage"]["prompt_tokens"] > 0
    stored = json.loads((tmp_path / "e" / "config.json").read_text())
    del stored["settings"]["api_base"]  # as earlier versions wrote them
    (tmp_path / "e" / "config.json").write_text(json.dumps(stored))
    run(asked)


@pytest.mark.parametrize(
    "trouble, words",
    [
        ((401, {"error": {"message": "bad key"}}, {}), "refused model 'some/model': 401 bad key"),
        ((404, {"error": {"message": "no such model"}}, {}), "404 no such model"),
        ((200, {"object": "list"}, {}), "answered something that is no chat completion"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, trouble, words, tmp_path):
    server.plan = [trouble] * 50
    with pytest.raises(AtodError, match=words):
        run(config_of(server, tmp_path / "e", concurrency=1))
    assert len(server.requests) == 1
