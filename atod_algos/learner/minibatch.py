"""What a mini-batch's loss is made of: the clipped surrogate, and the further terms of an algorithm.

The invariant: the loss of a mini-batch is the sum of its rows' shares, so it can be computed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atod_algos.algorithm import Objective
from atod_algos.batch import TokenBatch
from atod_algos.learner.logprobs import predict
from atod_algos.learner.loss import TeacherTokens, aggregation_weights, importance_ratio, surrogate

AuxiliaryLoss = Callable[[torch.Tensor, np.ndarray], torch.Tensor | None]
"""Current log-probs of some tokens, and their indices on axis M -> a loss for each of them, or None."""


@dataclass(frozen=True, slots=True)
class SupportTerm:
    """A loss on more than the sampled token.

    Attributes:
        ids_MS: S token ids in the place of each sampled token.
        loss: their current log-probs [m, S] for some tokens, and the tokens' indices on axis M -> a loss for each
            token.
    """

    ids_MS: np.ndarray
    loss: Callable[[torch.Tensor, np.ndarray], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class DivergenceTerm:
    """The reverse KL to the teacher as a loss (``--gap exact``).

    Attributes:
        teacher: what the teacher says in the place of each sampled token.
        weight_M: weight of each place; detached.
        minibatches: optimizer updates that it has for itself in a pass over the step's trajectories, after the
            surrogate's; 0: it is part of the surrogate's.
        epochs: passes in updates of its own.
    """

    teacher: TeacherTokens
    weight_M: np.ndarray
    minibatches: int = 0
    epochs: int = 1


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The loss of a mini-batch, computable a few rows at a time.

    Attributes:
        batch: the step's data.
        chosen_N: which trajectories are in the mini-batch.
        advantage_M: detached advantage of each sampled token.
        old_logprobs_M: log-probs under the weights before the step; ``None``: the current ones are.
        objective: the surrogate's options.
        temperature: of the sampling.
        auxiliary: a further loss for each token.
        support: a further loss from more than the sampled tokens.
        divergence: the reverse KL to the teacher.
        alone: only the divergence is learned from.
    """

    batch: TokenBatch
    chosen_N: np.ndarray
    advantage_M: np.ndarray
    old_logprobs_M: np.ndarray | None
    objective: Objective
    temperature: float
    auxiliary: AuxiliaryLoss | None
    support: SupportTerm | None
    divergence: DivergenceTerm | None
    alone: bool

    def share(self, model: Any, rows: np.ndarray, sums: Sums, found_M: np.ndarray) -> torch.Tensor:
        """These rows' share of the loss. Reported sums go to ``sums``, old log-probs that are found to ``found_M``."""
        objective, term = self.objective, self.divergence
        support = None if self.alone else self.support
        inside = int(self.chosen_N[self.batch.trajectory_M].sum())
        weight_M = aggregation_weights(self.batch, self.chosen_N, objective)
        found = predict(
            model,
            self.batch,
            rows,
            temperature=self.temperature,
            entropy=True,
            support_MS=None if support is None else support.ids_MS,
            teacher=None if term is None else term.teacher,
        )
        index_M, logprobs, entropy = found.index_M, found.logprobs, found.entropy

        def at(values_M: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values_M[index_M], dtype=np.float32)).to(logprobs.device)

        weight = at(weight_M)
        if self.old_logprobs_M is None:
            found_M[index_M] = logprobs.detach().cpu().numpy()
        old = logprobs.detach() if self.old_logprobs_M is None else at(self.old_logprobs_M)
        n = len(index_M)
        part = n / inside
        total = logprobs.new_zeros(())
        if term is not None and found.divergence is not None:
            total = total + (weight * at(term.weight_M) * found.divergence).sum()
            sums.add("divergence", float(found.divergence.detach().sum()), n)
            sums.add("divergence_loss", float(total.detach()), part)
        ratio = importance_ratio(logprobs, old)
        if term is not None or self.advantage_M.any():  # otherwise nothing here is about the policy that played
            sums.add("policy_kl", float((ratio - 1 - ratio.log()).detach().sum()), n)
        sums.add("entropy_loss", float(entropy.detach().sum()), n)
        if self.alone:
            return total
        loss, clipped = surrogate(ratio, at(self.advantage_M), objective)
        total = total + (weight * loss).sum()
        if objective.entropy_coef:
            total = total - objective.entropy_coef * (weight * entropy).sum()
        extra = self.auxiliary(logprobs, index_M) if self.auxiliary is not None else None
        if extra is not None:
            total = total + (weight * extra).sum()
            sums.add("auxiliary_loss", float((weight * extra).sum().detach()), part)
        if support is not None and found.support is not None:
            extra = support.loss(found.support, index_M)
            if extra is not None:
                total = total + (weight * extra).sum()
                sums.add("support_loss", float((weight * extra).sum().detach()), part)
        sums.add("pg_loss", float((weight * loss).sum().detach()), part)
        sums.add("pg_clipfrac", float(clipped.sum()), n)
        sums.add("ppo_kl", float((old - logprobs.detach()).sum()), n)
        return total


class Sums:
    """Weighted running means."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        """Add to a mean: a weighted sum of values, and their weight."""
        self._totals[name] = self._totals.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def merge(self, other: Sums) -> None:
        """Add all that another holds."""
        for name, total in other._totals.items():
            self.add(name, total, other._weights[name])

    def means(self) -> dict[str, float]:
        """The means by name."""
        return {name: total / max(self._weights[name], 1e-12) for name, total in self._totals.items()}
