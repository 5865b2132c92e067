"""The engine protocol: the verbs that every inference back end offers, and the data they exchange.

The invariant: an engine is given token ids and returns the ids that it sampled with their log-probs under the very
distribution they were drawn from; text never passes through it. Requests are independent: what one request samples
depends on its prompt, its parameters and the weights, not on the order of submission.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from atod_envs.errors import AtodError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is drawn.

    Top-p and top-k are left out on purpose: a truncated distribution is not the one whose log-probs are trained on.

    Attributes:
        max_tokens: longest response, in tokens.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of this request's own random stream; equal seeds and prompts give equal responses.
        stop_ids: ids that end the response; the stop token is part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}; expected at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}; expected 0 (greedy) or more")


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished response.

    Attributes:
        request_id: as submitted.
        token_ids: sampled ids, the stop token included.
        logprobs: natural log-probability of each, at the temperature of the request (at 1 where it was greedy).
        stopped: ended by a stop token, not by length.
        seconds: from submission to completion.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    seconds: float


class EngineDied(AtodError):
    """An engine failed in the middle of its work and answers nothing more; what was running on it is lost."""

    def __init__(self, name: str, cause: BaseException) -> None:
        reason = (str(cause).strip().splitlines() or ["no message"])[0]
        super().__init__(
            f"the {name} engine died ({type(cause).__name__}: {reason}); the step in progress is lost. Run the same command "
            "again to go on from the last checkpoint"
        )


class Engine(Protocol):
    """Continuous batching behind six verbs."""

    version: int
    """Version of the weights that sample; raised by every ``load_weights``."""
    max_context: int
    """Longest prompt plus response, in tokens."""

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request. Raises ValueError if it cannot fit the context."""

    def step(self) -> list[Completion]:
        """Advance all running requests; return those that have finished. Raises EngineDied if that failed."""

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, by the model's own parameter names."""

    def sleep(self) -> None:
        """Give memory back while the learner or a scorer computes; no request may be running."""

    def wake(self) -> None:
        """Take the memory again. What the weights are is undefined until ``load_weights``."""

    def close(self) -> None:
        """Free what the engine holds."""


def check_request(request_id: str, prompt_ids: Sequence[int], params: SamplingParams, max_context: int) -> None:
    """Refuse what no engine can run.

    Raises:
        ValueError: the prompt is empty, or prompt and response do not fit the context.
    """
    if not prompt_ids:
        raise ValueError(f"request {request_id!r} has an empty prompt")
    if len(prompt_ids) + params.max_tokens > max_context:
        raise ValueError(
            f"request {request_id!r}: {len(prompt_ids)} prompt tokens and up to {params.max_tokens} new ones exceed the "
            f"context of {max_context}"
        )


def uniform(seeds_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, position): the random streams of the requests.

    A counter-based generator (the SplitMix64 finaliser over seed and position), so that a draw depends on nothing but
    its own stream and place: batching, scheduling and resuming cannot change it.

    Args:
        seeds_N: uint64 seeds.
        positions_N: place in each stream.

    Returns:
        float64 array of the same length.
    """
    with np.errstate(over="ignore"):
        x = seeds_N.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + positions_N.astype(np.uint64)
        for _ in range(2):
            x = x + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
