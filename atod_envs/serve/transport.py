"""How a client reaches the server: HTTP over a connection that is kept alive, or one WebSocket.

The invariant: a call returns the server's answer or raises an error that names the server and the reason; what can pass
(a refused or broken connection, a time-out, a server that is busy) is tried again first.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import socket
import time
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from atod_envs.errors import AtodError, EpisodeError, UnknownName
from atod_envs.http.client import HttpClient, Passing, Retry, ServerGone, ServerRefused, with_retries
from atod_envs.serve.codec import dumps, loads

BACKOFF_SECONDS = 0.2
"""Seconds before the second attempt; doubled each time."""
LONGEST_ANSWER = 64 << 20
"""Bytes of an answer that are read from a WebSocket."""

_PASSING = frozenset({408, 409, 429, 502, 503})


class RemoteError(AtodError, RuntimeError):
    """The server did not answer, or refused."""


class SessionLost(RemoteError):
    """The session is gone: it was idle too long, took too long, or the server was started anew."""


class Link(Protocol):
    """A way to the server."""

    def call(self, name: str, arguments: dict[str, Any], retry: bool = True) -> dict[str, Any]:
        """One call; see the module's invariant."""

    def close(self) -> None:
        """Close the connection; the next call opens another."""


def connect(url: str, token: str, *, timeout: float, retries: int) -> Link:
    """A link to a server; nothing is sent before the first call.

    Raises:
        ValueError: the address is none.
    """
    parts = urlsplit(url)
    kinds: dict[str, type[_Link]] = {"http": HttpLink, "https": HttpLink, "ws": SocketLink, "wss": SocketLink}
    if parts.scheme not in kinds or not parts.hostname:
        raise ValueError(f"url={url!r}; expected an address such as http://127.0.0.1:8080 or ws://127.0.0.1:8080")
    return kinds[parts.scheme](url.rstrip("/"), token, timeout, retries)


class _Link(abc.ABC):
    """What both ways share: attempts, and errors from answers."""

    def __init__(self, url: str, token: str, timeout: float, retries: int) -> None:
        self.url, self._token, self._timeout = url, token, timeout
        self._retry = Retry(retries, BACKOFF_SECONDS, passing=_PASSING)

    def call(self, name: str, arguments: dict[str, Any], retry: bool = True) -> dict[str, Any]:
        """One call, in several attempts."""
        try:
            return self._ask(name, arguments, retry)
        except ServerGone as gone:
            tried = f"{gone.tries} attempt{'s' if gone.tries > 1 else ''}"
            raise RemoteError(
                f"{self.url} did not answer {name!r} ({tried}): {gone.reason}; is the server running?"
            ) from gone

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abc.abstractmethod
    def _ask(self, name: str, arguments: dict[str, Any], retry: bool) -> dict[str, Any]:
        """Ask until there is an answer.

        Raises:
            ServerGone: there is none.
            RemoteError: it is no.
        """

    def _checked(self, status: int, answer: dict[str, Any], said: str = "") -> dict[str, Any]:
        if status == 200:
            return answer
        error = answer.get("error")
        kind = error.get("type") if isinstance(error, dict) else None
        said = _message(answer, said or f"HTTP {status}")
        if status in (410, 504):
            raise SessionLost(f"{self.url}: {said}")
        if kind == "EpisodeError":
            raise EpisodeError(said)
        if kind == "UnknownName":
            unknown = UnknownName("name", "")
            unknown.message, unknown.args = said, (said,)
            raise unknown
        raise RemoteError(f"{self.url} refused: {said}")


class HttpLink(_Link):
    """HTTP over connections that are kept alive."""

    def __init__(self, url: str, token: str, timeout: float, retries: int) -> None:
        super().__init__(url, token, timeout, retries)
        self._client = HttpClient(url, token=token, timeout=timeout, retry=self._retry, decode=loads)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _ask(self, name: str, arguments: dict[str, Any], retry: bool) -> dict[str, Any]:
        try:
            answer = self._client.ask(f"{self._client.prefix}/v1/{name}", dumps(arguments), retry=retry)
        except ServerRefused as error:
            if not error.code:
                raise RemoteError(f"{self.url}: {error}; is it a server of environments?") from error
            return self._checked(error.code, error.answer if isinstance(error.answer, dict) else {}, error.said)
        return cast("dict[str, Any]", answer)


class SocketLink(_Link):
    """One WebSocket."""

    def __init__(self, url: str, token: str, timeout: float, retries: int) -> None:
        super().__init__(url, token, timeout, retries)
        try:
            import websockets.exceptions
            import websockets.sync.client
        except ImportError as error:
            raise ImportError("ws:// needs websockets: pip install 'atod[serve]', or use http://") from error
        self._library = websockets
        self._socket: Any = None
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            with contextlib.suppress(Exception):
                self._socket.close()
            self._socket = None

    def _ask(self, name: str, arguments: dict[str, Any], retry: bool) -> dict[str, Any]:
        policy = self._retry if retry else Retry(0)
        return with_retries(lambda: self._attempt(name, arguments), policy, time.sleep)

    def _attempt(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        deadline = time.monotonic() + self._timeout
        failures = self._library.exceptions
        try:
            if self._socket is None:
                # As over HTTP: straight to the server that was named, through no proxy and behind no redirect, which
                # cannot be followed with a connection that is given.
                where = urlsplit(self.url)
                port = where.port or (443 if where.scheme == "wss" else 80)
                self._socket = self._library.sync.client.connect(
                    f"{self.url}/v1/ws",
                    sock=socket.create_connection((where.hostname, port), timeout=self._timeout),
                    additional_headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
                    open_timeout=self._timeout,
                    close_timeout=2,
                    max_size=LONGEST_ANSWER,
                    compression=None,
                )
            self._socket.send(dumps({**arguments, "id": number, "call": name}).decode("ascii"))
            while True:
                answer = loads(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))
                if answer.pop("id", None) in (number, None):
                    break
            status = int(answer.pop("status"))
        except failures.InvalidStatus as error:
            self.close()
            if error.response.status_code in (401, 403):
                raise RemoteError(f"{self.url} refused the connection: is the token right?") from error
            raise Passing(str(error)) from error
        except failures.ConnectionClosed as error:
            self.close()
            if error.rcvd is not None and error.rcvd.code == 1009:
                raise RemoteError(f"{self.url} refused: the message is too long for it") from error
            raise Passing(f"the connection was closed ({error})") from error
        except TimeoutError as error:
            self.close()
            raise Passing(f"no answer within {self._timeout:g} s") from error
        except (OSError, failures.WebSocketException) as error:
            self.close()
            raise Passing(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise RemoteError(f"{self.url} answered no message of the protocol ({error})") from error
        if status in _PASSING:
            raise Passing(_message(answer, ""), status)
        return self._checked(status, answer)


def _message(answer: dict[str, Any], otherwise: str) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else otherwise
