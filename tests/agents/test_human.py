"""A person at the terminal: plays to a win, with completion, in a real pseudo-terminal and through a pipe."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import gymnasium as gym
import pytest
from paths import REPOSITORY

import atod_envs  # noqa: F401  (registers the environments)
from agents.expert import expert_for
from agents.human import HumanAgent, main, play
from atod_envs.alfworld.generator import builtin

TASK = builtin.task_ids("valid_seen")[2]
PLAN = builtin.game(TASK)["walkthrough"]
COMMAND = [sys.executable, "-m", "agents.human", "--option", "data=builtin", "--split", "valid_seen", "--task-id", TASK]


def environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb", "INPUTRC": os.devnull}


class Terminal:
    """The program at a pseudo-terminal."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            COMMAND,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(),
            cwd=REPOSITORY,
            start_new_session=True,
            preexec_fn=self._control,  # so that Ctrl-C comes through as a signal
        )
        os.close(slave)
        self.seen = ""

    @staticmethod
    def _control():
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # a suite in the background of a shell ignores it, and so would its children
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, text, seconds=100.0):
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} never came; the terminal shows:\n{self.seen}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
                except OSError:
                    assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def test_plays_to_a_win_in_a_terminal_with_completion(terminal):
    pytest.importorskip("readline", reason="this Python has no line editor")
    terminal.wait_for("Your task is to:")
    terminal.wait_for("> ")
    terminal.type(":hi\t\n")  # completes to :hint
    terminal.wait_for("go to ")
    terminal.wait_for("> ")
    first = PLAN[
        0
    ]  # "go to countertop 2": the number decides, so typing all but the number is enough to list, all to act
    terminal.type(first[:-4] + "\t\t")
    listed = terminal.wait_for(first)
    assert len(listed) < 2000
    terminal.type("\x15")  # clear the line
    terminal.type("inv\t\n")
    terminal.wait_for("You are not carrying anything.")
    for command in PLAN:
        terminal.wait_for("> ")
        terminal.type(command + "\n")
    terminal.wait_for(f"Solved after {len(PLAN) + 1} turns (success); score 1.00")
    assert terminal.process.wait(60) == 0


def test_control_d_and_control_c_leave_quietly(terminal):
    terminal.wait_for("> ")
    terminal.type("\x04")
    terminal.wait_for("Not solved after 0 turns (left)")
    assert terminal.process.wait(60) == 0
    again = Terminal()
    try:
        again.wait_for("> ")
        for _ in range(10):  # one that comes just before the line editor waits is noticed with the next
            again.type("\x03")
            try:
                again.process.wait(10)  # one that comes while it is leaving would kill it
                break
            except subprocess.TimeoutExpired:
                continue
        assert again.process.returncode == 130
    finally:
        again.close()


def test_plays_through_a_pipe():
    lines = "\n".join([":actions", ":nonsense", *PLAN]) + "\n"
    done = subprocess.run(
        COMMAND, input=lines, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, timeout=200
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "inventory, look" in done.stdout.replace("\n", " ")
    assert ":nonsense is not a command; there are :actions" in done.stdout
    assert f"Solved after {len(PLAN)} turns (success)" in done.stdout
    assert "> " not in done.stdout


def test_a_closed_input_leaves_at_once():
    words = ["/bin/sh", "-c", '"$@" <&-', "sh", *COMMAND]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("Not solved after 0 turns (left)"), done


def test_hints_alone_win():
    env = gym.make("atod/ALFWorld-v0", data="builtin", split="valid_seen")
    told: list[str] = []
    hinted = iter(range(10**6))

    def ask():
        """Asks for a hint, then does what it says."""
        return ":hint" if next(hinted) % 2 == 0 else told[-1].partition("   (")[0]

    agent = HumanAgent(ask, told.append, expert_for(env))
    info = play(env, agent, seed=1, task_id=TASK)
    assert info["success"] and info["stop_reason"] == "success"


def test_completions():
    agent = HumanAgent(lambda: "", lambda text: None)
    info = {"admissible": ("go to fridge 1", "go to fridge 2", "look", "search[<your query>]"), "task": "x"}
    agent.reset("x", info)
    assert agent.completions("go to fr") == ["go to fridge 1", "go to fridge 2"]
    assert agent.completions("se") == ["search["]
    assert agent.completions(":h") == [":help", ":hint"]
    assert agent.completions("GO") == []


def test_errors(capsys):
    for arguments, message in (
        (["--env", "atod/ALFWord-v0"], "did you mean 'atod/ALFWorld-v0'"),
        (["--split", "tset", "--option", "data=builtin"], "unknown split"),
        (["--option", "data"], "expected NAME=VALUE"),
        (["--option", "data=builtin", "--task-id", "nowhere"], "unknown task id"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
