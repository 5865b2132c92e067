"""The clipped surrogate and the optimizer: advantages in, better weights out.

The learner knows no algorithm. It is given one detached advantage for each sampled token and the old log-probs, and
minimises the clipped surrogate (eq 4, Algorithm 1 line 24) over mini-batches of whole trajectories, accumulating
packed micro-batches; the result does not depend on how many tokens fit into memory at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from atod_algos.algorithm import Objective
from atod_algos.batch import TokenBatch
from atod_algos.learner import distributed, memory
from atod_algos.learner.logprobs import CHUNK_LOGITS, split_rows, stream_tokens
from atod_algos.learner.minibatch import AuxiliaryLoss, DivergenceTerm, Minibatch, Sums, SupportTerm
from atod_algos.learner.onednn import onednn_linear, recompute_context
from atod_algos.learner.optimizer import Updater, learning_rate
from atod_algos.learner.options import OptimizerOptions
from atod_envs.errors import AtodError

log = logging.getLogger(__name__)

SANE_KL = 0.1
"""Mean KL(old policy || new one) of a step's updates, in nats a token, above which a step is said to have moved too
far."""
SANE_CLIPPED = 0.3
"""The same for the share of tokens whose ratio was clipped."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a training step's update found.

    Attributes:
        metrics: numbers under ``actor/`` and ``memory/``.
        old_logprobs_M: log-probs under the weights before the step: those that were given, or what the only update's
            own pass found.
    """

    metrics: dict[str, float]
    old_logprobs_M: np.ndarray


def recompute_layers(model: Any) -> None:
    """Keep only the layers' inputs for the backward pass and compute their insides again (gradient checkpointing)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": recompute_context})


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
        divergence: DivergenceTerm | None = None,
    ) -> Update:
        """One training step: every trajectory is used in each epoch once, in ``minibatches`` optimizer updates.

        Args:
            batch: the step's data.
            advantage_M: detached advantage of each sampled token.
            old_logprobs_M: log-probs under the weights before the step; ``None`` has the pass of the step's only update
                give them: before that update they are the current ones.
            objective: the surrogate's options.
            step: training step, from 1 (for the warm-up).
            temperature: of the sampling.
            seed: shuffles trajectories into mini-batches.
            auxiliary: a further loss for each token, added with the same weights.
            support: a further loss from more than the sampled tokens, added with the same weights.
            divergence: the reverse KL to the teacher, with the same weights times its own.

        Returns:
            Metrics under ``actor/`` and the memory that was predicted and used; the old log-probs. A mini-batch whose
            gradient is exactly zero moves nothing: neither momentum nor decay act on weights that nothing was learned
            for.

        Raises:
            AtodError: an advantage, the loss or the gradient is not finite, or a single row does not fit into memory.
            ValueError: old log-probs are unknown, but there are several updates.
        """
        if old_logprobs_M is None and self.options.minibatches * self.options.epochs > 1:
            raise ValueError("after the first of several updates the old log-probs cannot be found any more")
        known_M = np.zeros(batch.n_tokens) if old_logprobs_M is None else old_logprobs_M
        _require_finite(batch, advantage_M, known_M, step)
        found_M = np.array(known_M, dtype=np.float64)
        speaks = bool(advantage_M.any()) or objective.entropy_coef != 0
        speaks = speaks or support is not None or auxiliary is not None
        plan = self._plan(speaks, divergence, len(batch.group_N), seed)
        sums, lr = Sums(), learning_rate(self.options, step)
        self.model.train()
        distributions = 1 if divergence is None else 3  # the student's, the teacher's, and the terms of their sum
        predicted = self._make_room(batch, [part for part, _, _ in plan], distributions)
        memory.start_peak(self._device)
        for part, alone, term in plan:
            chosen_N = np.zeros(len(batch.group_N), dtype=bool)
            chosen_N[part] = True
            loss = Minibatch(
                batch, chosen_N, advantage_M, old_logprobs_M, objective, temperature, auxiliary, support, term, alone
            )
            sums.merge(self._update_once(loss, found_M, step, lr))
        if sums.means()["still_updates"] == 1.0:
            log.info("step %d: every gradient is zero, so nothing was learned and no weight moved", step)
        used = {
            "memory/predicted_mib": predicted / memory.MIB,
            "memory/peak_mib": memory.peak(self._device) / memory.MIB,
        }
        means = {name: value for name, value in sums.means().items() if len(plan) > 1 or name != "policy_kl"}
        _warn(step, means)  # a step of one update has no KL: it is measured before each update
        metrics = {f"actor/{name}": value for name, value in means.items()} | {"actor/lr": lr} | used
        return Update(metrics, found_M)

    def _plan(
        self, speaks: bool, divergence: DivergenceTerm | None, trajectories: int, seed: int
    ) -> list[tuple[np.ndarray, bool, DivergenceTerm | None]]:
        """The step's updates: trajectories, whether only the divergence is learned from, and the divergence if any.

        Where the divergence has updates of its own, those of a term that says nothing anywhere are left out.
        """
        rng = np.random.default_rng(seed)

        def split(minibatches: int) -> list[np.ndarray]:
            order = rng.permutation(trajectories)
            return [part for part in np.array_split(order, min(minibatches, trajectories)) if len(part)]

        options = self.options
        if divergence is None or divergence.minibatches == 0:
            return [(part, False, divergence) for _ in range(options.epochs) for part in split(options.minibatches)]
        plan: list[tuple[np.ndarray, bool, DivergenceTerm | None]] = []
        if speaks or not divergence.weight_M.any():
            plan += [(part, False, None) for _ in range(options.epochs) for part in split(options.minibatches)]
        if divergence.weight_M.any():
            own = divergence
            plan += [(part, True, own) for _ in range(own.epochs) for part in split(own.minibatches)]
        return plan

    def _update_once(self, loss: Minibatch, found_M: np.ndarray, step: int, lr: float) -> Sums:
        """One optimizer update; old log-probs that were not known go into ``found_M``."""
        batch, sums = loss.batch, Sums()
        rows = np.flatnonzero(loss.chosen_N[batch.trajectory_B])
        if len(rows):
            sums = self.budget.run(
                "update",
                partial(self._gradient, loss, rows, found_M),
                least=max(len(batch.rows[row]) for row in rows),
                undo=self.updater.zero_grad,
            )
        norm = self.updater.update(lr)
        if not math.isfinite(norm):
            raise AtodError(
                f"step {step}: the gradient is {norm}; the update was not made and the run stops. Lower --lr, or look at "
                "the last trajectories for extreme log-probs; the same command goes on from the last checkpoint"
            )
        sums.add("grad_norm", norm, 1.0)
        sums.add("still_updates", float(norm == 0.0), 1.0)
        return sums

    def _gradient(self, loss: Minibatch, rows: np.ndarray, found_M: np.ndarray, budget: int) -> Sums:
        """Add up a mini-batch's gradient by micro-batches; old log-probs that were not known go into ``found_M``."""
        sums = Sums()
        chosen = [loss.batch.rows[row] for row in rows]
        budget = distributed.per_rank_budget(budget, sum(len(row) for row in chosen))
        for micro, counts in distributed.iter_shard(split_rows(self.model, chosen, budget)):
            found = Sums()
            with onednn_linear(self._device):
                part = loss.share(self.model, rows[micro], found, found_M)
                # A divided model's gradient is averaged over the ranks, but the loss's weights sum to one over all.
                (part * (distributed.size() if counts else 0)).backward()  # type: ignore[no-untyped-call]
            if counts:
                sums.merge(found)
        whole = Sums()
        for share in distributed.gather(sums):
            whole.merge(share)
        return whole

    def _make_room(self, batch: TokenBatch, parts: list[np.ndarray], distributions: int) -> int:
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
                logits=distributions * min(sampled * int(head.shape[0]), CHUNK_LOGITS),
                head=memory.head_bytes(head),
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
        """What a resumed run needs besides the model's weights; of a divided model, besides its shards."""
        budgets = {"token_budget": self.budget.tokens, "token_budget_asked": self.options.token_budget}
        return budgets | (self.updater.state() if distributed.size() == 1 else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        if "optimizer" in state:
            self.updater.load_state(state)
        if (kept := int(state["token_budget"])) < state.get("token_budget_asked", kept + 1):  # memory lowered it
            self.budget.tokens = min(self.budget.tokens, kept)


def _require_finite(batch: TokenBatch, advantage_M: np.ndarray, logprobs_M: np.ndarray, step: int) -> None:
    if len(wrong := np.flatnonzero(~(np.isfinite(advantage_M) & np.isfinite(logprobs_M)))):
        bad = int(wrong[0])
        raise AtodError(
            f"step {step}: advantage {advantage_M[bad]}, log-prob {logprobs_M[bad]} at token {bad} of task "
            f"{batch.trajectories[batch.trajectory_M[bad]].task_id!r}; nothing was learned from it. Look at student and "
            "teacher: a model that overflows gives such numbers"
        )


def _warn(step: int, means: Mapping[str, float]) -> None:
    """Say that a step moved the policy too far for what it learned from to be about the new one."""
    kl, clipped = means.get("policy_kl", 0.0), means.get("pg_clipfrac", 0.0)
    if kl > SANE_KL or clipped > SANE_CLIPPED:
        say = f"KL {kl:.3f} nats a token from the one that played (sane: up to {SANE_KL:.2f})"
        if "pg_clipfrac" in means:
            say += f", ratio clipped on {100 * clipped:.0f} % of tokens (up to {100 * SANE_CLIPPED:.0f})"
        advice = "Lower --lr, or make fewer updates: --minibatches, --epochs, --gap-minibatches, --gap-epochs"
        log.warning("step %d moved the policy far: %s. %s", step, say, advice)
