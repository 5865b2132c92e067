"""What goes wrong: dead and slow servers, lost answers, idle and crowded sessions, oversized and hostile messages."""

import asyncio
import http.client
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import TOY_OFFERS, running
from wire import post_call

from atod_envs.serve.client import RemoteEnv
from atod_envs.serve.command import main
from atod_envs.serve.sessions import Limits, Offer, Refused, Sessions
from atod_envs.serve.transport import RemoteError, SessionLost

# ---- servers that do not answer ----


def test_a_dead_server_is_named(kind):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and no server listens
        port = unused.getsockname()[1]
        with pytest.raises(
            RemoteError, match=rf"127.0.0.1:{port} did not answer 'open' \(2 attempts\).*is the server running"
        ):
            RemoteEnv(f"{kind}://127.0.0.1:{port}", retries=1)


def test_a_server_that_never_answers_is_given_up(kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(RemoteError, match=r"no answer within 0\.3 s|timed out"):
            RemoteEnv(f"{kind}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3, retries=0)
        assert time.monotonic() - started < 60


def test_a_server_that_drips_is_given_up():
    """Each byte arrives in time, the whole answer never: a client without a limit for the whole waits two minutes."""
    with socket.create_server(("127.0.0.1", 0)) as dripping:

        def drip():
            client, _ = dripping.accept()
            with client:
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    time.sleep(0.12)
                    try:
                        client.sendall(b"{")
                    except OSError:
                        return

        threading.Thread(target=drip, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(RemoteError, match="no answer within"):
            RemoteEnv(f"http://127.0.0.1:{dripping.getsockname()[1]}", timeout=0.4, retries=0)
        assert time.monotonic() - started < 60


def test_something_else_on_the_port_is_recognised():

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        with pytest.raises(RemoteError, match="is it a server of environments"):
            RemoteEnv(f"http://127.0.0.1:{other.server_port}", retries=0)
    for url in ("localhost:8080", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="expected an address"):
            RemoteEnv(url)


def test_a_server_that_is_started_anew_loses_the_episode_but_not_the_client(kind):
    with running(TOY_OFFERS) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        env = RemoteEnv(url.replace("http", kind), retries=3)
        first = env.reset(seed=2)
    with running(TOY_OFFERS, port=port):
        with pytest.raises(SessionLost, match="open another"):
            env.step("pear")
        assert env.reset(seed=2) == first
        env.step("pear")


def test_an_answer_that_is_lost_is_asked_for_again_and_nothing_happens_twice(toy_server):
    """A proxy cuts the connection after the request has been carried out."""
    upstream = toy_server.removeprefix("http://")
    cuts = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            connection = http.client.HTTPConnection(upstream, timeout=120)
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            connection.close()
            if cuts:
                cuts.pop()
                self.close_connection = True
                return
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        env = RemoteEnv(f"http://127.0.0.1:{proxy.server_port}", retries=3)
        env.reset(seed=1)
        env.step("plum")
        cuts.append("once")
        *_, info = env.step("pear")
        assert not cuts and info["turn"] == 2
        *_, info = env.step("plum")
        assert info["turn"] == 3
        env.close()

        # Given up rather than asked for again: its answer is none to another call.
        env = RemoteEnv(f"http://127.0.0.1:{proxy.server_port}", retries=0)
        first, wanted = env.tasks[:2]
        env.reset(seed=1, options={"task_id": first})
        cuts += ["and once more", "over a fresh connection"]
        with pytest.raises(RemoteError, match="did not answer 'step'"):
            env.step("plum")
        with pytest.raises(SessionLost, match="its answer was lost; open another session"):
            env.step("pear")
        _, info = env.reset(seed=7, options={"task_id": wanted})
        assert (info["task_id"], info["turn"]) == (wanted, 0) and env.step("pear")[4]["turn"] == 1
        env.close()
        proxy.shutdown()


# ---- sessions ----


def test_idle_sessions_expire_and_the_client_says_so():
    now = [0.0]
    with running(TOY_OFFERS, idle_seconds=0.4, clock=lambda: now[0]) as (url, sessions):
        env, busy = RemoteEnv(url), RemoteEnv(url)
        env.reset(seed=0)
        busy.reset(seed=0)
        for now[0] in (0.2, 0.3, 0.5):
            busy.reset(seed=0)
        deadline = time.monotonic() + 60
        while (
            len(sessions) > 1 and time.monotonic() < deadline
        ):  # the server looks for them by itself, by its own clock
            time.sleep(0.02)
        assert len(sessions) == 1
        with pytest.raises(SessionLost, match="idle for too long"):
            env.step("pear")
        env.reset(seed=0)
        assert len(sessions) == 2


def test_thousands_of_sessions_and_no_more():
    """3,000 open sessions; the next is refused, until one is closed."""
    websockets = pytest.importorskip("websockets", reason="websockets is not installed (extra 'serve')")

    async def crowd(url):
        async with websockets.connect(url.replace("http", "ws") + "/v1/ws") as link:

            async def send():
                for mark in range(3001):
                    await link.send(json.dumps({"id": mark, "call": "open", "split": "valid"}))

            sending = asyncio.create_task(send())
            answers = [json.loads(await link.recv()) for _ in range(3001)]
            await sending
            return answers

    with running(TOY_OFFERS, sessions=3000, call_seconds=250) as (url, sessions):  # each waits for all before it
        answers = asyncio.run(crowd(url))
        (late,) = [answer for answer in answers if answer["status"] != 200]
        assert late["status"] == 503 and "all 3000 sessions are taken" in late["error"]["message"]
        names = [answer["session"] for answer in answers if answer["status"] == 200]
        assert len(set(names)) == len(sessions) == 3000
        with pytest.raises(RemoteError, match="all 3000 sessions are taken"):
            RemoteEnv(url, retries=0)
        post_call(url, "close", {"session": names[0]})
        RemoteEnv(url, retries=0).close()
        for name in (names[1], names[-1]):
            assert post_call(url, "reset", {"session": name, "seed": 3})[1]["info"]["split"] == "valid"


def test_an_environment_can_be_played_to_its_own_turn_limit():
    with running([Offer("odd/Odd-v0", ("train",), {"max_turns": 30})], turns=20) as (url, _):
        env = RemoteEnv(url, retries=0)
        assert env.max_turns == 30 and env.reset(seed=0)[1]["turn"] == 0
        env.max_turns = 31
        with pytest.raises(RemoteError, match="max_turns=31; expected 1 to 30"):
            env.reset(seed=0)


def test_one_call_at_a_time_in_a_session(toy_server, gate):
    env = RemoteEnv(toy_server, retries=0)
    env.reset(seed=0)
    call = {"session": env.session, "action": "wait"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post_call, toy_server, "step", call)
        gate.until_waiting(1)
        assert [post_call(toy_server, "step", call)[0] for _ in range(3)] == [409, 409, 409]
        gate.open()
        assert first.result()[0] == 200
    assert gate.waiting == 1
    status, answer = post_call(toy_server, "step", {"session": env.session, "action": "pear", "number": 9})
    assert status == 409 and "another client is using this session" in answer["error"]["message"]
    status, answer = post_call(toy_server, "step", {"session": env.session, "action": "pear", "number": 3})
    assert status == 200 and answer["info"]["turn"] == 2


def test_a_call_that_hangs_is_cut_and_the_others_go_on(gate):
    with running(TOY_OFFERS, call_seconds=3) as (url, sessions):
        hanging, other = RemoteEnv(url, retries=0), RemoteEnv(url, retries=0)
        hanging.reset(seed=0)
        other.reset(seed=0)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(hanging.step, "wait")
            gate.until_waiting(1)
            time.sleep(1.5)
            *_, info = other.step(
                "pear"
            )  # waits behind the one that hangs, then goes on, though that one hangs for ever
            assert info["turn"] == 1
            with pytest.raises(SessionLost, match="more than 3 s"):
                lost.result()
        assert len(sessions) == 1
        hanging.reset(seed=0)


def test_an_environments_own_time_out_is_not_the_servers(toy_server):
    for env_id in ("odd/Odd-v0", "odd/Blocking-v0"):
        env = RemoteEnv(toy_server, env_id, retries=0)
        env.reset(seed=0)
        with pytest.raises(RemoteError, match="the server's log says why") as caught:
            env.step("time out")
        assert not isinstance(caught.value, SessionLost)
        assert env.step("pear")[-1]["turn"] == 1, "the session goes on"


def test_an_environment_that_takes_too_long_to_be_made_is_named(gate):
    with running([Offer("odd/Odd-v0", ("train",), {"wait": True})], call_seconds=0.3) as (url, sessions):
        with pytest.raises(RemoteError, match=r"the call took more than 0\.3 s"):
            RemoteEnv(url, retries=0)
        gate.open()
        assert not sessions


def test_environments_that_wait_do_not_make_each_other_wait(toy_server, gate):
    envs = [RemoteEnv(toy_server, "odd/Blocking-v0") for _ in range(8)]
    for env in envs:
        env.reset(seed=0)
    gate.enough = 8  # it opens only for all at once
    with ThreadPoolExecutor(8) as pool:
        turns = [answer[-1]["turn"] for answer in pool.map(lambda env: env.step("wait"), envs)]
    assert turns == [1] * 8


def test_an_environment_that_fails_tells_the_client_nothing_private(toy_server, kind):
    env = RemoteEnv(toy_server.replace("http", kind), retries=0)
    env.reset(seed=0)
    with pytest.raises(RemoteError, match="the server's log says why") as caught:
        env.step("fail")
    assert "passwd" not in str(caught.value)
    with pytest.raises(RemoteError, match="the server's log"):
        env.step("object")


# ---- the sessions alone ----


def test_expiry_follows_the_clock_in_order_of_use():
    async def scenario():
        now = [0.0]
        sessions = Sessions([Offer("odd/Odd-v0", ("train",))], Limits(idle_seconds=10), clock=lambda: now[0])
        names = [(await sessions.call("open", {}))["session"] for _ in range(3)]
        now[0] = 8.0
        await sessions.call("reset", {"session": names[0], "seed": 1})
        now[0] = 11.0
        assert sessions.expire() == 2
        await sessions.call("step", {"session": names[0], "action": "pear"})
        with pytest.raises(Refused, match="open another"):
            await sessions.call("reset", {"session": names[1]})
        sessions.shutdown()

    asyncio.run(scenario())


def test_a_session_keeps_no_request():
    async def scenario():
        sessions = Sessions([Offer("odd/Odd-v0", ("train",))])
        name = (await sessions.call("open", {}))["session"]
        await sessions.call("reset", {"session": name, "seed": 1, "number": 1})
        before = tracemalloc.get_traced_memory()[0]
        call = {"session": name, "action": "\ud800" + "x" * 900_000, "number": 2}
        answer = await sessions.call("step", dict(call))
        assert await sessions.call("step", dict(reversed(call.items()))) is answer
        with pytest.raises(Refused, match="was another one"):
            await sessions.call("step", call | {"action": "x"})
        del call
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
        sessions.shutdown()

    tracemalloc.start()
    try:
        asyncio.run(scenario())
    finally:
        tracemalloc.stop()


# ---- the command ----


def test_the_command_serves_and_stops(tmp_path):
    pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbft0ken\r\n")  # as an editor on Windows saves it
    command = [sys.executable, "-m", "atod_envs.serve", "--env", "atod/ALFWorld-v0", "--option", "data=builtin"]
    process = subprocess.Popen(
        [*command, "--split", "valid_seen", "--port", "0", "--token-file", str(tmp_path / "token")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving atod/ALFWorld-v0 on http://127.0.0.1:")
        env = RemoteEnv(line.split()[-1], token="t0ken", retries=0)  # it accepts before it says so
        assert env.reset(seed=0)[1]["split"] == "valid_seen"
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set a token"),
        (["--env", "atod/Nothing-v0"], "Nothing"),
        (["--env", "atod/ALFWorld-v0", "--split", "nowhere"], "nowhere"),
        (["--env", "atod/ALFWorld-v0", "--option", "data=/nowhere/at/all"], "/nowhere/at/all"),
        (["--option", "train.data=builtin"], "leave out the split's name"),
        (["--option", "data"], "expected NAME=VALUE"),
        (["--sessions", "0"], "--sessions 0"),
        (["--token-file", "/nowhere"], "nowhere"),
    ],
)
def test_the_command_answers_slips_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("ATOD_TOKEN", raising=False)
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and message in said and "\n" not in said
