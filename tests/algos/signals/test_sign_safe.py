"""The sign-safe rules and privileged siblings by numbers worked out by hand on a small ragged batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import GAPS, close
from episodes import episode

from atod_algos.signals.siblings import HEADING, Siblings
from atod_algos.signals.sign_safe import SignSafe, equal_budgets
from atod_algos.training.cli import main, with_rules
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
    got = SignSafe(rule="sg_opd").advantages(batch, scores, 1)
    close(got.token_M, np.where(agrees, 1.8, 1.0) * GAPS)
    assert got.reward_M is None
    close(np.mean(got.notes["agreement_ratio"]), agrees.mean())
    kept = SignSafe(rule="opdvr").advantages(batch, scores, 1).token_M
    close(kept, [0.4, 0.6, 0, 0, 0.6, 0, 0, -0.2, -0.2, 0.5, 0, 0, -0.3, -0.5])


def test_agreement_is_of_gap_and_outcome_under_every_rule_over_what_was_shown(ragged):
    """Not of gap and advantage, which is 0 in a group of one outcome (the last three tokens)."""
    batch, scores = ragged
    agrees = OUTCOME * GAPS > 0
    for rule in ("rlsd", "crest", "sg_opd", "opdvr"):
        notes = SignSafe(rule=rule, gap_source="teacher").advantages(batch, scores, 1).notes
        close(np.mean(notes["agreement_ratio"]), agrees.mean())
        close(np.mean(notes["gap_mean"]), GAPS.mean())
    shown = np.array([1] * 11 + [0] * 3, dtype=bool)  # the last group has no success
    for algorithm in (SignSafe(rule="stepopsd"), Siblings()):
        notes = algorithm.advantages(batch, scores, 1).notes
        close(np.mean(notes["gap_mean"]), (scores.privileged_M - scores.student_M)[shown].mean())
    notes = SignSafe(rule="stepopsd").advantages(batch, scores, 1).notes
    close(np.mean(notes["agreement_ratio"]), (OUTCOME * (scores.privileged_M - scores.student_M) > 0)[shown].mean())


def test_the_sign_is_the_outcomes_whatever_the_teacher_says(ragged):
    batch, scores = ragged
    rng = np.random.default_rng(0)
    wild = dataclasses.replace(scores, privileged_M=scores.student_M + rng.normal(0, 50, 14))
    for rule in ("rlsd", "crest"):
        assert (np.sign(SignSafe(rule=rule).advantages(batch, wild, 1).token_M) == SIGN).all()
    with pytest.raises(AtodError, match=r"--strength 2\.0"):
        SignSafe(strength=2.0)
    with pytest.raises(AtodError, match="--fade-steps -1"):
        SignSafe(fade_steps=-1)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (
            SignSafe,
            "--rule sg_opd --strength 0.3",
            "--strength 0.3: it acts with --rule rlsd or crest or stepopsd alone",
        ),
        (
            SignSafe,
            "--rule crest --agreed 2",
            "--agreed 2.0: it acts with --rule sg_opd alone, and here --rule is crest",
        ),
        (
            SignSafe,
            "--rules released --rule crest --fade-steps 50",
            "--fade-steps 50: it acts with --rule rlsd or stepopsd",
        ),
        (SignSafe, "--rule opdvr --skills X", "--skills X: the gap of --rule opdvr is here that of a teacher"),
        (Siblings, "--rule sdpo --nudge 0.1", "--nudge 0.1: it acts with --rule opid alone"),
        (Siblings, "--rule opid --largest-signal 3", "--largest-signal 3.0: it acts with --rule grsd alone"),
    ],
)
def test_an_option_of_another_rule_is_refused(kind, words, said, capsys):
    with pytest.raises(SystemExit):
        main(kind, [*words.split(), "--dry-run"])
    assert said in capsys.readouterr().err


def test_what_a_rule_set_presets_is_no_slip(capsys):
    main(SignSafe, ["--rules", "released", "--rule", "crest", "--dry-run"])
    assert "fade_steps=100" in capsys.readouterr().out


def test_each_rule_takes_its_papers_source_unless_another_is_named(ragged):
    batch, scores = ragged
    sources = {"rlsd": "skills", "crest": "skills", "stepopsd": "sibling", "sg_opd": "teacher", "opdvr": "teacher"}
    for rule, source in sources.items():
        assert SignSafe(rule=rule).source == source
        assert SignSafe(rule=rule).scores == {"teacher" if source == "teacher" else "privileged"}
        for named in ("skills", "teacher", "sibling"):
            chosen = SignSafe(rule=rule, gap_source=named)
            assert chosen.scores == {"teacher" if named == "teacher" else "privileged"}
    apart = dataclasses.replace(scores, privileged_M=scores.student_M)  # the student's own gap is 0
    close(SignSafe(rule="opdvr").advantages(batch, apart, 1).token_M[:2], [0.4, 0.6])
    assert not SignSafe(rule="opdvr", gap_source="skills").advantages(batch, apart, 1).token_M.any()


def test_released_is_rlsds_scripts_and_the_kl_is_off_without_it(ragged):
    """0.5 falls to 0 over 100 steps: 0.3 at step 40. The KL by k3: e^x - x - 1, times 0.01."""
    batch, scores = ragged
    released = with_rules(SignSafe, "released")
    assert released.advantages(batch, scores, 40).coefficients["strength"] == pytest.approx(0.3)
    assert SignSafe().advantages(batch, scores, 40).coefficients["strength"] == 0.5
    scores = dataclasses.replace(scores, reference_M=scores.teacher_M)
    own = torch.tensor(scores.student_M)
    for algorithm, plain in ((released, SignSafe()), (with_rules(Siblings, "released"), Siblings())):
        assert algorithm.scores == {"privileged", "reference"} and plain.scores == {"privileged"}
        close(algorithm.auxiliary_loss(own, np.arange(14), scores), 0.01 * (np.exp(GAPS) - GAPS - 1))
        assert plain.auxiliary_loss(own, np.arange(14), scores) is None


# --- StepOPSD -----------------------------------------------------------------------------------------------------


def test_stepopsd_by_hand(ragged):
    """2 sigmoid(0.4) = 1.197 and 2 sigmoid(-0.1) = 0.950; 0.6 is above the bound, -0.5 below it. Every attempt of the
    first group has a successful sibling, the only one of the second has none."""
    batch, scores = ragged
    half = dataclasses.replace(
        scores, privileged_M=np.where(np.arange(14) == 9, scores.student_M - 0.5, scores.teacher_M)
    )
    gap = GAPS.copy()
    gap[9], gap[11:] = -0.5, 0.0
    weight = [min(1.2, max(0.8, 2 / (1 + math.exp(-s * g)))) for s, g in zip(SIGN, gap, strict=True)]
    close(weight[:3], [1.1973753, 1.2, 0.9500416], 1e-6)
    assert weight[9] == 0.8
    # At step 10 of 50 l is 0.4. Turns of the first episode: 2, 1, 3 tokens; of the second 2, 1; of the third 2.
    shaped = [a * (0.6 + 0.4 * w) for a, w in zip(A, weight, strict=True)]
    turns = [[0, 1], [2], [3, 4, 5], [6, 7], [8], [9, 10], [11, 12], [13]]
    b = [sum(abs(shaped[m]) for m in turn) / len(turn) for turn in turns]
    means = [sum(b[:3]) / 3] * 3 + [sum(b[3:5]) / 2] * 2
    f = [mean / (own + 1e-6) for mean, own in zip(means, b[:5], strict=True)]
    assert f[0] < 1 < f[1] and min(f) > 0.5 and max(f) < 2
    f += [1.0]  # an episode of one turn keeps its A'
    result = SignSafe(rule="stepopsd").advantages(batch, half, 10)
    assert result.coefficients["strength"] == pytest.approx(0.4)
    close(result.turn_weight_K[:6], f)
    close(result.token_M, [shaped[m] * ([*f, 0, 0][k]) for k, turn in enumerate(turns) for m in turn])
    assert (np.sign(result.token_M) == SIGN).all()
    assert np.mean(result.notes["shown_ratio"]) == 0.75
    # After 50 steps the gap says nothing, and equal turns have equal budgets.
    close(SignSafe(rule="stepopsd").advantages(batch, half, 50).token_M, A)


def test_stepopsds_budgets_are_bounded(ragged):
    """Turns of mean sizes 8, 1, 3 have a mean of 4: 1/2, then 4, which is cut to 2, then 4/3. Turns of 1 and 3 have one
    of 2. Without an advantage there is no budget."""
    batch, _ = ragged
    shaped = np.array([8, -8, 1, 3, -3, 3, 1, 1, -3, 7, 7, 0, 0, 0.0])
    close(equal_budgets(shaped, batch), [0.5, 2, 4 / 3, 2, 2 / 3, 1, 1, 1], 1e-5)
    # A turn without a token takes no part: the second episode has one turn left.
    fewer = dataclasses.replace(batch, turn_M=np.where(batch.turn_M == 4, 3, batch.turn_M))
    close(equal_budgets(shaped, fewer)[3:5], [1, 1])


def test_stepopsd_shows_the_first_other_success():
    """Siblings shows the shortest one. These episodes' actions are empty: 3 turns, and 1."""
    first, second, failed = episode(["a", "b", "c"], True), episode(["d"], True), episode(["e"], False)
    group = Group("t", (failed, first, second))

    def shown(trajectory):
        return SignSafe(rule="stepopsd").privileged_text(trajectory, group)

    assert shown(failed) == shown(second) == f"{HEADING}\n1. \n2. \n3. \n\n"
    assert shown(first) == f"{HEADING}\n1. \n\n"
    assert SignSafe(rule="stepopsd").privileged_text(first, Group("t", (failed, first))) == ""


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
    for bound in (0.2, 3.0):  # all scripts; the function where nothing is given
        factor = [max(0.1, 1 + 0.5 * min(bound, max(-bound, one / level))) for one in x]
        options = {} if bound == 0.2 else {"largest_signal": bound}
        result = Siblings(rule="grsd", **options).advantages(batch, scores, 1)
        close(result.turn_weight_K, [*factor, 1, 1])
        close(result.token_M, A * np.array([*factor, 1, 1])[batch.turn_M])
        assert factor[1] < 1 and factor[4] > 1  # a failed episode's turn that the sibling speaks against
        assert factor[0] == 1.1 if bound == 0.2 else factor[0] > 2
    with pytest.raises(AtodError, match=r"--largest-signal -1\.0"):
        Siblings(largest_signal=-1.0)
    alike = dataclasses.replace(batch, success_N=np.ones(4, bool))
    assert (Siblings(rule="grsd").advantages(alike, scores, 1).turn_weight_K == 1).all()
