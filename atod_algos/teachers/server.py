"""Serve a model's prompt log-probs over HTTP: a teacher on another machine, where vLLM is not installed.

It answers the three requests that a teacher needs, in vLLM's form: ``POST /v1/completions`` with ``prompt_logprobs``,
``POST /tokenize`` and ``GET /v1/models``. Unlike vLLM's, its log-probs are at the temperature of the request. It does
not write texts.

``prompt_logprobs: k`` from 2 on gives in every place the k most likely ids with their ranks, and the prompt's own id
with a rank if it is one of them. 0 and 1 give the own id alone: most methods need no more, and an answer is half as
long.

    atod serve teacher PATH_OR_HUB_ID --port 8765
    atod train opd --teacher http://HOST:8765/v1 ...
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import tyro

from atod_algos.batch import TokenBatch
from atod_algos.guard import guarded, parse
from atod_algos.learner.options import UpdateOptions
from atod_envs.http.messages import Refused, parse_object
from atod_envs.options import needed_imports
from atod_envs.styles import whole_characters

with needed_imports("serve", __name__):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from atod_envs.http.guard import Access, HttpLimits, make_app
    from atod_envs.http.server import HttpServer, require_free, server_of

if TYPE_CHECKING:
    from agents.models import LoadedModel

LIMITS = HttpLimits(connections=256, body_bytes=8 << 20)
"""What one server gives to its clients."""
MOST_IDS = 1 << 18
"""Token ids in one request."""
MOST_TOP = 1024
"""Most likely ids in one place."""
MOST_ENTRIES = 1 << 20
"""Entries (an id and its log-prob) in one answer: 16,000 places with 64 ids."""
MOST_CHARACTERS = 1 << 17
"""Characters of a text that becomes ids."""
SLICE_ROWS = 256
"""Rows of a request that are scored before it is another's turn; fewer where they are long."""
COLDEST, HOTTEST = 1e-3, 1e3
"""Temperatures at which log-probs are still numbers."""

T = TypeVar("T")
Place = dict[str, dict[str, float]]
"""What is said of one place: an id's log-prob, and its rank where it is known."""


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and where."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder or hub id, or 'builtin' for the reference teacher of --world."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of the machine, with no password."""
    port: int = 8765
    """Port to listen on; 0 takes a free one."""
    world: str = "alfworld"
    """Environment key of the 'builtin' teacher."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the model runs."""
    token_budget: int = UpdateOptions.token_budget
    """Most tokens in one forward pass."""


def row_batch(rows: Sequence[np.ndarray]) -> TokenBatch:
    """Bare rows as a batch in which every id but a row's first counts as sampled."""
    lengths = [len(row) - 1 for row in rows]
    row_M = np.repeat(np.arange(len(rows)), lengths)
    column_M = np.concatenate([1 + np.arange(length) for length in lengths])
    none = np.zeros(0, dtype=np.int64)
    return TokenBatch(
        rows=tuple(rows),
        row_M=row_M,
        column_M=column_M,
        turn_M=np.zeros_like(row_M),
        sampler_logprobs_M=np.zeros(len(row_M)),
        trajectory_K=none,
        index_K=none,
        valid_K=none.astype(bool),
        prompt_length_K=none,
        group_N=none,
        success_N=none.astype(bool),
        score_N=none.astype(np.float64),
        trajectories=(),
    )


