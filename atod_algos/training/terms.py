"""From an algorithm's advantages to what the learner minimises: one number a sampled token, and terms that are losses.

``--staleness`` weights the numbers where older weights sampled the tokens. Under ``--gap exact`` the teacher's part is
no number but a divergence, with updates of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from atod_algos.algorithm import Advantages, Algorithm
from atod_algos.batch import Scores, TokenBatch
from atod_algos.learner.loss import TeacherTokens
from atod_algos.learner.minibatch import AuxiliaryLoss, DivergenceTerm, SupportTerm
from atod_algos.rollout.async_rollout import correct
from atod_algos.training.config import RunConfig
from atod_envs.errors import AtodError


class Terms(NamedTuple):
    """What a step's update minimises.

    Attributes:
        advantage_M: of each sampled token, for the policy gradient.
        auxiliary: the algorithm's own loss on the sampled tokens.
        divergence: the teacher's part under ``--gap exact``.
        support: the algorithm's own loss on the teacher's top-k tokens.
        metrics: how stale the episodes were, and how much was corrected.
    """

    advantage_M: np.ndarray
    auxiliary: AuxiliaryLoss | None
    divergence: DivergenceTerm | None
    support: SupportTerm | None
    metrics: dict[str, float]


def loss_terms(
    config: RunConfig, algorithm: Algorithm, batch: TokenBatch, scores: Scores, advantages: Advantages, step: int
) -> Terms:
    """The terms of a step.

    Raises:
        AtodError: ``--gap exact`` acts on the algorithm, but it weighs no divergence.
    """
    divergence = _divergence(config, algorithm, scores, advantages)
    advantage_M = advantages.token_M
    if divergence is not None:
        advantage_M = np.zeros(batch.n_tokens) if advantages.reward_M is None else advantages.reward_M
    advantage_M, metrics = correct(
        advantage_M, scores.student_M, batch.sampler_logprobs_M, step=step, staleness=config.staleness
    )
    return Terms(advantage_M, _auxiliary(algorithm, scores), divergence, _support(algorithm, scores), metrics)


def _divergence(
    config: RunConfig, algorithm: Algorithm, scores: Scores, advantages: Advantages
) -> DivergenceTerm | None:
    if config.gap != "exact" or not algorithm.takes_exact_gap:
        return None
    if advantages.teacher_weight_M is None:
        raise AtodError(
            f"--gap exact: {algorithm.name} gives no teacher_weight_M, which weighs the divergence; use --gap sampled"
        )
    teacher = TeacherTokens(scores.support_MS, scores.require("teacher_support"))
    return DivergenceTerm(teacher, advantages.teacher_weight_M, config.gap_minibatches, config.gap_epochs)


def _auxiliary(algorithm: Algorithm, scores: Scores) -> AuxiliaryLoss | None:
    loss = algorithm.auxiliary_loss
    if type(algorithm).auxiliary_loss is Algorithm.auxiliary_loss:
        return None
    return lambda logprobs, index_M: loss(logprobs, index_M, scores)


def _support(algorithm: Algorithm, scores: Scores) -> SupportTerm | None:
    loss, none = algorithm.support_loss, type(algorithm).support_loss is Algorithm.support_loss
    if scores.support_MS is None or "support" not in algorithm.scores or none:
        return None
    return SupportTerm(scores.support_MS, lambda logprobs, index_M: loss(logprobs, index_M, scores))
