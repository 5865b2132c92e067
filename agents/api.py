"""A model behind an OpenAI-compatible server as an agent: hosted models, vLLM, SGLang, llama.cpp, Ollama.

The invariant: a request that could not be answered is never turned into an action. What passes by itself (a busy server, a lost
connection, a time-out) is tried again; anything else ends in an error that says what the server said, so that no failure of the
network is counted as a failure of the model.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Lock
from typing import Any

from agents.base import Decision
from atod_envs.errors import AtodError
from atod_envs.styles import Layout

log = logging.getLogger(__name__)

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes that a later try may not meet again."""
_LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """How to reach a server and how it samples."""

    base_url: str = ""
    """Address up to /v1; by default $OPENAI_BASE_URL."""
    timeout: float = 120.0
    """Seconds until a request counts as lost."""
    retries: int = 6
    """Further tries of a request that failed in passing; the wait doubles from one second."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, e.g. {"chat_template_kwargs": {"enable_thinking": false}} for Qwen3 on vLLM."""


class Server:
    """Posts JSON to one server until it answers; safe to share between threads.

    Args:
        options: address, time-out, retries.
        wait: sleeps; replaced in tests.

    Raises:
        AtodError: no address is given.
    """

    def __init__(self, options: ApiOptions, *, wait: Callable[[float], None] = time.sleep) -> None:
        base = options.base_url or os.environ.get("OPENAI_BASE_URL", "")
        if not base.startswith(("http://", "https://")):
            raise AtodError(
                f"the server's address is {base!r}; give --api-base http://HOST:PORT/v1 or set $OPENAI_BASE_URL"
            )
        self.base, self.options, self._wait = base.rstrip("/"), options, wait

    def ask(self, url: str, body: Mapping[str, Any] | None) -> Any:
        """Post a body, or get where there is none, and return the answer.

        Raises:
            Refused: the server says no.
            AtodError: it stays away for all tries.
        """
        pause = 1.0
        for tries_left in range(self.options.retries, -1, -1):
            try:
                return self._once(url, body)
            except _Passing as trouble:
                if not tries_left:
                    raise AtodError(
                        f"{url} did not answer after {self.options.retries + 1} tries; the last said: {trouble}"
                    ) from trouble
                # Clients that were turned away together should not come back together.
                seconds = trouble.after if trouble.after is not None else pause * (0.5 + random.random())
                log.info("%s: %s; again in %.1f s", url, trouble, seconds)
                self._wait(min(seconds, _LONGEST_WAIT))
                pause *= 2
        raise AssertionError("unreachable")

    def _once(self, url: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            if error.code in _PASSING:
                raise _Passing(f"{error.code} {reason}", _seconds(error.headers.get("Retry-After"))) from error
            model = "" if body is None else f" model {body.get('model')!r}"
            raise Refused(f"{url} refused{model}: {error.code} {reason}", error.code) from error
        except (urllib.error.URLError, OSError, HTTPException, ValueError) as error:
            # A time-out, a refused or lost connection, half an answer.
            raise _Passing(str(error) or type(error).__name__, None) from error


class ChatClient:
    """Sends conversations to ``/chat/completions``; safe to share between threads.

    Args:
        model: the server's name for it.
        options: address, time-out, retries.
        temperature: of the sampling.
        max_tokens: longest response.
        wait: sleeps; replaced in tests.

    Attributes:
        prompt_tokens: what the server says it has read so far.
        completion_tokens: what it says it has written.

    Raises:
        AtodError: no address is given.
    """

    def __init__(
        self,
        model: str,
        options: ApiOptions,
        *,
        temperature: float,
        max_tokens: int,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.model, self.options = model, options
        self._server = Server(options, wait=wait)
        self._url = self._server.base + "/chat/completions"
        self._temperature, self._max_tokens = temperature, max_tokens
        self._lock = Lock()
        self.prompt_tokens = self.completion_tokens = 0

    def complete(self, messages: Sequence[Mapping[str, str]], seed: int) -> str:
        """Ask for the next message of a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            seed: passed on; servers that know it answer the same again.

        Raises:
            AtodError: the server refuses, answers something else, or stays away for all tries.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "seed": seed % 2**31,
            **self.options.extra,
        }
        return self._read(self._server.ask(self._url, body))

    def _read(self, answer: Any) -> str:
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise AtodError(
                f"{self._url} answered something that is no chat completion: {str(answer)[:200]}"
            ) from error
        usage = answer.get("usage") or {}
        with self._lock:
            self.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.completion_tokens += int(usage.get("completion_tokens") or 0)
        return str(content or "")  # null: the model spent all its tokens on hidden reasoning


class Refused(AtodError):
    """A server's no; ``code`` is its HTTP status."""

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


class _Passing(Exception):
    """A failure that may not come again; ``after`` is how long the server asks to wait, in seconds."""

    def __init__(self, said: str, after: float | None) -> None:
        super().__init__(said)
        self.after = after


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(4000).decode("utf-8", "replace")
    try:
        said = json.loads(text)["error"]
        text = said["message"] if isinstance(said, dict) else str(said)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300] or error.reason


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header or ""))
    except ValueError:  # absent, or a date
        return None


class ApiAgent:
    """Plays a *prompted* environment: it answers prompts with whole responses.

    Args:
        client: reaches the model.
        layout: whether prompts stand alone or continue a conversation (the prompt style's layout).
        seed: of the sampling, for servers that know it.
    """

    def __init__(self, client: ChatClient, layout: Layout, seed: int = 0) -> None:
        self._client, self._layout, self._seed = client, layout, seed
        self._messages: list[dict[str, str]] = []

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin a conversation with the episode's first prompt."""
        self._messages = [{"role": "user", "content": observation}]

    def act(self) -> Decision:
        """Ask the server for a response."""
        self._seed += 1
        return Decision(self._client.complete(self._messages, self._seed))

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Go on with the next prompt."""
        message = {"role": "user", "content": observation}
        if self._layout is Layout.WINDOW:
            self._messages = [message]
        else:
            self._messages += [{"role": "assistant", "content": action}, message]
