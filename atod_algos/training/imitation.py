"""Fitting a model to demonstrations, round by round; ``atod train sft`` is made of it (:mod:`atod_algos.training.sft`).

Objective
    L = -mean over learned tokens of log pi_theta(response | conversation so far)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from agents.chat import ChatFormat
from atod_algos.algorithm import Objective
from atod_algos.batch import RowLayout, make_batch
from atod_algos.learner.learner import Learner
from atod_algos.learner.logprobs import micro_batches
from atod_algos.learner.options import OptimizerOptions
from atod_algos.rollout.episodes import derive_seed
from atod_algos.training.demonstrations import Expert, ImitationOptions
from atod_envs.errors import AtodError
from atod_envs.styles import PromptStyle
from atod_envs.trajectory import Group, Trajectory

EpisodesOf = Callable[[int], "Sequence[Trajectory]"]
"""Number of a round (from 0) -> its episodes, whose learned turns carry token ids."""


class Imitator:
    """Fits a model to demonstrations, round by round; the learning rate follows one schedule over all rounds.

    Args:
        model: the model; what of it requires a gradient is trained.
        options: how it is fitted.
        rows: how episodes become training rows.
    """

    def __init__(self, model: Any, options: ImitationOptions, rows: RowLayout = RowLayout.MERGED) -> None:
        self.options, self.rows = options, rows
        plain = OptimizerOptions(
            lr=options.lr,
            lr_floor=1.0,
            adam_beta2=0.98,
            steps=options.rounds,
            weight_decay=options.weight_decay,
            minibatches=1,
            token_budget=options.batch_tokens,
        )
        self.learner = Learner(model, plain)

    def fit(self, demonstrations: Sequence[Trajectory], number: int, seed: int) -> float:
        """Run the epochs of a round (from 0); return the mean loss of the last one, nats a token.

        Raises:
            AtodError: there is nothing to learn from.
        """
        units = [unit for trajectory in demonstrations for unit in self._units(trajectory)]
        if not units:
            raise AtodError(
                "no demonstrated turn fits the context; raise --max-context, lower --max-response, or choose a shorter prompt --style"
            )
        lengths = [len(unit.turns[-1].prompt_ids) + len(unit.turns[-1].response_ids) for unit in units]
        options, loss = self.options, 0.0
        for epoch in range(options.epochs):
            total = count = 0.0
            parts = _shuffled(lengths, options.batch_tokens, derive_seed(seed, epoch))
            for place, part in enumerate(parts):
                done = (number + (epoch + place / len(parts)) / options.epochs) / options.rounds
                found, tokens = self._update([units[i] for i in part], done)
                total, count = total + found * tokens, count + tokens
            loss = total / count
        return loss

    def _units(self, trajectory: Trajectory) -> list[Trajectory]:
        """What becomes a row of its own: a conversation up to its last learned turn, or one turn."""
        learned = [turn for turn in trajectory.turns if turn.response_ids]
        groups = [learned[:1]] if learned else []
        for before, turn in itertools.pairwise(learned):
            ids = before.prompt_ids + before.response_ids
            if self.rows is RowLayout.MERGED and turn.prompt_ids[: len(ids)] == ids:
                groups[-1].append(turn)
            else:
                groups.append([turn])
        return [dataclasses.replace(trajectory, turns=tuple(turns)) for turns in groups]

    def _update(self, units: Sequence[Trajectory], done: float) -> tuple[float, int]:
        """One optimizer update; its mean loss, and the tokens that it is over."""
        batch = make_batch([Group(unit.task_id, (unit,)) for unit in units])
        self.learner.options = dataclasses.replace(self.learner.options, lr=self._rate(done))
        nothing_M = np.zeros(batch.n_tokens)
        update = self.learner.update(
            batch,
            nothing_M,
            nothing_M,
            Objective(loss_agg="token_mean"),
            step=1,
            temperature=1.0,
            seed=0,
            auxiliary=lambda logprobs, _: -logprobs,
        )
        return update.metrics["actor/auxiliary_loss"], batch.n_tokens

    def _rate(self, done: float) -> float:
        """Learning rate after a share of the whole schedule: linear warm-up, then a cosine down to a tenth."""
        warmup = self.options.warmup
        if done < warmup:
            return self.options.lr * (done / warmup + 1e-2)
        fall = (done - warmup) / (1 - warmup)
        return self.options.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


def imitate(
    model: Any,
    chat: ChatFormat,
    make_env: Callable[[], gym.Env[str, str]],
    options: ImitationOptions,
    *,
    style: str | PromptStyle,
    max_tokens: int,
    max_context: int,
    on_round: Callable[[int, float], None] | None = None,
) -> None:
    """Fit a model to an environment's scripted expert, in place.

    Args:
        model: the model.
        chat: renders messages to ids.
        make_env: see :class:`Expert`.
        options: how.
        style: prompt style.
        max_tokens: longest response of the student.
        max_context: longest prompt plus response.
        on_round: called after each round (from 1) with its loss in nats a token.
    """
    expert = Expert(model, chat, make_env, options, style=style, max_tokens=max_tokens, max_context=max_context)
    imitator = Imitator(model, options)
    for number in range(last_round(options)):
        loss = imitator.fit(expert(number), number, derive_seed(options.seed, "round", number))
        if on_round is not None:
            on_round(number + 1, loss)
    model.eval()


def last_round(options: ImitationOptions) -> int:
    """How many rounds are trained: all, or as many as come before an early stop."""
    return options.rounds if options.stop is None else min(options.stop, options.rounds)


def _shuffled(lengths: Sequence[int], budget: int, seed: int) -> list[np.ndarray]:
    """Mini-batches of rows of similar length, in random order."""
    rng = np.random.default_rng(seed)
    noisy = [length + rng.random() * 16 for length in lengths]
    parts = list(micro_batches([int(length) for length in noisy], budget))
    return [parts[i] for i in rng.permutation(len(parts))]
