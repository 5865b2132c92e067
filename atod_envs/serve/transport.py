"""How a client reaches the server: HTTP over a connection that is kept alive, or one WebSocket.

The invariant: a call returns the server's answer or raises an error that names the server and the reason; what can pass (a
refused or broken connection, a time-out, a server that is busy) is tried again first.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import itertools
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

from atod_envs.errors import AtodError, EpisodeError, UnknownName
from atod_envs.serve.codec import dumps, loads

BACKOFF_SECONDS = 0.2
"""Seconds before the second attempt; doubled each time."""
LONGEST_ANSWER = 64 << 20
"""Bytes of an answer that are read."""

_PASSING = frozenset({408, 409, 429, 502, 503})


class RemoteError(AtodError, RuntimeError):
    """The server did not answer, or refused."""


class SessionLost(RemoteError):
    """The session is gone: it was idle too long, took too long, or the server was started anew."""


class _Passing(Exception):
    """An attempt failed in a way that another may not."""


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
        self.url, self._token, self._timeout, self._attempts = url, token, timeout, retries + 1
        self._parts = urlsplit(url)

    def call(self, name: str, arguments: dict[str, Any], retry: bool = True) -> dict[str, Any]:
        """One call, in several attempts."""
        reason = ""
        attempts = self._attempts if retry else 1
        for attempt in range(attempts):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                return self._checked(*self._attempt(name, arguments))
            except _Passing as passing:
                reason = str(passing)
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        raise RemoteError(f"{self.url} did not answer {name!r} ({tried}): {reason}; is the server running?")

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abc.abstractmethod
    def _attempt(self, name: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Ask once: the status, and the message.

        Raises:
            _Passing: it may go well another time.
            RemoteError: it will not.
        """

    def _checked(self, status: int, answer: dict[str, Any]) -> dict[str, Any]:
        if status == 200:
            return answer
        error = answer.get("error")
        kind, message = (error.get("type"), error.get("message")) if isinstance(error, dict) else (None, None)
        message = message if isinstance(message, str) else f"HTTP {status}"
        if status in _PASSING:
            raise _Passing(message)
        if status in (410, 504):
            raise SessionLost(f"{self.url}: {message}")
        if kind == "EpisodeError":
            raise EpisodeError(message)
        if kind == "UnknownName":
            unknown = UnknownName("name", "")
            unknown.message, unknown.args = message, (message,)
            raise unknown
        raise RemoteError(f"{self.url} refused: {message}")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}


class HttpLink(_Link):
    """One HTTP connection that is kept alive."""

    _connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _attempt(self, name: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        body = dumps(arguments)
        deadline = time.monotonic() + self._timeout
        reused = self._connection is not None
        try:
            try:
                status, data = self._exchange(name, body, deadline)
            except (ConnectionError, http.client.BadStatusLine):
                self.close()
                if not reused:
                    raise
                status, data = self._exchange(name, body, deadline)  # an old connection had been closed meanwhile
            return status, loads(data) if data.startswith(b"{") or status == 200 else {}
        except TimeoutError as error:
            self.close()
            raise _Passing(f"no answer within {self._timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _Passing(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            self.close()
            raise RemoteError(
                f"{self.url} answered no JSON object ({error}); is it a server of environments?"
            ) from error

    def _exchange(self, name: str, body: bytes, deadline: float) -> tuple[int, bytes]:
        if self._connection is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
        connection = self._connection
        headers = {"Content-Type": "application/json", **self._headers()}
        # A server that refuses a message closes the connection before all of it is sent; its answer is there to read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", f"{self._parts.path}/v1/{name}", body, headers)
        response = connection.getresponse()
        parts: list[bytes] = []
        size = 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError
            if size > LONGEST_ANSWER:
                raise http.client.HTTPException(f"an answer of more than {LONGEST_ANSWER} bytes")
        response.close()
        if response.will_close:
            self.close()
        return response.status, b"".join(parts)


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

    def _attempt(self, name: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = next(self._numbers)
        deadline = time.monotonic() + self._timeout
        failures = self._library.exceptions
        try:
            if self._socket is None:
                self._socket = self._library.sync.client.connect(
                    f"{self.url}/v1/ws",
                    additional_headers=self._headers(),
                    open_timeout=self._timeout,
                    close_timeout=2,
                    max_size=LONGEST_ANSWER,
                    compression=None,
                )
            self._socket.send(dumps({**arguments, "id": number, "call": name}).decode("ascii"))
            while True:
                answer = loads(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))
                if answer.pop("id", None) in (number, None):
                    return int(answer.pop("status")), answer
        except failures.InvalidStatus as error:
            self.close()
            if error.response.status_code in (401, 403):
                raise RemoteError(f"{self.url} refused the connection: is the token right?") from error
            raise _Passing(str(error)) from error
        except failures.ConnectionClosed as error:
            self.close()
            if error.rcvd is not None and error.rcvd.code == 1009:
                raise RemoteError(f"{self.url} refused: the message is too long for it") from error
            raise _Passing(f"the connection was closed ({error})") from error
        except TimeoutError as error:
            self.close()
            raise _Passing(f"no answer within {self._timeout:g} s") from error
        except (OSError, failures.WebSocketException) as error:
            self.close()
            raise _Passing(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError) as error:
            self.close()
            raise RemoteError(f"{self.url} answered no message of the protocol ({error})") from error
