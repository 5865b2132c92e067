"""Environments in this process or in worker processes, behind one small interface: submit a request, take the outcome.

The invariant: an environment answers its requests in order and is never shared, so the same requests give the same
outcomes wherever it lives. A worker starts from nothing but this package (no copy of the caller's main module, no
fork of its threads), and ends by itself when the caller is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import gymnasium as gym

from atod_envs.errors import AtodError, EpisodeError

Maker: TypeAlias = str | Callable[..., gym.Env[Any, Any]]
"""An environment id, or something importable that returns an environment."""

Request: TypeAlias = tuple[int, str, tuple[Any, ...], dict[str, Any]]
"""Index of the environment; name of a method, or ``get:`` / ``set:`` and an attribute; arguments; keyword arguments."""

_GOODBYE_SECONDS = 5.0


class WorkerError(AtodError, RuntimeError):
    """A worker process died, or failed in a way that cannot be carried over to the caller."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request came to: a value, or an error that :meth:`unwrap` raises for the caller."""

    value: Any = None
    error: BaseException | None = None

    def unwrap(self) -> Any:
        """The value.

        Raises:
            BaseException: what the environment raised.
        """
        if self.error is not None:
            raise self.error
        return self.value

    def packed(self) -> tuple[Any, ...]:
        """Itself in parts that can be sent: errors do not travel well whole, their constructors may want anything."""
        error = self.error
        if error is None:
            return (self.value,)
        trace = "".join(traceback.format_exception(error))
        return (type(error), error.args, {**vars(error), "__notes__": [f"In the worker process:\n{trace}"]})

    @classmethod
    def unpacked(cls, parts: tuple[Any, ...]) -> Outcome:
        """The outcome that was packed."""
        if len(parts) == 1:
            return cls(parts[0])
        kind, arguments, state = parts
        error: BaseException = kind.__new__(kind)
        error.args = arguments
        error.__dict__.update(state)
        return cls(error=error)


