"""The loss of a training step: the clipped surrogate, and how tokens are averaged.

The one file with torch in it that an algorithm's reader opens. Advantages are detached; the gradient flows through the importance
ratio eta = pi_theta / pi_old alone.
"""

from __future__ import annotations

import numpy as np
import torch

from atod_algos.algorithm import Objective
from atod_algos.batch import TokenBatch

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are cut to +-20 before the exponential: beyond it a ratio is a number without meaning, and soon infinite."""


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
