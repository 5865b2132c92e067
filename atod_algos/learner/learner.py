"""The clipped surrogate and the optimizer: advantages in, better weights out.

The learner knows no algorithm. It is given one detached advantage for each sampled token and the old log-probs, and
minimises the clipped surrogate (eq 4, Algorithm 1 line 24) over mini-batches of whole trajectories, accumulating
packed micro-batches; the result does not depend on how many tokens fit into memory at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from atod_algos.algorithm import Objective
from atod_algos.batch import TokenBatch
from atod_algos.learner import distributed, memory
from atod_algos.learner.logprobs import CHUNK_LOGITS, predict, split_rows, stream_tokens
from atod_algos.learner.loss import aggregation_weights, importance_ratio, surrogate
from atod_algos.learner.onednn import fast_products, same_products
from atod_algos.learner.optimizer import Updater, learning_rate
from atod_algos.learner.options import OptimizerOptions
from atod_envs.errors import AtodError

log = logging.getLogger(__name__)

AuxiliaryLoss = Callable[[torch.Tensor, np.ndarray], torch.Tensor | None]
"""Current log-probs of some tokens, and their indices on axis M -> a loss for each of them, or None."""


@dataclass(frozen=True, slots=True)
class SupportTerm:
    """A loss on more than the sampled token.

    Attributes:
        ids_MS: S token ids in the place of each sampled token.
        loss: their current log-probs [m, S] for some tokens, and the tokens' indices on axis M -> a loss for each token.
    """

    ids_MS: np.ndarray
    loss: Callable[[torch.Tensor, np.ndarray], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Update:
    """What a training step's update found.

    Attributes:
        metrics: numbers under ``actor/`` and ``memory/``.
        old_logprobs_M: log-probs under the weights before the step: those that were given, or what the only update's own pass found.
    """

    metrics: dict[str, float]
    old_logprobs_M: np.ndarray


def recompute_layers(model: Any) -> None:
    """Keep only the layers' inputs for the backward pass and compute their insides again (gradient checkpointing)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": same_products})


