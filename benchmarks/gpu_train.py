"""The GPU's last part: SmolLM2 learns the built-in ALFWorld by demonstrations, then by ATOD.

The teacher is the same model after all of the demonstrations, the student the one after a part of them. A panel before
anything, after the demonstrations, and after ATOD.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpu_setting import Setting

PROMPTS = {"style": "compact", "max_turns": 30, "max_response": 48, "max_context": 2048}
"""How the model is shown the game, in every stage."""


class OutOfTime(Exception):
    """A stage has used its share."""


def train(setting: Setting) -> dict[str, Any]:
    """Cold start, ATOD, panels."""
    from gpu_models import smollm2

    found: dict[str, Any] = {}
    model = smollm2(setting)
    toy = setting.toy
    # Few rounds of many episodes: what takes time is the model's own turns, which are played side by side.
    rounds, episodes, panel = (2, 2, 2) if toy else (4, 256, 128)
    prompts = PROMPTS | ({"max_turns": 2, "max_response": 12, "max_context": 512} if toy else {})
    whole = setting.left()
    # It chats to the end of every turn, so a third of the turns has to do.
    few = prompts | {"max_turns": max(2, prompts["max_turns"] // 3)}
    found |= _panel(f"before, {few['max_turns']} turns at most", model, setting, few, panel)
    early, last = rounds // 2, rounds
    out = setting.out / "train"
    for stop in (early, last):
        found |= _demonstrations(setting, model, out, prompts, rounds, episodes, stop)
        found |= _panel(f"after {stop} rounds of demonstrations", str(out), setting, prompts, panel)
        setting.keep(found)
        if stop == early:
            _copy(out, setting.out / "student")
        if setting.left() < 0.35 * whole and not toy:
            found["demonstrations"] = f"ended after round {stop} of {last}: out of time"
            break
    return _atod(setting, prompts, str(setting.out / "student"), str(out), panel, found)


def _demonstrations(
    setting: Setting, model: str, out: Path, prompts: dict[str, Any], rounds: int, episodes: int, stop: int
) -> dict[str, Any]:
    from atod_algos.training.demonstrations import ImitationOptions
    from atod_algos.training.sft import SftCommand, train_sft

    options = ImitationOptions(
        rounds=rounds, episodes=episodes, epochs=1, first_beta=0.2, last_beta=0.3, lr=3e-4, batch_tokens=4096, stop=stop
    )
    losses: list[str] = []
    began = time.perf_counter()
    command = SftCommand(
        student=model, out=str(out), data="builtin", device=setting.device, fit=options, **prompts  # type: ignore[arg-type]
    )  # fmt: skip
    train_sft(command, losses.append)
    return {
        f"demonstrations up to round {stop} (s)": time.perf_counter() - began,
        f"demonstrations, round {stop}": losses[-1].partition(": ")[2],
    }


def _copy(source: Path, to: Path) -> None:
    import shutil

    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, to / file.name)


def _panel(what: str, agent: str, setting: Setting, prompts: dict[str, Any], tasks: int) -> dict[str, Any]:
    from atod_algos.evaluate.command import run
    from atod_algos.evaluate.settings import EvaluateConfig

    began = time.perf_counter()
    out = setting.out / "panels" / what.replace(" ", "-")
    config = EvaluateConfig(
        agent=agent, data="builtin", panels=(f"valid_unseen/{tasks}",), temperature=0.4, concurrency=128, device=setting.device,
        out=out, **prompts,
    )  # fmt: skip
    (row,) = run(config, show=False)["panels"].values()
    return {
        f"panel {what}: success of {row['n']} valid_unseen (95 % interval)": (
            f"{row['success']:.1%} ({100 * row['low']:.1f} - {100 * row['high']:.1f}), {row['length']:.1f} turns"
        ),
        f"panel {what} (s)": time.perf_counter() - began,
    }


def _atod(
    setting: Setting, prompts: dict[str, Any], student: str, teacher: str, panel: int, before: dict[str, Any]
) -> dict[str, Any]:
    from atod_algos.atod import ATOD
    from atod_algos.training.config import TrainConfig, resolve
    from atod_algos.training.console import Progress
    from atod_algos.training.run_dir import RunFolder, settings_of
    from atod_algos.training.trainer import Trainer

    toy = setting.toy
    steps, tasks, group = (2, 2, 2) if toy else (60, 16, 8)
    config = resolve(
        TrainConfig(
            data="builtin", student=student, teacher=teacher, device=setting.device, steps=steps, tasks_per_step=tasks, group_size=group,
            lr=3e-6, lr_floor=1.0, eval_every=0, eval_tasks=1, store="nothing", checkpoint_every=10_000, **prompts,
        )
    )  # fmt: skip
    algorithm = ATOD()
    trainer = Trainer(config, algorithm, RunFolder(setting.out / "atod", settings_of(config, algorithm, "paper")))
    kept = 0 if toy else 25.0  # seconds for the last panel

    class Clock(Progress):
        done = 0
        metrics: dict[str, float] = {}  # noqa: RUF012

        def step(self, step: int, metrics: Any) -> None:
            Clock.done, Clock.metrics = step, dict(metrics)
            if setting.left() < kept + metrics["time/step"]:
                raise OutOfTime

    began = time.perf_counter()
    with contextlib.suppress(OutOfTime):
        trainer.fit(Clock(steps, "gpu", quiet=True))
    took = time.perf_counter() - began
    out = setting.out / "after"
    trainer.student.model.save_pretrained(out)
    trainer.student.tokenizer.save_pretrained(out)
    trainer.close()
    del trainer
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    found = before | {
        f"ATOD, steps in {took:.0f} s": Clock.done,
        "ATOD, last step (s)": Clock.metrics["time/step"],
        "ATOD, last step: rollout, scoring, update (s)": ", ".join(
            f"{Clock.metrics[f'time/{name}']:.2f}" for name in ("rollout", "score", "update")
        ),
        "ATOD, training episodes solved in the last step": f"{Clock.metrics['episode/success']:.1%}",
        "ATOD, teacher's gap (nats a token)": Clock.metrics.get("atod/teacher_student_gap_mean", float("nan")),
    }
    return setting.keep(found) | _panel("after ATOD", str(out), setting, prompts, panel)
