"""The GPU's parts that measure: what the card reaches, memory, tokens a second, the learner's share."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_models import batch_of, random_model, vocabulary_of

if TYPE_CHECKING:
    from gpu_setting import Setting

_MIB = 1 << 20


def seconds(work: Callable[[], Any], setting: Setting, repeats: int) -> float:
    """The shortest of some repetitions, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        setting.sync()
        began = time.perf_counter()
        work()
        setting.sync()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def device(setting: Setting) -> dict[str, Any]:
    """What it is, and what torch itself reaches on it."""
    gpu = setting.device == "cuda"
    return {
        "name": torch.cuda.get_device_name() if gpu else platform.machine(),
        "memory (GiB)": torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else "of the machine",
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "matrix product, bfloat16 (TFLOP/s)": peak_flops(setting, torch.bfloat16) / 1e12,
        "matrix product, float32 (TFLOP/s)": peak_flops(setting, torch.float32) / 1e12,
        "copy (GB/s)": bandwidth(setting) / 1e9,
    }


def peak_flops(setting: Setting, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = 256 if setting.toy else 8192
    a = torch.randn(side, side, device=setting.device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: a @ a, setting, 5)


def bandwidth(setting: Setting) -> float:
    """Bytes a second, read and written, of a large copy."""
    big = torch.empty((1 << 22) if setting.toy else (1 << 30), dtype=torch.uint8, device=setting.device)
    return 2 * big.numel() / seconds(lambda: big.clone(), setting, 5)


def _learner(model: Any, **options: Any) -> Any:
    from atod_algos.learner.learner import Learner
    from atod_algos.training.config import TrainConfig, resolve

    return Learner(model, resolve(TrainConfig(student="x", lr=1e-6, minibatches=1, steps=10, **options)))


def _update(learner: Any, batch: Any, old_M: np.ndarray, step: int = 1) -> dict[str, float]:
    from atod_algos.algorithm import Objective

    advantage_M = np.random.default_rng(step).normal(size=batch.n_tokens)
    update = learner.update(batch, advantage_M, old_M, Objective(), step=step, temperature=1.0, seed=0)
    return dict(update.metrics)


def memory_used(setting: Setting) -> dict[str, Any]:
    """The learner's prediction of an update's peak against the peak."""
    from atod_algos.learner.learner import recompute_layers

    found: dict[str, Any] = {}
    dtype = torch.float32 if setting.toy else torch.bfloat16
    for name, budget, recompute in (
        ("0.6B", 4096, False),
        ("0.6B", 16384, False),
        ("0.6B", 16384, True),
        ("1.7B", 8192, True),
    ):
        model = random_model(name, setting, dtype)
        if recompute:
            recompute_layers(model)
        batch = batch_of(vocabulary_of(model), *((2, 2, 20, 8) if setting.toy else (16, 4, 700, 300)))
        learner = _learner(model, token_budget=budget)
        metrics = _update(learner, batch, np.full(batch.n_tokens, -1.0))
        label = f"Qwen3-{name}, {budget:,} tokens" + (", layers recomputed" if recompute else "")
        predicted, peak = metrics["memory/predicted_mib"], metrics["memory/peak_mib"]
        found |= {
            f"{label}: predicted (MiB)": predicted,
            f"{label}: used (MiB)": peak,
            f"{label}: predicted / used": predicted / peak,
        }
        setting.keep(found)
        del model, learner
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        if setting.left() < 8:
            break
    return found


def eight_bits(setting: Setting) -> dict[str, Any]:
    """AdamW's moments in eight bits: memory, and how far an update differs."""
    if setting.device != "cuda":
        return {"adamw8bit": "not available: it runs on a GPU only"}
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"adamw8bit": "not available: bitsandbytes was not brought along"}
    found: dict[str, Any] = {}
    moved: dict[str, torch.Tensor] = {}
    for optimizer in ("adamw", "adamw8bit"):
        model = random_model("0.6B", setting, torch.bfloat16)
        batch = batch_of(vocabulary_of(model), 4, 4, 200, 100)
        learner = _learner(model, optimizer=optimizer)
        before = [weight.detach().clone() for weight in learner.updater.master_weights[:20]]
        used = torch.cuda.memory_allocated()
        took = time.perf_counter()
        _update(learner, batch, np.full(batch.n_tokens, -1.0))
        setting.sync()
        took = time.perf_counter() - took
        found[f"{optimizer}: first update (s)"] = took
        found[f"{optimizer}: moments (MiB)"] = (torch.cuda.memory_allocated() - used) / _MIB
        changes = [after.detach() - old for after, old in zip(learner.updater.master_weights, before, strict=False)]
        moved[optimizer] = torch.cat([change.flatten() for change in changes])
        del model, learner
        torch.cuda.empty_cache()
    a, b = moved["adamw"], moved["adamw8bit"]
    found["cosine of the two updates"] = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return found


