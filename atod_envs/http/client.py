"""``HttpClient``: asks an HTTP server for JSON until it answers.

Whatever may pass by itself (a refused or lost connection, a time-out, a busy server, an answer that is cut off) is
tried again; whatever will not (a refusal, a redirect, a page instead of JSON) is said at once. A redirect is never
followed, so that no key and no request goes to a host that was not named.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import logging
import os
import random
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from atod_envs.errors import AtodError
from atod_envs.http.messages import parse

log = logging.getLogger(__name__)

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that a later try may not meet again."""
LONGEST_ANSWER = 256 << 20
"""Bytes of an answer that are read."""
SHOWN = 300
"""Characters of an answer that an error quotes."""

T = TypeVar("T")


class ServerRefused(AtodError):
    """A no that another try would not change.

    Attributes:
        code: HTTP status; 0 where the answer came with 200 and is none.
        said: what the server said.
        answer: the answer's JSON, or ``None``.
    """

    def __init__(self, message: str, code: int = 0, said: str = "", answer: Any = None) -> None:
        super().__init__(message)
        self.code, self.said, self.answer = code, said or message, answer


class ServerGone(AtodError):
    """The server did not answer in any try.

    Attributes:
        said: why the last one failed.
        tries: how many there were.
        code: HTTP status of the last one; 0 where there was none.
    """

    def __init__(self, said: str, tries: int, code: int = 0) -> None:
        self.said, self.tries, self.code = said, tries, code
        super().__init__(f"no answer in {tries} {'try' if tries == 1 else 'tries'}: {self.reason}")

    @property
    def reason(self) -> str:
        """Why the last one failed, with its status."""
        return f"HTTP {self.code}: {self.said}" if self.code else self.said


class Passing(Exception):
    """A try failed in a way that another may not.

    Attributes:
        code: HTTP status; 0 where there was none.
        after: seconds that the server asks to wait, or ``None``.
    """

    def __init__(self, said: str, code: int = 0, after: float | None = None) -> None:
        super().__init__(said)
        self.code, self.after = code, after


@dataclass(frozen=True, slots=True)
class Retry:
    """When to try again.

    Attributes:
        retries: further tries after the first.
        pause: seconds before the second try; doubled each time.
        longest: longest pause, in seconds, also where the server asks for more.
        jitter: share of a pause that is random, so that clients that were turned away together do not come back
            together.
        passing: statuses that are tried again.
    """

    retries: int = 5
    pause: float = 0.5
    longest: float = 60.0
    jitter: float = 0.5
    passing: frozenset[int] = PASSING


def with_retries(attempt: Callable[[], T], retry: Retry, sleep: Callable[[float], None]) -> T:
    """Try until it goes well.

    Args:
        attempt: one try; raises :class:`Passing` where another may help.
        retry: how often and when.
        sleep: waits some seconds.

    Raises:
        ServerGone: no try went well.
    """
    pause, tries = retry.pause, 0
    while True:
        try:
            return attempt()
        except Passing as trouble:
            tries += 1
            if tries > retry.retries:
                raise ServerGone(str(trouble), tries, trouble.code) from trouble
            seconds = pause * (1 + retry.jitter * random.uniform(-1, 1)) if trouble.after is None else trouble.after
            log.info("%s; again in %.1f s", trouble, seconds)
            sleep(min(seconds, retry.longest))
            pause *= 2


