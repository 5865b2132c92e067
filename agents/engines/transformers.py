"""The engine that works anywhere: continuous batching over a Hugging Face causal language model.

Each running request owns a slot: one row of a key/value store that grows with use. Every ``step`` is one ragged
forward pass: the new tokens of requests that have just been admitted stand next to the single next tokens of all
running ones, with no padding between them. So a finished request costs nothing more, and a waiting one starts at once.
A slot keeps its keys and values when its request ends: the next turn of the same conversation, or another episode with
the same opening, reads in only what is new.

The invariant: ``slot.cached`` is exactly the list of ids whose keys and values stand in the slot's row.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agents.engines.base import Completion, EngineDied, SamplingParams, check_request, uniform
from agents.engines.decode_graph import DecodeGraphs, NextTokens
from agents.engines.decoder import FamilyDecoder, make_decoder
from agents.engines.kv_cache import Segment, to_device
from agents.logits import logit_head, longest_context, require_steady_positions

PASS_TOKENS = 8192
"""Most new tokens of one forward pass; bounds its activations. A single longer prompt is read in on its own."""
_SHARED = 8
"""A common opening is copied from another slot from this many tokens on."""


@dataclass(slots=True)
class _Request:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    submitted: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.tokens[-1] in self.params.stop_ids or len(self.tokens) >= self.params.max_tokens


@dataclass(slots=True)
class _Slot:
    row: int
    cached: list[int] = field(default_factory=list)
    request: _Request | None = None
    used: int = 0

    def new_ids(self) -> list[int]:
        """Ids of the running request that are not in the store yet."""
        if self.request is None:
            raise RuntimeError(f"slot {self.row} runs no request")
        if self.request.tokens:
            return self.request.tokens[-1:]
        return self.request.prompt[len(self.cached) :]


class TransformersEngine:
    """Samples from a ``transformers`` causal language model.

    Args:
        model: the model; it may be the learner's own, then loading its weights copies nothing.
        slots: requests that run at the same time; more wait in a queue.
        max_context: longest prompt plus response, in tokens; by default the model's own.
        graphs: whether a step without prompt tokens runs at a fixed shape, on a GPU as a recorded CUDA graph; by
            default on a GPU. Only models with their own code here (:class:`FamilyDecoder`) have it.

    Attributes:
        prefilled: prompt tokens that were computed so far.
        decoded: sampled tokens that were computed so far.

    Raises:
        UnsupportedModel: the model's own log-probs cannot be had here; says what to use instead.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        slots: int = 128,
        max_context: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        wrapped: Any = model
        base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
        self.model = model
        self.version = 0
        self.max_context = int(max_context or longest_context(base))
        require_steady_positions(base, self.max_context, "the model")
        self.device = next(model.parameters()).device
        self._head = logit_head(base)
        self.decoder, self.store = make_decoder(model, slots, self.max_context)
        self._slots = [_Slot(row) for row in range(slots)]
        self._queue: deque[_Request] = deque()
        self.graphs: DecodeGraphs | None = None
        if isinstance(self.decoder, FamilyDecoder) and (self.device.type == "cuda" if graphs is None else graphs):
            self.graphs = DecodeGraphs(base, self.store, slots, self._compute)
        self._clock = 0
        self._dead: Exception | None = None
        self.prefilled = 0
        self.decoded = 0

    # --- the engine's verbs ---------------------------------------------------------------------------------------

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty, or prompt and response do not fit the context.
        """
        check_request(request_id, prompt_ids, params, self.max_context)
        self._queue.append(_Request(request_id, list(prompt_ids), params, time.perf_counter()))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit waiting requests, advance every running one by a token, and return those that have finished.

        Raises:
            EngineDied: the forward pass failed; the engine answers nothing more.
        """
        if self._dead is not None:
            raise EngineDied("transformers", self._dead)
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            return self._step()
        except Exception as error:
            self._dead = error
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise  # the command line says which settings lower it
            raise EngineDied("transformers", error) from error
        finally:
            if was_training:
                self.model.train()

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights; everything that was cached under the old ones is dropped.

        Raises:
            KeyError: a name that the model does not have.
            RuntimeError: requests are still running.
        """
        self._require_idle("weights were loaded")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in own:
                    raise KeyError(f"the engine's model has no parameter {name!r}")
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        # A fresh start, so that what follows does not depend, not even in rounding, on what ran before.
        self._drop_finished()
        self.decoder.rebind()
        self.model.eval()
        self.version += 1

    def sleep(self) -> None:
        """Give the store's memory back until the next request; the weights stay, they may be the learner's own."""
        self._require_idle("the engine was put to sleep")
        self._drop_finished()

    def wake(self) -> None:
        """Nothing to do: the store grows again by itself."""

    def close(self) -> None:
        """Drop all requests and free the store."""
        self._queue.clear()
        for slot in self._slots:
            slot.request, slot.cached = None, []
        self._clear_store()

    def _require_idle(self, what: str) -> None:
        if any(slot.request is not None for slot in self._slots) or self._queue:
            raise RuntimeError(f"{what} while requests are running; let them finish, or close the engine")

    def _drop_finished(self) -> None:
        self._slots = [_Slot(row) for row in range(len(self._slots))]
        self._clear_store()
        self._clock = 0

    def _clear_store(self) -> None:
        if self.graphs is not None:
            self.graphs.drop()  # they read and write the store's memory
        self.store.clear()

    # --- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> list[_Slot]:
        admitted: list[_Slot] = []
        free = [slot for slot in self._slots if slot.request is None]
        while self._queue and free:
            request = self._queue.popleft()
            slot, shared = self._place(request.prompt, free)
            free.remove(slot)
            slot.cached = slot.cached[:shared]
            slot.request = request
            self._clock += 1
            slot.used = self._clock
            admitted.append(slot)
        if admitted:
            most = max(len(s.request.prompt) + s.request.params.max_tokens for s in admitted if s.request)
            self.store.grow(most, max(slot.row for slot in admitted) + 1)
        return admitted

    def _place(self, prompt: list[int], free: list[_Slot]) -> tuple[_Slot, int]:
        """Choose a slot: its own conversation's if that is still there, else the least recently used."""
        own: _Slot | None = None
        for slot in free:
            n = len(slot.cached)
            # The last id rarely agrees by chance, so whole lists are seldom compared.
            if 0 < n <= len(prompt) and slot.cached[-1] == prompt[n - 1] and slot.cached == prompt[:n]:
                own = slot if own is None or n > len(own.cached) else own
        if own is not None:
            return own, min(len(own.cached), len(prompt) - 1)  # the last token is read in again for its logits
        oldest = min(free, key=lambda slot: (slot.used, slot.row))
        donor, shared = None, _SHARED - 1
        for slot in self._slots:
            known = slot.cached
            if slot is not oldest and len(known) > shared < len(prompt) and known[shared] == prompt[shared]:
                length = _common(known, prompt)
                if length > shared:
                    donor, shared = slot, length
        if donor is None:
            return oldest, 0
        shared = min(shared, len(prompt) - 1)
        self.store.copy_prefix(donor.row, [oldest.row], shared)
        oldest.cached = donor.cached[:shared]
        return oldest, shared

    # --- forward passes -------------------------------------------------------------------------------------------

    def _step(self) -> list[Completion]:
        running = [slot for slot in self._slots if slot.request is not None]
        admitted = self._admit()
        # Identical prompts (the first turn of a group) are computed once and copied.
        leaders: dict[tuple[int, ...], _Slot] = {}
        copies: dict[int, list[_Slot]] = {}
        todo: list[_Slot] = []
        for slot in admitted:
            # A slot that continues a conversation of its own has nothing to share.
            leader = slot if slot.cached else leaders.setdefault(tuple(slot.new_ids()), slot)
            (todo if leader is slot else copies.setdefault(leader.row, [])).append(slot)
        part, size = running, len(running)
        self.decoded += size
        for slot in todo:
            width = len(slot.new_ids())
            self.prefilled += width
            if part and size + width > PASS_TOKENS:
                self._pass(part, copies)
                part, size = [], 0
            part = [*part, slot]
            size += width
        if part:
            self._pass(part, copies)
        return [_finish(slot) for slot in (*running, *admitted) if slot.request is not None and slot.request.done]

    def _pass(self, slots: list[_Slot], copies: dict[int, list[_Slot]]) -> None:
        """Compute the new tokens of some slots and draw the next token of each, and of those that copy them."""
        single = all(slot.request is not None and slot.request.tokens for slot in slots)
        if self.graphs is not None and single and self._fixed_pass(self.graphs, slots):
            return
        new = [slot.new_ids() for slot in slots]
        segments = [Segment(slot.row, len(slot.cached), len(ids)) for slot, ids in zip(slots, new, strict=True)]
        ids_T = np.fromiter(itertools.chain.from_iterable(new), dtype=np.int64)
        tokens, positions, last = self.store.begin(segments, ids_T)
        logits = self.decoder.next_logits(tokens, positions, self.store, last)
        drawn, source = list(slots), list(range(len(slots)))
        for place, (slot, ids) in enumerate(zip(slots, new, strict=True)):
            slot.cached += ids
            followers = copies.pop(slot.row, [])
            if followers:
                self.store.copy_prefix(slot.row, [other.row for other in followers], len(slot.cached))
            for other in followers:
                other.cached = list(slot.cached)
                drawn.append(other)
                source.append(place)
        if len(drawn) > len(slots):
            logits = logits[to_device([np.array(source)], self.device)[0]]
        self._sample([slot.request for slot in drawn if slot.request is not None], self._head.close(logits.float()))

    def _fixed_pass(self, graphs: DecodeGraphs, slots: list[_Slot]) -> bool:
        """The same for slots with one new token each, at a fixed shape; False where that cannot be had."""
        requests = [slot.request for slot in slots if slot.request is not None]
        alive = {slot.row for slot in slots}
        live = NextTokens(
            np.array([slot.row for slot in slots]),
            np.array([request.tokens[-1] for request in requests]),
            np.array([len(slot.cached) for slot in slots]),
            np.array([request.params.temperature for request in requests], dtype=np.float64),
            _draws(requests),
        )
        drawn = graphs.step(live, [(slot.row, len(slot.cached)) for slot in self._slots if slot.row not in alive])
        if drawn is None:
            return False
        for slot, request in zip(slots, requests, strict=True):
            slot.cached.append(request.tokens[-1])
        _append(requests, *drawn)
        return True

    def _compute(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        temperatures: torch.Tensor,
        draws: torch.Tensor,
    ) -> torch.Tensor:
        """From the tokens of a fixed pass to what is drawn; see :data:`agents.engines.decode_graph.Compute`."""
        logits = self.decoder.next_logits(ids, positions, self.store, last)
        return draw(self._head.close(logits.float()), temperatures, draws, greedy=True)

    def _sample(self, requests: list[_Request], logits: torch.Tensor) -> None:
        """Draw one token a row, and hand it to the row's request."""
        temperatures = np.array([r.params.temperature for r in requests], dtype=np.float64)
        temperature_S, draws_S = to_device([temperatures, _draws(requests)], logits.device)
        drawn = draw(logits, temperature_S, draws_S, greedy=bool((temperatures == 0).any()))
        _append(requests, *drawn.tolist())  # the only wait of a pass


