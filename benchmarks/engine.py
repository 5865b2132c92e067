"""Tokens per second of the inference engines, side by side in one run.

    python benchmarks/engine.py                        # every engine that is installed, every workload
    python benchmarks/engine.py --engines transformers lock-step --workloads mixed
    python benchmarks/engine.py --products             # linear layers: PyTorch's default against oneDNN

Engines: ``transformers`` (ours), ``vllm`` (where installed), and ``lock-step``: what a script does without an engine,
one ``model.generate()`` over all that wait, left-padded, until the longest is done. Lock-step is given every advantage:
the largest batch, no log-probs to return, and it is told each length beforehand so that it stops exactly there.
``llama.cpp`` (where llama-cpp-python is installed) has the same weights in float32, ``llama.cpp-f16`` in float16, and
``llama.cpp-file`` the very file of ``--model``, quantized as it is: another precision.

Workloads, all with sampling at temperature 1 and lengths that are the same for every engine:

``builtin``   128 episodes of the built-in ALFWorld, played by the reference student (0.26 M parameters) for real.
``episodes``  the lengths of the first --episodes of these, turn by turn in one growing conversation, on a random model.
``windows``   the same, but every turn is a sliding-window prompt of its own (nothing to reuse but the opening).
``mixed``     twice as many single prompts of 32 to 512 tokens in groups of eight, responses of 1 to 256 (log-normal).
``prefill``   --episodes prompts of 384 tokens that have nothing in common, one token sampled after each.
``decode``    --episodes prompts of 8 tokens, 96 sampled after each.

A token that was sampled counts, a prompt's does not; in ``prefill`` it is the other way round. Seconds are of one core
inside the engine, so that a busy machine and the environments do not matter; the best of --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch

import atod_envs  # noqa: F401  (registers the environments)
from agents.chat import ChatFormat
from agents.engines import make_engine
from agents.engines.base import Engine, SamplingParams
from agents.gguf import gguf_file
from agents.models import load_model
from atod_algos.rollout.episodes import EpisodeSpec, Rollout, derive_seed
from atod_envs.errors import AtodError

sys.path.append(str(Path(__file__).parent))
from engine_contenders import LlamaCpp, LockStep, Timed, llama_cpp, write_gguf

TASKS, GROUP = 16, 8
CONTEXT = 1024


@dataclass(frozen=True)
class Turn:
    """What is new in a prompt, and how long the response was."""

    new_ids: list[int]
    response: int


# --- workloads --------------------------------------------------------------------------------------------------------


def played(
    make: Callable[[Any], Engine], count: int = TASKS * GROUP
) -> tuple[Engine, Callable[[Engine, int], list[Any]]]:
    """The reference student in the first so many episodes of the built-in ALFWorld, for real."""
    student = load_model("builtin", "student", world="alfworld")
    chat = ChatFormat(student.tokenizer)

    def make_env() -> Any:
        return gym.make("atod/ALFWorld-v0", data="builtin", max_turns=14)

    tasks = make_env().unwrapped.tasks.order(5)[:TASKS]

    def work(engine: Engine, seed: int) -> list[Any]:
        rollout = Rollout(engine, chat, make_env, style="compact", max_tokens=24, concurrency=TASKS * GROUP)
        specs = [EpisodeSpec(task, task, derive_seed(seed, task, g)) for task in tasks for g in range(GROUP)]
        trajectories = rollout.play(specs[:count])
        rollout.close()
        return trajectories

    return make(student.model), work


def conversations(trajectories: Sequence[Any], window: bool) -> list[list[Turn]]:
    """The lengths of episodes: what each turn adds (or, as windows, the last turns told again), and its response."""
    episodes = []
    for trajectory in trajectories:
        seen, turns = 0, []
        for turn in trajectory.turns:
            new = list(turn.prompt_ids[seen:])
            if window:
                first = trajectory.turns[0].prompt_ids
                # The opening, and then as much of the conversation as two turns, as in the paper's prompt.
                past = trajectory.turns[max(0, turn.index - 2)].prompt_ids
                new = [*first, *turn.prompt_ids[len(past) :]] if turn.index else list(first)
            turns.append(Turn(new, len(turn.response_ids)))
            seen = len(turn.prompt_ids) + len(turn.response_ids)
        episodes.append(turns)
    return episodes


def replay(engine: Engine, episodes: Sequence[Sequence[Turn]], seed: int, *, window: bool) -> None:
    """Every episode asks for its next turn as soon as it has the one before; lengths as recorded."""
    asked: dict[str, tuple[int, int, list[int]]] = {}

    def ask(index: int, turn: int, before: list[int]) -> None:
        if turn == len(episodes[index]):
            return
        step = episodes[index][turn]
        prompt = [*([] if window else before), *step.new_ids]
        name = f"{index}/{turn}"
        asked[name] = (index, turn, prompt)
        engine.submit(name, prompt, SamplingParams(step.response, 1.0, derive_seed(seed, index, turn)))

    for index in range(len(episodes)):
        ask(index, 0, [])
    while asked:
        for done in engine.step():
            index, turn, prompt = asked.pop(done.request_id)
            ask(index, turn + 1, [*prompt, *done.token_ids])


def mixed(n: int, vocabulary: int) -> list[list[Turn]]:
    """Single prompts in groups, responses of very different lengths."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(n // GROUP):
        prompt = [int(i) for i in rng.integers(0, vocabulary, rng.integers(32, 513))]
        lengths = np.clip(np.exp(rng.normal(3.7, 0.9, GROUP)), 1, 256).astype(int)
        episodes += [[Turn(prompt, int(length))] for length in lengths]
    return episodes


