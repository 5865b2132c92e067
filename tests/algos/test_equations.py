"""The equations against recorded numbers (float64, 1e-6)."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import RAGGED, batch_of, close, one_token_a_turn, published

from atod_algos import advantages as maths
from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Objective
from atod_algos.atod import ATOD, token_weights
from atod_algos.grpo import GRPO
from atod_algos.learner.loss import aggregation_weights, surrogate
from atod_algos.metrics import term_metrics
from atod_algos.opd import OPD


def algorithm_for(inputs) -> ATOD:
    options = GroupOptions(
        reward="score",
        reward_scale=10.0,
        group_stats=inputs["group_stats_unit"],
        invalid_penalty=inputs["invalid_action_penalty"],
    )
    released = inputs["weight_rule"] == "released"
    schedule = inputs["schedule"]
    return ATOD(
        group=options,
        coef_anneal_steps=schedule["coef_anneal_steps"],
        kappa_init=schedule["kappa_init"],
        kappa_min=schedule["kappa_min"],
        rho_init=schedule["rho_init"],
        rho_max=schedule["rho_max"],
        tdur_min_turns=inputs["tip_min_turns"] if released else 1,
        tdur_min_divergence=inputs["tip_min_divergence"] if released else 0.0,
    )


def flat(case, key):
    """One value a token (masked ones left out) or one a turn."""
    values = []
    for given, trajectory in zip(case["inputs"]["trajectories"], case["expected"]["trajectories"], strict=True):
        for turn, value in zip(given["turns"], trajectory[key], strict=True):
            values += [x for x, m in zip(value, turn["mask"], strict=True) if m] if isinstance(value, list) else [value]
    return values


@pytest.mark.parametrize("index", range(5))
def test_cases_end_to_end(golden, index, monkeypatch):
    case = golden["cases"][index]
    inputs, expected = case["inputs"], case["expected"]
    if inputs["std_ddof"] == 0:
        original = maths.reward_advantage
        monkeypatch.setattr("atod_algos.algorithm.reward_advantage", lambda *a: original(*a, ddof=0))
    batch, scores, _ = batch_of(inputs["trajectories"])
    result = algorithm_for(inputs).advantages(batch, scores, inputs["step"])
    close(result.token_M, flat(case, "A"))
    close(result.turn_weight_K, flat(case, "w"))
    metrics = published(algorithm_for(inputs), batch, scores, inputs["step"])
    close(metrics["atod/kl_coef"], expected["kappa"])
    close(metrics["atod/rl_coef"], expected["rho"])
    names = {
        "opd_abs_mean": "atod/opd_abs_mean",
        "rl_abs_mean": "atod/rl_abs_mean",
        "opd_rl_ratio": "atod/opd_rl_ratio",
        "teacher_student_gap_mean": "atod/teacher_student_gap_mean",
        "raw_kl_mean": "atod/raw_kl_mean",
        "tdur_active_ratio": "tip/active_ratio",
        "mean_turn_weight": "tip/mean_importance",
    }
    for theirs, ours in names.items():
        close(metrics[ours], expected["diagnostics"][theirs])
    assert batch.n_tokens == expected["diagnostics"]["n_response_tokens"]


def test_schedule(golden):
    for row in golden["schedule"]:
        algorithm = ATOD(coef_anneal_steps=row["coef_anneal_steps"])
        coefficients = algorithm.advantages(*one_token_a_turn([0.1], [0.2]), row["step"]).coefficients
        close(coefficients["kl_coef"], row["kappa"])
        close(coefficients["rl_coef"], row["rho"])


def test_group_advantage(golden):
    for case in golden["group_advantage"]:
        reward, group = np.array(case["rewards"], dtype=float), np.zeros(len(case["rewards"]), int)
        close(maths.group_advantage(reward, group), case["A_ddof1"])
        close(maths.group_advantage(reward, group, ddof=0), case["A_ddof0"])
        close(maths.group_advantage(reward, group, divide=False), case["A_dr_grpo_no_std"])


def test_equal_rewards_of_any_size_say_exactly_nothing():
    """Three thirds of a tenth do not sum to a tenth; an optimizer would make a whole step of what is left."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(2, 17))
        reward = np.append(np.full(n, rng.integers(1, 100) / rng.integers(1, 60) * 10), [1.0, 2.0, 7.0])
        group = np.append(np.zeros(n, dtype=int), [1, 1, 2])
        for divide in (False, True):
            found = maths.group_advantage(reward, group, divide=divide)
            assert not found[:n].any() and found[n] < 0 < found[n + 1] and found[n + 2] == 0