class Learner:
    """Owns the student's weights and their optimizer.

    Args:
        model: the student; the weights of it that require a gradient are trained.
        options: optimizer settings.
        per_token: :func:`memory.bytes_per_token` of the model, where it is known already.

    Attributes:
        model: the student.
        budget: tokens of a micro-batch, fewer than ``options.token_budget`` once memory has run out.
    """

    def __init__(self, model: Any, options: OptimizerOptions, per_token: float | None = None) -> None:
        self.model = model
        self.options = options
        self.budget = memory.Budget(options.token_budget)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._device = weights[0].device
        self.updater = Updater(weights, options)
        self._per_token = per_token

    def update(
        self,
        batch: TokenBatch,
        advantage_M: np.ndarray,
        old_logprobs_M: np.ndarray | None,
        objective: Objective,
        *,
        step: int,
        temperature: float,
        seed: int,
        auxiliary: AuxiliaryLoss | None = None,
        support: SupportTerm | None = None,
    ) -> Update:
        """One training step: every trajectory is used once, in ``minibatches`` optimizer updates.

        Args:
            batch: the step's data.
            advantage_M: detached advantage of each sampled token.
            old_logprobs_M: log-probs under the weights before the step; ``None`` has the pass of the step's only update give them:
                before that update they are the current ones.
            objective: the surrogate's options.
            step: training step, from 1 (for the warm-up).
            temperature: of the sampling.
            seed: shuffles trajectories into mini-batches.
            auxiliary: a further loss for each token, added with the same weights.
            support: a further loss from more than the sampled tokens, added with the same weights.

        Returns:
            Metrics under ``actor/`` and the memory that was predicted and used; the old log-probs. A mini-batch whose gradient is
            exactly zero moves nothing: neither momentum nor decay act on weights that nothing was learned for.

        Raises:
            AtodError: an advantage, the loss or the gradient is not finite, or a single row does not fit into memory.
            ValueError: old log-probs are unknown, but there are several updates.
        """
        if old_logprobs_M is None and self.options.minibatches > 1:
            raise ValueError("after the first of several updates the old log-probs cannot be found any more")
        known_M = np.zeros(batch.n_tokens) if old_logprobs_M is None else old_logprobs_M
        if not (np.isfinite(advantage_M).all() and np.isfinite(known_M).all()):
            bad = int(np.flatnonzero(~(np.isfinite(advantage_M) & np.isfinite(known_M)))[0])
            raise AtodError(
                f"step {step}: advantage {advantage_M[bad]}, log-prob {known_M[bad]} at token {bad} of task "
                f"{batch.trajectories[batch.trajectory_M[bad]].task_id!r}; nothing was learned from it. Look at student and "
                "teacher: a model that overflows gives such numbers"
            )
        found_M = np.array(known_M, dtype=np.float64)
        order = np.random.default_rng(seed).permutation(len(batch.group_N))
        parts = [part for part in np.array_split(order, min(self.options.minibatches, len(order))) if len(part)]
        sums = _Sums()
        self.model.train()
        lr = learning_rate(self.options, step)
        predicted = self._make_room(batch, parts)
        memory.start_peak(self._device)
        for part in parts:
            chosen_N = np.zeros(len(batch.group_N), dtype=bool)
            chosen_N[part] = True
            rows = np.flatnonzero(chosen_N[batch.trajectory_B])
            loss = _Minibatch(batch, chosen_N, advantage_M, old_logprobs_M, objective, temperature, auxiliary, support)
            if len(rows):
                found = self.budget.run(
                    "update",
                    partial(self._gradient, loss, rows, found_M),
                    least=max(len(batch.rows[row]) for row in rows),
                    undo=self.updater.zero_grad,
                )
                sums.merge(found)
            norm = self.updater.update(lr)
            if not math.isfinite(norm):
                raise AtodError(
                    f"step {step}: the gradient is {norm}; the update was not made and the run stops. Lower --lr, or look at "
                    "the last trajectories for extreme log-probs; the same command goes on from the last checkpoint"
                )
            sums.add("grad_norm", norm, 1.0)
            sums.add("still_updates", float(norm == 0.0), 1.0)
        if sums.means()["still_updates"] == 1.0:
            log.info("step %d: every gradient is zero, so nothing was learned and no weight moved", step)
        used = {
            "memory/predicted_mib": predicted / memory.MIB,
            "memory/peak_mib": memory.peak(self._device) / memory.MIB,
        }
        metrics = {f"actor/{name}": value for name, value in sums.means().items()} | {"actor/lr": lr} | used
        return Update(metrics, found_M)

    def _gradient(self, loss: _Minibatch, rows: np.ndarray, found_M: np.ndarray, budget: int) -> _Sums:
        """Add up the gradient of a mini-batch, a micro-batch at a time; old log-probs that were not known go into ``found_M``."""
        sums = _Sums()
        chosen = [loss.batch.rows[row] for row in rows]
        budget = distributed.per_rank_budget(budget, sum(len(row) for row in chosen))
        for micro, counts in distributed.iter_shard(split_rows(self.model, chosen, budget)):
            found = _Sums()
            with fast_products(self._device):
                part = loss.of(self.model, rows[micro], found, found_M)
                # A divided model's gradient is averaged over the ranks, but the weights of the loss sum to one over all.
                (part * (distributed.size() if counts else 0)).backward()  # type: ignore[no-untyped-call]
            if counts:
                sums.merge(found)
        whole = _Sums()
        for share in distributed.gather(sums):
            whole.merge(share)
        return whole

    def _make_room(self, batch: TokenBatch, parts: list[np.ndarray]) -> int:
        """Predict the update's highest use of memory, and lower the budget beforehand where it would not fit."""
        if self._per_token is None:
            self._per_token = memory.bytes_per_token(self.model)
        use = distributed.gather((memory.used(self._device), memory.available(self._device)))
        now, free = max(now for now, _ in use), min((free for _, free in use if free is not None), default=None)
        size = sum(weight.numel() for weight in self.updater.master_weights) // distributed.size()
        head = self.model.get_output_embeddings().weight
        longest = max(len(row) for row in batch.rows)
        while True:
            tokens = sampled = 0
            for part in parts:
                rows = np.flatnonzero(np.isin(batch.trajectory_B, part))
                for micro in split_rows(self.model, [batch.rows[row] for row in rows], self.budget.tokens):
                    chosen = [batch.rows[row] for row in rows[micro]]
                    tokens = max(tokens, stream_tokens(self.model, chosen))
                    sampled = max(sampled, int(np.isin(batch.row_M, rows[micro]).sum()))
            predicted = memory.predict_peak(
                now,
                tokens=tokens,
                per_token=self._per_token,
                logits=min(sampled * int(head.shape[0]), CHUNK_LOGITS),
                gradient=4 * size,
                moments=0 if self.updater.moved else 2 * self.updater.moment_bytes * size,
                states=2 * sampled * int(head.shape[1]) * head.element_size(),
            )
            if free is None or predicted - now < free or self.budget.tokens <= longest:
                return predicted
            self.budget.tokens = max(longest, self.budget.tokens // 2)
            log.warning(
                "the update would need %d MiB more, but %d are free; going on with --token-budget %d",
                (predicted - now) / memory.MIB,
                free / memory.MIB,
                self.budget.tokens,
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's weights; of a divided model, beside its shards."""
        own = self.updater.state() if distributed.size() == 1 else {}
        return {**own, "token_budget": self.budget.tokens}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        if "optimizer" in state:
            self.updater.load_state(state)
        self.budget.tokens = min(self.budget.tokens, int(state["token_budget"]))


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """The loss of a mini-batch, computable a few rows at a time."""

    batch: TokenBatch
    chosen_N: np.ndarray
    advantage_M: np.ndarray
    old_logprobs_M: np.ndarray | None
    objective: Objective
    temperature: float
    auxiliary: AuxiliaryLoss | None
    support: SupportTerm | None

    def of(self, model: Any, rows: np.ndarray, sums: _Sums, found_M: np.ndarray) -> torch.Tensor:
        """These rows' share of the loss; what is to be reported is added to ``sums``, old log-probs that are found to ``found_M``."""
        objective, support = self.objective, self.support
        inside = int(self.chosen_N[self.batch.trajectory_M].sum())
        weight_M = aggregation_weights(self.batch, self.chosen_N, objective)
        found = predict(
            model,
            self.batch,
            rows,
            temperature=self.temperature,
            entropy=True,
            support_MS=None if support is None else support.ids_MS,
        )
        index_M, logprobs, entropy = found.index_M, found.logprobs, found.entropy

        def at(values_M: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values_M[index_M], dtype=np.float32)).to(logprobs.device)

        weight = at(weight_M)
        if self.old_logprobs_M is None:
            found_M[index_M] = logprobs.detach().cpu().numpy()
        old = logprobs.detach() if self.old_logprobs_M is None else at(self.old_logprobs_M)
        loss, clipped = surrogate(importance_ratio(logprobs, old), at(self.advantage_M), objective)
        total = (weight * loss).sum()
        if objective.entropy_coef:
            total = total - objective.entropy_coef * (weight * entropy).sum()
        n = len(index_M)
        share = n / inside
        extra = self.auxiliary(logprobs, index_M) if self.auxiliary is not None else None
        if extra is not None:
            total = total + (weight * extra).sum()
            sums.add("auxiliary_loss", float((weight * extra).sum().detach()), share)
        if support is not None and found.support is not None:
            extra = support.loss(found.support, index_M)
            if extra is not None:
                total = total + (weight * extra).sum()
                sums.add("support_loss", float((weight * extra).sum().detach()), share)
        sums.add("pg_loss", float((weight * loss).sum().detach()), share)
        sums.add("entropy_loss", float(entropy.detach().sum()), n)
        sums.add("pg_clipfrac", float(clipped.sum()), n)
        sums.add("ppo_kl", float((old - logprobs.detach()).sum()), n)
        return total


class _Sums:
    """Weighted running means."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def merge(self, other: _Sums) -> None:
        for name, total in other._totals.items():
            self.add(name, total, other._weights[name])

    def means(self) -> dict[str, float]:
        return {name: total / max(self._weights[name], 1e-12) for name, total in self._totals.items()}
