"""SOD, TCOD, SDAR and ATOD's ablations against recorded numbers, under both rule sets."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import batch_of, close, published

from atod_algos.advantages import GroupOptions, turn_mean
from atod_algos.algorithm import RolloutLimits
from atod_algos.atod import ATOD, mean_preserving
from atod_algos.batch import Scores
from atod_algos.grpo import GRPO
from atod_algos.opd import OPD
from atod_algos.sdar import SDAR
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.training.cli import with_rules
from atod_algos.turn_plans import ExpertFirst
from atod_envs.errors import AtodError

RULES = pytest.mark.parametrize("rules", ["paper", "released"])


def episode(gaps, reward=0.0, group="x", student=-1.0, valid=True):
    """A trajectory whose turns have the given gaps teacher - student, one list a turn."""
    turns = [
        {
            "student_logp": [student] * len(gap),
            "teacher_logp": [student + g for g in gap],
            "mask": [1] * len(gap),
            "valid": valid,
        }
        for gap in gaps
    ]
    return {"group": group, "reward": reward, "turns": turns}


@RULES
def test_sod_weights(golden, rules):
    for case in golden["baselines"]["SOD_weights"]:
        algorithm = with_rules(SOD, rules)
        assert (1e-6, 0.2) == (algorithm.weight_eps, algorithm.weight_cap) == (case["eps"], case["delta"])
        batch, scores, _ = batch_of([episode([[d, -d] for d in case["d"]])])
        result = algorithm.advantages(batch, scores, 1)
        close(result.turn_weight_K, case["w"])
        # One trajectory, so no reward advantage besides the group's own value of 0.
        close(result.token_M, np.repeat(case["w"], 2) * (scores.teacher_M - scores.student_M))


@RULES
def test_sod_is_grpo_plus_the_weighted_gap(golden, rules):
    batch, scores, _ = batch_of(golden["cases"][0]["inputs"]["trajectories"])
    sod = with_rules(SOD, rules)
    both = sod.advantages(batch, scores, 3)
    alone = dataclasses.replace(sod, grpo_coef=0.0).advantages(batch, scores, 3)
    grpo = with_rules(GRPO, rules).advantages(batch, scores, 3)
    close(both.token_M, alone.token_M + grpo.token_M)
    # By hand, the first trajectory: d = (0.5, 0.1, 0.3), so the later turns are capped at 1.2.
    close(both.turn_weight_K[:3], [1, 1.2, 1.2])
    close(alone.token_M[:3], [0.4, 0.6, -0.12])


def test_tcod_windows(golden):
    case = golden["baselines"]["TCOD_f2b_window"]
    original = with_rules(TCOD, "paper")
    for row in case["paper_eta2"]:
        assert min(original.limits(row["n"] + 1).max_turns, 30) == row["k"]
    again = with_rules(TCOD, "released")
    for row in case["atod_reimplementation_c3_cap50"]:
        assert min(again.limits(row["step"]).max_turns, 50) == row["k"]
    slower = dataclasses.replace(again, turns_every=6)
    for row in case["atod_reimplementation_c6_cap15"]:
        assert min(slower.limits(row["step"]).max_turns, 15) == row["k"]


def test_tcod_expert_prefix(golden):
    case = golden["baselines"]["TCOD_b2f_expert_prefix"]
    algorithm = TCOD(curriculum="back_to_front", turns_every=case["eta"])
    for row in case["values"]:
        limits = algorithm.limits(row["n"] + 1)
        assert limits == RolloutLimits(who=ExpertFirst(limits.who.leaves))
        assert max(0, case["L"] - limits.who.leaves) == row["prefix"]


def test_tcod_refuses_a_curriculum_that_does_not_grow():
    with pytest.raises(AtodError, match="--turns-every 0"):
        TCOD(turns_every=0)


@RULES
def test_opd_and_tcod_learn_from_the_same_gap(golden, rules):
    row = golden["baselines"]["OPD_advantage"]
    gaps = np.array(row["teacher_logp"]) - np.array(row["student_logp_old"])
    batch, _, _ = batch_of([episode([gaps])])
    scores = Scores(np.array(row["student_logp_old"]), np.array(row["teacher_logp"]))
    for algorithm in (OPD, TCOD):
        close(with_rules(algorithm, rules).advantages(batch, scores, 5).token_M, row["A"])


@RULES
def test_sdar_loss_gate_and_gradient(golden, rules):
    case = golden["baselines"]["SDAR"]
    algorithm = dataclasses.replace(with_rules(SDAR, rules), kl_coef=0.0)
    assert (algorithm.sdar_coef, algorithm.gate_beta) == (case["lambda"], case["beta"])
    student, teacher = np.array(case["student_logp_current"]), np.array(case["self_teacher_logp_detached"])
    scores = Scores(student, privileged_M=teacher)
    current = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    loss = algorithm.auxiliary_loss(current, np.arange(3), scores)
    close(loss.detach() / case["lambda"], case["per_token_loss_g_times_(teacher-student)"])
    close(loss.detach().mean(), case["lambda_times_aux"])
    loss.mean().backward()
    close(current.grad / case["lambda"], case["d_aux_d_student_logp"])
    batch, _, _ = batch_of([episode([[0.0, 0.0, 0.0]])])
    metrics = published(algorithm, batch, scores, 1)
    close(metrics["sdar/gate_mean"], np.mean(case["gate"]))
    close(metrics["sdar/gate_active_ratio"], case["gate_active_ratio_gt_0.5"])
    close(metrics["sdar/teacher_gap_mean"], np.mean(teacher - student))
    close(metrics["sdar/loss"], case["aux_loss_masked_mean"])


def test_sdar_gradient_by_finite_differences():
    """The gate is held where it was: the derivative of g (T - s) in s alone, not of sigma(b (T - s)) (T - s)."""
    rng = np.random.default_rng(0)
    student, teacher, reference = (-rng.exponential(1.0, 6) for _ in range(3))
    scores = Scores(student, privileged_M=teacher, reference_M=reference)
    algorithm = SDAR(sdar_coef=0.3, kl_coef=0.2)
    current = torch.tensor(student, requires_grad=True)
    algorithm.auxiliary_loss(current, np.arange(6), scores).sum().backward()
    gate = 1 / (1 + np.exp(-5.0 * (teacher - student)))

    def loss(values):
        x = reference - values
        return (0.3 * gate * (teacher - values) + 0.2 * (np.exp(x) - x - 1)).sum()

    for i in range(6):
        step = np.eye(6)[i] * 1e-6
        close(current.grad[i], (loss(student + step) - loss(student - step)) / 2e-6)


@RULES
def test_sdar_learns_reward_exactly_as_grpo_does(golden, rules):
    batch, scores, _ = batch_of(golden["cases"][2]["inputs"]["trajectories"])
    told = dataclasses.replace(scores, privileged_M=scores.student_M + 0.1)
    sdar, grpo = with_rules(SDAR, rules), with_rules(GRPO, rules)
    close(sdar.advantages(batch, told, 1).token_M, grpo.advantages(batch, scores, 1).token_M)
    assert sdar.kl_coef == grpo.kl_coef and ("reference" in sdar.scores) == (rules == "released")


def test_ablations(golden):
    """Each named ablation leaves out one thing and nothing else."""
    inputs = golden["cases"][0]["inputs"]
    batch, scores, _ = batch_of(inputs["trajectories"])
    full = ATOD(group=GroupOptions(reward="score"))
    rl = with_rules(GRPO, "paper").advantages(batch, scores, 40).token_M
    delta = scores.teacher_M - scores.student_M
    token = golden["ablations_on_E1_data"]["token_level_reweighting"]["w"]
    for weighting, weight_M in (("token", np.array(token)), ("none", np.ones(batch.n_tokens))):
        got = dataclasses.replace(full, weighting=weighting).advantages(batch, scores, 40)
        close(got.token_M, 0.55 * delta * weight_M + 1.5 * rl)
        close(got.turn_weight_K, turn_mean(weight_M, batch.turn_M, len(batch.index_K)))
    weight_M = full.advantages(batch, scores, 40).turn_weight_K[batch.turn_M]
    constant = dataclasses.replace(full, coef_anneal_steps=0)
    for step in (1, 40, 400):
        got = constant.advantages(batch, scores, step)
        close(got.token_M, delta * weight_M + rl)
        assert (got.coefficients["kl_coef"], got.coefficients["rl_coef"]) == (1.0, 1.0)


def test_mean_preserving_weights(golden):
    case = golden["ablations_on_E1_data"]["mean_preserving_option_t1"]
    n_K, zero_K = np.array(case["N_k"]), np.zeros(3, int)
    close(mean_preserving(np.array(case["z"]), n_K, zero_K), case["w"])
    batch, scores, _ = batch_of(golden["cases"][0]["inputs"]["trajectories"])
    weight_K = ATOD(tdur_mean_preserve=True).advantages(batch, scores, 1).turn_weight_K
    close(weight_K[:3], case["w"])
    mean_N = np.bincount(batch.trajectory_K, weight_K * batch.n_K) / np.bincount(batch.trajectory_K, batch.n_K)
    close(mean_N, np.ones(4))
    plain, level = (
        ATOD(weighting="token", tdur_mean_preserve=is_on).advantages(batch, scores, 1) for is_on in (False, True)
    )
    close(
        level.teacher_weight_M, level.coefficients["kl_coef"] * plain.teacher_weight_M / plain.teacher_weight_M.mean()
    )
