"""What the server offers, and the sessions of its clients: a session is one environment, driven by one client.

The invariants: a session carries out one call at a time, in order; a call that is sent again (its answer was lost) is
answered again and not carried out twice; whatever is idle too long or takes too long is let go.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium as gym

from atod_envs.errors import AtodError, EpisodeError, UnknownName
from atod_envs.http.messages import Refused
from atod_envs.text_env import TextEnv

log = logging.getLogger(__name__)

TASK_PAGE = 5000
"""Task ids in one answer."""


@dataclass(frozen=True, slots=True)
class Offer:
    """An environment that clients may play.

    Attributes:
        env_id: its registered id; clients name it so.
        splits: splits that clients may choose; the first is the default.
        options: its other arguments, the operator's alone.
    """

    env_id: str
    splits: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, split: str) -> TextEnv:
        """Make the environment of a split."""
        return cast("TextEnv", gym.make(self.env_id, split=split, **self.options).unwrapped)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of everything the server gives.

    Attributes:
        sessions: sessions that exist at the same time.
        idle_seconds: seconds without a call after which a session is closed.
        call_seconds: longest time that one call may take.
        message_bytes: longest message that is read.
        turns: highest turn limit that a client may ask for, unless the environment's own is higher.
        connections: connections that are served at the same time.
        threads: threads for environments that wait on something outside the process.
    """

    sessions: int = 4096
    idle_seconds: float = 900.0
    call_seconds: float = 60.0
    message_bytes: int = 1 << 20
    turns: int = 1000
    connections: int = 4096
    threads: int = 64


@dataclass(slots=True)
class Session:
    """One client's environment, and the last call's digest and answer."""

    name: str
    env: TextEnv
    used: float
    busy: bool = False
    number: int = 0
    asked: bytes = b""
    answer: dict[str, Any] = field(default_factory=dict)


