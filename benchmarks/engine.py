"""Tokens per second of the inference engines, side by side in one run.

    python benchmarks/engine.py                        # every engine that is installed, every workload
    python benchmarks/engine.py --engines transformers lock-step --workloads mixed
    python benchmarks/engine.py --products             # linear layers: PyTorch's default against oneDNN

Engines: ``transformers`` (ours), ``vllm`` (where installed), and ``lock-step``: what a script does without an engine,
one ``model.generate()`` over all that wait, left-padded, until the longest is done. Lock-step is given every advantage:
the largest batch, no log-probs to return, and it is told each length beforehand so that it stops exactly there.

Workloads, all with sampling at temperature 1 and lengths that are the same for every engine:

``builtin``   128 episodes of the built-in ALFWorld, played by the reference student (0.26 M parameters) for real.
``episodes``  the lengths of the first --episodes of these, turn by turn in one growing conversation, on a random model.
``windows``   the same, but every turn is a sliding-window prompt of its own (nothing to reuse but the opening).
``mixed``     twice as many single prompts of 32 to 512 tokens in groups of eight, responses of 1 to 256 (log-normal).

A token that was sampled counts, a prompt's does not. Seconds are of one core's CPU time inside the engine, so that
a busy machine and the environments do not matter; the best of --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch

import atod_envs  # noqa: F401  (registers the environments)
from agents.chat import ChatFormat
from agents.engines import make_engine
from agents.engines.base import Completion, Engine, SamplingParams
from agents.models import load_model
from atod_algos.rollout.episodes import EpisodeSpec, Rollout, derive_seed
from atod_envs.errors import AtodError

TASKS, GROUP = 16, 8
CONTEXT = 1024


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
    """An engine whose verbs' CPU time is added up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds, self.tokens = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request."""
        start = time.process_time()
        self._engine.submit(request_id, prompt_ids, params)
        self.seconds += time.process_time() - start

    def step(self) -> list[Completion]:
        """Advance."""
        start = time.process_time()
        done = self._engine.step()
        self.seconds += time.process_time() - start
        self.tokens += sum(len(completion.token_ids) for completion in done)
        return done


@dataclass(frozen=True)
class Turn:
    """What is new in a prompt, and how long the response was."""

    new_ids: list[int]
    response: int


# --- workloads --------------------------------------------------------------------------------------------------------


def played(make: Callable[[Any], Engine]) -> tuple[Engine, Callable[[Engine, int], list[Any]]]:
    """The reference student in the built-in ALFWorld, for real."""
    student = load_model("builtin", "student", world="alfworld")
    chat = ChatFormat(student.tokenizer)

    def make_env() -> Any:
        return gym.make("atod/ALFWorld-v0", data="builtin", max_turns=14)

    tasks = make_env().unwrapped.tasks.order(5)[:TASKS]

    def work(engine: Engine, seed: int) -> list[Any]:
        rollout = Rollout(engine, chat, make_env, style="compact", max_tokens=24, concurrency=TASKS * GROUP)
        specs = [EpisodeSpec(task, task, derive_seed(seed, task, g)) for task in tasks for g in range(GROUP)]
        trajectories = rollout.play(specs)
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


def maker(name: str) -> Callable[[Any], Engine]:
    slots = TASKS * GROUP
    if name == "lock-step":
        return lambda model: LockStep(model, slots, CONTEXT)
    return lambda model: make_engine(name, model, slots=slots, max_context=CONTEXT, memory=0.45)


def best(engine: Engine, work: Callable[[Engine, int], Any], repeats: int) -> dict[str, float]:
    """The fastest of some repetitions, after one to warm up; every one begins with nothing cached."""
    rates = []
    for seed in range(repeats + 1):
        model = getattr(engine, "model", None)
        engine.load_weights(model.named_parameters() if model is not None else WEIGHTS[0])
        timed = Timed(engine)
        start = time.perf_counter()
        work(timed, seed)
        rates.append((timed.tokens / timed.seconds, timed.tokens, timed.seconds, time.perf_counter() - start))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("transformers", "vllm", "lock-step")
    parser.add_argument("--engines", nargs="+", default=list(names), choices=names)
    parser.add_argument("--workloads", nargs="+", default=["builtin", "episodes", "windows", "mixed"])
    parser.add_argument("--parameters", type=float, default=14.0, help="millions of parameters of the random model")
    parser.add_argument("--model", help="a real one in its place: a folder, a GGUF file or smollm2-135m")
    parser.add_argument("--episodes", type=int, default=32, help="episodes on the random model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--products", action="store_true", help="time linear layers instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.products:
        matmuls(max(3, options.repeats))
        return

    _, play = played(maker("transformers"))
    recorded = play(played(maker("transformers"))[0], 1)
    model = load_model(options.model, "student").model if options.model else random_model(options.parameters)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rows: list[dict[str, Any]] = []
    for workload in options.workloads:
        for name in options.engines:
            try:
                if workload == "builtin":
                    engine, work = played(maker(name))
                else:
                    window = workload == "windows"
                    lengths = (
                        mixed(2 * options.episodes, 2048)
                        if workload == "mixed"
                        else conversations(recorded[: options.episodes], window)
                    )
                    engine = maker(name)(model)
                    WEIGHTS[:] = [list(model.named_parameters())]

                    def work(engine: Engine, seed: int, lengths: Any = lengths, window: bool = window) -> None:
                        replay(engine, lengths, seed, window=window)

                row = best(engine, work, options.repeats)
                engine.close()
            except AtodError as error:
                print(f"{workload:10} {name:14} not run: {error}")
                continue
            rows.append({"workload": workload, "engine": name, **row})
            if not options.json:
                print(
                    f"{workload:10} {name:14} {row['tokens_per_second']:8.0f} tokens/s   {row['tokens']:6.0f} sampled in "
                    f"{row['engine_seconds']:6.2f} s of the engine, {row['wall_seconds']:6.2f} s in all",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"millions": millions, "rows": rows}))
        return
    print(
        f"\n{options.model or 'random model'}: {millions:.1f} M parameters; torch {torch.__version__}, {torch.get_num_threads()} thread"
    )
    for workload in options.workloads:
        found = {row["engine"]: row["tokens_per_second"] for row in rows if row["workload"] == workload}
        if "lock-step" in found:
            others = ", ".join(f"{k} {v / found['lock-step']:.1f}x" for k, v in found.items() if k != "lock-step")
            print(f"{workload}: against lock-step {others}")


if __name__ == "__main__":
    main()