class TeacherServer(HttpServer):
    """Answers requests for one model; passes run one after the other, and requests take turns.

    Args:
        loaded: the model.
        options: where to listen.

    Raises:
        AtodError: the address cannot be had.
    """

    def __init__(self, loaded: LoadedModel, options: ServeOptions) -> None:
        self.loaded, self.budget = loaded, options.token_budget
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._waiting = ThreadPoolExecutor(LIMITS.connections, thread_name_prefix="request")

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            for pool in (self._worker, self._waiting):
                pool.shutdown(wait=False, cancel_futures=True)

        routes = [
            Route("/v1/completions", self._posted(lambda body: self.completions(body)), methods=["POST"]),
            Route("/tokenize", self._posted(lambda body: self.tokenize(body)), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
        ]
        app = make_app(routes, _refuse, LIMITS, Access(), lifespan)
        super().__init__(server_of(app, LIMITS), options.host, options.port)

    @property
    def address(self) -> str:
        """What to give as --teacher."""
        return f"{self.origin}/v1"

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """Prompt log-probs of one prompt or several.

        Raises:
            Refused: the request is for something else.
        """
        prompts, temperature, top = self._asked(body)
        places: list[list[Place]] = []
        for part in self._slices(prompts):
            if top > 1:
                places += self._in_turn(partial(self._ranked, part, temperature, top))
                continue
            for prompt, own in zip(part, self._in_turn(partial(self._scored, part, temperature)), strict=True):
                entries = zip(prompt[1:], own, strict=True)
                places.append([{str(token): {"logprob": value}} for token, value in entries])
        choices = [
            {"index": index, "text": "", "finish_reason": "length", "prompt_logprobs": [None, *found]}
            for index, found in enumerate(places)
        ]
        return {"object": "text_completion", "model": self.loaded.name, "choices": choices}

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ids of a text.

        Raises:
            Refused: there is none.
        """
        prompt, special = body.get("prompt"), body.get("add_special_tokens", False)
        if not isinstance(prompt, str) or not isinstance(special, bool):
            kinds = f"{type(prompt).__name__} and {type(special).__name__}"
            raise Refused(400, f"prompt must be a text and add_special_tokens true or false, not {kinds}")
        if len(prompt) > MOST_CHARACTERS:
            raise Refused(413, f"the text has {len(prompt)} characters; send at most {MOST_CHARACTERS} in a request")
        text = whole_characters(prompt)
        tokens = self._in_turn(lambda: self.loaded.tokenizer.encode(text, add_special_tokens=special))
        return {"count": len(tokens), "tokens": tokens}

    def _asked(self, body: dict[str, Any]) -> tuple[list[list[int]], float, int]:
        """The prompts, the temperature and the number of most likely ids of a request."""
        from agents.logits import longest_context

        prompts = body.get("prompt")
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        size = int(self.loaded.model.get_input_embeddings().num_embeddings)
        if not isinstance(prompts, list) or not prompts or not all(_are_ids(prompt, size) for prompt in prompts):
            raise Refused(400, f"prompt must be a list of token ids from 0 to {size - 1}, or several such lists")
        wanted, most = body.get("prompt_logprobs"), body.get("max_tokens", 1)
        if type(wanted) is not int or wanted < 0 or type(most) is not int or most not in (0, 1):
            raise Refused(400, "this server gives prompt log-probs only: prompt_logprobs=1, max_tokens=1")
        if wanted > MOST_TOP:
            raise Refused(400, f"prompt_logprobs is {wanted}; this server gives at most {MOST_TOP} ids in a place")
        if body.get("stream") or body.get("n", 1) != 1:
            raise Refused(400, "this server answers once and whole: leave out stream and n")
        temperature = body.get("temperature", 1.0)
        if type(temperature) not in (int, float) or not COLDEST <= temperature <= HOTTEST:
            raise Refused(400, f"temperature is {temperature!r}; expected a number from {COLDEST:g} to {HOTTEST:g}")
        limit = longest_context(self.loaded.model)
        longest = max(map(len, prompts))
        if longest > limit:
            raise Refused(400, f"a prompt has {longest} ids, but the model reads {limit}")
        if (total := sum(map(len, prompts))) > MOST_IDS:
            raise Refused(413, f"the prompts have {total} ids together; send at most {MOST_IDS} in a request")
        if wanted > 1 and (entries := total * (wanted + 1)) > MOST_ENTRIES:
            raise Refused(
                413,
                f"{total} ids with {wanted} most likely ones each are {entries} entries; ask for at most {MOST_ENTRIES} in a request: "
                "lower prompt_logprobs, or send fewer prompts",
            )
        return prompts, float(temperature), wanted

    def _slices(self, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
        """Prompts in their order, as many at a time as one pass or a few can hold."""
        part: list[list[int]] = []
        for prompt in prompts:
            if part and (len(part) == SLICE_ROWS or sum(map(len, part)) + len(prompt) > 4 * self.budget):
                yield part
                part = []
            part.append(prompt)
        yield part

    def _scored(self, prompts: list[list[int]], temperature: float) -> list[list[float]]:
        """Log-probs of the prompts' ids but their first."""
        from atod_algos.learner.logprobs import score

        rows = [np.array(prompt) for prompt in prompts if len(prompt) > 1]
        if not rows:
            return [[] for _ in prompts]
        values = score(self.loaded.model, row_batch(rows), temperature=temperature, budget=self.budget)[0].tolist()
        ends = np.cumsum([len(prompt) - 1 for prompt in prompts]).tolist()
        return [values[end - len(prompt) + 1 : end] for prompt, end in zip(prompts, ends, strict=True)]

    def _ranked(self, prompts: list[list[int]], temperature: float, top: int) -> list[list[Place]]:
        """The places of each prompt but its first: the own id, and as many of the most likely, with their ranks."""
        from atod_algos.learner.distribution import distribution

        rows = [np.array(prompt) for prompt in prompts if len(prompt) > 1]
        if not rows:
            return [[] for _ in prompts]
        model, batch = self.loaded.model, row_batch(rows)
        own_M, best = distribution(model, model, batch, temperature=temperature, budget=self.budget, topk=top, whole=0)
        ids = [token for row in rows for token in row[1:].tolist()]
        assert best.ids_MS is not None  # only a vocabulary that is kept whole has none
        found: list[Place] = []
        for token, value, tops, values in zip(
            ids, own_M.tolist(), best.ids_MS.tolist(), best.logprobs_MS.tolist(), strict=True
        ):
            place: Place = {str(token): {"logprob": value}}
            for rank, (other, logprob) in enumerate(zip(tops, values, strict=True), 1):
                place[str(other)] = {"logprob": logprob, "rank": rank}
            found.append(place)
        ends = np.cumsum([len(prompt) - 1 for prompt in prompts]).tolist()
        return [found[end - len(prompt) + 1 : end] for prompt, end in zip(prompts, ends, strict=True)]

    async def _models(self, request: Request) -> Response:
        return _json(200, {"object": "list", "data": [{"id": self.loaded.name, "object": "model"}]})

    def _in_turn(self, work: Callable[[], T]) -> T:
        """Work in the one thread that holds the model; requests take turns, a slice each."""
        return self._worker.submit(work).result()

    def _posted(self, work: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
        """An endpoint that waits for the model in a thread of its own."""

        async def answer(request: Request) -> Response:
            body = parse_object(await request.body())
            return await asyncio.get_running_loop().run_in_executor(self._waiting, lambda: _json(200, work(body)))

        return answer


def _json(status: int, body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, allow_nan=False), status, media_type="application/json")


def _refuse(status: int, message: str) -> Response:
    return _json(status, {"error": {"message": message}})


def _are_ids(prompt: Any, size: int) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(i) is int and 0 <= i < size for i in prompt)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    options = parse(ServeOptions, arguments, "atod_algos.teachers.server", __doc__)

    def run() -> None:
        require_free(options.host, options.port)
        from agents.models import computing_type, device_of, load_model  # this takes seconds

        device = device_of(options.device)
        loaded = load_model(options.model, "teacher", world=options.world, device=device, dtype=computing_type(device))
        with TeacherServer(loaded, options) as server:
            server.serve_command(f"serving {loaded.name}; give --teacher {server.address}")

    guarded(run)


if __name__ == "__main__":
    main()
