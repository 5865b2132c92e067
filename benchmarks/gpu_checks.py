"""The GPU's parts that compare numbers: log-probs, loaded weights, packed rows, one step of every algorithm."""

from __future__ import annotations

import importlib
import inspect
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_models import batch_of, random_model, smollm2, vocabulary_of

if TYPE_CHECKING:
    from gpu_setting import Setting

ALGORITHMS = ("atod", "grpo", "opd", "sdar", "sod", "tcod", "gigpo", "gopd", "tip", "entropy_aware")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def logprobs(setting: Setting) -> dict[str, Any]:
    """Engine and learner against ``model(ids).logits``, in both types; bfloat16 also against float32."""
    from agents.models import load_model
    from atod_envs.errors import AtodError

    found: dict[str, Any] = {}
    for name in ("0.6B", "smollm2"):
        for dtype in (torch.float32, torch.bfloat16):
            try:
                if name == "smollm2":
                    world = "alfworld"
                    model = load_model(
                        smollm2(setting), "student", world=world, device=setting.device, dtype=dtype
                    ).model
                else:
                    model = random_model(name, setting, dtype)
            except AtodError as error:
                found[f"{name}, {_NAMES[dtype]}"] = f"not available: {error}"
                continue
            found |= {f"{name}, {_NAMES[dtype]}: {what}": value for what, value in _compared(model, setting).items()}
            setting.keep(found)
            del model
    return found


def _compared(model: Any, setting: Setting) -> dict[str, Any]:
    """Largest differences of a log-prob in nats."""
    from agents.engines.base import SamplingParams
    from agents.engines.transformers import TransformersEngine
    from agents.engines.weight_check import TOLERANCES
    from agents.logits import logit_head, own_logits
    from atod_algos.learner.logprobs import score

    prompts, prompt, response = (3, 24, 6) if setting.toy else (16, 300, 48)
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, vocabulary_of(model), int(prompt * rng.uniform(0.3, 1))).tolist() for _ in range(prompts)]

    def answered(graphs: bool) -> dict[int, Any]:
        engine = TransformersEngine(model, slots=prompts, max_context=prompt + response + 1, graphs=graphs)
        for place, ids in enumerate(asked):
            engine.submit(str(place), ids, SamplingParams(response, 1.0, seed=place))
        answers: dict[int, Any] = {}
        while len(answers) < prompts:
            answers |= {int(done.request_id): done for done in engine.step()}
        if graphs:
            found["recorded steps"] = len(engine.graphs.recorded) if engine.graphs is not None else "none"
        engine.close()
        return answers

    found: dict[str, Any] = {}
    ways = {"engine": answered(True), "engine without graphs": answered(False)}

    def own(row: list[int], start: int) -> np.ndarray:
        with torch.no_grad():
            logits = logit_head(model).close(own_logits(model, row))[start - 1 : -1]
            chosen = torch.tensor(row[start:], device=logits.device)
            return torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0].double().cpu().numpy()

    gaps = {
        way: np.concatenate(
            [np.abs(own([*ids, *said[i].token_ids], len(ids)) - said[i].logprobs) for i, ids in enumerate(asked)]
        )
        for way, said in ways.items()
    }
    batch = batch_of(vocabulary_of(model), 2, 4, prompt, response)
    scored = score(model, batch, temperature=1.0)[0]
    expected = np.zeros(batch.n_tokens)
    for row, ids in enumerate(batch.rows):
        mine = np.flatnonzero(batch.row_M == row)
        whole = own(ids.tolist(), 1)
        expected[mine] = whole[batch.column_M[mine] - 1]
    allowed = TOLERANCES[next(model.parameters()).dtype]
    worst = {way: float(gap.max()) for way, gap in gaps.items()} | {"learner": float(np.abs(scored - expected).max())}
    found |= {f"{who}, largest difference (nats)": value for who, value in worst.items()}
    same = [ways["engine"][i].token_ids == ways["engine without graphs"][i].token_ids for i in range(prompts)]
    found["responses that are the same with and without graphs"] = f"{sum(same)} of {prompts}"
    mean = {way: float(gap.mean()) for way, gap in gaps.items()} | {"learner": float(np.abs(scored - expected).mean())}
    found |= {f"{who}, mean difference (nats)": value for who, value in mean.items()}
    # In bfloat16 rounding alone moves single log-probs by whole nats.
    judged = worst if next(model.parameters()).dtype is torch.float32 else mean
    found["within what rounding may make"] = f"{'yes' if max(judged.values()) <= allowed else 'NO'} ({allowed:g})"
    if next(model.parameters()).dtype is torch.bfloat16:
        model.float()
        exact = np.zeros(batch.n_tokens)
        for row, ids in enumerate(batch.rows):
            mine = np.flatnonzero(batch.row_M == row)
            exact[mine] = own(ids.tolist(), 1)[batch.column_M[mine] - 1]
        found["learner against float32, mean (nats)"] = float(np.abs(scored - exact).mean())
        found["model's own logits against float32, mean (nats)"] = float(np.abs(expected - exact).mean())
    return found


def weights(setting: Setting) -> dict[str, Any]:
    """Weights that are loaded are those that sample; stale ones are noticed."""
    from agents.engines.transformers import TransformersEngine
    from agents.engines.weight_check import WeightMismatch, verify_weights

    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        acting, trained = (random_model("smollm2", setting, dtype, seed) for seed in (0, 1))
        engine = TransformersEngine(acting, slots=2, max_context=64)
        try:
            verify_weights(engine, trained)
            found[f"{_NAMES[dtype]}: other weights"] = "NOT noticed"
        except WeightMismatch:
            found[f"{_NAMES[dtype]}: other weights"] = "noticed"
        setting.sync()
        began = time.perf_counter()
        engine.load_weights(trained.named_parameters())
        setting.sync()
        found[f"{_NAMES[dtype]}: loading (s)"] = time.perf_counter() - began
        found[f"{_NAMES[dtype]}: difference after loading (nats)"] = verify_weights(engine, trained)
        engine.close()
    return found


