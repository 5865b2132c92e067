"""Serve a model's prompt log-probs over HTTP: a teacher on another machine, where vLLM is not at hand.

It answers the three requests that a teacher needs, in vLLM's form: ``POST /v1/completions`` with ``prompt_logprobs``, ``POST /tokenize``
and ``GET /v1/models``. Unlike vLLM's, its log-probs are at the temperature of the request. It does not write texts.

    atod serve teacher PATH_OR_HUB_ID --port 8765
    atod train opd --teacher http://HOST:8765/v1 ...
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Annotated, Any

import numpy as np
import tyro

from agents.models import LoadedModel, load_model
from atod_algos.batch import TokenBatch
from atod_algos.learner.logprobs import score
from atod_algos.training.cli import guarded
from atod_algos.training.config import TrainConfig
from atod_envs.options import program

log = logging.getLogger(__name__)


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
    device: str = "cpu"
    """Where the model runs: cpu or cuda."""
    token_budget: int = TrainConfig.token_budget
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


class TeacherServer(ThreadingHTTPServer):
    """Answers requests for one model; passes run one after the other.

    Args:
        loaded: the model.
        options: where to listen.
    """

    daemon_threads = True

    def __init__(self, loaded: LoadedModel, options: ServeOptions) -> None:
        super().__init__((options.host, options.port), _Handler)
        self.loaded, self.budget = loaded, options.token_budget
        self.lock = Lock()

    @property
    def address(self) -> str:
        """What to give as --teacher."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/v1"

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """Prompt log-probs of one prompt or several.

        Raises:
            ValueError: the request is for something else.
        """
        prompts = body.get("prompt")
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        size = int(self.loaded.model.get_input_embeddings().num_embeddings)
        if not isinstance(prompts, list) or not prompts or not all(_are_ids(prompt, size) for prompt in prompts):
            raise ValueError(f"prompt must be a list of token ids from 0 to {size - 1}, or several such lists")
        if body.get("prompt_logprobs") is None or int(body.get("max_tokens", 1)) > 1:
            raise ValueError("this server gives prompt log-probs only: prompt_logprobs=1, max_tokens=1")
        temperature = float(body.get("temperature", 1.0))
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        limit = int(self.loaded.model.config.max_position_embeddings)
        longest = max(map(len, prompts))
        if longest > limit:
            raise ValueError(f"a prompt has {longest} ids, but the model reads {limit}")
        scored = [prompt for prompt in prompts if len(prompt) > 1]
        values = np.zeros(0)
        if scored:
            with self.lock:
                rows = row_batch([np.array(prompt) for prompt in scored])
                values = score(self.loaded.model, rows, temperature=temperature, budget=self.budget)[0]
        choices, start = [], 0
        for index, prompt in enumerate(prompts):
            own = values[start : start + len(prompt) - 1].tolist()
            start += len(prompt) - 1
            places = [None, *({str(token): {"logprob": value}} for token, value in zip(prompt[1:], own, strict=True))]
            choices.append({"index": index, "text": "", "finish_reason": "length", "prompt_logprobs": places})
        return {"object": "text_completion", "model": self.loaded.name, "choices": choices}

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ids of a text."""
        tokens = self.loaded.tokenizer.encode(
            str(body["prompt"]), add_special_tokens=bool(body.get("add_special_tokens"))
        )
        return {"count": len(tokens), "tokens": tokens}

    def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [{"id": self.loaded.name, "object": "model"}]}


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, self.server.models())
        else:
            self._answer(404, {"error": {"message": f"no such address: {self.path}"}})

    def do_POST(self) -> None:
        work = {"/v1/completions": self.server.completions, "/tokenize": self.server.tokenize}.get(self.path)
        if work is None:
            self._answer(404, {"error": {"message": f"no such address: {self.path}"}})
            return
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self._answer(200, work(body))
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, {"error": {"message": str(error)}})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


def _are_ids(prompt: Any, size: int) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(i, int) and 0 <= i < size for i in prompt)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    options = tyro.cli(ServeOptions, args=arguments, prog=program("atod_algos.teachers.server"), description=__doc__)

    def run() -> None:
        loaded = load_model(options.model, "teacher", world=options.world, device=options.device)
        with TeacherServer(loaded, options) as server:
            print(f"serving {loaded.name}; give --teacher {server.address}", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("stopped")

    guarded(run)


if __name__ == "__main__":
    main()
