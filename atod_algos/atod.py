"""ATOD: annealed turn-aware on-policy distillation (arXiv 2606.27814, Algorithm 1).

Objective
    Delta_t  = log pi_T - log pi_old                    the teacher's opinion of a sampled token                (eq 6)
    A_t      = kappa Delta_t w_k(t) + rho A^GRPO        in place of A in GRPO's clipped surrogate           (eqs 8, 9)
    p(s)     = min(s / T, 1)                            training step s counts from 1                          (eq 10)
    kappa(s) = max(kappa_min, kappa_init - (kappa_init - kappa_min) p)     the teacher first ...               (eq 11)
    rho(s)   = rho_init + (rho_max - rho_init) p                           ... the reward later                (eq 12)
    d_k      = mean_t |Delta_t|,   h_k = mean_t (-log pi_old)              over the tokens of turn k      (eqs 13, 14)
    w_k      = 1 - (1 - d~_k)(1 - h~_k)                 d~, h~: min-max within the trajectory             (eqs 15, 16)

Everything in A_t is detached. There is no KL penalty. pi_old is the policy that rolled out, recomputed by the learner's
model. The ratio and the clip of eqs 3 and 4 are in learner/loss.py, the conventions of eqs 2 and 15 in advantages.py.

Where the paper and the released code differ (``--rules paper`` is the default, ``--rules released`` presets the other):
    group statistics     over trajectories (eq 2)           | over all turn rows of the group      --group-stats
    short trajectories   always eqs 15, 16 (1 turn: 0.75)   | w = 1 below 3 turns                  --tdur-min-turns
    agreeing ones        always eqs 15, 16                  | w = 1 if max d_k < 0.01              --tdur-min-divergence
    loss average         mean over trajectories (eq 4)      | mean over tokens                     --loss-agg
    reward               task reward                        | minus 0.1 on invalid turns           --invalid-penalty
    entropy bonus        none                               | 0.001                                --entropy-coef
    dual clip            none                               | 3                                    --dual-clip

The three ablations of section 5.3:
    token-level reweighting   --weighting token        weights per token, normalised over the whole batch, as released
                                                       (the paper says "at the token level" and no more)
    without T-DUR             --weighting none         w = 1. T-DUR's weights are at most 1, so distillation grows
                                                       stronger; --tdur-mean-preserve compares at equal strength
    without annealing         --coef-anneal-steps 0    kappa and rho stay at --kappa-init and --rho-init: 1 and 1 in
                                                       the released scripts; the paper does not give its constants

Beyond the paper, off under its settings (the built-in run has the first three):
    --gap exact          The teacher's term leaves the advantage and becomes a loss of its own, the reverse KL
                             L_T = E_t kappa w_k(t) KL(pi_theta(. | s_t) || pi_T(. | s_t))
                         whose gradient, for given weights, is the expectation, over all tokens that could have been
                         sampled, of the one that kappa Delta_t w_k(t) gives on the sampled token. It has no noise of
                         sampling, no ratio and no clip, so it gains more from many updates a step (--gap-minibatches,
                         --gap-epochs; docs/log.md). kappa and w_k act on it unchanged.
    --gap-clip           Bounds Delta_t itself, and so what d_k and w_k are made of (3 in the built-in run).
    --staleness          pi_old is the learner's own before the step, and A_t is weighted by the capped ratio of both.
    --baseline kl        kappa w_k(t) multiplies Delta_t + KL(pi_old(. | s_t) || pi_T(. | s_t)), the sampled gap less
                         its mean (vOPD, signals/vopd.py; of the cut gaps under --gap-clip). Its noise falls; d_k and
                         h_k are those of eqs 13 and 14. For given weights the gradient's expectation stays, and so it
                         does with --weighting none. But w_k is made of the very tokens that were sampled, so what is
                         taken away is no baseline in full: the expectation moves, and that of --gap exact is another
                         one, too.

    python -m atod_algos.atod --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from atod_algos.advantages import importance, min_max_by_trajectory, require_range, turn_mean
from atod_algos.algorithm import RELEASED_REWARD, ActsWith, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch


@dataclass(frozen=True)
class ATOD(RewardAlgorithm):
    """Annealed turn-aware on-policy distillation."""

    name: ClassVar[str] = "atod"
    exact_gap: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {**RELEASED_REWARD, "tdur_min_turns": 3, "tdur_min_divergence": 0.01},
    }
    acts_with: ClassVar[ActsWith] = {
        "tdur_min_turns": ("weighting", ("turn",)),
        "tdur_min_divergence": ("weighting", ("turn",)),
        "tdur_mean_preserve": ("weighting", ("turn", "token")),
    }

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
    """Rescale each trajectory's turn weights to a mean of 1 over its tokens (an option of the released code, off in its
    scripts); token weights to a mean of 1 over the batch, within which they are normalised."""
    baseline: Literal["none", "kl"] = "none"
    """What is subtracted from the sampled gap: 'none' (paper), or 'kl', its exact mean, which is -KL(pi_old || pi_T)
    where --gap-clip cuts nothing (vOPD)."""

    def __post_init__(self) -> None:
        require_range(self, "kappa_min", "rho_init", "rho_max", "coef_anneal_steps", "tdur_min_divergence", low=0)
        require_range(self, "kappa_init", low=self.kappa_min)  # it falls to its floor

    @property
    def scores(self) -> frozenset[str]:
        """The teacher; whole distributions where the baseline needs them."""
        return frozenset({"teacher", "divergence"} if self.baseline == "kl" else {"teacher"})

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The hybrid advantage of every sampled token.

        ``k`` is the turn of each token (axis M), ``tau`` the trajectory of each turn (axis K); a turn is ``spoken`` if
        it has sampled tokens.
        """
        log_pi, log_pi_T = scores.student_M, scores.require("teacher")
        k, tau, K, spoken = batch.turn_M, batch.trajectory_K, len(batch.trajectory_K), batch.n_K > 0

        # Stage I: what the reward says.
        A_grpo = self.grpo(batch)  # eq 2

        # Stage II: what the teacher says, and how much each turn of it matters (T-DUR).
        delta = log_pi_T - log_pi  # eq 6
        d = turn_mean(np.abs(delta), k, K)  # eq 13: disagreement
        h = turn_mean(-log_pi, k, K)  # eq 14: uncertainty
        d_norm, h_norm = (min_max_by_trajectory(x, tau, spoken) for x in (d, h))  # eq 15
        w = 1 - (1 - d_norm) * (1 - h_norm)  # eq 16: high if either is
        w, left_out = self._released_exceptions(w, d, batch)  # none under the paper's rules
        w_token = w[k]  # eq 8: a token has the weight of its turn
        if self.weighting != "turn":
            (w, w_token), left_out = self._ablation(log_pi, delta, batch), None  # section 5.3
        learned = delta if self.baseline == "none" else delta - scores.require("gap_mean")

        # Stage III: the teacher first, the reward later.
        p = min(step / self.coef_anneal_steps, 1.0) if self.coef_anneal_steps > 0 else 0.0  # eq 10
        kappa = max(self.kappa_min, self.kappa_init - (self.kappa_init - self.kappa_min) * p)  # eq 11
        rho = self.rho_init + (self.rho_max - self.rho_init) * p  # eq 12
        return Advantages(  # eqs 8, 9: the sum of the first two is A_t
            distillation_M=kappa * learned * w_token,
            reward_M=rho * A_grpo,
            teacher_weight_M=kappa * w_token,  # what weighs the loss of --gap exact
            turn_weight_K=w,
            left_out_N=left_out,
            coefficients={
                "kl_coef": kappa,  # the released code's names of kappa and rho
                "rl_coef": rho,
                "anneal_progress": p,
                "kl_coef_base": self.kappa_init,
                "rl_coef_base": self.rho_init,
            },
        )

    def _released_exceptions(
        self, w: np.ndarray, d: np.ndarray, batch: TokenBatch
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Turn weights with the released code's exceptions, and which trajectories are one (``left_out_N``)."""
        tau = batch.trajectory_K
        largest_d = np.zeros(len(batch.group_N))
        np.maximum.at(largest_d, tau, d)
        short, agreeing = (
            (batch.turns_N > 0) & (batch.turns_N < self.tdur_min_turns),
            largest_d < self.tdur_min_divergence,
        )
        left_out = np.where(short, 1, np.where(agreeing, 2, 0))
        w = np.where(left_out[tau] == 0, w, 1.0)
        return (mean_preserving(w, batch.n_K, tau) if self.tdur_mean_preserve else w), left_out

    def _ablation(self, log_pi: np.ndarray, delta: np.ndarray, batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
        """Weights of turns and of tokens without T-DUR, under which no trajectory is an exception."""
        K = len(batch.trajectory_K)
        if self.weighting == "none":
            return np.ones(K), np.ones(batch.n_tokens)
        w_token = token_weights(log_pi, delta)
        if self.tdur_mean_preserve:
            w_token = w_token / (w_token.mean() + 1e-8)
        return turn_mean(w_token, batch.turn_M, K), w_token


def token_weights(log_pi: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The token-level ablation: soft-or of min-max normalised |Delta| and -log pi over all tokens of the batch.

    As released: uncertainty is first cut at its 0.98 quantile, and all weights are 1 if no |Delta| reaches 0.01. (The
    paper only says "at the token level".)

    Returns:
        One weight in [0, 1] for each token (axis M).
    """
    d = np.abs(delta)
    return np.ones_like(d) if d.max(initial=0.0) < 0.01 else importance(d, -log_pi, 0.98)


def mean_preserving(weight_K: np.ndarray, n_K: np.ndarray, trajectory_K: np.ndarray) -> np.ndarray:
    """Rescale each trajectory's weights so that their mean over tokens is 1 (released code, off by default).

    Weights relative to their mean are first clipped to [0.5, 2], so no turn falls silent. It keeps the strength of
    distillation as it is without weights, which the plain weights, being at most 1, lower.

    Args:
        weight_K: weight of each turn.
        n_K: sampled tokens of each turn.
        trajectory_K: trajectory of each turn.
    """

    def mean_K(value_K: np.ndarray) -> np.ndarray:
        total_N, count_N = np.bincount(trajectory_K, value_K * n_K), np.bincount(trajectory_K, n_K)
        return np.asarray(np.where(count_N > 0, total_N / np.maximum(count_N, 1), 1.0)[trajectory_K])

    clipped_K = np.clip(weight_K / (mean_K(weight_K) + 1e-8), 0.5, 2.0)
    return np.asarray(clipped_K / (mean_K(clipped_K) + 1e-8))


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(ATOD)