def test_a_group_of_one_says_nothing_but_under_the_released_statistics():
    """r - mean is 0 (eq 2); the released code takes mean 0 and deviation 1 where a group has one row."""
    turns = [{"student_logp": [-1.0], "teacher_logp": [-1.0], "mask": [1]}]
    alone = {"group": "one", "reward": 10.0, "turns": turns}
    two = [{"group": "two", "reward": reward, "turns": turns} for reward in (10.0, 0.0)]
    batch, scores, _ = batch_of([alone, *two])
    for divide in (True, False):
        by_trajectory = GRPO(group=GroupOptions(group_std=divide)).advantages(batch, scores, 1).token_M
        by_row = GRPO(group=GroupOptions(group_stats="turn_row", group_std=divide)).advantages(batch, scores, 1).token_M
        assert by_trajectory[0] == 0.0 and by_trajectory[1] > 0 > by_trajectory[2]
        close(by_row, [10.0, *by_trajectory[1:]], 2e-5)


def test_an_episode_without_a_turn_is_no_exception_of_turn_weights():
    batch, scores, _ = batch_of([{"group": "x", "reward": 0.0, "turns": []}, *RAGGED])
    published_now = published(ATOD(), batch, scores, 1)
    assert published_now["tip/active_ratio"] == 1.0 and published_now["tip/n_skipped_few_turns"] == 0.0


def test_group_advantage_over_turn_rows(golden):
    case = golden["group_advantage_turn_rows"]
    reward_N, turns = np.array(case["rewards"], dtype=float), case["n_turns"]
    trajectory_K = np.repeat(np.arange(len(turns)), turns)
    first = np.searchsorted(trajectory_K, np.arange(len(turns)))
    valid_K, group_N = np.ones(len(trajectory_K), bool), np.zeros(len(turns), int)
    for unit, key in (("turn_row", "A_per_trajectory_row_level"), ("trajectory", "A_per_trajectory_trajectory_level")):
        got_K = maths.reward_advantage(reward_N, group_N, trajectory_K, valid_K, GroupOptions(group_stats=unit))
        close(got_K[first], case[key])


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_turn_weights(golden, rule):
    algorithm = ATOD() if rule == "paper" else ATOD(tdur_min_turns=3, tdur_min_divergence=0.01)
    for case in golden["turn_weights"]:
        d, h = np.array(case["d"]), np.array(case["h"])
        zero, counted = np.zeros(len(d), int), np.ones(len(d), bool)
        close(maths.min_max_by_trajectory(d, zero, counted), case["d_norm"])
        result = algorithm.advantages(*one_token_a_turn(d, h), 1)
        close(result.turn_weight_K, case[f"w_{rule}"])
        if rule == "released":
            assert (result.left_out_N[0] == 0) == case["released_computed"]


def test_printed_figure_is_reproduced(golden):
    figure = golden["figure11_second_hand"]
    d, h = np.array(figure["d"]), np.array(figure["h"])
    weights = ATOD().advantages(*one_token_a_turn(d, h), 1).turn_weight_K
    close(weights, figure["w_formula"])
    close(weights, figure["w_printed"], 0.02)


def test_token_level_ablation(golden):
    expected = golden["ablations_on_E1_data"]["token_level_reweighting"]
    batch, scores, _ = batch_of(golden["cases"][0]["inputs"]["trajectories"])
    close(token_weights(scores.student_M, scores.teacher_M - scores.student_M), expected["w"])
    inputs = golden["cases"][0]["inputs"]
    ablation = dataclasses.replace(algorithm_for(inputs), weighting="token").advantages(batch, scores, inputs["step"])
    full = algorithm_for(inputs).advantages(batch, scores, inputs["step"])
    delta = scores.teacher_M - scores.student_M
    close(ablation.token_M - full.token_M, 0.55 * delta * (np.array(expected["w"]) - full.turn_weight_K[batch.turn_M]))


