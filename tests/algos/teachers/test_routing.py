"""Several teachers: each row under its own, the size of each environment's term by hand."""

import dataclasses
import logging

import numpy as np
import pytest
from toyworld import ECHO, TOY

from agents.models import LoadedModel, load_model
from atod_algos.algorithm import Advantages
from atod_algos.atod import ATOD
from atod_algos.batch import Scores, make_batch, part_of
from atod_algos.grpo import GRPO
from atod_algos.opd import OPD
from atod_algos.signals.gkd import GKD
from atod_algos.signals.sage_opd import SageOPD
from atod_algos.signals.vopd import VOPD
from atod_algos.teachers.local import StepScorer
from atod_algos.teachers.routing import gap_factors, label_of, require_scale, world_places
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn


def config_of(**changes):
    settings = {"env": (TOY, ECHO), "student": "s", "style": "compact", "gap_clip": 0.0} | changes
    return resolve(TrainConfig(**settings))


def trajectory(env, kind, *responses, task="t"):
    turns, prompt = [], (3, 4)
    for index, ids in enumerate(responses):
        turns.append(Turn(index, "", (), prompt, ids, (-1.0,) * len(ids), "", "", True, True, 0.0))
        prompt = (*prompt, *ids, 5)
    return Trajectory(
        env,
        task,
        "train",
        "",
        f"{env}/{task}",
        0,
        tuple(turns),
        "",
        False,
        0.0,
        StopReason.FAILURE,
        labels={"kind": kind},
    )


@pytest.fixture(scope="module")
def batch():
    """Tokens, in this order: 3 of the toy world, 1 of echo's small task, 2 of the toy world, 4 of echo's large task."""
    played = [
        trajectory(TOY, "fruit", (6, 7), (8,)),
        trajectory(ECHO, "small", (9,)),
        trajectory(TOY, "fruit", (7, 7), task="u"),
        trajectory(ECHO, "large", (6, 6), (5, 9), task="u"),
    ]
    return make_batch([Group(t.task_id, (t,)) for t in played])


# --- parts --------------------------------------------------------------------------------------------------------


def test_a_part_of_a_batch_is_the_batch_of_its_trajectories(batch):
    keep_N = np.array([False, True, False, True])
    part, keep_M = part_of(batch, keep_N)
    alone = make_batch([Group(t.task_id, (t,)) for t in batch.trajectories if t.env_id == ECHO])
    assert keep_M.tolist() == [False] * 3 + [True] + [False] * 2 + [True] * 4
    for field in dataclasses.fields(alone):
        got, expected = getattr(part, field.name), getattr(alone, field.name)
        if field.name == "rows":
            assert [row.tolist() for row in got] == [row.tolist() for row in expected]
        elif field.name == "group_N":
            assert got.tolist() == [1, 3]  # they keep their numbers
        else:
            assert np.array_equal(got, expected), field.name


# --- routing ------------------------------------------------------------------------------------------------------


def test_rows_belong_to_environments_and_teachers_to_labels(batch):
    config = config_of(teacher=("a", "echo/small=b"))
    assert world_places(batch.trajectories, config).tolist() == [0, 1, 0, 1]
    echo = config.worlds[1]
    assert [label_of(t, echo) for t in batch.trajectories] == [None, "small", None, None]


@pytest.mark.parametrize("gap, algorithm", [("sampled", OPD()), ("exact", OPD()), ("sampled", VOPD())])
def test_each_row_is_scored_under_its_own_teacher(gap, algorithm, batch, models, caplog):
    folders = {name: load_model(str(folder), "teacher") for name, folder in models.items()}
    student = load_model(str(models["student"]), "student")

    def scores(*teacher):
        config = config_of(student="s", teacher=teacher, gap=gap)
        return StepScorer(config, algorithm, student, None, lambda name, *_: folders[name], "cpu").score(batch)

    alone = {name: scores(name) for name in models}
    with caplog.at_level(logging.WARNING):
        mixed = scores("toy=teacher", "echo=student", "echo/small=teacher", "echo/tiny=student")
    taught_M = np.array([True] * 3 + [True] + [True] * 2 + [False] * 4)
    for name in ("teacher_M", "teacher_support_MS", "reverse_kl_M", "gap_mean_M"):
        value = getattr(mixed, name)
        if getattr(alone["teacher"], name) is None:
            assert value is None
            continue
        np.testing.assert_allclose(value[taught_M], getattr(alone["teacher"], name)[taught_M], atol=1e-5)
        np.testing.assert_allclose(value[~taught_M], getattr(alone["student"], name)[~taught_M], atol=1e-5)
    np.testing.assert_allclose(mixed.student_M, alone["teacher"].student_M, atol=1e-5)
    gap_M = np.abs(mixed.teacher_M - mixed.student_M)
    assert gap_M[~taught_M].max() < 1e-5 < gap_M[taught_M].mean(), "the student agrees with itself"
    assert "--teacher echo/tiny: no task of the first step has this label; there were: large, small" in caplog.text


