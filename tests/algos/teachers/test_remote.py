"""A teacher behind HTTP, against real local servers: ours, one that answers like other stacks, and ones that fail."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
from toyworld import TOY

from agents.api import ApiClient, ApiOptions
from atod_algos.atod import ATOD
from atod_algos.opd import OPD
from atod_algos.teachers.local import LocalScorer
from atod_algos.teachers.remote import RemoteScorer
from atod_algos.teachers.server import ServeOptions, TeacherServer, row_batch
from atod_algos.training.cli import main
from atod_envs.errors import AtodError
from atod_envs.http.messages import Refused

pytestmark = pytest.mark.slow

QUICK = ApiOptions(timeout=60.0, retries=2)


class Server(TeacherServer):
    """Ours, with switches for what can be different elsewhere."""

    fails = 0
    echo = bos = deaf = False
    seen = 0

    def completions(self, body):
        self.seen += 1
        if self.fails:
            self.fails -= 1
            raise Refused(503, "overloaded")
        if self.deaf:
            body = body | {"temperature": 1.0}
        if self.bos:
            body = body | {"prompt": [[1, *prompt] for prompt in body["prompt"]]}
        echo = body.pop("echo", False)
        if self.echo and not echo:
            return {"choices": [{"index": i, "text": "x"} for i in range(len(body["prompt"]))]}
        answer = super().completions(body | {"prompt_logprobs": 1})
        if self.echo:
            for choice in answer["choices"]:
                places = choice.pop("prompt_logprobs")
                found = [None if at is None else next(iter(at.values()))["logprob"] for at in places]
                choice["logprobs"] = {"token_logprobs": [*found, -0.5]}
        answer["choices"].reverse()  # the order is the index's, not the list's
        return answer


@pytest.fixture
def server(teacher):
    with Server(teacher, ServeOptions("x", port=0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def rows(tokenizer):
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(tokenizer), n) for n in (5, 40, 17, 2, 33)]


def scorer(server, tokenizer, temperature=1.0, **options):
    return RemoteScorer(
        server.address, tokenizer, temperature=temperature, options=QUICK, wait=lambda _: None, **options
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("echo", [False, True])
def test_a_server_gives_what_the_model_gives_here(echo, temperature, server, teacher, tokenizer, rows):
    server.echo = echo
    batch = row_batch(rows)
    expected = LocalScorer(teacher, "cpu").logprobs(batch, temperature=temperature, budget=64)
    remote = scorer(server, tokenizer, temperature)
    assert np.allclose(remote.logprobs(batch, temperature=temperature, budget=64), expected, atol=1e-5)
    assert all(np.isnan(values[0]) for values in remote.rows(rows))


def test_rows_go_in_batches_and_each_is_asked_for_once(server, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("atod_algos.teachers.remote._REQUEST_TOKENS", 60)
    remote = scorer(server, tokenizer)
    first = remote.rows([*rows, rows[0]])
    assert server.seen == remote.requests == 2  # 5 + 40, and 17 + 2 + 33; the row that comes twice goes once
    again = remote.rows(rows[::-1])
    assert remote.requests == 2
    for a, b in zip(first, [*again[::-1], again[-1]], strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_what_is_kept_is_bounded(server, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("atod_algos.teachers.remote._KEPT_TOKENS", 50)
    remote = scorer(server, tokenizer)
    assert len(remote.rows(rows)) == 5
    for row in rows:
        remote.rows([row])
    assert remote.kept_tokens == sum(map(len, remote.kept.values())) <= 50


def test_a_server_that_ignores_the_temperature_is_refused(server, tokenizer):
    server.deaf = True
    scorer(server, tokenizer, 1.0)
    with pytest.raises(AtodError, match=r"at temperature 1 whatever is asked.*sampled at 0.7"):
        scorer(server, tokenizer, 0.7)
    with pytest.raises(AtodError, match="scored at the same"):
        scorer(server, tokenizer).logprobs(row_batch([np.array([1, 2])]), temperature=0.5, budget=1)


def test_a_server_that_puts_a_token_in_front_is_refused(server, tokenizer, rows):
    server.bos = True
    with pytest.raises(AtodError, match=r"5 ids were sent and 6 came back"):
        scorer(server, tokenizer).rows(rows[:1])


def test_another_tokenizer_is_refused_by_its_first_token(server, tokenizer):
    from agents.reference.tokenizer import train_tokenizer

    other = train_tokenizer(["You sit on chair 4."] * 30)
    with pytest.raises(
        AtodError, match=r"have different tokenizers: after .* comes token .* in one and .* in the other"
    ):
        scorer(server, other)


def test_failures_that_pass_are_tried_again(server, tokenizer, rows):
    remote = scorer(server, tokenizer)
    server.fails = 2
    assert len(remote.rows(rows)) == 5
    server.fails = 3
    with pytest.raises(AtodError, match=r"is gone.*after 3 tries.*503 overloaded.*same command"):
        remote.rows([np.array([1, 2, 3])])


def test_a_server_that_never_answers_is_given_up_on(tokenizer):
    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(2)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Silent) as silent:
        threading.Thread(target=silent.serve_forever, daemon=True).start()
        with pytest.raises(AtodError, match=r"did not answer after 2 tries.*timed out"):
            RemoteScorer(
                f"http://127.0.0.1:{silent.server_address[1]}/v1",
                tokenizer,
                temperature=1.0,
                options=ApiOptions(timeout=0.1, retries=1),
                wait=lambda _: None,
            )
        silent.shutdown()


def test_a_server_that_cannot_be_a_teacher_is_refused(tokenizer):
    class Chatty(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "m"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.answer({"tokens": tokenizer.encode(body["prompt"], add_special_tokens=False)})
            else:
                self.answer({"choices": [{"index": 0, "text": "hello"}]})

        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Chatty) as chatty:
        threading.Thread(target=chatty.serve_forever, daemon=True).start()
        remote = scorer(type("S", (), {"address": f"http://127.0.0.1:{chatty.server_address[1]}/v1"}), tokenizer)
        with pytest.raises(AtodError, match="gives neither prompt_logprobs nor echoed"):
            remote.rows([np.array([1, 2, 3])])
        chatty.shutdown()


class Liar(Server):
    """Ours, whose completions are changed by ``lie`` after the first, which the check of the start needs."""

    lie = staticmethod(lambda answer: answer)

    def completions(self, body):
        return self.lie(super().completions(body))


def _places(answer):
    return answer["choices"][0]["prompt_logprobs"]


def _change(change):
    def lie(answer):
        change(answer)
        return answer

    return lie


LIES = {
    "no choices": (lambda answer: {"object": "error"}, "no completion"),
    "not an object": (lambda answer: [answer], "no completion"),
    "choices of another kind": (lambda answer: {"choices": "none"}, "no completion"),
    "one choice less": (lambda answer: {"choices": answer["choices"][:-1]}, "sent 5 prompts and answered 4"),
    "one index twice": (_change(lambda a: a["choices"][0].update(index=1)), "numbers its answers"),
    "an index that is none": (_change(lambda a: a["choices"][0].update(index="0")), "numbers its answers"),
    "places of another kind": (_change(lambda a: a["choices"][0].update(prompt_logprobs="all")), "ids were sent"),
    "one place more": (_change(lambda a: _places(a).append(_places(a)[-1])), "came back"),
    "an empty place inside": (_change(lambda a: _places(a).__setitem__(-1, None)), "the answer is about None"),
    "another token": (_change(lambda a: _places(a).__setitem__(-1, {"x": {"logprob": -1.0}})), "another tokenizer"),
    "a bare number": (_change(lambda a: _places(a)[-1].update({k: -1.0 for k in _places(a)[-1]})), "another tokenizer"),
    "no log-prob": (_change(lambda a: next(iter(_places(a)[-1].values())).clear()), "is None; expected a number"),
    "a text": (_change(lambda a: next(iter(_places(a)[-1].values())).update(logprob="-1")), "'-1'; expected a number"),
    "above zero": (_change(lambda a: next(iter(_places(a)[-1].values())).update(logprob=0.7)), "0.7; expected"),
    "true": (_change(lambda a: next(iter(_places(a)[-1].values())).update(logprob=True)), "True; expected"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_in_the_middle_is_refused_at_once(lie, teacher, tokenizer, rows):
    change, said = LIES[lie]
    with Liar(teacher, ServeOptions("x", port=0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = scorer(server, tokenizer)
        assert len(remote.rows(rows[:1])) == 1
        server.lie, server.seen = change, 0
        with pytest.raises(AtodError, match=said):
            remote.rows([row + 0 for row in rows[::-1]] + [rows[0][:4]] if lie == "one choice less" else [rows[1]])
        assert server.seen == 1
        server.shutdown()


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-" + "9" * 400])
def test_a_log_prob_that_is_no_number_is_refused(number, server, tokenizer, rows, monkeypatch):
    remote = scorer(server, tokenizer)
    honest = json.dumps
    monkeypatch.setattr(
        "atod_algos.teachers.server.json.dumps",
        lambda body, **_: honest(body).replace('"logprob": -', f'"logprob": {number}, "x": -', 1),
    )
    with pytest.raises(AtodError, match=r"no JSON number|too large"):
        remote.rows(rows[:1])
    assert remote.requests == 1


def test_another_model_behind_the_same_address_is_refused(server, tokenizer, rows):
    """The server is started anew with another model in the middle of a run."""
    remote = scorer(server, tokenizer)
    remote.rows(rows[:1])
    server.loaded = replace(server.loaded, name="another")
    with pytest.raises(AtodError, match=r"answered as model .* and now answers as 'another'"):
        remote.rows(rows[1:])


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--style", "compact", "--max-turns", "3", "--max-response", "8",
        "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "2", "--group-size", "4", "--eval-every", "0",
        "--report-tasks", "4", "--minibatches", "2", "--threads", "1",
    ]  # fmt: skip


def rows_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in lines]


def test_a_served_teacher_dies_and_the_run_goes_on_when_it_is_back(
    options, server, models, tmp_path, capsys, monkeypatch
):
    local = [*options, "--teacher", str(models["teacher"])]
    main(ATOD, [*local, "--steps", "3", "--run", str(tmp_path / "local")])
    monkeypatch.setattr("atod_algos.teachers.remote.ApiOptions", lambda *a: ApiOptions(*a[:1], 60.0, 1) if a else QUICK)
    monkeypatch.setitem(ApiClient.__init__.__kwdefaults__, "wait", lambda _: None)
    remote = [*options, "--teacher", server.address, "--steps", "3", "--run", str(tmp_path / "remote")]
    honest, died = server.completions, []

    def dying(body):
        if server.seen >= 1 and not died:
            died.append(True)
            server.shutdown(), server.server_close()
            raise SystemExit
        return honest(body)

    server.completions = dying
    with pytest.raises(SystemExit) as stop:
        main(ATOD, remote)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "the teacher's server is gone" in err and "same command" in err
    assert died and len(rows_of(tmp_path / "remote")) == 1

    again = ServeOptions("x", port=server.server_address[1])
    with Server(server.loaded, again) as back:
        threading.Thread(target=back.serve_forever, daemon=True).start()
        main(ATOD, remote)
        back.shutdown()
    found, expected = rows_of(tmp_path / "remote"), rows_of(tmp_path / "local")
    assert [row["step"] for row in found] == [1, 2, 3]
    # The same but for rounding: the server scores each row in other company.
    for mine, theirs in zip(found, expected, strict=True):
        gap = "atod/teacher_student_gap_mean"
        assert mine[gap] == pytest.approx(theirs[gap], abs=1e-3)


def test_the_serving_command_serves(models, tokenizer):
    command = [sys.executable, "-m", "atod_algos.teachers.server", str(models["teacher"]), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        address = said.split("--teacher ")[1].strip()
        remote = RemoteScorer(address, tokenizer, temperature=1.0, options=QUICK)
        assert np.isfinite(remote.rows([np.array([3, 4, 5])])[0][1:]).all()
    finally:
        process.terminate()
        process.wait(60)


def test_whole_distributions_cannot_be_had_from_a_server(server, tokenizer, teacher):
    from atod_algos.teachers.local import StepScorer
    from atod_algos.training.config import TrainConfig, resolve

    class Divergent(OPD):
        scores = frozenset({"teacher", "divergence"})

    config = resolve(TrainConfig(env=TOY, student="x", teacher=server.address))
    for chosen in (config, replace(config, teacher="x", teacher_engine="vllm")):
        with pytest.raises(AtodError, match=r"opd compares whole distributions, .* gives top-k tokens at most"):
            StepScorer(chosen, Divergent(), teacher, None, lambda *_: teacher, "cpu")
    assert server.seen == 0