class HttpClient:
    """Asks one server; safe to share between threads and processes. Connections are kept alive.

    Args:
        url: ``http://host:port/prefix`` or ``https://...``.
        token: sent as ``Authorization: Bearer TOKEN``; empty for none.
        timeout: seconds for one try, from connecting to the answer's last byte.
        retry: when to try again.
        proxies: go through the proxy that ``$http_proxy`` and its kind name, with the name and password in its address,
            except on this machine.
        decode: reads an answer; raises ``ValueError`` where it is none.
        sleep: waits between tries; replaced in tests.

    Attributes:
        url: as it was given, without a closing slash.
        prefix: its path.

    Raises:
        ValueError: the address is none, or the token cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 60.0,
        retry: Retry | None = None,
        proxies: bool = False,
        decode: Callable[[bytes], Any] = parse,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._parts = address_of(url)
        self.url = url.rstrip("/")
        self.prefix = self._parts.path.rstrip("/")
        self.timeout = timeout
        self._retry = retry or Retry()
        self._decode, self._sleep = decode, sleep
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            if not token.isascii() or not token.isprintable():
                raise ValueError("the token holds characters that no HTTP header can; is it the right one?")
            self._headers["Authorization"] = f"Bearer {token}"
        self._proxy = _proxy(self._parts) if proxies else None
        self._proxy_headers = {} if self._proxy is None else _credentials(self._proxy)
        if self._parts.scheme == "http":  # to https, they go with the tunnel and no further than the proxy
            self._headers |= self._proxy_headers
        self._owner, self._idle = os.getpid(), deque[http.client.HTTPConnection]()

    def ask(self, path: str, body: Mapping[str, Any] | bytes | None = None, *, retry: bool = True) -> Any:
        """Post a body, or get where there is none.

        Args:
            path: of the request, with the prefix.
            body: the JSON object, or its bytes.
            retry: whether to try again.

        Returns:
            The answer's JSON.

        Raises:
            ServerRefused: the server says no, or something that is no answer.
            ServerGone: it does not answer.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        policy = self._retry if retry else Retry(0, passing=self._retry.passing)
        return with_retries(lambda: self._attempt(path, data), policy, self._sleep)

    def close(self) -> None:
        """Close the connections that are kept; the next request opens another."""
        while self._idle:
            self._idle.pop().close()

    def _attempt(self, path: str, body: bytes | None) -> Any:
        try:
            response, data = self._exchange(path, body)
        except TimeoutError as error:
            raise Passing(f"timed out: no answer within {self.timeout:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise ServerRefused(f"its certificate is not trusted: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Passing(f"{type(error).__name__}: {error}") from error
        status = response.status
        if 200 <= status < 300:
            return self._read(data)
        if 300 <= status < 400:
            target = response.headers.get("Location", "")
            raise ServerRefused(f"it redirects to {target[:SHOWN]!r}; give the address of the server itself", status)
        said, answer = _said(data)
        said = said or response.reason
        if status in self._retry.passing:
            raise Passing(said, status, _seconds(response.headers.get("Retry-After")))
        raise ServerRefused(f"HTTP {status}: {said}", status, said, answer)

    def _read(self, data: bytes) -> Any:
        try:
            return self._decode(data)
        except ValueError as error:
            text = data.strip()
            if not text or (text[:1] in b"{[" and text[-1:] not in b"}]"):
                raise Passing(f"the answer is cut off: {data[-80:]!r}") from error
            if text[:1] not in b"{[":
                raise ServerRefused(f"not JSON: {data[:80]!r}") from error
            raise ServerRefused(f"not JSON: {error}") from error

    def _exchange(self, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request and read its answer, all of it before the time is up."""
        deadline = time.monotonic() + self.timeout
        if self._owner != os.getpid():  # a forked child has connections of its own
            self._owner, self._idle = os.getpid(), deque()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._over(self._connect(), path, body, deadline)
            with contextlib.suppress(ConnectionError, http.client.BadStatusLine):
                return self._over(connection, path, body, deadline)
            # The server had closed a connection that was kept alive; the next one is no new try.

    def _over(
        self, connection: http.client.HTTPConnection, path: str, body: bytes | None, deadline: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection.response_class = _response_class(deadline)
        if connection.sock is not None:
            connection.sock.settimeout(self.timeout)
        if self._proxy is not None and self._parts.scheme == "http":
            path = f"http://{self._parts.netloc}{path}"
        try:
            # A server that refuses a message closes the connection before all of it is sent; its answer is there to
            # read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("GET" if body is None else "POST", path, body, self._headers)
            response = connection.getresponse()
            data = response.read(LONGEST_ANSWER + 1)
            if len(data) > LONGEST_ANSWER:
                raise ServerRefused(f"an answer of more than {LONGEST_ANSWER} bytes")
            if response.length:
                raise http.client.IncompleteRead(data, response.length)
            response.close()
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return response, data

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        host, port = self._parts.hostname or "", self._parts.port
        if self._proxy is None:
            return kind(host, port, timeout=self.timeout)
        connection = kind(self._proxy.hostname or "", self._proxy.port, timeout=self.timeout)
        if self._parts.scheme == "https":
            connection.set_tunnel(host, port, self._proxy_headers)
        return connection


def address_of(url: str) -> SplitResult:
    """The parts of a server's address.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"url={url!r}; expected an address such as http://127.0.0.1:8000")
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Source(Protocol):
    def readinto(self, buffer: Any) -> int | None: ...
    def close(self) -> None: ...


class _Timed(io.RawIOBase):
    """A socket's stream that ends at a deadline, however slowly the bytes come."""

    def __init__(self, source: _Source, sock: Any, deadline: float) -> None:
        self._source, self._sock, self._deadline = source, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._source.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def _response_class(deadline: float) -> type[http.client.HTTPResponse]:
    class Response(http.client.HTTPResponse):
        def __init__(self, sock: Any, *arguments: Any, **named: Any) -> None:
            super().__init__(sock, *arguments, **named)
            self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, deadline))

    return Response


def _proxy(parts: SplitResult) -> SplitResult | None:
    host = parts.hostname or ""
    named = urllib.request.getproxies().get(parts.scheme)
    if not named or is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(named if "://" in named else f"http://{named}")


def _credentials(proxy: SplitResult) -> dict[str, str]:
    """The header for the name and password in a proxy's address, if it has any."""
    if proxy.username is None:
        return {}
    given = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"}


def _said(data: bytes) -> tuple[str, Any]:
    """What an error says, in one line, and its JSON."""
    text, answer = data[:4000].decode("utf-8", "replace"), None
    with contextlib.suppress(ValueError):
        answer = parse(data)
    if isinstance(answer, dict):
        said = answer.get("error", answer.get("detail"))
        said = said.get("message") if isinstance(said, dict) else said
        text = said if isinstance(said, str) else text
    return " ".join(text.split())[:SHOWN], answer


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:  # absent, or a date
        return None
    return max(0.0, seconds) if seconds == seconds else None
