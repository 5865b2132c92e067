"""The loss of a training step: the clipped surrogate, and how tokens are averaged.

The one file with torch in it that an algorithm's reader opens. Advantages are detached; the gradient flows through the
importance ratio eta = pi_theta / pi_old alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atod_algos.algorithm import Objective
from atod_algos.batch import TokenBatch

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are cut to +-20 before the exponential: beyond it a ratio is a number without meaning, and soon
infinite."""

SMALLEST_BUCKET = 1e-6
"""Probability that the bucket of all other tokens has at least: below it float32 sums are rounding."""


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """Importance ratio of each token, eq 3: eta = pi_theta / pi_old = exp(log pi_theta - log pi_old).

    Args:
        logprobs: [M] current log-probs, with gradients.
        old_logprobs: [M] log-probs under the weights that rolled out.
    """
    return (logprobs - old_logprobs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token clipped surrogate loss, eq 4: -min(eta A, clip(eta, 1-eps, 1+eps) A), with the optional dual clip.

    A token without an advantage has no loss, whatever its ratio.

    Args:
        ratio: [M] importance ratios eta.
        advantage: [M] detached advantages.
        objective: clip ranges.

    Returns:
        [M] losses, and [M] booleans that say where the clip was active.
    """
    ratio = torch.where(advantage == 0, torch.ones_like(ratio), ratio)
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = torch.maximum(plain, clipped)
    active = clipped > plain
    if objective.dual_clip > 0:
        bound = -objective.dual_clip * advantage
        loss = torch.where(advantage < 0, torch.minimum(loss, bound), loss)
    return loss, active


@dataclass(frozen=True, slots=True)
class TeacherTokens:
    """What a teacher says in the place of each sampled token.

    Attributes:
        ids_MS: S token ids; None: the whole vocabulary, in its order.
        logprobs_MS: their log-probs under the teacher.
    """

    ids_MS: np.ndarray | None
    logprobs_MS: np.ndarray

    def at(self, index_M: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ([m, 0] for the whole vocabulary) and log-probs of some tokens."""
        ids = np.zeros((len(index_M), 0), dtype=np.int64) if self.ids_MS is None else self.ids_MS[index_M]
        return torch.from_numpy(ids).long().to(device), torch.from_numpy(self.logprobs_MS[index_M]).to(device)


def reverse_kl(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Reverse KL of each place, in nats: KL(pi_theta || pi_T) = sum_v pi_theta(v) (log pi_theta(v) - log pi_T(v)).

    All tokens but these S are one bucket, which makes it a lower bound; it is exact where the S tokens are all that can
    be said, or the rest of both models is divided alike.

    Args:
        own: [m, S] log-probs under the student, with gradients.
        theirs: [m, S] log-probs under the teacher.

    Returns:
        [m] divergences.
    """
    rest, their_rest = ((1 - logprobs.exp().sum(-1)).clamp(min=SMALLEST_BUCKET) for logprobs in (own, theirs))
    return (own.exp() * (own - theirs)).sum(-1) + rest * (rest.log() - their_rest.log())


def with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probs of some tokens, and of one bucket for all others: a distribution that sums to 1.

    Args:
        logprobs: [m, S] log-probs of S tokens in each of m places.

    Returns:
        [m, S + 1] log-probs, the bucket's last; it has at least ``SMALLEST_BUCKET``.
    """
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=SMALLEST_BUCKET)
    return torch.cat([logprobs, rest.log()], dim=-1)


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
