"""A model behind an HTTP server as a teacher: prompt log-probs from OpenAI-compatible completions, as vLLM serves them.

The invariant: a number that comes back belongs to the id that was sent, from a model with the student's tokenizer, at
the sampling temperature; anything else is an error that names what differs. A row is asked for once: answers are kept,
so a step that is scored again, or a row that two trajectories share, costs nothing.

The address is ``http://HOST:PORT/v1#MODEL``; without ``#MODEL`` it is the server's first. Two forms of answer are read:
``prompt_logprobs`` (vLLM, and ``python -m atod_algos.teachers.server``), else ``logprobs.token_logprobs`` with
``echo``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from agents.api import ApiClient, ApiOptions
from atod_algos.batch import TokenBatch
from atod_envs.errors import AtodError
from atod_envs.files import as_text
from atod_envs.http.client import ServerRefused

_REQUEST_TOKENS = 16384
"""Most tokens of one request."""
_AT_ONCE = 4
"""Requests under way at the same time."""
_KEPT_TOKENS = 4_000_000
"""Answers that are kept, in tokens (eight bytes each)."""
_PROBE_IDS = 512
"""Ids of the vocabulary in one probe of the tokenizer."""
_MOST_LOGPROB = 1e-3
"""Largest log-prob that rounding can make of certainty."""


def is_address(name: str) -> bool:
    """Whether a teacher's name is a server's address."""
    return name.startswith(("http://", "https://"))


class RemoteJudge:
    """Scores rows with a model behind a server; a :class:`atod_algos.teachers.local.LogprobScorer`.

    Args:
        address: ``http://HOST:PORT/v1#MODEL``.
        tokenizer: the student's.
        temperature: of the sampling.
        options: time-out and retries.
        wait: sleeps between tries; replaced in tests.

    Raises:
        AtodError: the server stays away, has another tokenizer, or ignores the temperature.
    """

    def __init__(
        self,
        address: str,
        tokenizer: Any,
        *,
        temperature: float,
        options: ApiOptions | None = None,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        url, _, model = address.partition("#")
        chosen = options or ApiOptions()
        chosen = ApiOptions(url, chosen.timeout, chosen.retries, chosen.extra)
        self._api = ApiClient(chosen) if wait is None else ApiClient(chosen, wait=wait)
        self.address, self.temperature = address, temperature
        self.model = model or self._first_model()
        self.kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.kept_tokens = 0
        self._echo = False
        self._answered_by: Any = None
        self.requests = 0
        self._require_tokenizer(tokenizer)
        self._require_temperature(tokenizer)

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """Log-probs along axis M; the server cuts its own batches, so ``budget`` plays no part.

        Raises:
            AtodError: the server went away; says how to go on.
        """
        if temperature != self.temperature:
            raise AtodError(
                f"the teacher was set up for temperature {self.temperature}, but is asked at {temperature}; "
                "student and teacher must be scored at the same"
            )
        found = self.rows(batch.rows)
        logprobs_M = np.zeros(batch.n_tokens)
        for row, values in enumerate(found):
            at = np.flatnonzero(batch.row_M == row)
            logprobs_M[at] = values[batch.column_M[at]]
        return logprobs_M

    def rows(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-prob of every id of every row given the ids before it; the first is not a number."""
        keys = [hashlib.blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest() for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.kept}
        found = {key: self.kept[key] for key in keys if key in self.kept}
        try:
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="teacher") as threads:
                for part, answers in threads.map(self._ask_part, _parts(missing)):
                    # Kept at once: what came before a failure need not be asked for again.
                    self._keep(part, answers)
                    found |= dict(zip(part, answers, strict=True))
        except ServerRefused:
            raise
        except AtodError as error:
            raise AtodError(
                f"the teacher's server is gone: {error}. Start it again and run the same command to go on from the last checkpoint"
            ) from error
        return [found[key] for key in keys]

    def _keep(self, keys: Sequence[bytes], answers: Sequence[np.ndarray]) -> None:
        for key, values in zip(keys, answers, strict=True):
            self.kept[key] = values
            self.kept_tokens += len(values)
        while self.kept_tokens > _KEPT_TOKENS:
            self.kept_tokens -= len(self.kept.popitem(last=False)[1])

    # --- one request ----------------------------------------------------------------------------------------------

    def _ask_part(self, part: dict[bytes, np.ndarray]) -> tuple[list[bytes], list[np.ndarray]]:
        return list(part), self._ask([row.tolist() for row in part.values()], self.temperature)

    def _ask(self, prompts: list[list[int]], temperature: float) -> list[np.ndarray]:
        """Log-probs of the prompts' own ids."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": temperature,
            "add_special_tokens": False,
        }
        self.requests += 1
        if not self._echo:
            choices = self._choices({**body, "prompt_logprobs": 1}, len(prompts))
            if all(choice.get("prompt_logprobs") for choice in choices):
                return [self._own(*pair) for pair in zip(prompts, choices, strict=True)]
            self._echo = True
        choices = self._choices({**body, "echo": True, "logprobs": 1}, len(prompts))
        return [self._echoed(*pair) for pair in zip(prompts, choices, strict=True)]

    def _choices(self, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        """The answers to ``n`` prompts, in their order."""
        answer = self._api.ask("/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._refused(f"answered something that is no completion: {str(answer)[:200]}")
        if len(choices) != n:
            raise self._refused(f"was sent {n} prompts and answered {len(choices)}")
        found = {choice.get("index"): choice for choice in choices if isinstance(choice.get("index"), int)}
        if sorted(found) != list(range(n)):
            raise self._refused(f"was sent {n} prompts and numbers its answers {[c.get('index') for c in choices]}")
        name = answer.get("model")
        if self._answered_by is None:
            self._answered_by = name
        elif name != self._answered_by:
            raise self._refused(f"answered as model {self._answered_by!r} and now answers as {name!r}")
        return [found[index] for index in range(n)]

    def _own(self, prompt: list[int], choice: dict[str, Any]) -> np.ndarray:
        places = choice["prompt_logprobs"]
        if not isinstance(places, list) or len(places) != len(prompt):
            came = len(places) if isinstance(places, list) else type(places).__name__
            raise self._refused(f"{len(prompt)} ids were sent and {came} came back; the server adds or drops tokens")
        values = np.full(len(prompt), np.nan)
        for place, (token, offered) in enumerate(zip(prompt, places, strict=True)):
            if not offered and not place:  # nothing comes before the first id
                continue
            if not isinstance(offered, dict) or not isinstance(own := offered.get(str(token)), dict):
                about = sorted(offered)[:3] if isinstance(offered, dict) else offered
                raise self._refused(
                    f"id {token} was sent at place {place}, but the answer is about {about}; the server has another "
                    "tokenizer or changes prompts"
                )
            values[place] = self._logprob(own.get("logprob"), place)
        return values

    def _echoed(self, prompt: list[int], choice: dict[str, Any]) -> np.ndarray:
        logprobs = choice.get("logprobs")
        found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(found, list):
            raise self._refused(
                "gives neither prompt_logprobs nor echoed log-probs, so it cannot be a teacher; serve it with vLLM, or with "
                "python -m atod_algos.teachers.server"
            )
        if len(found) not in (len(prompt), len(prompt) + 1):
            raise self._refused(f"{len(prompt)} ids were sent and {len(found)} log-probs came back")
        first = [np.nan] if found[0] is None else []
        return np.array(first + [self._logprob(found[at], at) for at in range(len(first), len(prompt))])

    def _logprob(self, value: Any, place: int) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= _MOST_LOGPROB:
            raise self._refused(f"the log-prob at place {place} is {value!r}; expected a number up to 0")
        return float(value)

    def _refused(self, said: str) -> ServerRefused:
        return ServerRefused(f"{self.address}: {said}")

    # --- is it the right model? -----------------------------------------------------------------------------------

    def _first_model(self) -> str:
        try:
            return as_text(self._api.ask("/models", None)["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise AtodError(f"{self._api.base} names no model; give one: --teacher {self.address}#MODEL") from error

    def _require_tokenizer(self, tokenizer: Any) -> None:
        """The whole vocabulary, decoded to text in pieces, must become the same ids on both sides."""
        ids = sorted(tokenizer.get_vocab().values())
        for start in range(0, len(ids), _PROBE_IDS):
            text = tokenizer.decode(ids[start : start + _PROBE_IDS])
            own = tokenizer.encode(text, add_special_tokens=False)
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            try:
                theirs = list(self._api.ask("/tokenize", body, versioned=False)["tokens"])
            except (ServerRefused, KeyError, TypeError) as error:
                raise AtodError(
                    f"{self.address}: whether it has the student's tokenizer cannot be found out ({error}); the server must "
                    "answer /tokenize as vLLM does"
                ) from error
            if theirs != own:
                place = next(i for i in range(len(own) + 1) if own[: i + 1] != theirs[: i + 1])
                mine, other = own[place : place + 1], theirs[place : place + 1]
                raise AtodError(
                    f"student and teacher {self.address} have different tokenizers: after {tokenizer.decode(own[:place])[-20:]!r} "
                    f"comes token {mine} ({tokenizer.decode(mine)!r}) in one and {other} in the other; on-policy distillation "
                    "compares log-probs of the same token ids, so choose models of one family"
                )

    def _require_temperature(self, tokenizer: Any) -> None:
        if self.temperature == 1.0:
            return
        probe = [sorted(tokenizer.get_vocab().values())[:16]]
        plain, warm = self._ask(probe, 1.0)[0], self._ask(probe, self.temperature)[0]
        if np.allclose(plain, warm, atol=1e-6, equal_nan=True):
            raise AtodError(
                f"{self.address} gives prompt log-probs at temperature 1 whatever is asked (vLLM does), but episodes are sampled at "
                f"{self.temperature}; use --temperature 1, a local teacher, or python -m atod_algos.teachers.server"
            )


def _parts(rows: dict[bytes, np.ndarray]) -> Iterator[dict[bytes, np.ndarray]]:
    """Requests of at most ``_REQUEST_TOKENS`` tokens."""
    part: dict[bytes, np.ndarray] = {}
    tokens = 0
    for key, row in rows.items():
        if part and tokens + len(row) > _REQUEST_TOKENS:
            yield part
            part, tokens = {}, 0
        part[key] = row
        tokens += len(row)
    if part:
        yield part
