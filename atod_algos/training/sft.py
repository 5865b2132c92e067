"""Supervised training on demonstrations: how a model is cold-started (``atod train sft``, also called ``imitation``).

Objective
    L = -mean over learned tokens of log pi_theta(response | conversation so far)

Demonstrations come from the environment's scripted expert, or from recorded episodes: a run's, an evaluation's, an API
model's. The conversation is not always the expert's. Each turn, with probability ``beta``, the student's own sample is
executed instead (and is not learned from), and the expert, who has watched, answers from wherever that led (Ross et al.
2011, dataset aggregation). Without this a small model never learns to recover: it repeats itself after "Nothing
happens.".

    atod train sft --student PATH --out FOLDER --env atod/ALFWorld-v0
    atod train sft --student PATH --out FOLDER --source evaluations/gpt-ALFWorld-v0 --only success --best-of 2

OUT is a folder that ``from_pretrained`` loads. OUT/training holds settings, metrics and checkpoints, one a round: the
same command goes on where an earlier one ended, to the same weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from agents.chat import CHAT_DATE, ThinkingMode
from agents.logits import longest_context
from agents.models import device_of, load_model, model_digest
from atod_algos.guard import guarded, parse
from atod_algos.learner.lora import add_adapters
from atod_algos.rollout.environments import describe, make_env
from atod_algos.rollout.episodes import derive_seed
from atod_algos.rollout.layouts import LayoutName, choose_layout
from atod_algos.rollout.pools import dtype_of
from atod_algos.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune,
    recover,
    require_same_models,
    save_checkpoint,
    step_of,
    write_failure,
)
from atod_algos.training.config import RunConfig, TrainConfig, resolve
from atod_algos.training.demonstrations import (
    Expert,
    ImitationOptions,
    Recorded,
    episodes_digest,
    read_recorded,
    require_episodes_of,
    tokenized,
)
from atod_algos.training.imitation import EpisodesOf, Imitator, last_round
from atod_algos.training.run_dir import RunFolder, held
from atod_envs.errors import AtodError
from atod_envs.files import make_folder
from atod_envs.trajectory import Trajectory


@dataclass(frozen=True)
class SftCommand:
    """What ``atod train sft`` is asked for."""

    student: str
    """Model to train: a folder or a hub id."""
    out: str
    """Folder for the result, as ``from_pretrained`` loads it."""
    source: tuple[str, ...] = ("expert",)
    """Where demonstrations come from: 'expert', or recorded episodes: files, or folders of runs and evaluations."""
    only: Literal["all", "success"] = "success"
    """Recorded episodes to take: solved ones, or all. The expert's are taken as they are."""
    best_of: int = 0
    """Recorded episodes to take of each task, the best and then the shortest first; 0 takes all."""
    env: str = "atod/ALFWorld-v0"
    """Registered id of the environment; for --source expert it must have a scripted expert."""
    data: str | None = None
    """Data folder of the environment."""
    option: tuple[str, ...] = ()
    """Further arguments of the environment, KEY=VALUE, e.g. dataset=single."""
    style: str = "compact"
    """Prompt style."""
    layout: LayoutName = "auto"
    """How episodes become prompts and rows, as in training: window, turns, trajectory, or what the style is made
    for."""
    max_turns: int | None = None
    """Turn limit of the episodes."""
    max_response: int = 64
    """Longest response of the student, in tokens."""
    max_context: int = 2048
    """Longest prompt plus response, in tokens."""
    thinking: ThinkingMode = "off"
    """Thoughts of the chat template: off, on (an earlier turn's is dropped), keep."""
    chat_date: str = CHAT_DATE
    """Date that chat templates are told."""
    lora_rank: int = 0
    """Rank of low-rank adapters (needs peft); 0 trains all weights. OUT gets the sum of both."""
    run: str | None = None
    """Folder of settings, metrics and checkpoints; by default OUT/training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that compute, as in training: 'auto' is bfloat16 on a GPU, float32 elsewhere; updates are
    made in float32. On a processor with bfloat16 instructions it halves the time."""
    fit: ImitationOptions = field(default_factory=ImitationOptions)


