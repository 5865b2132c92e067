"""AgentOPSD: turn credit as the revision of a belief (arXiv 2608.05987): reward, larger where a turn decided.

With skills for the task in its prompt, the student finds some of its turns more probable and others less. Summed over
an episode this is evidence, as in a sequential test, that the episode will succeed. A turn counts by how far it moves
this belief: the same gap moves it far while the outcome is open, and little once it is settled.

Objective
    delta_t = log pi_old(y_t | s+) - log pi_old(y_t | s)      the sampled ids, with the skills in front and without
    e_k     = sum_t delta_t                                   evidence of turn k, over its tokens
    B_0     = clip(share of the group's attempts that succeed, eps, 1 - eps)
    c_k     = gamma c_{k-1} + e_k,   B_k = sigmoid(logit B_0 + c_k)
    q_k     = sign(A_k) z_k                                   in step with the outcome or against it            (eq 6)
              z_k: B_k - B_{k-1}, standardised within the episode
    w_k     = clip(1 + b q_k, 1 - b, 1 + b)
    A'_k    = A_k ((1 - lambda) + lambda w_k)                 A_k: A^GRPO of the episode (eq 2 of the ATOD paper)
    L       = the clipped surrogate with A'_k on every token of turn k, and a KL to the initial student, k3

w_k is above 0, so the sign of A_k stays; lambda = 0 is GRPO, as is an episode of one turn. The skills are those of
sdar.py.

``--rules paper`` is the paper's one setting for all three worlds, ``--rules released`` the authors' script for
ALFWorld:

                       paper         released
    --decay            0.95          1                 gamma
    --clip-high        0.24          0.2
    --group-stats      trajectory    turn_row          unit of the reward's mean and deviation
    --invalid-penalty  0             0.1               subtracted on turns whose action was invalid
    --loss-agg         trajectory_mean  token_mean
    --dual-clip        0             3
    --entropy-coef     0             0.001

Differences: formulae are from public accounts of the paper, checked against the authors' code. The paper standardises
sign(A) (B_k - B_{k-1}), which is the same where an episode has one sign; under ``turn_row`` with a penalty its turns
may differ in it, and the code's order, above, is ours. z_k has the population's deviation, as there; turns without a
token take no part. The code clips B_0 at 1e-4, the paper at 1e-3,
which we keep in both; its prior is the group's mean reward, which with rewards of 10 is no share, and ours is the
share. ``--centre`` takes each episode's mean evidence away first: the code's remedy for a gap that is negative on
average. Its other diagnostic switches are left out; its tether is ``sign_safe`` with RLSD's rule. Its skills are
SkillRL's, ours the environments'.

    python -m atod_algos.signals.agent_opsd --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import kl_to_reference
from atod_algos.sdar import skill_files, skill_text
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, Trajectory

if TYPE_CHECKING:
    import torch

_SMALLEST_DEVIATION = 1e-6
"""Added to the deviation of an episode's revisions (authors' code)."""


@dataclass(frozen=True)
class AgentOPSD(RewardAlgorithm):
    """Group-relative reward, shared out among turns by the revision of a belief."""

    name: ClassVar[str] = "agent_opsd"
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"objective": {"clip_high": 0.24}},
        "released": {**RELEASED_REWARD, "decay": 1.0},
    }

    mix: float = 0.5
    """lambda: share of the advantage that the belief reshapes (paper and script); 0 is GRPO."""
    band: float = 0.2
    """b: a turn's weight stays within 1 - b and 1 + b (paper and code)."""
    decay: float = 0.95
    """gamma: what is left of earlier evidence at each turn: 0.95 (paper), 1 (script)."""
    prior_floor: float = 1e-3
    """eps: the belief starts at least this far from 0 and from 1 (paper)."""
    centre: bool = False
    """Take the mean of an episode's evidence away before it accumulates (a switch of the authors' code, off in its
    scripts)."""
    kl_coef: float = 0.01
    """Weight of the KL to the initial student (paper and scripts)."""
    skills: str | None = None
    """Markdown file of skills, with '# General' and '## kind' sections; by default the environment's own."""

    def __post_init__(self) -> None:
        require_range(self, "kl_coef", low=0)
        if not (0 <= self.mix <= 1 and 0 <= self.band < 1 and 0 < self.decay <= 1 and 0 < self.prior_floor < 0.5):
            raise AtodError(
                f"--mix {self.mix}, --band {self.band}, --decay {self.decay}, --prior-floor {self.prior_floor}: expected "
                "shares: 0 to 1, 0 to below 1, above 0 to 1, and above 0 to below 0.5"
            )

    def reads(self) -> Mapping[str, str]:
        """The file of skills."""
        return skill_files(self.skills)

    @property
    def scores(self) -> frozenset[str]:
        """The student with the skills in front; the initial student only where the KL term is on."""
        return frozenset({"privileged", "reference"} if self.kl_coef else {"privileged"})

    def privileged_text(self, trajectory: Trajectory, group: Group) -> str:
        """The skills for the trajectory's task; see :func:`atod_algos.sdar.skill_text`."""
        return skill_text(trajectory, self.skills)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """A'_k = A_k ((1 - lambda) + lambda w_k)."""
        advantage_K = self.grpo_by_turn(batch)
        gap_M = scores.require("privileged") - scores.student_M
        evidence_K = np.bincount(batch.turn_M, gap_M, minlength=len(advantage_K))
        revision_K, belief_K = self.beliefs(batch, evidence_K)
        q_K = np.sign(advantage_K) * standardised(batch, revision_K)
        weight_K = np.clip(1 + self.band * q_K, 1 - self.band, 1 + self.band)
        shaped_K = advantage_K * ((1 - self.mix) + self.mix * weight_K)
        spoken_K = batch.n_K > 0
        return Advantages(
            reward_M=shaped_K[batch.turn_M],
            turn_weight_K=weight_K,
            notes={
                "evidence_mean": evidence_K[spoken_K],
                "revision_abs_mean": np.abs(revision_K[spoken_K]),
                "belief_mean": belief_K[spoken_K],
                "settled_ratio": np.abs(belief_K[spoken_K] - 0.5) > 0.49,
            },
        )

    def beliefs(self, batch: TokenBatch, evidence_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each turn's revision B_k - B_{k-1}, and B_k; 0 and 0.5 for a turn without a token.

        Args:
            batch: the batch.
            evidence_K: e_k.
        """
        share_G = np.bincount(batch.group_N, batch.success_N) / np.maximum(np.bincount(batch.group_N), 1)
        prior_N = np.clip(share_G, self.prior_floor, 1 - self.prior_floor)[batch.group_N]
        revision_K, belief_K = np.zeros(len(evidence_K)), np.full(len(evidence_K), 0.5)
        for n, prior in enumerate(prior_N):
            turns = np.flatnonzero((batch.trajectory_K == n) & (batch.n_K > 0))
            evidence = evidence_K[turns] - (evidence_K[turns].mean() if self.centre and len(turns) else 0.0)
            start, gathered, before = np.log(prior / (1 - prior)), 0.0, prior
            for k, own in zip(turns, evidence, strict=True):
                gathered = self.decay * gathered + own
                belief_K[k] = 0.5 * (1 + np.tanh(0.5 * (start + gathered)))  # the sigmoid, without overflow
                revision_K[k], before = belief_K[k] - before, belief_K[k]
        return revision_K, belief_K

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """The KL to the initial student."""
        return kl_to_reference(logprobs, index_M, scores, self.kl_coef)


def standardised(batch: TokenBatch, revision_K: np.ndarray) -> np.ndarray:
    """z_k: revisions less their episode's mean, over its deviation; 0 for a turn without a token."""
    spoken_K, tau_K, n = batch.n_K > 0, batch.trajectory_K, len(batch.group_N)
    count_N = np.maximum(np.bincount(tau_K[spoken_K], minlength=n), 1)
    mean_N = np.bincount(tau_K[spoken_K], revision_K[spoken_K], minlength=n) / count_N
    apart_K = np.where(spoken_K, revision_K - mean_N[tau_K], 0.0)
    deviation_N = np.sqrt(np.bincount(tau_K, apart_K**2, minlength=n) / count_N)
    return np.asarray(apart_K / (deviation_N[tau_K] + _SMALLEST_DEVIATION))


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(AgentOPSD)
