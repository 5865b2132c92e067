"""Commands that are stopped in any phase, whose output has no reader, whose port is taken, that lack packages."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")

from paths import REPOSITORY
from wire import get, post

ROOT = REPOSITORY
pytestmark = pytest.mark.slow
SIGNALS = [signal.SIGTERM, signal.SIGINT]
SEARCH = """
import sys, time
from atod_envs.searchqa import serve
class Slow:
    def retrieve(self, queries, k):
        print("searching", flush=True)
        time.sleep(600)
serve.load_service = lambda *_: {service}
sys.exit(serve.main(["--port", "{port}"]))
"""


@contextlib.contextmanager
def started(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process):
    """Exit status and standard error of a process that should end by itself."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def served(port):
    """Waits until a server answers."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError):
            return get(port, "/health")
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "command, how",
    [
        (command, how)
        for command in ("atod_envs.serve", "atod_envs.searchqa.serve", "atod_envs.webshop.serve")
        for how in SIGNALS
        if (command, how) != ("atod_envs.serve", signal.SIGINT)
    ]
    + [("atod_envs.serve --env atod/TextCraft-v0", signal.SIGINT)],  # all of them take seconds: once will do
)
def test_a_server_accepts_when_it_says_so_and_stops_when_it_is_told(command, how):
    module, *options = command.split()
    with started("-m", module, *options, "--port", "0") as process:
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0].split()[0])
        # The first attempt is answered: 404 is what the shop says of /health.
        assert get(port, "/health")[0] == (404 if "webshop" in module else 200)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as idle:
            idle.sendall(b"GET /hea")
            process.send_signal(how)
            status, said = ended(process)
            assert status == 0 and "Traceback" not in said, said


@pytest.mark.parametrize("how", SIGNALS)
def test_a_server_that_is_still_loading_stops(how):
    with started("-c", SEARCH.format(service='print("loading", flush=True) or time.sleep(600)', port=0)) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(how)
        status, said = ended(process)
        assert status == 128 + how and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("how", SIGNALS)
def test_a_search_that_hangs_does_not_keep_the_server(how):
    with started("-c", SEARCH.format(service="Slow()", port=0)) as process:
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])

        def ask():
            with contextlib.suppress(OSError, IndexError, ValueError):
                post(port, "/retrieve", b'{"queries": ["x"]}')

        threading.Thread(target=ask, daemon=True).start()
        assert process.stdout.readline() == "searching\n"
        process.send_signal(how)
        assert ended(process)[0] == 0


def test_a_server_outlives_whoever_read_its_output():
    reading, writing = os.pipe()
    port = free_port()
    with started("-m", "atod_envs.searchqa.serve", "--port", str(port), stdout=writing) as process:
        os.close(reading)
        os.close(writing)
        assert served(port)[0] == 200
        process.terminate()
        status, said = ended(process)
        assert status == 0 and "Traceback" not in said and "Exception ignored" not in said


def test_a_server_without_any_output_serves():
    port = free_port()
    command = f"exec {shlex.quote(sys.executable)} -m atod_envs.searchqa.serve --port {port} >&-"
    process = subprocess.Popen(["sh", "-c", command], cwd=ROOT)
    try:
        assert served(port)[0] == 200
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait(60)


@pytest.mark.parametrize("module", ["atod_envs.searchqa.serve", "atod_envs.webshop.serve", "atod_envs.serve"])
def test_a_port_that_is_taken_is_said_in_one_line(module):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started("-m", module, "--port", str(port)) as process:
            status, said = ended(process)
    assert status == 1 and f"cannot listen on 127.0.0.1, port {port}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "module", ["atod_envs.searchqa.serve", "atod_envs.webshop.serve", "atod_envs.serve", "atod_algos.teachers.server"]
)
@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_package_is_said_in_one_line(module, missing):
    run = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['x']; "
    run += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    with started("-c", run) as process:
        status, said = ended(process)
    assert status == 1 and said == f"error: {missing} is not installed: pip install 'atod[serve]'\n"
