"""vOPD, OPSA, IW-OPD: numbers worked out by hand on a small ragged batch, and by brute force."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import GAPS, batch_of, close
from toyworld import TOY

from agents.models import load_model
from atod_algos.atod import ATOD
from atod_algos.batch import make_batch
from atod_algos.learner.logprobs import _mean_gap, score
from atod_algos.opd import OPD
from atod_algos.signals.gkd import GKD
from atod_algos.signals.iw_opd import IWOPD, share_before
from atod_algos.signals.opsa import OPSA
from atod_algos.signals.vopd import VOPD
from atod_algos.teachers.local import StepScorer
from atod_algos.teachers.server import row_batch
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

# --- vOPD ---------------------------------------------------------------------------------------------------------


def test_vopd_by_hand(ragged):
    batch, scores = ragged
    kl = np.linspace(0.0, 0.65, 14)
    scores = dataclasses.replace(scores, gap_mean_M=-kl)
    result = VOPD().advantages(batch, scores, 1)
    close(result.token_M, GAPS + kl)
    close(
        result.coefficients["advantage_rms"], math.sqrt(sum((g + k) ** 2 for g, k in zip(GAPS, kl, strict=True)) / 14)
    )
    close(np.mean(result.notes["baseline_mean"]), -0.325)
    close(OPD(baseline="kl", opd_coef=2.0).advantages(batch, scores, 1).token_M, 2 * (GAPS + kl))
    plain, centred = (ATOD(baseline=name).advantages(batch, scores, 1) for name in ("none", "kl"))
    close(plain.turn_weight_K, centred.turn_weight_K)
    close(centred.token_M - plain.token_M, plain.teacher_weight_M * kl)
    assert OPD().scores == ATOD().scores == {"teacher"}
    assert OPD(baseline="kl").scores == ATOD(baseline="kl").scores == VOPD().scores


def test_the_baseline_keeps_the_gradient_and_lowers_its_variance():
    """Four tokens that could be drawn: expectation and variance of the score-function gradient by enumeration."""
    logits = np.array([0.3, -0.2, 1.0, -1.1])
    own = logits - np.log(np.exp(logits).sum())
    theirs = np.log([0.55, 0.2, 0.05, 0.2])
    p = np.exp(own)
    gap = theirs - own
    kl = (p * (own - theirs)).sum()
    exact = -p * (own - theirs - kl)  # minus the gradient of KL(p || q) by the logits

    def moments(advantage):
        draws = [(np.eye(4)[v] - p) * advantage[v] for v in range(4)]
        mean = sum(p[v] * draws[v] for v in range(4))
        return mean, sum(p[v] * ((draws[v] - mean) ** 2).sum() for v in range(4))

    plain, centred = moments(gap), moments(gap + kl)
    close(plain[0], exact, 1e-12)
    close(centred[0], exact, 1e-12)
    assert (p * (gap + kl)).sum() == pytest.approx(0, abs=1e-12)
    tensor = torch.tensor(logits, requires_grad=True)
    logs = torch.log_softmax(tensor, -1)
    (logs.exp() * (logs - torch.tensor(theirs))).sum().backward()
    close(exact, -tensor.grad, 1e-12)
    # A gap far from 0 is where it pays: against a teacher that gives every token of these little.
    far = np.log([0.02, 0.01, 0.01, 0.01])
    assert moments(far - own + (p * (own - far)).sum())[1] < 0.2 * moments(far - own)[1]


def test_a_cut_gap_has_the_mean_of_the_cut_gaps_as_its_baseline(models):
    """Four tokens by hand, then the whole vocabulary of two models: what is taken away is the mean of what is drawn.

    Of 1/2, 1/4, 1/8, 1/8 against 1/8, 1/4, 1/2, 1/8 gaps are -2, 0, 2, 0 times log 2; cut to log 2 their mean is
    -1/2 + 1/8 of it, uncut -1 + 1/4.
    """
    own, theirs = (torch.log(torch.tensor([x])) for x in ([0.5, 0.25, 0.125, 0.125], [0.125, 0.25, 0.5, 0.125]))
    for limit, share in ((math.log(2), -3 / 8), (math.inf, -3 / 4), (0.5 * math.log(2), -3 / 16)):
        close(_mean_gap(own, theirs, torch.tensor([limit])), [share * math.log(2)], 1e-6)
    excluded = torch.log(torch.tensor([[1.0, 0.0]]))  # the first never says the second token, the other only that
    close(_mean_gap(excluded, excluded.flip(1), torch.tensor([2.0])), [-2.0])
    student, teacher = (load_model(str(models[name]), name) for name in ("student", "teacher"))
    turn = Turn(0, "o", (), (3, 4), (5, 6, 7), (0.0,) * 3, "", "", True, True, 0.0)
    attempt = Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE)
    rows = make_batch([Group("t", (attempt,))])

    def scored(clip):
        config = resolve(TrainConfig(env=TOY, student="x", teacher="y", gap_clip=clip))
        return StepScorer(config, VOPD(), student, None, lambda *_: teacher, "cpu").score(rows)

    free, cut = scored(0.0), scored(0.05)
    close(free.gap_mean_M, -free.reverse_kl_M)
    close(cut.reverse_kl_M, free.reverse_kl_M)  # TIP reads it, and it stays a divergence
    logs = []
    for model in (student.model, teacher.model):
        with torch.no_grad():
            predicted = model(torch.tensor([[3, 4, 5, 6]])).logits[0, 1:].double()
        logs.append(torch.log_softmax(predicted, -1).numpy())
    own, theirs = logs
    close(cut.gap_mean_M, (np.exp(own) * np.clip(theirs - own, -0.05, 0.05)).sum(1), 1e-5)
    assert (np.abs(theirs - own) > 0.05).any() and np.abs(cut.teacher_M - cut.student_M).max() <= 0.05 + 1e-6


def test_atods_weights_are_of_the_tokens_that_were_drawn():
    """Two turns of one token, three tokens to draw from: the expected gradient by the logits of the first turn.

    With --weighting none the baseline leaves it where it was; T-DUR's weights depend on the draw, so it moves a little.
    """
    own = [np.log([0.6, 0.3, 0.1]), np.log([0.2, 0.5, 0.3])]
    theirs = [np.log([0.2, 0.3, 0.5]), np.log([0.3, 0.3, 0.4])]
    mean = np.array([(np.exp(o) * (t - o)).sum() for o, t in zip(own, theirs, strict=True)])

    def expected(**options):
        algorithm = ATOD(rho_init=0.0, rho_max=0.0, coef_anneal_steps=0, **options)
        total = np.zeros(3)
        for draw in itertools.product(range(3), repeat=2):
            student, teacher = ([p[v] for p, v in zip(logs, draw, strict=True)] for logs in (own, theirs))
            turns = [
                {"student_logp": [s], "teacher_logp": [t], "mask": [1]} for s, t in zip(student, teacher, strict=True)
            ]
            batch, scores, _ = batch_of([{"group": "x", "reward": 0.0, "turns": turns}])
            scores = dataclasses.replace(scores, gap_mean_M=mean)
            first = algorithm.advantages(batch, scores, 1).distillation_M[0]
            total += np.exp(sum(student)) * first * (np.eye(3)[draw[0]] - np.exp(own[0]))
        return total

    close(expected(weighting="none"), expected(weighting="none", baseline="kl"), 1e-12)
    plain, centred = expected(), expected(baseline="kl")
    moved = np.linalg.norm(plain - centred) / np.linalg.norm(plain)
    assert moved == pytest.approx(0.109, abs=0.002)  # of its size


def test_the_exact_gap_leaves_no_noise_to_take_a_baseline_from(models):
    """--gap exact and the baseline exclude each other: with whole distributions compared, the sampled gap stays."""
    student = load_model(str(models["student"]), "student")
    config = resolve(TrainConfig(env=TOY, student="x", teacher="y", gap="exact"))
    for algorithm, exact in ((OPD(), True), (OPD(baseline="kl"), False), (VOPD(), False)):
        assert StepScorer(config, algorithm, student, None, lambda *_: student, "cpu").exact == exact


# --- OPSA ---------------------------------------------------------------------------------------------------------


def test_opsa_takes_the_share_that_is_meant():
    """0.07 of 100 tokens are 7, although 0.07 * 100 is more in floating point."""
    tokens = SimpleNamespace(n_tokens=100, student_M=-np.arange(1.0, 101.0))
    result = OPSA(keep=0.07).advantages(tokens, tokens, 1)
    assert int((result.token_M != 0).sum()) == 7


def test_opsa_by_hand(ragged):
    """Of 14 tokens 20 % are three: -1.6, -1.5, -1.0, which are tokens 13, 1 and 6."""
    batch, scores = ragged
    fixed = OPSA().advantages(batch, scores, 1)
    expected = np.zeros(14)
    expected[[1, 6, 13]] = -0.5
    close(fixed.token_M, expected)
    close(np.mean(fixed.notes["kept_ratio"]), 3 / 14)
    assert fixed.coefficients["logprob_threshold"] == -1.0
    entropy = np.full(14, 9.0)
    entropy[[1, 6, 13]] = [0.2, 1.0, 0.6]
    adapted = OPSA(adapt="entropy").advantages(batch, dataclasses.replace(scores, entropy_M=entropy), 1)
    expected[[1, 6, 13]] = [-0.5, -1.0, -0.75]
    close(adapted.token_M, expected)
    flat = dataclasses.replace(scores, entropy_M=np.ones(14))
    close(OPSA(adapt="entropy").advantages(batch, flat, 1).token_M[[1, 6, 13]], [-0.75] * 3)
    assert OPSA().scores == frozenset() and OPSA(adapt="entropy").scores == {"entropy"}


def test_opsa_takes_ties_along_and_asks_for_a_share(ragged):
    batch, scores = ragged
    tied = dataclasses.replace(scores, student_M=np.array([-2.0, *[-1.0] * 5, *[-0.5] * 8]))
    assert (OPSA(keep=0.2).advantages(batch, tied, 1).token_M != 0).sum() == 6
    assert (OPSA(keep=1.0, advantage=0.5).advantages(batch, scores, 1).token_M == 0.5).all()
    with pytest.raises(AtodError, match=r"--keep 0\.0"):
        OPSA(keep=0.0)


def test_the_students_entropy_can_be_had_without_a_teacher(models, tokenizer):
    """And with the sampler's log-probs as the old ones, which alone would need no pass."""
    student = load_model(str(models["student"]), "student")
    rows = row_batch([np.array([3, 4, 5, 6]), np.array([7, 8])])
    for old in ("learner", "sampler"):
        config = resolve(TrainConfig(env=TOY, student="x", old_logprobs=old))
        scores = StepScorer(config, OPSA(adapt="entropy"), student, None, lambda *_: student, "cpu").score(rows)
        logprobs_M, entropy_M = score(student.model, rows, temperature=1.0, entropy=True)
        close(scores.entropy_M, entropy_M)
        close(scores.student_M, logprobs_M if old == "learner" else rows.sampler_logprobs_M)
        assert (entropy_M > 0).all() and scores.teacher_M is None


