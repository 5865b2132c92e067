"""What ``benchmarks/engine.py`` compares with, behind the engine's verbs: ``generate()`` in lock-step, and llama.cpp.

llama.cpp runs in this process, through the low-level functions of llama-cpp-python, in the way of its own server:
continuous batching over sequences, each of which keeps its keys and values for the next turn of its conversation. An
opening that another sequence holds is copied. It returns no log-probs.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agents.engines.base import Completion, Engine, SamplingParams, check_request
from atod_envs.errors import AtodError

_SHARED = 8
"""An opening is copied from another sequence from this many tokens on, as in our engine."""


class LockStep:
    """``generate()`` behind the engine's verbs: a step answers everything that waits, when the longest is done."""

    def __init__(self, model: Any, slots: int, max_context: int) -> None:
        self.model, self.slots, self.max_context, self.version = model, slots, max_context, 0
        self._queue: deque[tuple[str, list[int], SamplingParams]] = deque()

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request."""
        self._queue.append((request_id, list(prompt_ids), params))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Answer a whole batch at once."""
        batch = [self._queue.popleft() for _ in range(min(self.slots, len(self._queue)))]
        if not batch:
            return []
        width = max(len(prompt) for _, prompt, _ in batch)
        device = self.model.device
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        limits = torch.tensor([params.max_tokens for _, _, params in batch], device=device)
        stops = torch.tensor(
            sorted({i for _, _, params in batch for i in params.stop_ids}), dtype=torch.int64, device=device
        )

        def done(tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            return (tokens.shape[1] - width >= limits) | torch.isin(tokens[:, -1], stops)

        from transformers import StoppingCriteriaList

        output = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=int(limits.max()),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([done]),
        )
        answers = []
        for (name, _, params), row in zip(batch, output[:, width:].tolist(), strict=True):
            tokens = row[: params.max_tokens]
            end = next((i + 1 for i, token in enumerate(tokens) if token in params.stop_ids), len(tokens))
            answers.append(Completion(name, tuple(tokens[:end]), (0.0,) * end, tokens[end - 1] in params.stop_ids, 0.0))
        return answers

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing: the model is used as it is."""
        self.version += 1

    def sleep(self) -> None:
        """Nothing is held."""

    def wake(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Drop what waits."""
        self._queue.clear()


class Timed:
    """An engine whose verbs' CPU time is added up, and whose tokens are counted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds, self.sampled, self.asked = 0.0, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request."""
        self.asked += len(prompt_ids)
        start = time.process_time()
        self._engine.submit(request_id, prompt_ids, params)
        self.seconds += time.process_time() - start

    def step(self) -> list[Completion]:
        """Advance."""
        start = time.process_time()
        done = self._engine.step()
        self.seconds += time.process_time() - start
        self.sampled += sum(len(completion.token_ids) for completion in done)
        return done


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_cpp() -> Any:
    """The module of llama-cpp-python.

    Raises:
        AtodError: it is not installed.
    """
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise AtodError(
            "llama.cpp is not installed: pip install llama-cpp-python gguf (it builds llama.cpp, so a C++ compiler is needed)"
        ) from error


