"""Ctrl-C and SIGTERM: one line with what is kept, the status that shells report, and no traceback in any phase."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from paths import REPOSITORY

from atod_envs.retrieval.build import main as build
from atod_envs.stopping import Terminated, stoppable

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


def send(number):
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 5)  # until the handler runs
    raise AssertionError("the signal was not answered")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_runs_and_only_that(number, capsys):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    assert before[signal.SIGTERM] == signal.SIG_DFL, "a library in this process answers SIGTERM itself"
    closing = []
    with pytest.raises(SystemExit) as stop, stoppable("outer"), stoppable(lambda: "two are kept"):
        try:
            send(number)
        finally:
            closing.append(signal.getsignal(signal.SIGTERM))
    assert stop.value.code == 128 + number and closing == [signal.SIG_IGN], "a second SIGTERM waits for the closing"
    assert capsys.readouterr().err == f"error: {SIGNALS[number]}; two are kept\n"
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_work_may_catch_it_first(capsys):
    with stoppable("never said"), contextlib.suppress(Terminated):
        send(signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_index_that_is_being_built(number, tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"id": "{i}", "contents": "T{i}\\nword{i} fox"}}\n' for i in range(50)))
    asked = ["--corpus", str(corpus), "--out", str(tmp_path / "wiki")]
    with monkeypatch.context() as patch:
        patch.setattr("atod_envs.retrieval.build.BM25Index.build", lambda *_, **__: send(number))
        with pytest.raises(SystemExit) as stop:
            build(asked)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 128 + number and said[-1].startswith(f"error: {SIGNALS[number]}; what was begun")
    assert build(asked) == 0 and "50 passages" in capsys.readouterr().out


def run(folder, *command, **modules):
    """Run Python with modules that stand before those that are installed."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    paths = os.pathsep.join([str(folder), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        # A suite in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("module", ["atod_envs.retrieval.build", "agents.human", "atod_algos.evaluate"])
def test_ctrl_c_while_python_m_imports(module, tmp_path):
    pressed = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10): pass\nprint('went on')\n"
    ended = run(tmp_path, "-m", module, gymnasium=pressed)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_an_import_of_a_command_raises_nothing_there(number, tmp_path):
    late = f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    for _ in range(10): pass\n"
    late += "except BaseException:\n    print('raised')\n    raise\nprint('went on')\n"
    code = "import contextlib, io\nfrom atod_envs.stopping import stoppable\n"
    code += "with stoppable('two are kept'), contextlib.redirect_stderr(io.StringIO()):\n    import late"
    ended = run(tmp_path, "-c", code, late=late)
    assert (ended.returncode, ended.stdout) == (128 + number, "")
    assert ended.stderr == f"error: {SIGNALS[number]}; two are kept\n"


def test_who_imports_us_keeps_ctrl_c(tmp_path):
    code = "import signal, atod_envs\nassert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    assert run(tmp_path, "-c", code).returncode == 0
    assert run(tmp_path, "-m", "mine", mine=code).returncode == 0