@pytest.mark.parametrize("name, dual", [("plain_clip", 0.0), ("dual_clip_3", 3.0)])
def test_surrogate(golden, name, dual):
    case, expected = golden["cases"][0], golden["surrogate_on_E1"]
    batch, _scores, _ = batch_of(case["inputs"]["trajectories"])
    advantage = torch.tensor(flat(case, "A"), dtype=torch.float64)
    eta = []
    for trajectory in case["inputs"]["trajectories"]:
        for turn, ratios in zip(trajectory["turns"], expected["eta"][trajectory["id"]], strict=True):
            eta += [r for r, m in zip(ratios, turn["mask"], strict=True) if m]
    loss, _ = surrogate(torch.tensor(eta, dtype=torch.float64), advantage, Objective(dual_clip=dual))
    chosen = np.ones(len(batch.group_N), bool)
    token = (loss.numpy() * aggregation_weights(batch, chosen, Objective(loss_agg="token_mean"))).sum()
    trajectory = (loss.numpy() * aggregation_weights(batch, chosen, Objective())).sum()
    close(token, expected[name]["loss_token_mean"])
    close(trajectory, expected[name]["loss_trajectory_mean_of_token_mean_eq4"])


def test_opd_advantage_and_k3(golden):
    row = golden["baselines"]["OPD_advantage"]
    trajectory = [
        {
            "group": "x",
            "reward": 0.0,
            "turns": [
                {"student_logp": row["student_logp_old"], "teacher_logp": row["teacher_logp"], "mask": [1, 1, 1]}
            ],
        }
    ]
    batch, scores, _ = batch_of(trajectory)
    close(OPD().advantages(batch, scores, 1).token_M, row["A"])
    for case in golden["baselines"]["k3_kl_low_var_kl"]:
        reference = dataclasses.replace(scores, reference_M=np.array([case["ref_logp"]]))
        loss = GRPO(kl_coef=1.0).auxiliary_loss(
            torch.tensor([case["policy_logp"]], dtype=torch.float64), np.array([0]), reference
        )
        close(loss, [case["value"]])


def test_terms_are_measured_where_the_paper_measures_them():
    metrics = term_metrics(np.array([1.0, -1.0, 0.0]), np.array([0.5, 0.5, 0.5]), "atod")
    assert metrics["atod/opd_rl_ratio"] == pytest.approx(2 / 1.5)
    assert metrics["atod/opd_mean"] == 0.0 and metrics["atod/opd_abs_mean"] == pytest.approx(2 / 3)


def test_an_example_worked_by_hand():
    """Step 40 of 80: kappa 0.55, rho 1.5. Rewards 10, 0, 10, 0: advantages +-sqrt(3)/2. The last trajectory holds a
    masked token with extreme log-probs, which must not be felt anywhere."""

    def turn(student, teacher, mask=None):
        return {"student_logp": student, "teacher_logp": teacher, "mask": mask or [1] * len(student)}

    trajectories = [
        {"group": "x", "reward": 10.0, "turns": [
            turn([-0.5, -1.5], [-0.1, -0.9]), turn([-0.2], [-0.3]), turn([-0.4, -0.8, -0.6], [-0.7, -0.2, -0.6])]},
        {"group": "x", "reward": 0.0, "turns": [turn([-1.0, -0.5], [-0.8, -0.7]), turn([-0.3], [-0.5])]},
        {"group": "x", "reward": 10.0, "turns": [turn([-0.9, -0.1], [-0.4, -0.3])]},
        {"group": "x", "reward": 0.0, "turns": [
            turn([-0.7, -5.0, -0.3], [-0.2, -9.0, -0.6], [1, 0, 1]), turn([-0.1], [-2.1]), turn([-1.6], [-1.4])]},
    ]  # fmt: skip
    batch, scores, _ = batch_of(trajectories)
    algorithm = ATOD(group=GroupOptions(reward="score"))
    result = algorithm.advantages(batch, scores, 40)
    close(result.turn_weight_K, [1, 0, 0.75, 1, 0.5, 0.75, 47 / 135, 1, 1])
    rl = 1.5 * 5 / (np.std([10, 0, 10, 0], ddof=1) + 1e-6)
    close(result.token_M[0], 0.55 * 0.4 + rl)
    close(result.token_M[2], rl)  # the least informative turn gets no distillation at all
    close(result.token_M[9], 0.55 * 0.5 * 0.75 + rl)
    close(result.token_M[11], 0.55 * 0.5 * 47 / 135 - rl)
    close(algorithm.advantages(batch, scores, 1).coefficients["kl_coef"], 0.98875)
