"""A training step here and in TRL: the same model, tasks, group size and update.

    python benchmarks/train.py                    ours, TRL's GRPOTrainer, TRL with our engine as rollout_func
    python benchmarks/train.py --model smollm2-135m --tasks 2 --group 4 --turns 4 --response 16 --trl-batch 4 --warmup 0
    python benchmarks/train.py --packing          padded and packed rows of the built-in run, ours alone

Every contender runs in a process of its own and they take turns, so that whatever else the machine does meets all of
them; ratios are of rounds that ran one after the other. TRL's rollout is written as its own loop over turns is: one
``generate()`` over all episodes still running, each turn's prompt the whole conversation. One update a step, on whole
episodes, no reference model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = {
    "ours": "this trainer",
    "trl": "TRL GRPOTrainer",
    "trl-engine": "TRL with our engine",
}


def peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Phases:
    """Wall seconds, CPU seconds and highest memory of one step's phases."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def begin(self) -> None:
        """A step begins."""
        self.step: dict[str, Any] = {}
        self.mark()

    def mark(self) -> None:
        """A phase begins."""
        peak_reset()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """A phase ends."""
        wall, cpu, mib = self.step.get(name, (0.0, 0.0, 0.0))
        now, spent = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.step[name] = (wall + now, cpu + spent, max(mib, peak_mib()))
        self.mark()

    def end(self, **more: Any) -> None:
        """The step ends."""
        self.steps.append({"phases": self.step, **more})


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """The reference student, a real model, or a random one of the asked size; with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from agents.models import REFERENCE, load_model

    if args.model not in ("builtin", "random"):
        loaded = load_model(args.model, "student")  # float32, whatever its files hold
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return
    source = REFERENCE / "alfworld" / "student"
    tokenizer = AutoTokenizer.from_pretrained(source)
    if args.model == "builtin":
        model = Qwen3ForCausalLM.from_pretrained(source)
    else:
        torch.manual_seed(0)
        heads = max(1, args.width // 64)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=3 * args.width, head_dim=64,
                num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
                max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- ours ---------------------------------------------------------------------------------------------------------


def run_ours(folder: Path, args: argparse.Namespace, phases: Phases) -> None:
    from atod_algos.grpo import GRPO
    from atod_algos.training.config import TrainConfig, resolve
    from atod_algos.training.console import Progress
    from atod_algos.training.run_dir import RunFolder, settings_of
    from atod_algos.training.trainer import Trainer

    config = resolve(
        TrainConfig(
            env="atod/ALFWorld-v0", data="builtin", student=str(folder), style="compact", max_turns=args.turns,
            max_response=args.response, max_context=args.context, tasks_per_step=args.tasks, group_size=args.group,
            minibatches=1, lr=1e-6, eval_every=0, store="nothing", slots=args.tasks * args.group, device="cpu",
            steps=args.warmup + args.steps, token_budget=args.budget,
        )
    )  # fmt: skip
    algorithm = GRPO()
    trainer = Trainer(
        config, algorithm, RunFolder(Path(tempfile.mkdtemp(dir=folder.parent)), settings_of(config, algorithm, "paper"))
    )
    laps = {"rollout": "rollout", "score": "scoring", "advantage": "update", "update": "update", "store": "update"}

    class Clock:
        def __init__(self, device: str) -> None:
            phases.begin()

        def lap(self, name: str) -> None:
            phases.lap(laps[name])

        def metrics(self, batch: Any) -> dict[str, float]:
            phases.end(sampled=batch.n_tokens, row_tokens=sum(map(len, batch.rows)), episodes=len(batch.trajectories))
            return {}

    import atod_algos.training.trainer as module

    module.Clock = Clock  # type: ignore[misc, assignment]
    progress = Progress(config.steps or 0, "benchmark")
    for step in range(1, args.warmup + args.steps + 1):
        trainer.train_step(step, progress)
    trainer.close()


# --- side by side -------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="train-benchmark-") as name:
        folder = Path(name) / "model"
        write_model(folder, args)
        rounds: dict[str, list[list[dict[str, Any]]]] = {who: [] for who in args.contenders}
        for number in range(args.rounds):
            for who in args.contenders:
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", who, "--folder", str(folder)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
                rounds[who].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1} of {args.rounds}: {who} done", file=sys.stderr)
    table(rounds, args)


def table(rounds: dict[str, list[list[dict[str, Any]]]], args: argparse.Namespace) -> None:
    import statistics

    def total(step: dict[str, Any], which: int) -> float:
        values = [phase[which] for phase in step["phases"].values()]
        return max(values) if which == 2 else sum(values)

    print(
        f"{args.model} model, {args.tasks} tasks x {args.group}, {args.turns} turns, {args.response} tokens a turn; ",
        end="",
    )
    print(
        f"{args.rounds} rounds of {args.steps} steps, {args.threads} thread, {platform.processor() or platform.machine()}"
    )
    print(
        f"{'':22}{'rollout':>10}{'scoring':>10}{'update':>10}{'step':>10}{'wall':>10}{'peak MiB':>10}{'row tok/s':>11}"
    )
    for who, runs in rounds.items():
        steps = [step for run in runs for step in run]

        def middle(values: list[float]) -> float:
            return statistics.median(values)

        cpu = {
            phase: middle([step["phases"].get(phase, (0, 0, 0))[1] for step in steps])
            for phase in ("rollout", "scoring", "update")
        }
        print(
            f"{CONTENDERS[who]:22}"
            + "".join(f"{cpu[phase]:10.2f}" for phase in cpu)
            + f"{middle([total(step, 1) for step in steps]):10.2f}{middle([total(step, 0) for step in steps]):10.2f}"
            + f"{middle([total(step, 2) for step in steps]):10.0f}"
            + f"{middle([step['row_tokens'] / total(step, 1) for step in steps]):11.0f}"
        )
    print("(CPU seconds a step, but for 'wall'; medians over all steps)")
    for mine in (who for who in rounds if who == "ours"):
        for other in (who for who in rounds if who.startswith("trl")):
            head = f"{CONTENDERS[other]} / {CONTENDERS[mine]}"
            for label, which in (("CPU time", 1), ("wall time", 0)):
                # Per token of a row: the sampled episodes differ in length.
                cost = [
                    [
                        sum(total(step, which) for step in run) / sum(step["row_tokens"] for step in run)
                        for run in rounds[who]
                    ]
                    for who in (mine, other)
                ]
                ratios = [b / a for a, b in zip(*cost, strict=True)]
                print(
                    f"{head}, {label} per token of a row: {statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)"
                )
            peaks = [max(total(step, 2) for run in rounds[name] for step in run) for name in (other, mine)]
            print(f"{head}, peak memory: {peaks[0] / peaks[1]:.2f}")


# --- packing ----------------------------------------------------------------------------------------------------------


def packing(args: argparse.Namespace) -> None:
    """One step of the built-in run, scored and learned from with padded rows and packed, at several token budgets."""
    import statistics

    import numpy as np

    from agents.chat import ChatFormat
    from agents.engines.transformers import TransformersEngine
    from agents.models import load_model
    from atod_algos.algorithm import Objective
    from atod_algos.batch import make_batch
    from atod_algos.learner import packing as module
    from atod_algos.learner.learner import Learner
    from atod_algos.learner.logprobs import score, split_rows, stream_tokens
    from atod_algos.rollout.environments import make_env
    from atod_algos.rollout.episodes import Rollout
    from atod_algos.rollout.task_sampler import StepSampler
    from atod_algos.training.config import TrainConfig, resolve

    config = resolve(TrainConfig(data="builtin"))
    loaded = load_model("builtin", "student", world="alfworld")
    tasks = make_env(config).unwrapped.tasks  # type: ignore[attr-defined]
    sampler = StepSampler([tasks], seed=0, tasks_per_step=config.tasks_per_step, group_size=config.group_size)
    engine = TransformersEngine(loaded.model, max_context=config.max_context)
    rollout = Rollout(engine, ChatFormat(loaded.tokenizer), lambda: make_env(config), style="compact", max_tokens=24)
    batch = make_batch(rollout.play_groups(sampler.specs(1)))
    rollout.close()
    engine.close()
    advantage_M = np.random.default_rng(0).normal(size=batch.n_tokens)
    lengths = [len(row) for row in batch.rows]
    print(
        f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; CPU seconds, ",
        end="",
    )
    print(f"medians of {args.rounds} rounds (lowest to highest)")
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    counted: dict[tuple[str, int], int] = {}
    for number in range(args.rounds + 1):
        for budget in (1024, 4096, 16384):
            for how in ("padded", "packed"):
                model = load_model("builtin", "student", world="alfworld").model
                if how == "padded":
                    module.PACKABLE[model] = False
                parts = split_rows(model, batch.rows, budget)
                counted[how, budget] = sum(stream_tokens(model, [batch.rows[i] for i in part]) for part in parts)
                learner = Learner(model, resolve(TrainConfig(data="builtin", token_budget=budget)))
                began = time.process_time()
                old_M = score(model, batch, temperature=1.0, budget=budget)[0]
                scored = time.process_time()
                learner.update(batch, advantage_M, old_M, Objective(), step=1, temperature=1.0, seed=0)
                if number:  # the first round warms up
                    times.setdefault((how, budget), []).append((scored - began, time.process_time() - scored))
    for (how, budget), pairs in times.items():
        columns = [
            f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"
            for values in zip(*pairs, strict=True)
        ]
        print(f"{how}, {budget:6d} tokens: scores {counted[how, budget]:6d} in {columns[0]}; update {columns[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="random", help="random, builtin (the reference student), a folder, or smollm2-135m"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--response", type=int, default=24)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2, help="measured steps in a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them; a large model may do without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=int, default=4096, help="our --token-budget")
    parser.add_argument(
        "--trl-batch", type=int, default=8, help="TRL's per_device_train_batch_size; 8 is its best here"
    )
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--packing", action="store_true", help="padded and packed rows in one step of the built-in run instead"
    )
    parser.add_argument("--worker", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.packing:
        packing(args)
    elif args.worker is None:
        compare(args)
    else:
        import torch

        torch.set_num_threads(args.threads)
        phases = Phases()
        if args.worker == "ours":
            run_ours(args.folder, args, phases)
        else:
            from trl_side import run_trl

            run_trl(args.folder, args, args.worker == "trl-engine", phases)
        print(json.dumps(phases.steps[args.warmup :]))


if __name__ == "__main__":
    main()
