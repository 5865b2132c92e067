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

from agents.chat import ChatFormat
from agents.engines.base import Engine, SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.expert import ExpertAgent, expert_for
from atod_algos.batch import TokenBatch, make_batch
from atod_algos.learner.logprobs import micro_batches, row_logprobs
from atod_algos.rollout.episodes import derive_seed
from atod_envs.options import program
from atod_envs.prompting import Prompted
from atod_envs.recording import RecordTurns
from atod_envs.styles import Layout, PromptStyle, phrase_response
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Group, StopReason, Trajectory


@dataclass(frozen=True)
class Demonstrations:
    """Episodes with the expert's responses, and which turns were the expert's.

    Attributes:
        trajectories: episodes; every turn carries the ids of the response that was executed.
        supervised: for each trajectory, for each turn, whether the response was the expert's.
    """

    trajectories: tuple[Trajectory, ...]
    supervised: tuple[tuple[bool, ...], ...]


@dataclass(slots=True)
class _Episode:
    index: int
    task: str
    env: RecordTurns
    expert: ExpertAgent
    ids: list[int]
    supervised: list[bool]
    seed: int


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
) -> Demonstrations:
    """Play tasks with the expert, letting the learner act in some turns.

    Args:
        tasks: what to play, one episode each.
        make_env: makes a raw environment.
        chat: renders messages to ids.
        style: prompt style; the conversation layout shows earlier turns, the window layout does not.
        seed: of the coins and the sampling.
        beta: probability that a turn is the learner's own.
        engine: samples the learner's turns; needed where ``beta`` is above 0.
        max_tokens: longest response of the learner.
        concurrency: episodes that run at the same time.
    """
    if beta > 0 and engine is None:
        raise ValueError("beta > 0 needs an engine that samples the learner's turns")
    coins = np.random.default_rng(seed)
    coin_NT = coins.random((len(tasks), 256)) < beta
    done: dict[int, _Episode] = {}
    running: dict[str, _Episode] = {}
    finished: dict[int, Trajectory] = {}
    waiting = list(enumerate(tasks))[::-1]
    pool: list[RecordTurns] = []

    def advance(episode: _Episode, message: str) -> None:
        """Play expert turns until the learner is asked or the episode ends."""
        while True:
            prompt = _extend(chat, episode, message)
            turn = len(episode.supervised)
            if engine is not None and len(prompt) + max_tokens > engine.max_context:
                finish(episode, episode.env.close_episode(StopReason.CONTEXT_LIMIT))
                return
            if engine is not None and coin_NT[episode.index, min(turn, 255)]:
                running[f"{episode.index}/{turn}"] = episode
                episode.ids = prompt
                params = SamplingParams(max_tokens, 1.0, derive_seed(episode.seed, turn), chat.stop_ids)
                engine.submit(f"{episode.index}/{turn}", prompt, params)
                return
            decision = episode.expert.act()
            prompted = cast("Prompted", episode.env.env)
            response = phrase_response(prompted.style, decision.action, decision.thought, prompted.history)
            ids = chat.encode_response(response)
            message_or_none = execute(episode, prompt, ids, (0.0,) * len(ids), response, expert=True)
            if message_or_none is None:
                return
            message = message_or_none

    def execute(
        episode: _Episode,
        prompt: list[int],
        ids: Sequence[int],
        logprobs: Sequence[float],
        response: str,
        *,
        expert: bool,
    ) -> str | None:
        episode.env.annotate(prompt_ids=prompt, response_ids=ids, logprobs=logprobs)
        message, _, terminated, truncated, info = episode.env.step(response)
        episode.ids = [*prompt, *ids]
        episode.supervised.append(expert)
        episode.expert.observe(info["action"], info["observation"], info)
        if terminated or truncated:
            finish(episode, info["trajectory"])
            return None
        return message

    def finish(episode: _Episode, trajectory: Trajectory) -> None:
        finished[episode.index], done[episode.index] = trajectory, episode
        pool.append(episode.env)

    while waiting or running:
        while waiting and len(running) < concurrency:
            index, task = waiting.pop()
            env = pool.pop() if pool else RecordTurns(Prompted(make_env(), style))
            episode_seed = derive_seed(seed, index)
            message, info = env.reset(seed=episode_seed, options={"task_id": task})
            episode = _Episode(index, task, env, expert_for(env, brief=True), [], [], episode_seed)
            episode.expert.reset(info["observation"], info)
            advance(episode, message)
        if engine is not None:
            for completion in engine.step():
                episode = running.pop(completion.request_id)
                response = chat.decode(completion.token_ids)
                message_or_none = execute(
                    episode, episode.ids, completion.token_ids, completion.logprobs, response, expert=False
                )
                if message_or_none is not None:
                    advance(episode, message_or_none)
    for env in pool:
        env.close()
    return Demonstrations(
        tuple(finished[i] for i in range(len(tasks))), tuple(tuple(done[i].supervised) for i in range(len(tasks)))
    )


def _extend(chat: ChatFormat, episode: _Episode, message: str) -> list[int]:
    layout = cast("Prompted", episode.env.env).style.layout
    if layout is Layout.WINDOW or not episode.ids:
        return chat.opening(message)
    return episode.ids + chat.continuation(message, episode.ids[-1] in chat.stop_ids)


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

    def fit(self, demonstrations: Demonstrations, seed: int) -> float:
        """Run one round's epochs; return the mean loss of the last one, nats a token."""
        batch, supervised_M = _supervised(demonstrations)
        lengths = [len(row) for row in batch.rows]
        options, start = self.options, self.done
        loss = 0.0
        for epoch in range(options.epochs):
            total, count = 0.0, 0
            parts = _shuffled(lengths, options.batch_tokens, derive_seed(seed, epoch))
            for number, rows in enumerate(parts):
                within = (epoch + number / len(parts)) / options.epochs
                self.done = start + within / options.rounds
                part_loss, part_count = self._update(batch, supervised_M, rows)
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

    def _update(self, batch: TokenBatch, supervised_M: np.ndarray, rows: np.ndarray) -> tuple[float, int]:
        self.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        index_M, logprobs, _ = row_logprobs(self.model, batch, rows, temperature=1.0)
        mask = torch.from_numpy(supervised_M[index_M]).to(logprobs)
        n = int(mask.sum())
        if not n:
            return 0.0, 0
        loss = -(logprobs * mask).sum() / n
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


def _supervised(demonstrations: Demonstrations) -> tuple[TokenBatch, np.ndarray]:
    groups = [Group(t.task_id, (t,)) for t in demonstrations.trajectories]
    batch = make_batch(groups)
    flags = [flag for turns in demonstrations.supervised for flag in turns]
    return batch, np.array(flags, dtype=bool)[batch.turn_M]


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
    options: ImitationOptions = field(default_factory=ImitationOptions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Warm-start a model from the command line."""
    import tyro

    from agents.models import load_model
    from atod_algos.rollout.pools import make_env
    from atod_algos.training.cli import guarded
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
            ChatFormat(loaded.tokenizer),
            lambda: make_env(config),
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
