"""What every command answers to errors and signals: one line for what a user can fix; a traceback means a bug."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from atod_envs.errors import AtodError

_MEMORY = "out of memory; lower --token-budget, --slots or --tasks-per-step"


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch system or a container ends the process."""


def guarded(command: Callable[[], object]) -> None:
    """Run a command; answer what a user can fix in one line and exit with 1.

    Ctrl-C ends it in one line, too; a reader that has closed our output ends it without a word.
    """
    try:
        command()
    except AtodError as error:
        fail(str(error))
    except MemoryError:
        fail(_MEMORY)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            fail(f"{_MEMORY}, then run the same command to go on")
        raise
    except ImportError as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        fail("interrupted", exit_code(stop))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(
            f"{error.filename or 'the output'} could not be written: {error.strerror}; make room and run the same command again"
        )


def exit_code(stop: KeyboardInterrupt) -> int:
    """What shells report for a process that a signal ended: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say an error on standard error, and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def sigterm_closes() -> Iterator[None]:
    """Let SIGTERM end what runs in here like Ctrl-C does, so that files and workers are closed.

    Raises:
        Terminated: in the main thread, when SIGTERM comes.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; closing takes a moment
        raise Terminated

    with _handler(signal.SIGTERM, signal.SIG_DFL, stop):
        yield


@contextmanager
def dies_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process without an exception: one raised inside torch's import aborts it with a dump."""
    with _handler(signal.SIGINT, signal.default_int_handler, signal.SIG_DFL):
        yield


@contextmanager
def _handler(number: signal.Signals, present: Any, new: Any) -> Iterator[None]:
    """Handle a signal another way, where it is handled in the usual one."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != present:
        yield
        return
    signal.signal(number, new)
    try:
        yield
    finally:
        signal.signal(number, present)
