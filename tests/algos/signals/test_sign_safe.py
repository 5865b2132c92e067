"""The sign-safe rules and privileged siblings by numbers worked out by hand on a small ragged batch."""

import dataclasses
import math

import numpy as np
import pytest
from cases import GAPS, close
from episodes import episode

from atod_algos.signals.siblings import HEADING, Siblings
from atod_algos.signals.sign_safe import SignSafe
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group

SPREAD = 10 / math.sqrt(3) + 1e-6
GOOD, BAD = 10 / 3 / SPREAD, -20 / 3 / SPREAD
SIGN = np.array([1] * 6 + [-1] * 3 + [1] * 2 + [0] * 3)
A = np.array([GOOD] * 6 + [BAD] * 3 + [GOOD] * 2 + [0.0] * 3)
OUTCOME = np.array([1] * 6 + [-1] * 3 + [1] * 2 + [-1] * 3)


def cut(x, bound):
    return min(1 + bound, max(1 - bound, math.exp(x)))


def test_rlsd_by_hand(ragged):
    batch, scores = ragged
    weight = np.array([cut(s * g, 0.2) for s, g in zip(SIGN, GAPS, strict=True)])
    assert (
        weight[0] == 1.2 and weight[2] == pytest.approx(math.exp(-0.1)) and weight[6] == pytest.approx(math.exp(-0.2))
    )
    assert weight[7] == 1.2  # the gap speaks against a token of a failure: more of its blame
    close(SignSafe().advantages(batch, scores, 1).token_M, A * (0.5 + 0.5 * weight))
    late = SignSafe(fade_steps=50).advantages(batch, scores, 40)
    assert late.coefficients["strength"] == pytest.approx(0.1)
    close(late.token_M, A * (0.9 + 0.1 * weight))
    close(SignSafe(fade_steps=50).advantages(batch, scores, 50).token_M, A)
    chosen = SignSafe(strength=1.0, bound=0.5).advantages(batch, scores, 1)
    close(chosen.token_M, A * np.array([cut(s * g, 0.5) for s, g in zip(SIGN, GAPS, strict=True)]))


def test_crest_by_hand(ragged):
    batch, scores = ragged
    surprise = -scores.student_M
    mean = sum(surprise) / 14
    deviation = math.sqrt(sum((x - mean) ** 2 for x in surprise) / 14)
    factor = []
    for sign, gap, own in zip(SIGN, GAPS, surprise, strict=True):
        gate = 1 if sign * gap > 0 else 0
        m = 1 + 0.5 * (2 / (1 + math.exp(-(own - mean) / (deviation + 1e-6))) - 1)
        factor.append(1 + min(0.3, 0.3 * gate * m) * (cut(sign * gap / 2, 0.28) - 1))
    result = SignSafe(rule="crest").advantages(batch, scores, 1)
    close(result.token_M, A * np.array(factor))
    # Never less than A, never above it by more than l e; a gap against the outcome is not heard.
    ratio = result.token_M[:11] / A[:11]
    assert (ratio >= 1).all() and (ratio <= 1 + 0.3 * 0.28 + 1e-12).all()
    assert (ratio[[2, 3, 5, 6, 10]] == 1).all() and ratio[1] > ratio[0] > 1


def test_sg_opd_and_opdvr_by_hand(ragged):
    batch, scores = ragged
    agrees = np.sign(GAPS) == OUTCOME
    got = SignSafe(rule="sg_opd", gap_source="teacher").advantages(batch, scores, 1)
    close(got.token_M, np.where(agrees, 1.8, 1.0) * GAPS)
    assert got.reward_M is None
    close(np.mean(got.notes["agreement_ratio"]), agrees.mean())
    kept = SignSafe(rule="opdvr", gap_source="teacher").advantages(batch, scores, 1).token_M
    close(kept, [0.4, 0.6, 0, 0, 0.6, 0, 0, -0.2, -0.2, 0.5, 0, 0, -0.3, -0.5])


def test_the_sign_is_the_outcomes_whatever_the_teacher_says(ragged):
    batch, scores = ragged
    rng = np.random.default_rng(0)
    wild = dataclasses.replace(scores, privileged_M=scores.student_M + rng.normal(0, 50, 14))
    for rule in ("rlsd", "crest"):
        assert (np.sign(SignSafe(rule=rule).advantages(batch, wild, 1).token_M) == SIGN).all()
    assert SignSafe().scores == {"privileged"} and SignSafe(gap_source="teacher").scores == {"teacher"}
    with pytest.raises(AtodError, match=r"--strength 2\.0"):
        SignSafe(strength=2.0)


# --- siblings -----------------------------------------------------------------------------------------------------


def test_the_shortest_other_success_is_shown():
    long, short, failed = episode(["a", "b", "c"], True), episode(["d", "e"], True), episode(["f"], False)
    group = Group("t", (failed, long, short))

    def shown(trajectory):
        return Siblings().privileged_text(trajectory, group)

    def told(trajectory):
        return f"{HEADING}\n" + "".join(f"{k}. {turn.action}\n" for k, turn in enumerate(trajectory.turns, 1)) + "\n"

    assert shown(failed) == shown(long) == told(short) and shown(short) == told(long)
    assert Siblings().privileged_text(long, Group("t", (failed, long))) == ""


def test_sdpo_and_opid_by_hand(ragged):
    batch, scores = ragged
    result = Siblings().advantages(batch, scores, 1)
    shown_N = result.notes["shown_ratio"]
    seen = np.where(shown_N[batch.trajectory_M], GAPS, 0.0)  # without a sibling the gap is the rounding of two passes
    assert (seen == 0).any() and (GAPS[seen == 0] != 0).any()
    close(result.token_M, seen)
    assert result.reward_M is None and np.mean(shown_N) == 0.75  # the other group has no success
    close(Siblings(rule="opid").advantages(batch, scores, 1).token_M, A + 0.001 * seen)


def test_grsd_by_hand(ragged):
    batch, scores = ragged
    mean = [0.5, -0.1, 0.1, 0.0, -0.2, 0.15]  # of the first group's turns
    x = [math.expm1(s * m) for s, m in zip([1, 1, 1, -1, -1, 1], mean, strict=True)]
    level = sum(map(abs, x)) / 6 + 1e-6
    factor = [max(0.1, 1 + 0.5 * min(3, max(-3, one / level))) for one in x]
    result = Siblings(rule="grsd").advantages(batch, scores, 1)
    close(result.turn_weight_K, [*factor, 1, 1])
    close(result.token_M, A * np.array([*factor, 1, 1])[batch.turn_M])
    assert factor[0] > 2 and factor[1] < 1 and factor[4] > 1  # a failed episode's turn that the sibling speaks against
    alike = dataclasses.replace(batch, success_N=np.ones(4, bool))
    assert (Siblings(rule="grsd").advantages(alike, scores, 1).turn_weight_K == 1).all()