def carry_out(env: gym.Env[Any, Any], name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Outcome:
    """Carry out one request and keep whatever it comes to."""
    try:
        if name.startswith("get:"):
            return Outcome(env.get_wrapper_attr(name[4:]))
        if name.startswith("set:"):
            env.set_wrapper_attr(name[4:], *arguments)
            return Outcome()
        found = env.get_wrapper_attr(name)
        # Gymnasium's own vector environments answer call() with an attribute that is no method, too.
        return Outcome(found(*arguments, **keywords) if callable(found) or arguments or keywords else found)
    except Exception as error:
        return Outcome(error=error)


def build(maker: Maker, keywords: Mapping[str, Any]) -> gym.Env[Any, Any]:
    """Make one environment."""
    return gym.make(maker, **keywords) if isinstance(maker, str) else maker(**keywords)


class LocalPool:
    """Environments in this process; requests are carried out as they are submitted."""

    def __init__(self, maker: Maker, keywords: Mapping[str, Any], number: int) -> None:
        self._envs = [build(maker, keywords) for _ in range(number)]
        self._outcomes: dict[int, Outcome] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        """Carry out requests, at most one for each environment that has none waiting to be collected."""
        for index, *_ in requests:  # what is broken off, by Ctrl-C say, has an outcome, too
            self._outcomes[index] = Outcome(
                error=EpisodeError("the call was broken off; reset() begins another episode")
            )
        for index, name, arguments, keywords in requests:
            self._outcomes[index] = carry_out(self._envs[index], name, arguments, keywords)

    def collect(self, timeout: float | None) -> dict[int, Outcome]:
        """Outcomes of finished requests, by environment; here, all of them."""
        del timeout  # nothing is ever under way
        outcomes, self._outcomes = self._outcomes, {}
        return outcomes

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()
        self._envs.clear()


class WorkerPool:
    """Environments in worker processes; environment ``i`` lives in worker ``i % workers``."""

    def __init__(self, maker: Maker, keywords: Mapping[str, Any], number: int, workers: int) -> None:
        self._number, self._workers = number, workers
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            order = pickle.dumps((maker, dict(keywords)))
        except Exception as error:
            raise WorkerError(
                f"{maker!r} with {dict(keywords)!r} cannot be sent to a worker process ({error}); "
                "use an environment id or a function at the top level of a module, or workers=0"
            ) from error
        try:
            for worker in range(workers):
                self._start(order, len(range(worker, number, workers)))
            for worker in range(workers):  # all are starting by now; wait for each to have made its environments
                self._read(worker)[1].unwrap()
        except BaseException:
            self.close()
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        """Send requests, at most one for each environment that has none waiting to be collected."""
        batches: dict[int, list[Request]] = {}
        for index, name, arguments, keywords in requests:
            batches.setdefault(index % self._workers, []).append((index // self._workers, name, arguments, keywords))
        for worker, batch in batches.items():
            try:
                self._connections[worker].send(batch)
            except OSError as error:
                raise self._died(worker) from error

    def collect(self, timeout: float | None) -> dict[int, Outcome]:
        """Outcomes of finished requests, by environment; waits for one, at most ``timeout`` seconds.

        Raises:
            WorkerError: a worker process died.
        """
        outcomes: dict[int, Outcome] = {}
        ready = wait(self._connections, timeout)
        for worker, connection in enumerate(self._connections):
            if connection not in ready:
                continue
            while True:
                local, outcome = self._read(worker)
                outcomes[local * self._workers + worker] = outcome
                if not connection.poll():
                    break
        return outcomes

    def close(self) -> None:
        """Let the workers end, and end those that do not."""
        for connection in self._connections:
            connection.close()  # a worker that reads the end of its orders closes its environments and leaves
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connections.clear()
        self.processes.clear()

    def _start(self, order: bytes, number: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from atod_envs.workers import serve; serve({theirs.fileno()})"
            )
            self.processes.append(
                subprocess.Popen([sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            )
        self._connections.append(Connection(ours.detach()))
        self._connections[-1].send((order, number))

    def _read(self, worker: int) -> tuple[int, Outcome]:
        try:
            local, parts = self._connections[worker].recv()
        except (EOFError, OSError) as error:
            raise self._died(worker) from error
        return local, Outcome.unpacked(parts)

    def _died(self, worker: int) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[worker].wait(_GOODBYE_SECONDS)
        code = self.processes[worker].returncode
        members = list(range(worker, self._number, self._workers))
        shown = ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"worker process {worker} (environments {shown}) {how}; their episodes are lost. "
            "If memory ran out, use fewer environments; then close this vector environment and make a new one"
        )


def serve(descriptor: int) -> None:
    """Life of a worker process: make environments, answer requests until there are no more to come.

    Args:
        descriptor: file descriptor of the socket to the caller.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; it then closes the connection
    connection = Connection(descriptor)
    order, number = connection.recv()
    envs: list[gym.Env[Any, Any]] = []
    try:
        maker, keywords = pickle.loads(order)
        envs.extend(build(maker, keywords) for _ in range(number))
        _reply(connection, -1, Outcome())
    except Exception as error:
        _reply(connection, -1, Outcome(error=error))
        return
    # Orders are read by a thread, so that the caller can always send, even while this process waits to be read.
    orders: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    while (batch := orders.get()) is not None:
        for local, name, arguments, keywords in batch:
            try:
                _reply(connection, local, carry_out(envs[local], name, arguments, keywords))
            except OSError:  # the caller is gone
                os._exit(0)
    for env in envs:
        env.close()


def _listen(connection: Connection, orders: queue.SimpleQueue[list[Request] | None]) -> None:
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        orders.put(None)


def _reply(connection: Connection, local: int, outcome: Outcome) -> None:
    try:
        message = pickle.dumps((local, outcome.packed()))
    except Exception as error:  # something in it cannot travel: say so instead
        what = repr(outcome.error) if outcome.error else f"a value of {type(outcome.value)}"
        message = pickle.dumps((local, Outcome(error=WorkerError(f"{what} cannot be sent: {error}")).packed()))
    connection.send_bytes(message)