class Sessions:
    """Carries out the calls of all clients.

    Environments that compute are stepped by one thread, since they share data in this process; those that wait on
    something outside (``blocking``) by several.

    Args:
        offers: what clients may play.
        limits: how much of it.
        clock: seconds, for tests.
    """

    def __init__(
        self, offers: list[Offer], limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not offers:
            raise ValueError("nothing to offer; expected at least one environment")
        self.offers = {offer.env_id: offer for offer in offers}
        self.limits = limits or Limits()
        self._clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._opening = 0
        self._single = ThreadPoolExecutor(1, thread_name_prefix="env")
        self._many = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="env-blocking")
        self._calls: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "about": self._about,
            "open": self._open,
            "tasks": self._tasks,
            "reset": self._reset,
            "step": self._step,
            "close": self._close,
        }

    def __len__(self) -> int:
        return len(self._sessions)

    async def call(self, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a call.

        Args:
            name: ``about``, ``open``, ``tasks``, ``reset``, ``step`` or ``close``.
            request: its arguments, as they were sent.

        Raises:
            Refused: the call is wrong, or cannot be carried out now.
            AtodError: what the environment says to a wrong use (an unknown task, a step after the end).
        """
        if name not in self._calls:
            raise Refused(404, f"no call {name[:40]!r}; expected one of: {', '.join(self._calls)}")
        return cast("dict[str, Any]", await self._calls[name](request))

    def expire(self) -> int:
        """Close the sessions that have been idle too long; returns how many."""
        deadline = self._clock() - self.limits.idle_seconds
        late = []
        for session in self._sessions.values():  # longest idle first
            if session.used > deadline:
                break
            if not session.busy:
                late.append(session.name)
        for name in late:
            self._single.submit(self._sessions.pop(name).env.close)
        return len(late)

    def shutdown(self) -> None:
        """Close everything."""
        for session in self._sessions.values():
            self._single.submit(session.env.close)
        self._sessions.clear()
        for pool in (self._single, self._many):
            pool.shutdown(wait=False, cancel_futures=False)

    # ---- the calls ----

    async def _about(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request)
        limits = self.limits
        return {
            "environments": {offer.env_id: {"splits": offer.splits} for offer in self.offers.values()},
            "limits": {
                "idle_seconds": limits.idle_seconds,
                "call_seconds": limits.call_seconds,
                "message_bytes": limits.message_bytes,
                "turns": limits.turns,
            },
        }

    async def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request, "env", "split")
        env_id = _text(request, "env", next(iter(self.offers)))
        if env_id not in self.offers:
            raise UnknownName("environment", env_id[:80], self.offers)
        offer = self.offers[env_id]
        split = _text(request, "split", offer.splits[0])
        if split not in offer.splits:
            raise UnknownName("split", split[:80], offer.splits)
        self.expire()
        if len(self._sessions) + self._opening >= self.limits.sessions:
            raise Refused(503, f"all {self.limits.sessions} sessions are taken; try again later")
        self._opening += 1
        try:
            env = await self._run(False, offer.make, split)
        finally:
            self._opening -= 1
        name = secrets.token_urlsafe(18)
        self._sessions[name] = Session(name, env, self._clock())
        return {
            "session": name,
            "env": env_id,
            "split": split,
            "splits": env.splits,
            "env_key": env.env_key,
            "label": env.label,
            "max_turns": env.configured_max_turns,
            "data_version": env.data_version,
            "tasks": len(env.tasks),
            "idle_seconds": self.limits.idle_seconds,
        }

    async def _tasks(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request, "session", "start")
        session = self._find(request)
        start = _number(request, "start", 0)
        session.used = self._clock()
        self._sessions.move_to_end(session.name)
        return {"tasks": tuple(session.env.tasks[start : start + TASK_PAGE]), "count": len(session.env.tasks)}

    async def _reset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request, "session", "number", "seed", "task_id", "max_turns")
        session = self._find(request)
        seed = None if request.get("seed") is None else _number(request, "seed")
        task_id = None if request.get("task_id") is None else _text(request, "task_id")
        configured = session.env.configured_max_turns
        limit = configured if request.get("max_turns") is None else _number(request, "max_turns")
        highest = max(self.limits.turns, configured)  # what the operator offers can be played
        if not 1 <= limit <= highest:
            raise Refused(400, f"max_turns={limit}; expected 1 to {highest}")

        def begin() -> dict[str, Any]:
            session.env.max_turns = limit
            observation, info = session.env.reset(seed=seed, options=None if task_id is None else {"task_id": task_id})
            return {"observation": observation, "info": info}

        return await self._in_turn("reset", session, request, begin)

    async def _step(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request, "session", "number", "action")
        session = self._find(request)
        action = _text(request, "action")

        def act() -> dict[str, Any]:
            observation, reward, terminated, truncated, info = session.env.step(action)
            return {
                "observation": observation,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "info": info,
            }

        return await self._in_turn("step", session, request, act)

    async def _close(self, request: Mapping[str, Any]) -> dict[str, Any]:
        _only(request, "session")
        session = self._sessions.pop(_text(request, "session"), None)
        if session is not None:
            self._single.submit(session.env.close)
        return {}

    # ---- one after the other ----

    def _find(self, request: Mapping[str, Any]) -> Session:
        session = self._sessions.get(_text(request, "session"))
        if session is None:
            raise Refused(410, "no such session: it was closed, or idle for too long; open another")
        return session

    async def _in_turn(
        self, name: str, session: Session, request: Mapping[str, Any], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Carry out a call with the next number; one with the last number again gets the last answer again."""
        number = None if request.get("number") is None else _number(request, "number")
        if session.busy:
            raise Refused(409, "the session is busy with another call; a session carries out one call at a time")
        asked = hashlib.blake2b(json.dumps([name, dict(request)], sort_keys=True).encode()).digest()
        if number is not None and number == session.number and session.answer:
            if asked != session.asked:
                raise Refused(
                    410, f"call number {number} was another one, and its answer was lost; open another session"
                )
            return session.answer
        if number is not None and number != session.number + 1:
            raise Refused(
                409, f"call number {number} after number {session.number}; another client is using this session"
            )
        session.busy, session.used = True, self._clock()
        self._sessions.move_to_end(session.name)
        try:
            answer: dict[str, Any] = await self._run(session.env.blocking, work)
        except _Late as late:
            self._sessions.pop(session.name, None)  # its thread may still be at work in it
            raise Refused(504, f"{late}; the session is closed") from None
        finally:
            session.busy, session.used = False, self._clock()
        session.number += 1
        session.asked, session.answer = asked, answer
        return answer

    async def _run(self, blocking: bool, work: Callable[..., Any], *arguments: Any) -> Any:
        deadline = time.monotonic() + self.limits.call_seconds
        while True:
            pool = self._many if blocking else self._single
            try:
                task = pool.submit(work, *arguments)
            except RuntimeError as error:  # the pool is shut down
                raise Refused(503, "the server is shutting down") from error
            try:
                return await asyncio.wait_for(asyncio.wrap_future(task), max(0.0, deadline - time.monotonic()))
            except asyncio.CancelledError:
                me = asyncio.current_task()
                if (me is not None and me.cancelling()) or pool is self._single:
                    raise
            except TimeoutError:
                if task.done() and not task.cancelled():
                    return task.result()  # the environment's own error, or an answer in the last moment
                if not blocking and pool is self._single and task.running():
                    # What hangs keeps its thread; the calls that wait behind it go on in another.
                    log.warning("a call hangs; going on in another thread")
                    self._single = ThreadPoolExecutor(1, thread_name_prefix="env")
                    pool.shutdown(wait=False, cancel_futures=True)
                raise _Late(504, f"the call took more than {self.limits.call_seconds:g} s") from None


class _Late(Refused):
    """A call took longer than the server gives it."""


def _only(request: Mapping[str, Any], *names: str) -> None:
    for name in request:
        if name not in names:
            raise Refused(400, f"unknown argument {name[:40]!r}; expected {', '.join(names) or 'none'}")


def _text(request: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = request.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Refused(400, f"{name}: expected a string, got {type(value).__name__}")
    return value


def _number(request: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = request.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise Refused(400, f"{name}: expected a whole number from 0 to 2^63 - 1")
    return value


def answer_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and message for what went wrong; what only the operator should read goes to the log."""
    if isinstance(error, Refused):
        return error.status, _error("Refused", str(error))
    if isinstance(error, UnknownName | EpisodeError):
        return 422, _error(type(error).__name__, str(error))
    log.error("a call failed", exc_info=error)
    if isinstance(error, AtodError):
        return 503, _error("Unavailable", "the environment needs something that does not answer; try again later")
    return 500, _error("InternalError", "the environment failed; the server's log says why")


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}