def train_sft(command: SftCommand, say: Callable[[str], None]) -> None:
    """Train as asked, from the last checkpoint if there is one, and write the result.

    Args:
        command: what was asked for.
        say: gets a line after every round.

    Raises:
        AtodError: model, data, sources or settings do not fit; says what to do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AtodError("sft trains in one process; start it without torchrun")
    if command.best_of and command.source == ("expert",):
        raise AtodError(
            f"--best-of {command.best_of}: it chooses among recorded episodes; leave it out, or give --source"
        )
    make_folder(Path(command.out), "--out")  # before hours of training, not after
    options = command.fit
    config = resolve(_train_config(command))
    run = RunFolder(_folder(command), _settings(command, config))
    recover(run.checkpoints)
    facts = describe(config)
    device = device_of(command.device)
    dtype = dtype_of(config, device)
    loaded = load_model(command.student, "student", world=facts.env_key, device=device, dtype=dtype)
    model, chat = loaded.model, loaded.chat(command.thinking, command.chat_date)
    context = min(command.max_context, longest_context(model))
    style, rows = choose_layout(command.layout, facts.style, chat)
    adapters = None
    if command.lora_rank:
        seed = derive_seed(options.seed, "adapters")
        adapters = add_adapters(model, rank=command.lora_rank, alpha=config.lora_alpha, seed=seed)
    imitator = Imitator(model, options, rows)
    recorded: list[Trajectory] = []
    if command.source != ("expert",):
        recorded = read_recorded(command.source, only=command.only, best_of=command.best_of)
    require_episodes_of(recorded, command.env, facts.splits[0])
    identity = {
        "algorithm": "sft",
        "data": facts.data_version,
        "models": {command.student: model_digest(command.student, facts.env_key)},
        "demonstrations": episodes_digest(recorded),
    }
    done = _restore(command, run, imitator, adapters, identity)
    if done:
        say(f"going on after round {done}")
    source: EpisodesOf
    if not recorded:
        source = Expert(
            model,
            chat,
            lambda: make_env(config),
            options,
            style=style,
            max_tokens=command.max_response,
            max_context=context,
            tasks=facts.tasks(facts.splits[0]),
        )
    else:
        source = Recorded(tokenized(recorded, style, chat, context), options)
        say(f"{len(recorded)} recorded episodes of {len({t.task_id for t in recorded})} tasks")
    run.begin(done)
    try:
        for number in range(done, last_round(options)):
            torch.manual_seed(derive_seed(options.seed, "round", number))
            episodes = source(number)
            loss = imitator.fit(episodes, number, derive_seed(options.seed, "round", number))
            solved = sum(t.success for t in episodes) / len(episodes)
            run.log(number + 1, {"sft/loss": loss, "sft/episodes": float(len(episodes)), "sft/success": solved})
            save_checkpoint(
                run.checkpoints,
                f"step_{number + 1:06d}",
                model=adapters or model,
                tokenizer=loaded.tokenizer,
                state=imitator.learner.state(),
                extra={"step": number + 1, "best": {}, **identity},
            )
            prune(run.checkpoints, 2)
            say(f"round {number + 1}: loss {loss:.4f} nats a token")
    finally:
        run.close()
    result = model if adapters is None else adapters.merge_and_unload()
    try:
        result.save_pretrained(command.out)
        loaded.tokenizer.save_pretrained(command.out)
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise AtodError(
            f"{command.out} could not be written: {reason}; every round is kept in {run.path}. Make room and run the same command again"
        ) from error


def _restore(
    command: SftCommand, run: RunFolder, imitator: Imitator, adapters: Any, identity: Mapping[str, Any]
) -> int:
    """Load the last checkpoint, if there is one of the same training; how many rounds it has behind it."""
    path = latest_checkpoint(run.checkpoints)
    if path is None:
        return 0
    learner = imitator.learner
    state, extra = load_checkpoint(path, learner.model, learner.updater, adapters)
    learner.load_state(state)
    if extra["data"] != identity["data"]:
        raise AtodError(
            f"{path} was trained on the data {extra['data']!r}, but {command.env} now plays {identity['data']!r}; give the old "
            "data back (--data, or the environment's variable), or start another training with --out"
        )
    require_same_models(path, extra, identity["models"])
    if extra.get("demonstrations", identity["demonstrations"]) != identity["demonstrations"]:
        raise AtodError(
            f"{path} was trained on other episodes than --source {' '.join(command.source)} holds now; give the old ones back, or "
            "start another training with --out"
        )
    return int(extra["step"])


def _train_config(command: SftCommand) -> TrainConfig:
    """The part of the settings that training has as well, so that an evaluation of a checkpoint finds it."""
    names = {part.name for part in dataclasses.fields(TrainConfig)} & {
        part.name for part in dataclasses.fields(command)
    }
    return TrainConfig(seed=command.fit.seed, **{name: getattr(command, name) for name in names})


def _folder(command: SftCommand) -> Path:
    return Path(command.run or Path(command.out) / "training")


def _settings(command: SftCommand, config: RunConfig) -> dict[str, Any]:
    options = dataclasses.asdict(command.fit)
    options.pop("stop")  # a training that stopped early may go on
    own = {"source": list(command.source), "only": command.only, "best_of": command.best_of}
    return {"train": config.stored(), "algorithm": {"name": "sft", **own, **options}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model on demonstrations from the command line."""
    command = parse(SftCommand, arguments, "atod_algos.training.sft", __doc__)

    def run() -> None:
        with held(_folder(command)):
            train_sft(command, lambda line: print(line, flush=True))

    def kept() -> str:
        last = latest_checkpoint(_folder(command) / "checkpoints")
        done = step_of(last) if last is not None else 0
        return f"kept in {_folder(command)}: finished rounds {done}; run the same command again to go on"

    guarded(run, kept)


if __name__ == "__main__":
    main()
