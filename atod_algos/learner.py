"""The clipped surrogate and the optimizer: advantages in, better weights out.

The learner knows no algorithm. It is given one detached advantage for each sampled token and the old log-probs, and
minimises the clipped surrogate (eq 4, Algorithm 1 line 24) over mini-batches of whole trajectories, accumulating
micro-batches of similar row length so that the result does not depend on how many fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from atod_algos.batch import TokenBatch
from atod_algos.scoring import predict, split_rows
from atod_envs.errors import AtodError

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
    loss: Callable[[torch.Tensor, np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The clipped surrogate's options."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped (eq 4)."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped (eq 4); DAPO raises it to 0.28."""
    dual_clip: float = 0.0
    """Bounds the loss of tokens with a negative advantage at dual_clip x |A|: 0 is off (paper), 3 in the released code."""
    loss_agg: Literal["trajectory_mean", "turn_mean", "token_mean", "constant"] = "trajectory_mean"
    """Average: 'trajectory_mean' of token means (eq 4), 'turn_mean' of token means (verl's seq-mean-token-mean, whose sequences
    are turns), 'token_mean' over a mini-batch (released code, DAPO), or 'constant': trajectory sums over --length-divisor (Dr. GRPO)."""
    length_divisor: float = 512.0
    """What a trajectory's token sum is divided by under 'constant'; 512 is the published longest response."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus: 0 (paper), 0.001 (released code)."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and how a step's data is split."""

    lr: float = 1e-6
    """Learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay (released code)."""
    beta2: float = 0.999
    """AdamW's second decay rate (released code)."""
    grad_clip: float = 1.0
    """Largest gradient norm (released code)."""
    warmup_steps: int = 0
    """Training steps over which the learning rate rises linearly."""
    lr_floor: float = 1.0
    """Share of the rate that is left at the last step, along a cosine; 1 keeps it constant."""
    steps: int = 1
    """Training steps in all, for the cosine."""
    minibatches: int = 4
    """Optimizer updates a step; each takes its share of the step's trajectories."""
    token_budget: int = 16384
    """Tokens of a micro-batch. Lower it where memory runs out; results do not change."""


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token clipped surrogate loss, eq 4: -min(eta A, clip(eta, 1-eps, 1+eps) A), with the optional dual clip.

    Args:
        ratio: [M] importance ratios eta.
        advantage: [M] detached advantages.
        objective: clip ranges.

    Returns:
        [M] losses, and [M] booleans that say where the clip was active.
    """
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = torch.maximum(plain, clipped)
    active = clipped > plain
    if objective.dual_clip > 0:
        bound = -objective.dual_clip * advantage
        loss = torch.where(advantage < 0, torch.minimum(loss, bound), loss)
    return loss, active


def aggregation_weights(batch: TokenBatch, chosen_N: np.ndarray, objective: Objective) -> np.ndarray:
    """Weight of each sampled token in the loss of a mini-batch; all but ``constant`` sum to 1.

    Args:
        batch: the batch.
        chosen_N: which trajectories belong to the mini-batch.
        objective: how to average.

    Returns:
        Weights on axis M, 0 outside the mini-batch.
    """
    inside_M = chosen_N[batch.trajectory_M]
    if objective.loss_agg == "token_mean":
        return np.asarray(inside_M / max(1, int(inside_M.sum())))
    if objective.loss_agg == "constant":
        return np.asarray(inside_M / (max(1, int(chosen_N.sum())) * objective.length_divisor))
    unit_M = batch.turn_M if objective.loss_agg == "turn_mean" else batch.trajectory_M
    tokens_U = np.bincount(unit_M[inside_M], minlength=int(unit_M.max(initial=-1)) + 1)
    speaking = int((tokens_U > 0).sum())
    return np.asarray(inside_M / (max(1, speaking) * np.maximum(tokens_U, 1)[unit_M]))


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """Learning rate of a step (from 1): linear warm-up, then a cosine down to ``lr_floor`` of it at the last step."""
    warm = min(1.0, step / max(1, options.warmup_steps))
    done = min(1.0, (step - 1) / max(1, options.steps - 1))
    fall = options.lr_floor + (1 - options.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * warm * fall


class Learner:
    """Owns the student's weights and their optimizer.

    Args:
        model: the student.
        options: optimizer settings.

    Attributes:
        model: the student.
    """

    def __init__(self, model: Any, options: OptimizerOptions) -> None:
        self.model = model
        self.options = options
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in self._parameters if p.ndim >= 2]
        kept = [p for p in self._parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2))
        self._device = self._parameters[0].device

    def update(
        self,
        batch: TokenBatch,
        advantage_M: np.ndarray,
        old_logprobs_M: np.ndarray,
        objective: Objective,
        *,
        step: int,
        temperature: float,
        seed: int,
        auxiliary: AuxiliaryLoss | None = None,
        support: SupportTerm | None = None,
    ) -> dict[str, float]:
        """One training step: every trajectory is used once, in ``minibatches`` optimizer updates.

        Args:
            batch: the step's data.
            advantage_M: detached advantage of each sampled token.
            old_logprobs_M: log-probs under the weights that rolled out.
            objective: the surrogate's options.
            step: training step, from 1 (for the warm-up).
            temperature: of the sampling.
            seed: shuffles trajectories into mini-batches.
            auxiliary: a further loss for each token, added with the same weights.
            support: a further loss from more than the sampled tokens, added with the same weights.

        Returns:
            Metrics under ``actor/``.

        Raises:
            AtodError: the loss or the gradient is not finite; the weights are left as they were.
        """
        options = self.options
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        order = np.random.default_rng(seed).permutation(len(batch.group_N))
        parts = [part for part in np.array_split(order, min(options.minibatches, len(order))) if len(part)]
        sums = _Sums()
        self.model.train()
        for part in parts:
            chosen_N = np.zeros(len(batch.group_N), dtype=bool)
            chosen_N[part] = True
            further = (auxiliary, support)
            self._minibatch(batch, chosen_N, advantage_M, old_logprobs_M, objective, temperature, further, sums)
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, options.grad_clip))
            if not math.isfinite(norm):
                self._optimizer.zero_grad(set_to_none=True)
                raise AtodError(
                    f"step {step}: the gradient is {norm}; the weights were not changed. Lower --lr, or look at the last "
                    "trajectories for extreme log-probs"
                )
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            sums.add("grad_norm", norm, 1.0)
        return {f"actor/{name}": value for name, value in sums.means().items()} | {
            "actor/lr": float(self._optimizer.param_groups[0]["lr"])
        }

    def _minibatch(
        self,
        batch: TokenBatch,
        chosen_N: np.ndarray,
        advantage_M: np.ndarray,
        old_logprobs_M: np.ndarray,
        objective: Objective,
        temperature: float,
        further: tuple[AuxiliaryLoss | None, SupportTerm | None],
        sums: _Sums,
    ) -> None:
        auxiliary, support = further
        weight_M = aggregation_weights(batch, chosen_N, objective)
        rows = np.flatnonzero(chosen_N[batch.trajectory_B])
        if not len(rows):
            return
        inside = int(chosen_N[batch.trajectory_M].sum())
        for micro in split_rows(self.model, [batch.rows[row] for row in rows], self.options.token_budget):
            found = predict(
                self.model,
                batch,
                rows[micro],
                temperature=temperature,
                entropy=True,
                support_MS=None if support is None else support.ids_MS,
            )
            index_M, logprobs, entropy = found.index_M, found.logprobs, found.entropy
            weight = self._tensor(weight_M[index_M])
            advantage = self._tensor(advantage_M[index_M])
            log_ratio = logprobs - self._tensor(old_logprobs_M[index_M])
            loss, clipped = surrogate(log_ratio.exp(), advantage, objective)
            total = (weight * loss).sum()
            if objective.entropy_coef:
                total = total - objective.entropy_coef * (weight * entropy).sum()
            n = len(index_M)
            share = n / inside
            extra = auxiliary(logprobs, index_M) if auxiliary is not None else None
            if extra is not None:
                total = total + (weight * extra).sum()
                sums.add("auxiliary_loss", float((weight * extra).sum().detach()), share)
            if support is not None and found.support is not None:
                extra = support.loss(found.support, index_M)
                total = total + (weight * extra).sum()
                sums.add("support_loss", float((weight * extra).sum().detach()), share)
            total.backward()  # type: ignore[no-untyped-call]
            sums.add("pg_loss", float((weight * loss).sum().detach()), share)
            sums.add("entropy_loss", float(entropy.detach().sum()), n)
            sums.add("pg_clipfrac", float(clipped.sum()), n)
            sums.add("ppo_kl", float(-log_ratio.detach().sum()), n)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self._device)

    def state(self) -> dict[str, Any]:
        """The optimizer's state; the weights are saved with the model."""
        return dict(self._optimizer.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer."""
        self._optimizer.load_state_dict(dict(state))


class _Sums:
    """Weighted running means."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        return {name: total / max(self._weights[name], 1e-12) for name, total in self._totals.items()}
