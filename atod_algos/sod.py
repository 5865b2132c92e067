"""SOD: step-wise on-policy distillation (arXiv 2605.07725), with GRPO as both of its implementations have it, or alone.

Objective
    d_k  = mean_t |log pi_old - log pi_T|                        over the tokens of turn k          (ATOD paper eq 13)
    w_1  = 1,   w_k = min( prod_{u<k} (d_u + e) / (d_{u+1} + e),  1 + delta )                          (SOD eqs 6, 7)
         = min( (d_1 + e) / (d_k + e),  1 + delta )              the product telescopes
    A_t  = A_GRPO + c w_k(t) (log pi_T - log pi_old)             detached; A_GRPO as in grpo.py        (SOD section 3)
    L    = the clipped surrogate with A_t

The teacher counts most where it disagrees no more with the student than at the start. The teacher itself would hardly
have reached a turn on which the two have drifted apart. The cap acts on each weight, not on the running
product, so a turn of little disagreement does not raise those after it.

``--rules paper`` is the SOD authors' own setting, ``--rules released`` the baseline as ATOD's authors re-implemented
it:

                       paper         released
    --group-stats      trajectory    turn_row          unit of the reward's mean and deviation
    --invalid-penalty  0             0.1               subtracted on turns whose action was invalid
    --loss-agg         token_mean    token_mean
    --clip-high        0.28          0.2
    --dual-clip        0             3
    --entropy-coef     0             0.001

Differences from the SOD paper: it writes the distillation term as a loss, sum_t (log pi_theta - log pi_T), added to
L_GRPO; here, as in its code, the detached gap is an advantage under the same clip. Its optional gated form, a
regulariser of strength sigma(-gamma A), and its supervised cold start are not here. The first turn is the first that
holds a token: one without has no d_k.

    python -m atod_algos.sod --env atod/ALFWorld-v0
    python -m atod_algos.sod --env atod/ALFWorld-v0 --grpo-coef 0        # the teacher alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atod_algos.advantages import require_range, turn_mean
from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class SOD(RewardAlgorithm):
    """Step-wise on-policy distillation."""

    name: ClassVar[str] = "sod"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"objective": {"loss_agg": "token_mean", "clip_high": 0.28}},
        "released": RELEASED_REWARD,
    }

    opd_coef: float = 1.0
    """c, weight of the distillation term (SOD's script and ATOD's re-implementation)."""
    grpo_coef: float = 1.0
    """Weight of the reward term: 1 (both implementations); 0 leaves the teacher alone."""
    weight_cap: float = 0.2
    """delta: no turn weighs more than 1 + delta (SOD's script and ATOD's re-implementation)."""
    weight_eps: float = 1e-6
    """e in the ratio of disagreements (SOD's script and ATOD's re-implementation)."""

    def __post_init__(self) -> None:
        require_range(self, "opd_coef", "grpo_coef", "weight_cap", "weight_eps", low=0)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The reward's advantage, and the teacher's gap weighted by turn."""
        delta_M = scores.require("teacher") - scores.student_M
        d_K = turn_mean(np.abs(delta_M), batch.turn_M, len(batch.trajectory_K))
        w_K = stepwise_weights(d_K, batch.trajectory_K, batch.n_K > 0, cap=1 + self.weight_cap, eps=self.weight_eps)
        weight_M = self.opd_coef * w_K[batch.turn_M]
        return Advantages(
            distillation_M=weight_M * delta_M,
            teacher_weight_M=weight_M,
            reward_M=self.grpo_coef * self.grpo(batch),
            turn_weight_K=w_K,
        )


def stepwise_weights(
    d_K: np.ndarray, trajectory_K: np.ndarray, counted_K: np.ndarray, *, cap: float, eps: float
) -> np.ndarray:
    """w_k = min((d_1 + eps) / (d_k + eps), cap), and w_1 = 1.

    Args:
        d_K: disagreement of each turn.
        trajectory_K: trajectory of each turn; turns are in order.
        counted_K: turns that hold a sampled token.
        cap: largest weight.
        eps: keeps the ratio finite.

    Returns:
        Weight of each turn; 1 for those without tokens, which weigh on nothing.
    """
    spoken = np.flatnonzero(counted_K)
    trajectories, place = np.unique(trajectory_K[spoken], return_index=True)
    first_N = np.zeros(int(trajectory_K.max(initial=-1)) + 1, dtype=np.int64)
    first_N[trajectories] = spoken[place]
    first_K = first_N[trajectory_K]
    weight_K = np.minimum((d_K[first_K] + eps) / (d_K + eps), cap)
    weight_K[first_K] = 1.0
    return np.where(counted_K, weight_K, 1.0)


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(SOD)