def packing(setting: Setting) -> dict[str, Any]:
    """Packed rows (one variable-length kernel on a GPU) against padded rows: numbers, seconds."""
    import atod_algos.learner.packing as module
    from atod_algos.algorithm import Objective
    from atod_algos.learner.learner import Learner
    from atod_algos.learner.logprobs import score
    from atod_algos.training.config import TrainConfig, resolve

    groups, attempts, prompt, response = (2, 3, 24, 8) if setting.toy else (8, 8, 700, 200)
    found: dict[str, Any] = {
        "variable-length flash attention": "yes"
        if setting.device == "cuda" and module.flash_kernel() is not None
        else "no"
    }
    for dtype in (torch.bfloat16, torch.float32):
        results: dict[str, Any] = {}
        for how in ("padded", "packed"):
            model = random_model("smollm2", setting, dtype)
            batch = batch_of(vocabulary_of(model), groups, attempts, prompt, response)
            if how == "padded":
                module.PACKABLE[model] = False
            elif not module.packable(model):
                found[f"{_NAMES[dtype]}: packed"] = "NOT accepted by the check of packed rows"
                break
            learner = Learner(model, resolve(TrainConfig(student="x", lr=1e-6, minibatches=1, steps=10)))
            advantage_M = np.random.default_rng(1).normal(size=batch.n_tokens)
            seconds: dict[str, float] = {}
            for _ in range(2):  # the first one warms up
                setting.sync()
                began = time.perf_counter()
                scored = score(model, batch, temperature=1.0)[0]
                setting.sync()
                seconds["score"] = time.perf_counter() - began
                began = time.perf_counter()
                update = learner.update(batch, advantage_M, scored, Objective(), step=1, temperature=1.0, seed=0)
                setting.sync()
                seconds["update"] = time.perf_counter() - began
                results.setdefault(how, (scored, update.metrics["actor/grad_norm"]))
            found |= {f"{_NAMES[dtype]}, {how}: {what} (s)": value for what, value in seconds.items()}
            setting.keep(found)
        if len(results) == 2:
            (a, norm_a), (b, norm_b) = results["padded"], results["packed"]
            found[f"{_NAMES[dtype]}: largest difference of a log-prob (nats)"] = float(np.abs(a - b).max())
            found[f"{_NAMES[dtype]}: gradient's norm, relative difference"] = abs(norm_a - norm_b) / norm_a
    return found


def algorithms(setting: Setting) -> dict[str, Any]:
    """One step of every algorithm on the device against the CPU's, from the same episodes, in float32."""
    torch.set_num_threads(1)  # for models this small one thread is the fastest
    found: dict[str, Any] = {}
    for name in ALGORITHMS:
        algorithm = _algorithm(name)
        played: list[Any] = []
        numbers: dict[str, dict[str, float]] = {}
        for device in ("cpu", setting.device):
            trainer = _trainer(algorithm, device, setting)
            play = trainer.sampler.play

            def once(*arguments: Any, play: Any = play, played: list[Any] = played) -> Any:
                if not played:
                    played.append(play(*arguments))
                return played[0]

            trainer.sampler.play = once  # type: ignore[method-assign]
            setting.sync()
            began = time.perf_counter()
            key = "cpu" if device == "cpu" and "cpu" not in numbers else "device"
            numbers[key] = trainer.train_step(1, _quiet())
            setting.sync()
            if key == "device":
                found[f"{name}: step on the device (s)"] = time.perf_counter() - began
            trainer.close()
        worst, where = _furthest(numbers["cpu"], numbers["device"])
        found[f"{name}: largest relative difference of {len(numbers['cpu'])} metrics"] = f"{worst:.2g} ({where})"
        setting.keep(found)
        if setting.left() < 5:
            found["not reached"] = ", ".join(ALGORITHMS[ALGORITHMS.index(name) + 1 :])
            break
    return found


def _algorithm(name: str) -> Any:
    module = importlib.import_module(f"atod_algos.{name}")
    return next(
        kind()
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if getattr(kind, "name", None) and kind.__module__ == module.__name__
    )


def _trainer(algorithm: Any, device: str, setting: Setting) -> Any:
    import tempfile
    from pathlib import Path

    from atod_algos.training.config import TrainConfig, resolve
    from atod_algos.training.run_dir import RunFolder, settings_of
    from atod_algos.training.trainer import Trainer

    tasks, group, turns = (2, 2, 3) if setting.toy else (4, 4, 14)
    config = resolve(
        TrainConfig(
            data="builtin", device=device, dtype="float32", tasks_per_step=tasks, group_size=group, max_turns=turns, minibatches=1,
            eval_every=0, store="nothing", steps=2,
        )
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(dir=setting.out, prefix="run-"))
    return Trainer(config, algorithm, RunFolder(folder, settings_of(config, algorithm, "paper")))


def _quiet() -> Any:
    from atod_algos.training.console import Progress

    return Progress(1, "gpu", quiet=True)


def _furthest(a: dict[str, float], b: dict[str, float]) -> tuple[float, str]:
    """The metric that differs most, times and memory apart; relative to its size, or to 1e-3 where it is smaller."""
    worst, where = 0.0, "none"
    for name in a.keys() & b.keys():
        if name.startswith(("time/", "memory/", "speed/")):
            continue
        gap = abs(a[name] - b[name]) / max(abs(a[name]), 1e-3)
        if gap > worst:
            worst, where = gap, name
    return worst, where
