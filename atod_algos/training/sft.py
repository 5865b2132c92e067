"""Imitation of a scripted expert, with the learner rolled in context: how a model is warm-started.

Objective
    L = -mean over supervised tokens of log pi_theta(expert's response | conversation so far)

The conversation is not always the expert's. Each turn, with probability ``beta``, the learner's own sample is executed instead (and is
not trained on), and the expert, who has watched, answers from wherever that led (Ross et al. 2011, dataset aggregation). Without
this a small model never learns to recover: it repeats itself after "Nothing happens.".

    python -m atod_algos.training.sft --student PATH --out FOLDER --env atod/ALFWorld-v0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch

from agents.base import Decision
from agents.chat import CHAT_DATE, ChatFormat, ThinkingMode
from agents.engines.base import Engine
from agents.engines.transformers import TransformersEngine
from atod_algos.algorithm import RolloutLimits
from atod_algos.batch import TokenBatch, make_batch
from atod_algos.learner.logprobs import micro_batches, row_logprobs
from atod_algos.rollout.environments import make_env as make_run_env
from atod_algos.rollout.episodes import Rollout, collect_groups, derive_seed
from atod_algos.turn_plans import EpisodeSpec, Role, TurnPlayer
from atod_envs.options import program
from atod_envs.styles import PromptStyle
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Mixture:
    """The expert answers every turn, but the student plays a share of them, from wherever that leads.

    Attributes:
        coin_NT: whether the student plays turn t of episode n, whose group id is n; the last column holds for all later turns.
    """

    coin_NT: np.ndarray
    learned: Role = "expert"
    expert_watches: bool = True

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnPlayer:
        """See :class:`TurnPlan`."""
        coin_T = self.coin_NT[int(spec.group_id)]
        return lambda turn: "student" if coin_T[min(turn, len(coin_T) - 1)] else "expert"


def demonstrate(
    tasks: Sequence[str],
    make_env: Callable[[], gym.Env[str, str]],
    chat: ChatFormat,
    *,
    style: str | PromptStyle,
    seed: int,
    beta: float = 0.0,
    engine: Engine | None = None,
    max_tokens: int = 24,
    concurrency: int = 256,
) -> list[Trajectory]:
    """Play tasks with the expert, letting the student act in some turns.

    Args:
        tasks: what to play, one episode each.
        make_env: makes a raw environment.
        chat: renders messages to ids.
        style: prompt style; the conversation layout shows earlier turns, the window layout does not.
        seed: of the coins and the sampling.
        beta: probability that a turn is the student's own.
        engine: samples the student's turns; needed where ``beta`` is above 0.
        max_tokens: longest response of the student.
        concurrency: episodes that run at the same time.

    Returns:
        One episode a task. The expert's turns carry token ids, the student's have none: they are context.
    """
    if beta > 0 and engine is None:
        raise ValueError("beta > 0 needs an engine that samples the student's turns")
    specs = [EpisodeSpec(task, str(n), derive_seed(seed, n)) for n, task in enumerate(tasks)]
    plan = Mixture(np.random.default_rng(seed).random((len(tasks), 256)) < beta)
    rollout = Rollout(
        engine, chat, make_env, style=style, max_tokens=max_tokens, concurrency=concurrency, seed_of_turn=derive_seed
    )
    try:
        return rollout.play(specs, RolloutLimits(who=plan))
    finally:
        rollout.close()


@dataclass(frozen=True)
class ImitationOptions:
    """How a model is fitted to an expert."""

    rounds: int = 40
    """Rounds; each plays fresh episodes with the current model and fits it to the expert's turns."""
    episodes: int = 256
    """Episodes a round."""
    epochs: int = 2
    """Passes over a round's episodes."""
    first_beta: float = 0.1
    """Share of turns that the learner acts in itself in the second round (in the first it never does)."""
    last_beta: float = 0.7
    """The same in the last round; in between the share rises linearly."""
    lr: float = 3e-3
    """Peak learning rate; it falls to a tenth along a cosine."""
    batch_tokens: int = 4096
    """Tokens of a mini-batch."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    warmup: float = 0.05
    """Share of the training over which the rate rises."""
    stop: int | None = None
    """Rounds after which it stops early, on the schedule of all of them; by default it plays them all."""
    seed: int = 0
    """Seed of tasks, coins, sampling and mini-batches."""


class Imitator:
    """Fits a model to demonstrations; the learning rate follows one schedule over all rounds.

    Args:
        model: the model.
        options: how it is fitted.

    Attributes:
        done: share of the schedule that lies behind.
    """

    def __init__(self, model: Any, options: ImitationOptions) -> None:
        self.model, self.options = model, options
        self.done = 0.0
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        kept = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))

    def fit(self, demonstrations: Sequence[Trajectory], seed: int) -> float:
        """Run one round's epochs; return the mean loss of the last one, nats a token."""
        batch = make_batch(collect_groups(demonstrations))
        lengths = [len(row) for row in batch.rows]
        options, start = self.options, self.done
        loss = 0.0
        for epoch in range(options.epochs):
            total, count = 0.0, 0
            parts = _shuffled(lengths, options.batch_tokens, derive_seed(seed, epoch))
            for number, rows in enumerate(parts):
                within = (epoch + number / len(parts)) / options.epochs
                self.done = start + within / options.rounds
                part_loss, part_count = self._update(batch, rows)
                total, count = total + part_loss, count + part_count
            loss = total / max(1, count)
        self.done = start + 1 / options.rounds
        return loss

    def _rate(self) -> float:
        warmup = self.options.warmup
        if self.done < warmup:
            return self.options.lr * (self.done / warmup + 1e-2)
        fall = (self.done - warmup) / (1 - warmup)
        return self.options.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))

    def _update(self, batch: TokenBatch, rows: np.ndarray) -> tuple[float, int]:
        self.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        _, logprobs, _ = row_logprobs(self.model, batch, rows, temperature=1.0)
        n = len(logprobs)
        loss = -logprobs.sum() / n
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) * n, n