@pytest.mark.parametrize("algorithm", [VOPD(), GKD()], ids=["whole", "top-k"])
def test_the_samplers_logprobs_are_the_old_ones_where_distributions_are_compared(algorithm, models):
    student, teacher = (load_model(str(models[name]), name) for name in ("student", "teacher"))
    turn = Turn(0, "o", (), (3, 4), (5, 6, 7), (-0.1, -0.2, -0.3), "", "", True, True, 0.0)
    attempt = Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE)
    rows = make_batch([Group("t", (attempt,))])
    config = resolve(TrainConfig(env=TOY, student="x", teacher="y", old_logprobs="sampler", gap_clip=0.0))
    scores = StepScorer(config, algorithm, student, None, lambda *_: teacher, "cpu").score(rows)
    close(scores.student_M, [-0.1, -0.2, -0.3])
    close(scores.teacher_M, score(teacher.model, rows, temperature=1.0)[0])


# --- IW-OPD -------------------------------------------------------------------------------------------------------


def test_iw_opd_by_hand(ragged):
    """Sums of |gap|: 2.0, 0.6, 0.7, 1.3."""
    batch, scores = ragged
    before = [0, 0.2, 0.5, 0.55, 0.7, 1, 0, 1 / 3, 2 / 3, 0, 5 / 7, 0, 5 / 13, 8 / 13]
    weight = 1.5 - 0.5 * np.array(before)
    result = IWOPD().advantages(batch, scores, 1)
    close(result.teacher_weight_M, weight)
    close(result.token_M, weight * GAPS)
    close(result.turn_weight_K[0], (1.5 + 1.4) / 2)
    anew = IWOPD(over="turn").advantages(batch, scores, 1).teacher_weight_M
    turns = [0, 0.4, 0, 0, 1 / 3, 1, 0, 0.5, 0, 0, 5 / 7, 0, 5 / 8, 0]
    close(anew, 1.5 - 0.5 * np.array(turns))
    level = IWOPD(mean_preserve=True).advantages(batch, scores, 1).teacher_weight_M
    for n in range(4):
        own = batch.trajectory_M == n
        close(level[own].mean(), 1.0)
        close(level[own] / level[own][0], weight[own] / 1.5)
    close(IWOPD(iw_gamma=0.0).advantages(batch, scores, 1).token_M, GAPS)
    with pytest.raises(AtodError, match="--iw-gamma -1"):
        IWOPD(iw_gamma=-1.0)


def test_the_share_before_a_token_is_a_running_sum():
    rng = np.random.default_rng(0)
    value, unit = rng.random(30), np.sort(rng.integers(0, 6, 30))
    value[unit == unit[0]] = 0.0
    expected = []
    for u in np.unique(unit):
        own = value[unit == u]
        running = [0.0, *itertools.accumulate(own)][:-1]
        expected += [r / own.sum() if own.sum() else 0.0 for r in running]
    close(share_before(value, unit), expected, 1e-12)
