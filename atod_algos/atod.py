"""ATOD: annealed turn-aware on-policy distillation (arXiv 2606.27814, Algorithm 1).

Objective
    p(s)     = min(s / T, 1)                                                     training step s counts from 1   (eq 10)
    kappa(s) = max(kappa_min, kappa_init - (kappa_init - kappa_min) p)           teacher first ...               (eq 11)
    rho(s)   = rho_init + (rho_max - rho_init) p                                 ... reward later                (eq 12)
    d_k      = mean_t |log pi_old - log pi_T|,   h_k = mean_t (-log pi_old)      over the tokens of turn k       (eqs 13, 14)
    w_k      = 1 - (1 - d~_k)(1 - h~_k)                                          min-max within the trajectory   (eqs 15, 16)
    A_t      = kappa (log pi_T - log pi_old) w_k(t) + rho A_GRPO                                                 (eqs 6, 8, 9)
    L        = the clipped surrogate of eq 4 with A_t; no KL penalty

Everything in A_t is detached. pi_old is the policy that rolled out, recomputed by the learner's model.

Where the paper and the released code differ (``--rules paper`` is the default, ``--rules released`` presets the other):
    group statistics     over trajectories (eq 2)           | over all turn rows of the group      --group-stats
    short trajectories   always eqs 15, 16 (1 turn: 0.75)   | w = 1 below 3 turns                  --tdur-min-turns
    agreeing ones        always eqs 15, 16                  | w = 1 if max d_k < 0.01              --tdur-min-divergence
    loss average         mean over trajectories (eq 4)      | mean over tokens                     --loss-agg
    reward               task reward                        | minus 0.1 on invalid turns           --invalid-penalty
    entropy bonus        none                               | 0.001                                --entropy-coef
    dual clip            none                               | 3                                    --dual-clip

The three ablations of section 5.3:
    token-level reweighting   --weighting token         weights per token, normalised over the whole batch, as released (the paper
                                                        says "at the token level" and no more)
    without T-DUR             --weighting none          w = 1. As T-DUR's weights are at most 1, this also makes distillation
                                                        stronger; ``--tdur-mean-preserve`` compares at equal strength
    without annealing         --coef-anneal-steps 0     kappa and rho stay at --kappa-init and --rho-init: 1 and 1 in the released
                                                        scripts; the paper does not give its constants

    python -m atod_algos.atod --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from atod_algos import advantages as maths
from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Advantages
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import grpo_metrics, grpo_token_advantage, task_reward
from atod_algos.learner.learner import Objective
from atod_algos.metrics import teacher_metrics, term_metrics, weight_metrics
from atod_algos.rollout.episodes import RolloutLimits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ATOD:
    """Annealed turn-aware on-policy distillation."""

    name: ClassVar[str] = "atod"
    scores: ClassVar[frozenset[str]] = frozenset({"teacher"})
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {
            "group": {"group_stats": "turn_row", "invalid_penalty": 0.1},
            "objective": {"dual_clip": 3.0, "loss_agg": "token_mean", "entropy_coef": 0.001},
            "tdur_min_turns": 3,
            "tdur_min_divergence": 0.01,
        },
    }

    group: GroupOptions = field(default_factory=GroupOptions)
    objective: Objective = field(default_factory=Objective)
    kappa_init: float = 1.0
    """kappa at the start (eq 11; released scripts)."""
    kappa_min: float = 0.1
    """Floor of kappa (eq 11; released scripts)."""
    rho_init: float = 1.0
    """rho at the start (eq 12; released scripts)."""
    rho_max: float = 2.0
    """rho at the end of annealing (eq 12; released scripts)."""
    coef_anneal_steps: int = 80
    """T of eq 10 (released scripts; the paper's table is missing); 0 turns annealing off."""
    weighting: Literal["turn", "token", "none"] = "turn"
    """What weighs the teacher: 'turn' is T-DUR (eqs 13-16); 'token' and 'none' are the paper's ablations of it."""
    tdur_min_turns: int = 1
    """Trajectories with fewer turns keep weight 1: 1 (paper), 3 (released code)."""
    tdur_min_divergence: float = 0.0
    """Trajectories whose largest d_k is below it keep weight 1: 0 (paper), 0.01 (released code)."""
    tdur_mean_preserve: bool = False
    """Rescale each trajectory's turn weights to a mean of 1 over its tokens (an option of the released code, off in its scripts)."""

    def limits(self, step: int) -> RolloutLimits:
        """No limit of its own."""
        return RolloutLimits()

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """R(tau), scaled."""
        return task_reward(batch, self.group)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The hybrid advantage of every sampled token (eq 8)."""
        student_M, teacher_M = scores.student_M, scores.require_teacher()

        # Stage I: reward advantage (eq 2).
        grpo_M = grpo_token_advantage(batch, self.group)

        # Stage II: turn-aware distillation weights (eqs 13-16).
        n_turns, counted_K = len(batch.trajectory_K), batch.n_K > 0
        weights = maths.turn_weights(
            maths.disagreement(student_M, teacher_M, batch.turn_M, n_turns),
            maths.uncertainty(student_M, batch.turn_M, n_turns),
            batch.trajectory_K,
            counted_K,
            min_turns=self.tdur_min_turns,
            min_divergence=self.tdur_min_divergence,
        )
        weight_K, weight_M = self._weights(weights.weight_K, student_M, teacher_M, batch)
        delta_M = teacher_M - student_M  # eq 6

        # Stage III: annealed hybrid (eqs 8-12).
        p = maths.progress(step, self.coef_anneal_steps)
        kappa = maths.kappa(p, self.kappa_init, self.kappa_min)
        rho = maths.rho(p, self.rho_init, self.rho_max)
        opd_M, rl_M = kappa * delta_M * weight_M, rho * grpo_M

        metrics = {"atod/kl_coef": kappa, "atod/rl_coef": rho, "atod/anneal_progress": p}
        metrics |= {"atod/kl_coef_base": self.kappa_init, "atod/rl_coef_base": self.rho_init}
        metrics |= grpo_metrics(batch, self.group)
        metrics |= term_metrics(opd_M, rl_M) | teacher_metrics(batch, scores, self.name)
        if self.weighting == "turn":
            metrics |= weight_metrics(replace(weights, weight_K=weight_K), batch, self.tdur_min_turns)
        return Advantages(opd_M + rl_M, metrics, weight_K)

    def _weights(
        self, weight_K: np.ndarray, student_M: np.ndarray, teacher_M: np.ndarray, batch: TokenBatch
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weight of each turn (for the record) and of each token (for the advantage)."""
        if self.weighting == "turn":
            if self.tdur_mean_preserve:
                weight_K = maths.mean_preserving(weight_K, batch.n_K, batch.trajectory_K)
            return weight_K, weight_K[batch.turn_M]
        if self.weighting == "none":
            return np.ones_like(weight_K), np.ones(batch.n_tokens)
        weight_M = maths.token_weights(student_M, teacher_M)
        return maths.turn_mean(weight_M, batch.turn_M, len(batch.trajectory_K)), weight_M

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """None: the teacher acts through the advantage alone (section 4.1)."""
        return None


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(ATOD)
