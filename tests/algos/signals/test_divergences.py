"""GKD's divergences with their tail, and TrOPD: by hand, by enumeration, and gradients by finite differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import GAPS, close

from atod_algos.batch import Scores
from atod_algos.learner.loss import reverse_kl, with_tail
from atod_algos.signals.gkd import GKD
from atod_algos.signals.tropd import TrOPD
from atod_envs.errors import AtodError

TEACHER = np.array([[0.5, 0.3], [0.6, 0.15]])
STUDENT = np.array([[0.25, 0.6], [0.1, 0.2]])
"""Of two places, the teacher's top two tokens: the tails have 0.2 and 0.25, 0.15 and 0.7."""


def kinds(**options):
    return {kind: GKD(divergence=kind, **options) for kind in ("forward", "reverse", "jsd")}


def plain(kind, p, q, beta):
    """The divergence of two distributions, term by term."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_divergences_with_a_tail_by_hand(beta):
    scores = Scores(np.zeros(2), np.zeros(2), teacher_support_MS=np.log(TEACHER))
    for kind, algorithm in kinds(beta=beta, coef=2.0).items():
        got = algorithm.support_loss(torch.log(torch.tensor(STUDENT)), np.array([0, 1]), scores)
        expected = [
            2 * plain(kind, [*p, 1 - sum(p)], [*q, 1 - sum(q)], beta) for p, q in zip(TEACHER, STUDENT, strict=True)
        ]
        close(got, expected, 1e-9)


def test_the_tail_is_what_is_left():
    close(with_tail(torch.log(torch.tensor(TEACHER))).exp(), np.array([[0.5, 0.3, 0.2], [0.6, 0.15, 0.25]]))
    own, theirs = torch.log(torch.tensor(STUDENT)), torch.log(torch.tensor(TEACHER))
    scores = Scores(np.zeros(2), np.zeros(2), teacher_support_MS=np.log(TEACHER))
    close(GKD().support_loss(own, np.arange(2), scores), reverse_kl(own, theirs), 1e-9)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_top_k_is_a_lower_bound_that_the_whole_vocabulary_reaches(kind):
    rng = np.random.default_rng(3)
    own, theirs = (torch.log_softmax(torch.tensor(rng.normal(0, 2, (5, 9))), -1) for _ in range(2))
    exact = [plain(kind, p.exp().tolist(), q.exp().tolist(), 0.5) for p, q in zip(theirs, own, strict=True)]
    before = np.zeros(5)
    for k in (1, 3, 6, 9):
        best = theirs.topk(k, -1)
        scores = Scores(np.zeros(5), np.zeros(5), teacher_support_MS=best.values.numpy())
        found = GKD(divergence=kind).support_loss(own.gather(1, best.indices), np.arange(5), scores).numpy()
        assert (found >= before - 1e-9).all()
        before = found
    close(before, exact, 1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradients_by_finite_differences(kind):
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(2, 6)), requires_grad=True)
    ids = torch.tensor([[4, 0, 2], [1, 5, 3]])
    teacher = np.log([[0.5, 0.2, 0.1], [0.7, 0.1, 0.05]])
    scores = Scores(np.zeros(2), np.zeros(2), teacher_support_MS=teacher)

    def loss(values):
        picked = torch.log_softmax(values, -1).gather(1, ids)
        return GKD(divergence=kind, beta=0.3).support_loss(picked, np.array([0, 1]), scores).sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    for i, j in np.ndindex(2, 6):
        bump = torch.zeros_like(logits)
        bump[i, j] = 1e-6
        numeric = (loss(logits + bump) - loss(logits - bump)) / 2e-6
        assert gradient[i, j].item() == pytest.approx(numeric.item(), abs=1e-6)


def test_a_token_that_both_exclude_adds_nothing_to_jsd():
    """Log-probs of -200 are 0 in float32, and the log of 0 is -inf: the mixture is taken from the logs."""
    own, theirs = torch.tensor([[-0.1, -200.0]], requires_grad=True), np.array([[-0.2, -300.0]])
    scores = Scores(np.zeros(1), np.zeros(1), teacher_support_MS=theirs)
    got = GKD(divergence="jsd", beta=0.3).support_loss(own, np.array([0]), scores)
    p, q = math.exp(-0.2), math.exp(-0.1)
    close(got.detach(), [plain("jsd", [p, 1 - p], [q, 1 - q], 0.3)], 1e-6)
    got.sum().backward()
    assert torch.isfinite(own.grad).all()


def test_gkd_gives_no_advantage_and_asks_for_sense(ragged):
    batch, scores = ragged
    scores = dataclasses.replace(scores, teacher_support_MS=np.log(np.full((14, 2), 0.4)))
    result = GKD().advantages(batch, scores, 1)
    assert not result.token_M.any()
    close(np.mean(result.notes["support_mass_mean"]), 0.8)
    for wrong, words in (({"beta": 1.0}, r"--beta 1\.0"), ({"support": 0}, "--support 0")):
        with pytest.raises(AtodError, match=words):
            GKD(**wrong)


def test_tropd_by_hand(ragged):
    """Where the teacher gives a token no less than the student the gap stands; else it is weighed by their ratio."""
    batch, scores = ragged
    scores = dataclasses.replace(scores, teacher_support_MS=np.log(np.tile([0.5, 0.3], (14, 1))))
    trust = np.array([1, 1, math.exp(-0.1), math.exp(-0.3), 1, 1, 1, *[math.exp(-0.2)] * 2, 1, math.exp(-0.2)])
    trust = np.array([*trust, 1, math.exp(-0.3), math.exp(-0.5)])
    result = TrOPD().advantages(batch, scores, 1)
    close(result.token_M, trust * GAPS)
    close(np.mean(result.notes["trust_mean"]), trust.mean())
    own = torch.log(torch.tensor([[0.25, 0.6]] * 14)).requires_grad_()
    loss = TrOPD(outlier_coef=2.0).support_loss(own, np.arange(14), scores)
    close(loss.detach(), 2 * (1 - trust) * (0.5 * math.log(2) + 0.3 * math.log(0.5)))
    loss.sum().backward()
    close(own.grad, -2 * (1 - trust)[:, None] * np.array([[0.5, 0.3]]))
    some = TrOPD().support_loss(own[[3, 8]], np.array([3, 8]), scores)
    close(some.detach(), loss.detach()[[3, 8]] / 2)
    # With the tail both have a third token: 0.2 against 0.15.
    tailed = TrOPD(outlier_coef=2.0, tail=True).support_loss(own, np.arange(14), scores).detach()
    close(tailed, 2 * (1 - trust) * (0.5 * math.log(2) + 0.3 * math.log(0.5) + 0.2 * math.log(0.2 / 0.15)), 1e-6)
    assert TrOPD().support == 64 and not TrOPD().tail
    far = dataclasses.replace(scores, teacher_M=scores.student_M - np.linspace(0, 40, 14))
    assert TrOPD().advantages(batch, far, 1).token_M.min() >= -1 / math.e
    with pytest.raises(AtodError, match="--support 0"):
        TrOPD(support=0)
