"""A model behind an HTTP server as a teacher: prompt log-probs from OpenAI-compatible completions, as vLLM serves them.

The invariant: a number that comes back belongs to the id that was sent, from a model with the student's tokenizer, at
the sampling temperature; anything else is an error that names what differs. A row is asked for once: answers are kept,
so a step that is scored again, or a row that two trajectories share, costs nothing.

Made for top-k tokens, it asks ``prompt_logprobs: k`` and keeps, at sampled tokens alone, the k ids of ranks 1 to k.

The address is ``http://HOST:PORT/v1#MODEL``; without ``#MODEL`` it is the server's first. Two forms of answer are read:
``prompt_logprobs`` (vLLM, and ``python -m atod_algos.teachers.server``), else ``logprobs.token_logprobs`` with
``echo``, which names tokens by their text and therefore gives no top-k tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.api import ApiClient, ApiOptions
from agents.engines.top_tokens import MOST_LOGPROB, TooFew, TopTokens, most_likely, top_tokens
from atod_algos.batch import TokenBatch
from atod_algos.learner.loss import TeacherTokens
from atod_algos.teachers.support import along_tokens, tokens_of_rows
from atod_envs.errors import AtodError
from atod_envs.files import as_text
from atod_envs.http.client import ServerRefused

_REQUEST_TOKENS = 16384
"""Most tokens of one request."""
_REQUEST_ENTRIES = 1 << 17
"""Most entries (id and log-prob) that an answer of several rows may have; read, each takes some 400 bytes."""
_AT_ONCE = 4
"""Requests under way at the same time."""
_KEPT_TOKENS = 4_000_000
"""Answers that are kept, in numbers of eight bytes: one for a token, and one for each of its top-k tokens."""
_PROBE_IDS = 512
"""Ids of the vocabulary in one probe of the tokenizer."""
_LEAST_TOP = 2
"""Fewest ids that are asked for where the most likely are wanted: a server that gives the row's own id alone, as ours
once did, is told from one that gives the most likely."""
_CAPPED = frozenset({400, 413, 422})
"""Statuses of a server that does not give so many ids."""


def is_address(name: str) -> bool:
    """Whether a teacher's name is a server's address."""
    return name.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True)
class _Question:
    """A row, and the places whose top-k tokens are wanted."""

    row: np.ndarray
    places: np.ndarray

    @property
    def key(self) -> bytes:
        """What its answer is kept under."""
        digest = hashlib.blake2b(np.asarray(self.row, dtype=np.int64).tobytes(), digest_size=16)
        digest.update(np.asarray(self.places, dtype=np.int64).tobytes())
        return digest.digest()


class RemoteScorer:
    """Scores rows with a model behind a server; a :class:`atod_algos.teachers.local.LogprobScorer`.

    Args:
        address: ``http://HOST:PORT/v1#MODEL``.
        tokenizer: the student's.
        temperature: of the sampling.
        top: k of the top-k tokens that :meth:`top` gives; 0 for none.
        top_option: the option that sets it, for messages.
        options: time-out and retries.
        wait: sleeps between tries; replaced in tests.

    Raises:
        AtodError: the server stays away, has another tokenizer, ignores the temperature, or does not give so many
            tokens.
    """

    def __init__(
        self,
        address: str,
        tokenizer: Any,
        *,
        temperature: float,
        top: int = 0,
        top_option: str = "--support",
        options: ApiOptions | None = None,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        url, _, model = address.partition("#")
        chosen = options or ApiOptions()
        chosen = ApiOptions(url, chosen.timeout, chosen.retries, chosen.extra)
        self._api = ApiClient(chosen) if wait is None else ApiClient(chosen, wait=wait)
        self.address, self.temperature = address, temperature
        self._k, self._option = top, top_option
        self.model = model or self._first_model()
        self.kept: OrderedDict[bytes, TopTokens] = OrderedDict()
        self.kept_tokens = 0
        self._echo = False
        self._answered_by: Any = None
        self.requests = 0
        self._require_tokenizer(tokenizer)
        self._require_temperature(tokenizer)
        if top:  # a server that cannot is found out before episodes are played
            probe = np.sort(np.array(list(tokenizer.get_vocab().values())))[:4]
            self._ask([_Question(probe, np.arange(1, len(probe)))], temperature)

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """Log-probs along axis M; the server cuts its own batches, so ``budget`` plays no part.

        Raises:
            AtodError: the server went away; says how to go on.
        """
        self._require_asked_at(temperature)
        found = self.rows(batch.rows)
        logprobs_M = np.zeros(batch.n_tokens)
        for row, values in enumerate(found):
            at = np.flatnonzero(batch.row_M == row)
            logprobs_M[at] = values[batch.column_M[at]]
        return logprobs_M

    def top(self, batch: TokenBatch, *, temperature: float, budget: int) -> tuple[np.ndarray, TeacherTokens]:
        """Log-probs along axis M, and the top-k tokens in the place of each sampled token, sorted.

        Raises:
            AtodError: the server went away, or does not answer with k tokens; says what to do.
        """
        self._require_asked_at(temperature)
        at_B = tokens_of_rows(batch)
        questions = [_Question(row, batch.column_M[at]) for row, at in zip(batch.rows, at_B, strict=True)]
        return along_tokens(batch, at_B, self._answers(questions))

    def rows(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-prob of every id of every row given the ids before it; the first is not a number."""
        nowhere = np.zeros(0, dtype=np.int64)
        return [found.own_T for found in self._answers([_Question(row, nowhere) for row in rows])]

    def _answers(self, questions: Sequence[_Question]) -> list[TopTokens]:
        keys = [question.key for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.kept}
        found = {key: self.kept[key] for key in keys if key in self.kept}
        limit = min(_REQUEST_TOKENS, _REQUEST_ENTRIES // (1 + max(_LEAST_TOP, self._k)))
        try:
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="teacher") as threads:
                for part, answers in threads.map(self._ask_part, _parts(missing, limit)):
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

    def _require_asked_at(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise AtodError(
                f"the teacher was set up for temperature {self.temperature}, but is asked at {temperature}; "
                "student and teacher must be scored at the same"
            )

    def _keep(self, keys: Sequence[bytes], answers: Sequence[TopTokens]) -> None:
        for key, values in zip(keys, answers, strict=True):
            self.kept[key] = values
            self.kept_tokens += len(values)
        while self.kept_tokens > _KEPT_TOKENS:
            self.kept_tokens -= len(self.kept.popitem(last=False)[1])

    # --- one request ----------------------------------------------------------------------------------------------

    def _ask_part(self, part: dict[bytes, _Question]) -> tuple[list[bytes], list[TopTokens]]:
        return list(part), self._ask(list(part.values()), self.temperature)

    def _ask(self, questions: Sequence[_Question], temperature: float) -> list[TopTokens]:
        """Log-probs of the rows' own ids; of top-k tokens as well where a question names places."""
        prompts = [question.row.tolist() for question in questions]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": temperature,
            "add_special_tokens": False,
        }
        self.requests += 1
        if any(len(question.places) for question in questions):
            choices = self._top_choices(body, len(prompts))
            return [self._ranked(*pair) for pair in zip(questions, choices, strict=True)]
        if not self._echo:
            choices = self._choices({**body, "prompt_logprobs": 1}, len(prompts))
            if all(choice.get("prompt_logprobs") for choice in choices):
                return [top_tokens(self._own(*pair), [], 0) for pair in zip(prompts, choices, strict=True)]
            self._echo = True
        choices = self._choices({**body, "echo": True, "logprobs": 1}, len(prompts))
        return [top_tokens(self._echoed(*pair), [], 0) for pair in zip(prompts, choices, strict=True)]

    def _top_choices(self, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        """The answers to ``n`` prompts with their top-k tokens."""
        try:
            choices = self._choices({**body, "prompt_logprobs": max(_LEAST_TOP, self._k)}, n)
        except ServerRefused as no:
            if no.code not in _CAPPED:
                raise
            raise ServerRefused(f"{no}; {self._what_is_needed}", no.code) from no
        if not all(choice.get("prompt_logprobs") for choice in choices):
            raise self._refused(f"gives no prompt_logprobs; {self._what_is_needed}")
        return choices

    @property
    def _what_is_needed(self) -> str:
        asked = max(_LEAST_TOP, self._k)
        lower = f", or lower {self._option}" if self._k > _LEAST_TOP else ""
        return (
            f"the teacher's {self._k} most likely ids are learned from, so the server must answer prompt_logprobs={asked}: start vLLM "
            f"with --max-logprobs {asked} or more (it gives 20 by default), an 'atod serve teacher' of today{lower}"
        )

    def _ranked(self, question: _Question, choice: dict[str, Any]) -> TopTokens:
        prompt, found = question.row.tolist(), []
        own = self._own(prompt, choice)
        for place in question.places.tolist():
            try:
                entries = [_entry(*pair) for pair in choice["prompt_logprobs"][place].items()]
                found.append(most_likely(entries, self._k, prompt[place]))
            except TooFew as error:
                raise self._refused(f"gives {error} at place {place}; {self._what_is_needed}") from error
            except ValueError as error:
                raise self._refused(f"gives no top-k tokens at place {place}: {error}") from error
        return top_tokens(own, found, self._k)

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
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MOST_LOGPROB:
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
        probe = [_Question(np.array(sorted(tokenizer.get_vocab().values())[:16]), np.zeros(0, dtype=np.int64))]
        plain, warm = (self._ask(probe, temperature)[0].own_T for temperature in (1.0, self.temperature))
        if np.allclose(plain, warm, atol=1e-6, equal_nan=True):
            raise AtodError(
                f"{self.address} gives prompt log-probs at temperature 1 whatever is asked (vLLM does), but episodes are sampled at "
                f"{self.temperature}; use --temperature 1, a local teacher, or python -m atod_algos.teachers.server"
            )


def _entry(token: str, said: Any) -> tuple[int, Any, Any]:
    """Id, log-prob and rank of an entry.

    Raises:
        ValueError: it is none.
    """
    if not (token.isascii() and token.isdecimal() and len(token) < 12 and isinstance(said, dict)):
        raise ValueError(f"the entry {token!r}: {str(said)[:80]} is no id with its log-prob")
    return int(token), said.get("logprob"), said.get("rank")


def _parts(questions: dict[bytes, _Question], limit: int) -> Iterator[dict[bytes, _Question]]:
    """Requests of at most ``limit`` tokens; a row that is longer goes alone."""
    part: dict[bytes, _Question] = {}
    tokens = 0
    for key, question in questions.items():
        if part and tokens + len(question.row) > limit:
            yield part
            part, tokens = {}, 0
        part[key] = question
        tokens += len(question.row)
    if part:
        yield part