def singles(n: int, prompt: int, response: int, vocabulary: int) -> list[list[Turn]]:
    """Single prompts of one length that share nothing, and responses of one length."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (n, prompt))
    return [[Turn([int(i) for i in row], response)] for row in ids]


def lengths_of(workload: str, episodes: int, recorded: Sequence[Any]) -> list[list[Turn]]:
    """What a workload asks for."""
    if workload == "mixed":
        return mixed(2 * episodes, 2048)
    if workload in ("prefill", "decode"):
        return singles(episodes, *((384, 1) if workload == "prefill" else (8, 96)), 2048)
    return conversations(recorded, workload == "windows")


def random_model(millions: float) -> Any:
    """A random Qwen3 of about that many million parameters, with heads that every engine's kernels know."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, vocabulary = 8, 2048
    hidden = 64 * max(1, round(float(np.sqrt(millions * 1e6 / (layers * 11.7))) / 64))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        head_dim=64,
        intermediate_size=3 * hidden,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


# --- measuring --------------------------------------------------------------------------------------------------------


def maker(name: str, slots: int, folder: Path, llama: Sequence[str], file: Path | None) -> Callable[[Any], Engine]:
    """How an engine is made for a model.

    Args:
        name: the engine's.
        slots: requests that run at the same time.
        folder: where files for llama.cpp are written, and stay.
        llama: settings of llama.cpp that differ from its best here, such as ``flash=0``.
        file: the GGUF file that the model was read from.
    """
    if name == "lock-step":
        return lambda model: LockStep(model, slots, CONTEXT)
    if not name.startswith("llama.cpp"):
        return lambda model: make_engine(name, model, slots=slots, max_context=CONTEXT, memory=0.45)
    settings = {
        key: int(value) if value.isdigit() else value for key, _, value in (one.partition("=") for one in llama)
    }

    def make(model: Any) -> Engine:
        llama_cpp()  # before a file is written for nothing
        if name == "llama.cpp-file" and file is None:
            raise AtodError("this model was not read from a GGUF file; give --model smollm2-135m or a file")
        kind = "f16" if name == "llama.cpp-f16" else "f32"
        written = file if name == "llama.cpp-file" else folder / f"{id(model)}-{kind}.gguf"
        if written is not None and not written.is_file():
            write_gguf(model, written, kind)
        return LlamaCpp(written, slots, CONTEXT, **settings)

    return make


def best(engine: Engine, work: Callable[[Engine, int], Any], repeats: int, *, prompts: bool) -> dict[str, float]:
    """The fastest of some repetitions, after one to warm up; every one begins with nothing cached."""
    rates = []
    for seed in range(repeats + 1):
        model = getattr(engine, "model", None)
        engine.load_weights(model.named_parameters() if model is not None else WEIGHTS[0])
        timed = Timed(engine)
        start = time.perf_counter()
        work(timed, seed)
        tokens = timed.asked if prompts else timed.sampled
        rates.append((tokens / timed.seconds, tokens, timed.seconds, time.perf_counter() - start))
    rate, tokens, seconds, wall = max(rates[1:])
    return {"tokens_per_second": rate, "tokens": tokens, "engine_seconds": seconds, "wall_seconds": wall}


