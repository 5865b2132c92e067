"""What this project uses of vLLM, around a ``transformers`` model: prompts alone, in the shapes that vLLM answers with.

An entry of a prompt is a dictionary from id to ``Logprob``. It holds the prompt's own id first, whose rank may be any,
and then the ids of ranks 1 to k; an id that is both is there once.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def prompt_entries(logprobs, ids, k):
    """vLLM's entries for a prompt, from the log-probs [T, V] of what comes after each of its ids."""
    entries = [None]
    for row, own in zip(logprobs[:-1], ids[1:], strict=True):
        best = row.topk(k)
        entry = {own: Logprob(float(row[own]), int((row >= row[own]).sum()))}
        for rank, (value, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
            entry[token] = Logprob(value, rank)
        entries.append(entry)
    return entries


class FakeEngine:
    """An engine that finishes one request a step, the last that came first."""

    def __init__(self, arguments, model):
        self.arguments, self.model = arguments, model
        self.waiting, self.asked = [], []
        self.engine_core = SimpleNamespace()
        self.change = lambda entries: entries

    def add_request(self, request_id, prompt, sampling):
        if sampling.prompt_logprobs > self.arguments.max_logprobs:
            raise ValueError(f"Requested prompt logprobs of {sampling.prompt_logprobs}")
        self.asked.append(sampling.prompt_logprobs)
        self.waiting.append((request_id, prompt["prompt_token_ids"], sampling.prompt_logprobs))

    def step(self):
        request_id, ids, k = self.waiting.pop()
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].float()
        entries = self.change(prompt_entries(torch.log_softmax(logits, -1), ids, k))
        done = {"request_id": request_id, "finished": True, "prompt_token_ids": ids, "prompt_logprobs": entries}
        return [SimpleNamespace(**done)]

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)

    def apply_model(self, work):
        pass

    def reset_prefix_cache(self):
        pass


def install(monkeypatch, make_model):
    """Put the fake in vLLM's place; ``make_model`` gives a model of the right shape. Returns the engines it makes."""
    engines = []

    def make(arguments):
        engines.append(FakeEngine(arguments, make_model()))
        return engines[-1]

    def settings(**given):
        return SimpleNamespace(**given)

    vllm = ModuleType("vllm")
    vllm.__version__ = "0"
    vllm.EngineArgs = vllm.SamplingParams = settings
    vllm.LLMEngine = SimpleNamespace(from_engine_args=make)
    vllm.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1))
    backend = ModuleType("vllm.v1.attention.backends.cpu_attn")
    backend.CPUAttentionBackend = SimpleNamespace(get_supported_head_sizes=lambda: [8, 16, 32])
    names = ["vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"]
    for module in (vllm, *map(ModuleType, names), backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return engines


def broken(value):
    """Changes vLLM's entries so that the first of rank 1 has another log-prob; ``None`` takes it away."""

    def change(entries):
        for entry in entries[1:]:
            first = next(token for token, said in entry.items() if said.rank == 1)
            if value is None:
                del entry[first]
            else:
                entry[first].logprob = value
        return entries

    return change


NOT_NUMBERS = (math.nan, -math.inf, math.inf, 0.5)