def write_gguf(model: Any, path: Path, kind: str) -> Path:
    """A model's weights as a GGUF file without a tokenizer: ids go in and come out.

    Args:
        model: a Llama or Qwen3 of transformers.
        path: where it goes.
        kind: of its matrices, ``"f32"`` or ``"f16"``; vectors are always float32.

    Raises:
        AtodError: another family, or the package ``gguf`` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise AtodError("writing a file for llama.cpp needs the package gguf: pip install gguf") from error
    config = model.config
    families = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
    if config.model_type not in families:
        raise AtodError(f"no GGUF file is written here for {config.model_type}; only for {', '.join(families)}")
    family = families[config.model_type]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(family, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        values = weight.detach().float()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring pairs in this family, transformers the two halves of a head.
            n = heads if "q_proj" in name else kv_heads
            values = values.reshape(n, 2, width // 2, -1).transpose(1, 2).reshape(values.shape)
        if kind == "f16" and values.ndim == 2:
            values = values.half()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(slots=True)
class _Sequence:
    number: int
    cached: list[int] = field(default_factory=list)
    request: tuple[str, list[int], SamplingParams] | None = None
    tokens: list[int] = field(default_factory=list)
    sampler: Any = None
    used: int = 0


class LlamaCpp:
    """llama.cpp behind the engine's verbs.

    Args:
        file: the GGUF file.
        slots: sequences that are kept.
        max_context: longest prompt plus response of each.
        batch: tokens of one pass.
        flash: its flash attention.
        unified: one store of keys and values for all sequences, over which every one attends, masked; else one each.
        keys: type of keys and values, ``"f16"`` (its default) or ``"f32"``.

    Raises:
        AtodError: llama-cpp-python is not installed, or the file cannot be loaded.
    """

    def __init__(
        self,
        file: Path,
        slots: int,
        max_context: int,
        *,
        batch: int = 512,
        flash: bool = True,
        unified: bool = False,
        keys: str = "f16",
    ) -> None:
        c = llama_cpp()
        self._c, self.max_context, self.version = c, max_context, 0
        self._silent = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._silent, ctypes.c_void_p(0))
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
        if not self._model:
            raise AtodError(f"llama.cpp cannot load {file}")
        params = c.llama_context_default_params()
        params.n_seq_max, params.n_ctx = slots, slots * max_context
        params.n_batch = params.n_ubatch = self._size = max(batch, slots)
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type, params.kv_unified = int(flash), unified
        params.type_k = params.type_v = {"f32": c.GGML_TYPE_F32, "f16": c.GGML_TYPE_F16}[keys]
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise AtodError(f"llama.cpp cannot make a context of {slots} x {max_context} tokens for {file}")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(self._size, 0, 1)
        self._slots = [_Sequence(i) for i in range(slots)]
        self._queue: deque[tuple[str, list[int], SamplingParams]] = deque()
        self._clock = 0

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request."""
        check_request(request_id, prompt_ids, params, self.max_context)
        self._queue.append((request_id, list(prompt_ids), params))

    def step(self) -> list[Completion]:
        """Advance every sequence by a token, and read in the prompts of those that begin."""
        self._admit()
        running = [slot for slot in self._slots if slot.request is not None]
        work = [entry for slot in running for entry in self._new_tokens(slot)]
        for start in range(0, len(work), self._size):
            self._pass(work[start : start + self._size])
        done = []
        for slot in running:
            name, _, params = slot.request  # type: ignore[misc]
            stopped = slot.tokens[-1] in params.stop_ids
            if stopped or len(slot.tokens) >= params.max_tokens:
                done.append(Completion(name, tuple(slot.tokens), (0.0,) * len(slot.tokens), stopped, 0.0))
                self._c.llama_sampler_free(slot.sampler)
                slot.request, slot.tokens, slot.sampler = None, [], None
        return done

    def _admit(self) -> None:
        """Give waiting requests the sequence of their own conversation, else the least recently used one."""
        later: deque[tuple[str, list[int], SamplingParams]] = deque()
        started: list[list[int]] = []
        while self._queue:
            request = self._queue.popleft()
            prompt = request[1]
            free = [slot for slot in self._slots if slot.request is None]
            if not free:
                later.append(request)
                break
            own = [slot for slot in free if slot.cached and slot.cached == prompt[: len(slot.cached)]]
            slot = max(own, key=lambda s: len(s.cached)) if own else min(free, key=lambda s: (s.used, s.number))
            donor = max(self._slots, key=lambda s: _common(s.cached, prompt))
            shared = _common((slot if own else donor).cached, prompt)
            # What another prompt of this very step reads in can be copied at the next.
            if max((_common(other, prompt) for other in started), default=0) >= max(shared, 1) + _SHARED:
                later.append(request)
                continue
            shared = min(shared, len(prompt) - 1)  # the last token is read in again for its logits
            if not own:
                if shared < _SHARED:
                    shared = 0
                if donor is not slot and shared:
                    self._c.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
                    self._c.llama_memory_seq_cp(self._memory, donor.number, slot.number, -1, -1)
            self._c.llama_memory_seq_rm(self._memory, slot.number, shared, -1)
            slot.cached, slot.request, slot.tokens = prompt[:shared], request, []
            slot.sampler = self._c.llama_sampler_init_dist(request[2].seed & 0xFFFFFFFF)
            self._clock += 1
            slot.used = self._clock
            started.append(prompt)
        self._queue = later + self._queue

    def _new_tokens(self, slot: _Sequence) -> Iterator[tuple[_Sequence, int, int, bool]]:
        new = slot.tokens[-1:] if slot.tokens else slot.request[1][len(slot.cached) :]  # type: ignore[index]
        for i, token in enumerate(new):
            yield slot, token, len(slot.cached) + i, i == len(new) - 1
        slot.cached = slot.cached + new

    def _pass(self, work: list[tuple[_Sequence, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(work)
        for i, (slot, token, position, last) in enumerate(work):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot.number
        code = self._c.llama_decode(self._context, batch)
        if code:
            raise AtodError(f"llama.cpp failed with code {code} on {len(work)} tokens")
        for i, (slot, _, _, last) in enumerate(work):
            if last:
                slot.tokens.append(self._draw(slot, i))

    def _draw(self, slot: _Sequence, i: int) -> int:
        if slot.request[2].temperature == 0:  # type: ignore[index]
            return int(torch.tensor(self.logits(i)).argmax())
        return int(self._c.llama_sampler_sample(slot.sampler, self._context, i))

    def logits(self, i: int) -> list[float]:
        """Those after the token at a place of the last pass."""
        n = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        return list(self._c.llama_get_logits_ith(self._context, i)[:n])

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The file's weights stay; what was cached is dropped, as an engine that takes new ones has to."""
        self._c.llama_memory_clear(self._memory, False)
        self._slots = [_Sequence(slot.number) for slot in self._slots]
        self.version += 1

    def sleep(self) -> None:
        """Nothing: its memory is fixed."""

    def wake(self) -> None:
        """Nothing: its memory is fixed."""

    def close(self) -> None:
        """Free everything."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
