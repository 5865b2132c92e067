"""``benchmarks/train.py --gpu``: learner and engine compared with what torch itself reaches on the device."""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any


def shares(args: argparse.Namespace) -> None:
    """Learner's arithmetic and engine's memory traffic against what torch itself reaches on this device."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from agents.engines.base import SamplingParams
    from agents.engines.transformers import TransformersEngine
    from atod_algos.algorithm import Objective
    from atod_algos.batch import make_batch
    from atod_algos.learner.learner import Learner
    from atod_algos.learner.logprobs import score
    from atod_algos.training.config import TrainConfig, resolve
    from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
    }
    rows, prompt, response, side = 4, 40, 12, 256
    if not args.tiny:
        # Qwen3-0.6B's: 28 layers, width 1024; about 440 million weights without the embedding.
        shape = {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "head_dim": 128,
            "num_attention_heads": 16,
        }
        rows, prompt, response, side = 128, 1536, 512, 8192
    vocabulary = 512 if args.tiny else 151_936
    torch.manual_seed(0)
    heads = max(1, shape["num_attention_heads"] // 2)
    with torch.device(device):
        model = Qwen3ForCausalLM(
            Qwen3Config(vocab_size=vocabulary, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=True, **shape)
        )  # fmt: skip
    model = model.to(dtype)

    def seconds(work: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats + 1):
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    a = torch.randn(side, side, device=device, dtype=dtype)
    flops = 2 * side**3 / seconds(lambda: a @ a, 5)
    big = torch.empty((1 << 24) if args.tiny else (1 << 30), dtype=torch.uint8, device=device)
    bandwidth = 2 * big.numel() / seconds(lambda: big.clone(), 5)
    print(f"device: {torch.cuda.get_device_name() if gpu else platform.machine()}, torch {torch.__version__}, {dtype}")
    print(f"reached by torch: {flops / 1e12:.3g} TFLOP/s in a matmul, {bandwidth / 1e9:.3g} GB/s in a copy")

    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, n).tolist())

    lone = []
    for _ in range(rows):
        turn = Turn(0, "", (), ids(prompt), ids(response), (0.0,) * response, "", "", True, True, 0.0)
        lone.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
    batch = make_batch([Group("t", tuple(lone))])
    config = resolve(TrainConfig(student="x", lr=1e-6, minibatches=1, steps=10))
    learner = Learner(model, config)
    old_M = score(model, batch, temperature=1.0)[0]
    advantage_M = rng.normal(size=batch.n_tokens)
    step = iter(range(1, 100))

    def update() -> None:
        learner.update(batch, advantage_M, old_M, Objective(), step=next(step), temperature=1.0, seed=0)

    tokens, sampled = rows * (prompt + response), rows * response
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    width = shape["head_dim"] * shape["num_attention_heads"]
    # Forward 2 operations a weight and token, backward 4; causal attention 2 x 2 x half the row, forward once, backward
    # twice.
    attention = 3 * 2 * shape["num_hidden_layers"] * width * tokens * (prompt + response)
    operations = 6 * body * tokens + 6 * head * sampled + attention
    took = seconds(update, 2)
    print(
        f"learner: {tokens} tokens in {took:.3f} s, {tokens / took:.0f} tokens/s, "
        f"{100 * operations / took / flops:.1f} % of that arithmetic"
    )
    for slots in (1, rows):
        engine = TransformersEngine(model, slots=slots, max_context=prompt + response)
        for i in range(slots):
            engine.submit(str(i), ids(prompt), SamplingParams(response, seed=i))
        engine.step()
        began, steps = time.perf_counter(), 0
        done = 0
        while done < slots:
            done += len(engine.step())
            steps += 1
        if gpu:
            torch.cuda.synchronize()
        took = (time.perf_counter() - began) / steps
        size = model.dtype.itemsize
        cache = 2 * shape["num_hidden_layers"] * heads * shape["head_dim"] * size * slots * (prompt + response // 2)
        traffic = (body + head) * size + cache
        print(
            f"engine, {slots} at once: {slots / took:.0f} tokens/s, {100 * traffic / took / bandwidth:.1f} % of that bandwidth "
            "(weights and keys, read once a token)"
        )
        engine.close()