def matmuls(repeats: int) -> None:
    """Linear layers of the engine (packed weights, few rows) and of the learner (both gradients, many rows)."""
    from atod_algos.learner.onednn import matmul

    def rate(work: Callable[[], Any], operations: float) -> float:
        work()
        inner = max(1, int(2e8 / operations))
        times = []
        for _ in range(repeats):
            start = time.process_time()
            for _ in range(inner):
                work()
            times.append((time.process_time() - start) / inner)
        return operations / float(np.median(times)) / 1e9

    print(
        f"billion operations a second, medians of {repeats}; torch {torch.__version__}, {torch.get_num_threads()} thread"
    )
    call = torch.ops.mkldnn._linear_pointwise
    for rows in (1, 8, 32, 128, 4096):
        for inner, outer in ((256, 256), (256, 768), (1024, 1024), (1024, 3072)):
            x, weight, gradient = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
            pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "forward, packed": (
                    lambda x=x, weight=weight: torch.nn.functional.linear(x, weight),
                    lambda x=x, packed=packed: call(x, packed, None, "none", [], ""),
                )
            }
            if rows == 4096:
                pairs = {
                    "forward": (pairs["forward, packed"][0], lambda x=x, weight=weight: matmul(x, weight)),
                    "gradient of x": (
                        lambda gradient=gradient, weight=weight: gradient @ weight,
                        lambda gradient=gradient, weight=weight: matmul(gradient, weight.t()),
                    ),
                    "of the weights": (
                        lambda gradient=gradient, x=x: gradient.t() @ x,
                        lambda gradient=gradient, x=x: matmul(gradient.t(), x.t()),
                    ),
                }
            for name, (default, onednn) in pairs.items():
                a, b = (rate(work, 2.0 * rows * inner * outer) for work in (default, onednn))
                print(
                    f"{rows:5d} rows x {inner:4d} x {outer:4d}, {name:15}: {a:6.0f} default, {b:6.0f} oneDNN, {b / a:4.1f} times"
                )


WEIGHTS: list[Any] = []
"""Those of the model that an engine without a model of its own is given again."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("transformers", "vllm", "lock-step", "llama.cpp", "llama.cpp-f16", "llama.cpp-file")
    parser.add_argument("--engines", nargs="+", default=list(names), choices=names)
    workloads = ("builtin", "episodes", "windows", "mixed", "prefill", "decode")
    parser.add_argument("--workloads", nargs="+", default=list(workloads), choices=workloads)
    parser.add_argument("--parameters", type=float, default=14.0, help="millions of parameters of the random model")
    parser.add_argument("--model", help="a real one in its place: a folder, a GGUF file or smollm2-135m")
    parser.add_argument("--episodes", type=int, default=32, help="episodes on the random model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--llama", nargs="+", default=[], metavar="SETTING=VALUE", help="of llama.cpp: batch, flash, unified, keys"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--products", action="store_true", help="time linear layers instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.products:
        matmuls(max(3, options.repeats))
        return
    with tempfile.TemporaryDirectory(prefix="engine-benchmark-") as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All engines on all workloads, and the tables."""
    recorded: list[Any] = []
    if {"episodes", "windows"} & set(options.workloads):
        engine, play = played(maker("transformers", TASKS * GROUP, folder, (), None), options.episodes)
        recorded = play(engine, 1)
        engine.close()
    model = load_model(options.model, "student").model if options.model else random_model(options.parameters)
    file = gguf_file(options.model) if options.model else None
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rows: list[dict[str, Any]] = []
    for workload in options.workloads:
        unit = "read" if workload == "prefill" else "sampled"
        for name in options.engines:
            try:
                if workload == "builtin":
                    engine, work = played(maker(name, TASKS * GROUP, folder, options.llama, None))
                else:
                    lengths = lengths_of(workload, options.episodes, recorded)
                    slots = min(TASKS * GROUP, len(lengths))
                    engine = maker(name, slots, folder, options.llama, file)(model)
                    WEIGHTS[:] = [list(model.named_parameters())]

                    def work(
                        engine: Engine, seed: int, lengths: Any = lengths, window: bool = workload == "windows"
                    ) -> None:
                        replay(engine, lengths if seed else lengths[:1], seed, window=window)  # one warms up

                row = best(engine, work, options.repeats, prompts=workload == "prefill")
                engine.close()
            except AtodError as error:
                print(f"{workload:10} {name:14} not run: {error}")
                continue
            rows.append({"workload": workload, "engine": name, **row})
            if not options.json:
                print(
                    f"{workload:10} {name:14} {row['tokens_per_second']:8.{0 if row['tokens_per_second'] > 100 else 1}f} tokens/s   "
                    f"{row['tokens']:6.0f} {unit} in {row['engine_seconds']:6.2f} s of the engine, {row['wall_seconds']:6.2f} s in all",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"millions": millions, "rows": rows}))
        return
    print(
        f"\n{options.model or 'random model'}: {millions:.1f} M parameters; torch {torch.__version__}, {torch.get_num_threads()} thread"
    )
    if any(row["engine"] == "llama.cpp-file" for row in rows):
        print("llama.cpp-file computes with the quantized weights of its file, so in another precision than all others")
    for workload in options.workloads:
        found = {row["engine"]: row["tokens_per_second"] for row in rows if row["workload"] == workload}
        if "lock-step" in found:
            others = ", ".join(f"{k} {v / found['lock-step']:.1f}x" for k, v in found.items() if k != "lock-step")
            print(f"{workload}: against lock-step {others}")


if __name__ == "__main__":
    main()