def draw(logits: torch.Tensor, temperature_S: torch.Tensor, draws_S: torch.Tensor, *, greedy: bool) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution at the row's own random number.

    Args:
        logits: [S, V] in float32.
        temperature_S: divides a row's logits, float64; 0 takes the most likely token.
        draws_S: a number in [0, 1) for each row, float64.
        greedy: whether some temperature may be 0.

    Returns:
        [2, S] in float64, which holds both exactly: the ids, and their log-probs at the row's temperature (greedy: 1).
    """
    cold_S = temperature_S == 0
    heat_S = temperature_S.masked_fill(cold_S, 1.0).float()
    logprobs = torch.log_softmax(logits / heat_S[:, None], dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    wanted = draws_S * cumulative[:, -1]
    # Below the total even where the product was rounded up: past it stand only ids without any probability.
    wanted = torch.minimum(wanted, torch.nextafter(cumulative[:, -1], torch.zeros_like(wanted)))
    chosen = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    if greedy:
        chosen = torch.where(cold_S, logits.argmax(dim=-1), chosen)
    picked = logprobs.gather(1, chosen[:, None])[:, 0]
    return torch.stack([chosen.double(), picked.double()])


def _draws(requests: Sequence[_Request]) -> np.ndarray:
    """The next number of each request's own random stream."""
    seeds = np.array([r.params.seed & 0xFFFFFFFFFFFFFFFF for r in requests], dtype=np.uint64)
    return uniform(seeds, np.array([len(r.tokens) for r in requests], dtype=np.uint64))


def _append(requests: Sequence[_Request], ids: Sequence[float], logprobs: Sequence[float]) -> None:
    for request, token, logprob in zip(requests, ids, logprobs, strict=True):
        request.tokens.append(int(token))
        request.logprobs.append(logprob)


def _finish(slot: _Slot) -> Completion:
    request = slot.request
    if request is None:
        raise RuntimeError("a slot without a request cannot finish")
    slot.request = None
    return Completion(
        request.request_id,
        tuple(request.tokens),
        tuple(request.logprobs),
        request.tokens[-1] in request.params.stop_ids,
        time.perf_counter() - request.submitted,
    )


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
