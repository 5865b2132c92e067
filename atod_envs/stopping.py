"""What Ctrl-C and SIGTERM do to a command: one line that says what is kept, and the exit status that shells report.

The invariant: no traceback, in any phase. Inside an import nothing is raised, since an exception in there aborts the
process with torch's own dump; what is stored is what a killed process leaves, and every command goes on from that.

While ``python -m`` still imports one of our modules, Ctrl-C ends the process without a word: this module sees to it
when it is imported, which each package does first. What Python itself does before is not ours.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

_OURS = ("agents", "atod_algos", "atod_envs")


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch system or a container ends the process."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """What shells report for a process that a signal ended: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def stoppable(kept: str | Callable[[], str] = "") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what runs in here after files and workers are closed, with one line on standard error.

    A second Ctrl-C does not wait for the closing. A signal that is ignored (by a job in a shell's background) stays so.

    Args:
        kept: what is kept and how to go on, or what says so when it is needed.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    answer = _Answer(kept)
    with answer.installed():
        try:
            yield
        except KeyboardInterrupt as stop:
            answer.say(exit_code(stop), sys.stderr)
            raise SystemExit(exit_code(stop)) from None


class _Answer:
    """Answers both signals.

    Args:
        kept: see :func:`stoppable`.
    """

    def __init__(self, kept: str | Callable[[], str]) -> None:
        self._kept, self._stopping = kept, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _importing(frame) or (self._stopping and number == signal.SIGINT):
            self.say(128 + number, sys.__stderr__)  # an import may stand where errors are kept from the terminal
            os._exit(128 + number)
        self._stopping = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; closing takes a moment
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def say(self, status: int, stream: TextIO | None) -> None:
        """Say what ended the command, and what is kept."""
        how = "ended by SIGTERM" if status == 128 + signal.SIGTERM else "interrupted"
        kept = self._kept if isinstance(self._kept, str) else self._kept()
        print(f"error: {how}{kept and f'; {kept}'}", file=stream, flush=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Answer both signals, where they are answered in the usual way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            present = signal.getsignal(number)
            if present in (signal.SIG_DFL, signal.default_int_handler) or isinstance(present, _Answer):
                before[number] = signal.signal(number, self)
        try:
            yield
        finally:
            for number, present in before.items():
                signal.signal(number, present)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _starts_ours() -> bool:
    """Whether ``python -m`` is looking for one of our modules: then ``sys.argv`` does not name it yet."""
    named = {word.removeprefix("-m").partition(".")[0] for word in sys.orig_argv}
    return sys.argv[:1] == ["-m"] and not named.isdisjoint(_OURS)


if _starts_ours() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