def test_one_teacher_of_another_family_is_refused(models):
    import tiny

    student = load_model(str(models["student"]), "student")
    other = LoadedModel("other", tiny.model(tiny.tokenizer()), tiny.tokenizer())
    config = config_of(teacher=("student", "echo/small=other"))
    with pytest.raises(AtodError, match=r"student .* and teacher 'other' have different tokenizers"):
        StepScorer(config, OPD(), student, None, lambda name, *_: other if name == "other" else student, "cpu")


def test_the_gap_is_bounded_by_each_environments_own_limit(batch, models):
    student = load_model(str(models["student"]), "student")
    teacher = load_model(str(models["teacher"]), "teacher")

    def gaps(**changes):
        scorer = StepScorer(config_of(**changes), OPD(), student, None, lambda *_: teacher, "cpu")
        scores = scorer.score(batch)
        return scores.teacher_M - scores.student_M

    free, bound = gaps(), gaps(gap_clip=("toy=0", "echo=0.01"))
    echo_M = np.array([False] * 3 + [True] + [False] * 2 + [True] * 4)
    np.testing.assert_allclose(bound[~echo_M], free[~echo_M], atol=1e-6)
    np.testing.assert_allclose(bound[echo_M], np.clip(free[echo_M], -0.01, 0.01), atol=1e-6)
    assert np.abs(free).min() > 0.01


# --- size of the teacher's term -----------------------------------------------------------------------------------


def scores_of(toy, echo):
    """Constant gaps of both signs: |gap| is ``toy`` on the toy world's 5 tokens and ``echo`` on the other's 5."""
    gap_M = np.array([toy, -toy, toy, echo, -toy, toy, echo, -echo, echo, echo])
    return Scores(np.full(10, -1.0), gap_M - 1.0)


def test_equal_sizes_by_hand(batch):
    """Mean gaps 3 and 1 have the mean 2: factors 2/3 and 2, and both terms then have the size 2."""
    config, world_N = config_of(gap_scale=("equal",)), np.array([0, 1, 0, 1])
    scores = scores_of(3.0, 1.0)
    factors = gap_factors(config, world_N, batch, scores)
    np.testing.assert_allclose(factors, [2 / 3, 2.0])
    terms = ATOD(weighting="none", coef_anneal_steps=0).advantages(batch, scores, 1)
    scaled = terms.scaled(factors[world_N][batch.trajectory_M])
    np.testing.assert_allclose(np.abs(scaled.distillation_M), 2.0)
    np.testing.assert_allclose(np.sign(scaled.distillation_M), np.sign(scores.teacher_M - scores.student_M))
    np.testing.assert_allclose(scaled.teacher_weight_M[:4], [2 / 3, 2 / 3, 2 / 3, 2.0])
    np.testing.assert_array_equal(scaled.reward_M, terms.reward_M)


def test_a_teacher_who_agrees_is_not_made_loud(batch):
    """Mean gaps 4 and 0: the mean is 2; 2/0 is cut at 10."""
    config, world_N = config_of(gap_scale=("equal",)), np.array([0, 1, 0, 1])
    np.testing.assert_allclose(gap_factors(config, world_N, batch, scores_of(4.0, 0.0)), [0.5, 10.0])


def test_an_environment_that_was_not_played_counts_for_nothing(batch):
    part, keep_M = part_of(batch, np.array([True, False, True, False]))
    scores = scores_of(3.0, 1.0).only(keep_M)
    config = config_of(gap_scale=("equal",))
    np.testing.assert_allclose(gap_factors(config, np.array([0, 0]), part, scores), [1.0, 1.0])


def test_factors_can_be_given(batch):
    config, world_N = config_of(gap_scale=("echo=0.25",)), np.array([0, 1, 0, 1])
    np.testing.assert_allclose(gap_factors(config, world_N, batch, scores_of(3.0, 1.0)), [1.0, 0.25])
    for wrong in (("echo=-1",), ("echo=nan",), ("echo=loud",), ("eco=1",), ("equal", "echo=1")):
        with pytest.raises(AtodError, match="gap-scale"):
            require_scale(config_of(gap_scale=wrong), OPD())
    right = config_of(gap_scale=("echo=0.5",))
    for taught in (OPD(), SageOPD()):
        require_scale(right, taught)
    with pytest.raises(AtodError, match="learns from no teacher; leave it out"):
        require_scale(right, GRPO())
    with pytest.raises(AtodError, match="top-k tokens by a loss of their own"):
        require_scale(right, GKD())
    require_scale(config_of(), GRPO())


def test_a_method_without_such_a_term_is_refused():
    with pytest.raises(AtodError, match="--gap-scale: the algorithm has no term of its teacher"):
        Advantages(reward_M=np.ones(2)).scaled(np.ones(2))