def imitate(
    model: Any,
    chat: ChatFormat,
    make_env: Callable[[], gym.Env[str, str]],
    options: ImitationOptions,
    *,
    style: str | PromptStyle,
    max_tokens: int,
    max_context: int,
    tasks: Sequence[str] | None = None,
    on_round: Callable[[int, float], None] | None = None,
) -> None:
    """Fit a model to an environment's scripted expert, in place.

    Args:
        model: the model.
        chat: renders messages to ids.
        make_env: makes a raw environment; asked anew each round, so what it makes may change from one to the next.
        options: how.
        style: prompt style.
        max_tokens: longest response of the learner.
        max_context: longest prompt plus response.
        tasks: what episodes are drawn from; by default all tasks of the environment's split.
        on_round: called after each round (from 1) with its loss in nats a token.
    """
    engine = TransformersEngine(model, slots=256, max_context=max_context)
    imitator = Imitator(model, options)
    for number in range(options.rounds if options.stop is None else min(options.stop, options.rounds)):
        seed = derive_seed(options.seed, "round", number)
        rng = np.random.default_rng(seed)
        drawn_from = _tasks_of(make_env) if tasks is None else tasks
        chosen = [drawn_from[int(i)] for i in rng.integers(len(drawn_from), size=options.episodes)]
        rise = (number - 1) / max(1, options.rounds - 2)
        beta = 0.0 if number == 0 else options.first_beta + (options.last_beta - options.first_beta) * rise
        demonstrations = demonstrate(
            chosen, make_env, chat, style=style, seed=seed, beta=beta, engine=engine, max_tokens=max_tokens
        )
        loss = imitator.fit(demonstrations, seed)
        engine.load_weights(model.named_parameters())
        if on_round is not None:
            on_round(number + 1, loss)
    model.eval()


def _tasks_of(make_env: Callable[[], gym.Env[str, str]]) -> Sequence[str]:
    env = make_env()
    env.close()
    return cast("TextEnv", env.unwrapped).tasks


def _shuffled(lengths: Sequence[int], budget: int, seed: int) -> list[np.ndarray]:
    """Mini-batches of rows of similar length, in random order."""
    rng = np.random.default_rng(seed)
    noisy = [length + rng.random() * 16 for length in lengths]
    parts = list(micro_batches([int(length) for length in noisy], budget))
    return [parts[i] for i in rng.permutation(len(parts))]


@dataclass(frozen=True)
class _Command:
    student: str
    """Model to warm-start: a folder or a hub id."""
    out: str
    """Folder for the result, as ``from_pretrained`` loads it."""
    env: str = "atod/ALFWorld-v0"
    """Registered id of the environment; it must have a scripted expert."""
    data: str | None = None
    """Data folder of the environment."""
    option: tuple[str, ...] = ()
    """Further arguments of the environment, KEY=VALUE, e.g. dataset=single."""
    style: str = "compact"
    """Prompt style."""
    max_turns: int | None = None
    """Turn limit of the episodes."""
    max_response: int = 64
    """Longest response of the learner, in tokens."""
    max_context: int = 2048
    """Longest prompt plus response, in tokens."""
    thinking: ThinkingMode = "off"
    """Thoughts of the chat template: off, on (an earlier turn's is dropped), keep."""
    chat_date: str = CHAT_DATE
    """Date that chat templates are told."""
    options: ImitationOptions = field(default_factory=ImitationOptions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Warm-start a model from the command line."""
    import tyro

    from agents.models import load_model
    from atod_algos.guard import guarded
    from atod_algos.training.config import TrainConfig

    command = tyro.cli(
        _Command,
        args=arguments,
        prog=program("atod_algos.training.sft"),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )

    def run() -> None:
        loaded = load_model(command.student, "student")
        config = TrainConfig(env=command.env, data=command.data, option=command.option, max_turns=command.max_turns)
        imitate(
            loaded.model,
            loaded.chat(command.thinking, command.chat_date),
            lambda: make_run_env(config),
            command.options,
            style=command.style,
            max_tokens=command.max_response,
            max_context=command.max_context,
            on_round=lambda number, loss: print(f"round {number}: loss {loss:.4f} nats a token", flush=True),
        )
        loaded.model.save_pretrained(command.out)
        loaded.tokenizer.save_pretrained(command.out)

    guarded(run)


if __name__ == "__main__":
    main()
