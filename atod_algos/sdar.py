"""SDAR: self-distilled agentic reinforcement learning (arXiv 2605.15155): GRPO, the student being its own teacher.

Objective
    s+      = a skill text for the task, then everything that the student saw in s
    delta_t = sg[ log pi_old(y_t | s+) ] - log pi_theta(y_t | s)     the same sampled ids y, with and without the skills
    g_t     = sg[ sigmoid(beta delta_t) ]                            the gate opens where skills raise the token
    L_SDAR  = mean_t g_t delta_t
    L       = L_GRPO + lambda L_SDAR                                 L_GRPO as in grpo.py

sg: no gradient. So d L_SDAR / d log pi_theta = -g_t / N on *every* sampled token: gated likelihood ascent, not a
reverse KL. A token that the skills make less probable is still pushed up, by a gate near 0; the loss may be negative.
pi_theta is the current policy, not pi_old: there is no ratio and no clip in this term. The teacher is the policy that
rolled out, scored once a step as the released code does.

The skills are text files of the environments (``atod_envs/<environment>/skills.md``): general ones and those for the
task's kind, both or an error. The student never sees them, neither in training nor in evaluation.

``--rules paper`` is the objective above, ``--rules released`` the baseline as it was compared with ATOD:

                       paper         released
    --group-stats      trajectory    turn_row          unit of the reward's mean and deviation
    --invalid-penalty  0             0.1               subtracted on turns whose action was invalid
    --loss-agg         token_mean    token_mean        a mean over tokens for L_SDAR too: one average serves both losses
    --kl-coef          0             0.01              KL to the initial student, k3
    --dual-clip        0             3
    --entropy-coef     0             0.001

Differences from the released code: it decodes the prompt, puts the skills before it, encodes the whole again and cuts
it on the left at the prompt limit, which can cut the skills; here their ids stand in front of the row's own ids,
nothing is encoded twice, and nothing is cut: a row too long for the model is an error. For some time its ALFWorld
teacher was given the general skills only. Its skills are its own; ours were written for this project. The paper's other
gates (by entropy, or by entropy and gap) are not here.

    python -m atod_algos.sdar --env atod/ALFWorld-v0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from atod_algos.advantages import require_range
from atod_algos.algorithm import RELEASED_REWARD, Advantages, RewardAlgorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.grpo import kl_to_reference
from atod_envs.errors import DataError
from atod_envs.files import hash_of
from atod_envs.skills import read_skills, skills_of
from atod_envs.trajectory import Group, Trajectory

if TYPE_CHECKING:
    import torch

HEADING = "[Privileged Skill Information]"
"""Stands before the skills, as published."""


@dataclass(frozen=True)
class SDAR(RewardAlgorithm):
    """Self-distilled agentic reinforcement learning."""

    name: ClassVar[str] = "sdar"
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"objective": {"loss_agg": "token_mean"}},
        "released": {**RELEASED_REWARD, "kl_coef": 0.01},
    }

    sdar_coef: float = 0.01
    """lambda, weight of the self-distillation loss (every released script)."""
    gate_beta: float = 5.0
    """beta, sharpness of the gate (every released script)."""
    kl_coef: float = 0.0
    """Weight of the KL to the initial student: 0 (ATOD paper, section 4.1), 0.01 (released scripts; 0.001 on
    Search-QA)."""
    skills: str | None = None
    """Markdown file of skills, with '# General' and '## kind' sections; by default the environment's own."""

    def __post_init__(self) -> None:
        require_range(self, "sdar_coef", "gate_beta", "kl_coef", low=0)

    def reads(self) -> Mapping[str, str]:
        """The file of skills."""
        return skill_files(self.skills)

    @property
    def scores(self) -> frozenset[str]:
        """The student with the skills in front; the initial student only where the KL term is on."""
        return frozenset({"privileged", "reference"} if self.kl_coef else {"privileged"})

    def privileged_text(self, trajectory: Trajectory, group: Group) -> str:
        """The skills for the trajectory's task; see :func:`skill_text`."""
        return skill_text(trajectory, self.skills)

    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The reward's advantage alone; the skills act through ``auxiliary_loss``."""
        gap_M = scores.require("privileged") - scores.student_M
        gate_M = 0.5 * (1 + np.tanh(0.5 * self.gate_beta * gap_M))  # the sigmoid, without overflow
        return Advantages(
            reward_M=self.grpo(batch),
            notes={
                "gate_mean": gate_M,
                "gate_active_ratio": gate_M > 0.5,
                "teacher_gap_mean": gap_M,
                "loss": gate_M * gap_M,
            },
        )

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """Lambda g_t delta_t, and the KL to the initial student where it is on."""
        delta = logprobs.new_tensor(scores.require("privileged")[index_M]) - logprobs
        gate = (self.gate_beta * delta.detach()).sigmoid()
        kl = kl_to_reference(logprobs, index_M, scores, self.kl_coef)
        return self.sdar_coef * gate * delta + (0.0 if kl is None else kl)


def skill_files(skills: str | None) -> Mapping[str, str]:
    """What a run with a file of skills of its own reads, as ``Algorithm.reads`` gives it.

    Raises:
        DataError: the file cannot be read.
    """
    if skills is None:
        return {}
    read_skills(Path(skills))
    return {f"--skills {skills}": hash_of([Path(skills)]).hexdigest()}


def skill_text(trajectory: Trajectory, skills: str | None = None) -> str:
    """The skills for a trajectory's task, general ones and its kind's.

    Args:
        trajectory: its labels name the environment and the kind of task.
        skills: file of skills; ``None`` for the environment's own.

    Raises:
        AtodError: there are none for this kind of task.
    """
    if not trajectory.labels:
        raise DataError(f"task {trajectory.task_id!r} has no kind (no label), so no skills can be chosen for it")
    label, kind = next(iter(trajectory.labels.items()))
    book = read_skills(Path(skills)) if skills else skills_of(label.split("/")[0])
    return f"{HEADING}\n{book.text_for(kind)}\n\n"


if __name__ == "__main__":
    from atod_algos.training.cli import main

    main(SDAR)