def offload(setting: Setting) -> dict[str, Any]:
    """A teacher that lies in the computer's memory and visits the device for scoring."""
    from transformers import AutoTokenizer

    from agents.models import REFERENCE, LoadedModel
    from atod_algos.learner import memory
    from atod_algos.teachers.local import LocalScorer

    dtype = torch.float32 if setting.toy else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "alfworld" / "student")
    batch = batch_of(512, *((2, 2, 20, 8) if setting.toy else (8, 8, 500, 200)))
    found: dict[str, Any] = {}
    scored: dict[str, np.ndarray] = {}
    place = torch.device(setting.device)
    for how, home in (("resident", setting.device), ("offloaded", "cpu")):
        model = random_model("1.7B", setting, dtype, device=setting.device).to(home)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        scorer = LocalScorer(LoadedModel("teacher", model, tokenizer), setting.device)
        before = memory.used(place)

        def work(scorer: Any = scorer, how: str = how) -> None:
            scored[how] = scorer.logprobs(batch, temperature=1.0, budget=16384)

        found[f"{how}: scoring (s)"] = seconds(work, setting, 2)
        found[f"{how}: on the device between scorings (MiB)"] = before / _MIB
        found[f"{how}: on the device afterwards (MiB)"] = memory.used(place) / _MIB
        del model, scorer
    found["largest difference (nats)"] = float(np.abs(scored["resident"] - scored["offloaded"]).max())
    return found


def engine(setting: Setting) -> dict[str, Any]:
    """Tokens a second of the engine, with and without graphs, and of ``generate()`` over conversations."""
    from engine import LockStep, Turn, replay

    from agents.engines.transformers import TransformersEngine

    dtype = torch.float32 if setting.toy else torch.bfloat16
    count, turns, new, said = (4, 2, 8, 4) if setting.toy else (64, 5, 100, 24)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    copied = bandwidth(setting)
    for name in ("smollm2", "0.6B", "1.7B"):
        if setting.left() < (0 if setting.toy else 12):
            found[name] = "not reached"
            continue
        model = random_model(name, setting, dtype)
        rows = [
            [
                Turn(
                    rng.integers(0, vocabulary_of(model), int(new * rng.uniform(0.5, 1.5))).tolist(),
                    max(1, int(said * rng.uniform(0.5, 1.5))),
                )
                for _ in range(turns)
            ]
            for _ in range(count)
        ]
        sampled = sum(turn.response for row in rows for turn in row)
        context = max(sum(len(t.new_ids) + t.response for t in row) for row in rows) + 2
        rates: dict[str, float] = {}
        for who in ("engine", "engine without graphs", "generate()"):
            made: Any = (
                LockStep(model, count, context)
                if who == "generate()"
                else TransformersEngine(model, slots=count, max_context=context, graphs=who == "engine")
            )
            times = []
            for seed in range(2):  # the first one warms up
                made.load_weights(model.named_parameters())
                setting.sync()
                began = time.perf_counter()
                replay(made, rows, seed, window=False)
                setting.sync()
                times.append(time.perf_counter() - began)
                if setting.left() < 3:
                    break
            if isinstance(made, TransformersEngine):
                took = _decoding(made, model, setting, count, said)
                found[f"{name}: {who}, a step of {count} tokens (ms)"] = 1000 * took
                share = _step_bytes(model, count, said) / took / copied
                found[f"{name}: {who}, a step's share of the card's copy (%)"] = 100 * share
            made.close()
            rates[who] = sampled / times[-1]
            found[f"{name}: {who} (sampled tokens/s)"] = rates[who]
        found[f"{name}: engine / generate()"] = rates["engine"] / rates["generate()"]
        setting.keep(found)
        del model, made
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return found


def _decoding(engine: Any, model: Any, setting: Setting, count: int, prompt: int) -> float:
    """Seconds of a step in which every slot takes one token: the median of steps without prompts."""
    from agents.engines.base import SamplingParams

    steps = 4 if setting.toy else 24
    engine.load_weights(model.named_parameters())
    for place in range(count):
        ids = np.random.default_rng(place).integers(0, vocabulary_of(model), prompt).tolist()
        engine.submit(str(place), ids, SamplingParams(steps + 3, 1.0, seed=place))
    times = []
    for _ in range(steps + 3):
        setting.sync()
        began = time.perf_counter()
        engine.step()
        setting.sync()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:-1]))  # the first reads the prompts, the second records


def _step_bytes(model: Any, count: int, positions: int) -> int:
    """Bytes that such a step has to read: every weight, and the keys and values of every slot."""
    config, size = model.config, model.dtype.itemsize
    keys_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * count * positions
    return size * (sum(weight.numel() for weight in model.parameters()) + keys_values)


def learner(setting: Setting) -> dict[str, Any]:
    """The learner's arithmetic as a share of the card's own."""
    from atod_algos.learner.logprobs import score

    dtype = torch.float32 if setting.toy else torch.bfloat16
    rows, prompt, response = (4, 20, 8) if setting.toy else (64, 1536, 512)
    flops = peak_flops(setting, dtype)
    model = random_model("0.6B", setting, dtype)
    batch = batch_of(vocabulary_of(model), rows, 1, prompt, response)
    made = _learner(model, token_budget=16384)
    old_M = score(model, batch, temperature=1.0)[0]
    steps = iter(range(1, 10))
    took = seconds(lambda: _update(made, batch, old_M, next(steps)), setting, 2)
    tokens = sum(len(row) for row in batch.rows)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    config = model.config
    squares = sum(len(row) ** 2 for row in batch.rows)
    # Forward 2 operations a weight and token, backward 4; causal attention 2 x 2 x half the row, forward once, backward
    # twice.
    attention = 3 * 2 * config.num_hidden_layers * config.head_dim * config.num_attention_heads * squares
    operations = 6 * body * tokens + 6 * head * batch.n_tokens + attention
    return {
        "tokens of an update": tokens,
        "update (s)": took,
        "tokens/s": tokens / took,
        "share of the card's matrix product (%)": 100 * operations / took / flops,
    }
