"""A model behind an OpenAI-compatible server as an agent: hosted models, vLLM, SGLang, llama.cpp, Ollama.

The invariant: a request that could not be answered is never turned into an action. What passes by itself (a busy
server, a lost connection, a time-out) is tried again; anything else ends in an error that says what the server said, so
that no failure of the network is counted as a failure of the model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from agents.base import Decision
from atod_envs.errors import AtodError
from atod_envs.http.client import HttpClient, Retry, ServerGone, ServerRefused
from atod_envs.styles import Layout, whole_characters


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


def server_address(asked: str) -> str:
    """The address that is asked at: as given, else ``$OPENAI_BASE_URL``; empty where there is none."""
    return asked or os.environ.get("OPENAI_BASE_URL", "")


class ApiClient:
    """Posts JSON to an OpenAI-compatible server; safe to share between threads. The key is ``$OPENAI_API_KEY``.

    Args:
        options: address, time-out, retries.
        wait: sleeps; replaced in tests.

    Raises:
        AtodError: no address is given, or the key cannot be sent.
    """

    def __init__(self, options: ApiOptions, *, wait: Callable[[float], None] = time.sleep) -> None:
        base = server_address(options.base_url)
        try:
            self._http = HttpClient(
                base,
                token=os.environ.get("OPENAI_API_KEY", "").strip(),
                timeout=options.timeout,
                retry=Retry(options.retries, 1.0),
                proxies=True,
                sleep=wait,
            )
        except ValueError as error:
            raise AtodError(
                f"the server's address is {base!r} ({error}); give --api-base http://HOST:PORT/v1 or set $OPENAI_BASE_URL"
            ) from error
        self.base = self._http.url

    def ask(self, path: str, body: Mapping[str, Any] | None, *, versioned: bool = True) -> Any:
        """Post a body, or get where there is none, and return the answer.

        Args:
            path: after the address, such as ``/chat/completions``.
            body: the request.
            versioned: whether the path stands under ``/v1`` or next to it.

        Raises:
            ServerRefused: the server says no.
            AtodError: it stays away for all tries.
        """
        cut = "" if versioned else "/v1"
        url = self.base.removesuffix(cut) + path
        try:
            return self._http.ask(self._http.prefix.removesuffix(cut) + path, body)
        except ServerGone as gone:
            said = f"{gone.code} {gone.said}" if gone.code else gone.said
            raise AtodError(f"{url} did not answer after {gone.tries} tries; the last said: {said}") from gone
        except ServerRefused as no:
            model = "" if body is None else f" model {body.get('model')!r}"
            said = f"refused{model}: {no.code} {no.said}" if no.code else f"gave no answer that can be read: {no.said}"
            raise ServerRefused(f"{url} {said}", no.code) from no


class ChatClient:
    """Sends conversations to ``/chat/completions``; safe to share between threads.

    Args:
        model: the server's name for it.
        options: address, time-out, retries.
        temperature: of the sampling.
        max_tokens: longest response.

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
    ) -> None:
        self.model, self.options = model, options
        self._api = ApiClient(options)
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
            "messages": [{name: whole_characters(said) for name, said in message.items()} for message in messages],
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "seed": seed % 2**31,
            **self.options.extra,
        }
        return self._read(self._api.ask("/chat/completions", body))

    def _read(self, answer: Any) -> str:
        try:
            content = answer["choices"][0]["message"]["content"]
            readable = content is None or isinstance(content, str)
        except (KeyError, IndexError, TypeError):
            readable = False
        if not readable:
            raise AtodError(f"{self._api.base} answered something that is no chat completion: {str(answer)[:200]}")
        usage = answer.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        with self._lock:
            self.prompt_tokens += _count(counts.get("prompt_tokens"))
            self.completion_tokens += _count(counts.get("completion_tokens"))
        return content or ""  # null: the model spent all its tokens on hidden reasoning


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


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
