"""GRPO's forms, dynamic sampling and GiGPO, by numbers worked out by hand and by brute force."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import batch_of, close
from episodes import batch_from, episode, uniform_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Objective
from atod_algos.gigpo import GiGPO, anchor_states, discounted_returns
from atod_algos.grpo import GRPO, differing_groups
from atod_algos.learner.loss import aggregation_weights
from atod_algos.rollout.task_sampler import StepSampler
from atod_algos.training.cli import with_rules
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import Group


@pytest.fixture(scope="module")
def baselines(golden):
    """The recorded numbers of the other methods."""
    return golden["baselines"]


# --- GRPO's forms -------------------------------------------------------------------------------------------------


def test_every_average_by_hand(baselines):
    """Two trajectories: one of two turns with 3 and 1 tokens, one of a single turn with 1 token."""
    case = baselines["loss_aggregation"]
    long, short = case["per_token_loss"]
    turns = [{"student_logp": [0.0] * n, "teacher_logp": [0.0] * n, "mask": [1] * n} for n in (3, 1, 1)]
    batch, _, _ = batch_of(
        [{"group": "x", "reward": 0.0, "turns": turns[:2]}, {"group": "x", "reward": 0.0, "turns": turns[2:]}]
    )
    loss = np.array([*long, short[0]])
    everybody = np.ones(2, bool)

    def average(how, chosen=everybody, **options):
        return float((loss * aggregation_weights(batch, chosen, Objective(loss_agg=how, **options))).sum())

    close(average("token_mean"), case["token_mean"])
    close(average("trajectory_mean"), case["seq_mean_token_mean"])
    # verl divides the sum by the padded length, Dr. GRPO (and we) also by the number of trajectories.
    close(2 * average("constant", length_divisor=4), case["seq_mean_token_sum_norm_padded_length_4"])
    close(average("constant", length_divisor=1), case["seq_mean_token_sum"])
    close(average("turn_mean"), (2.0 + 4.0 + 10.0) / 3)
    only_first = np.array([True, False])
    close(average("turn_mean", only_first), (2.0 + 4.0) / 2)
    close(average("constant", only_first, length_divisor=5), 10 / 5)


def test_dr_grpo_neither_divides_by_the_deviation_nor_by_the_length(baselines):
    algorithm = with_rules(GRPO, "dr_grpo")
    batch = batch_from([episode(["a"] * n, won) for n, won in ((1, True), (3, False), (2, False), (2, False))])
    advantage = algorithm.advantages(batch, uniform_scores(batch), 1).token_M
    close(
        np.unique(advantage), [-0.25, 0.75]
    )  # the paper's reward is 0 or 1: without a deviation, a scale would remain
    weights = aggregation_weights(batch, np.ones(4, bool), algorithm.objective)
    assert len(set(weights)) == 1  # a token counts the same in a long and in a short trajectory
    close(weights[0], 1 / (4 * 512))
    assert len(set(aggregation_weights(batch, np.ones(4, bool), Objective()))) == 3


def test_rules_preset_the_forms_of_the_papers():
    dapo = with_rules(GRPO, "dapo")
    assert (dapo.objective.clip_low, dapo.objective.clip_high, dapo.objective.loss_agg) == (0.2, 0.28, "token_mean")
    assert dapo.limits(1).rounds == 10 and dapo.kl_coef == 0
    assert with_rules(GRPO, "deepseek").kl_coef == 0.04 and with_rules(GRPO, "deepseek").scores == {"reference"}
    assert GRPO().limits(1).rounds == 1 and not GRPO().scores


def test_clip_higher_lets_a_good_token_grow_further():
    from atod_algos.learner.loss import surrogate

    ratio, up = torch.tensor([1.25], requires_grad=True), torch.tensor([1.0])
    for high, slope in ((0.2, 0.0), (0.28, -1.0)):
        loss, _ = surrogate(ratio, up, Objective(clip_high=high))
        (gradient,) = torch.autograd.grad(loss.sum(), ratio)
        assert gradient.item() == slope


# --- dynamic sampling ---------------------------------------------------------------------------------------------


class Cases:
    """Answers each group with the successes that a script has for it."""

    def __init__(self, successes):
        self.successes, self.asked = list(successes), []

    def __call__(self, specs, limits=None, on_finish=None):
        self.asked.append([(spec.task_id, spec.group_id, spec.seed) for spec in specs])
        groups = {}
        for spec in specs:
            groups.setdefault((spec.group_id, spec.task_id), []).append(spec)
        out = []
        for (group, task), members in groups.items():
            won = self.successes.pop(0)
            out.append(Group(task, tuple(episode(["o"], i < won, group, task) for i in range(len(members)))))
        return [trajectory for group in out for trajectory in group.trajectories]


def sampler(per_step=2):
    return StepSampler([TaskSet("train", [f"t{i}" for i in range(5)])], seed=3, tasks_per_step=per_step, group_size=4)


def played(algorithm, successes, step=1):
    rollout = Cases(successes)
    groups, metrics = sampler().play(step, algorithm, rollout, lambda text: None)
    return [sum(t.success for t in group.trajectories) for group in groups], metrics, rollout


def test_dynamic_sampling_plays_on_until_enough_groups_differ():
    dapo = with_rules(GRPO, "dapo")
    kept, metrics, rollout = played(dapo, [0, 4, 4, 3, 0, 1])
    assert kept == [3, 1] and len(rollout.asked) == 3
    assert metrics["sampling/rounds"] == 3 and metrics["sampling/episodes"] == 24
    assert metrics["sampling/informative_groups"] == pytest.approx(2 / 6)
    assert metrics["sampling/success"] == pytest.approx(12 / 24)


def test_dynamic_sampling_takes_no_more_than_it_needs_and_stops_at_its_bound():
    dapo = with_rules(GRPO, "dapo")
    assert played(dapo, [1, 2])[0] == [1, 2]
    assert played(dapo, [1, 0, 2, 3])[0] == [1, 2]  # the third good group is left over
    bounded = dataclasses.replace(dapo, sampling_rounds=2)
    kept, metrics, _ = played(bounded, [0, 1, 4, 4])
    assert kept == [1] and metrics["sampling/rounds"] == 2
    kept, metrics, _ = played(bounded, [0, 4, 4, 0])
    assert kept == [0, 4] and metrics["sampling/informative_groups"] == 0  # nothing better was found


def test_without_dynamic_sampling_every_group_counts():
    kept, metrics, rollout = played(GRPO(), [0, 4])
    assert kept == [0, 4] and metrics == {} and len(rollout.asked) == 1


def test_rounds_are_a_function_of_seed_and_step():
    dapo = with_rules(GRPO, "dapo")
    once = played(dapo, [0, 0, 1, 1], step=2)[2].asked
    again = sampler()
    again.play(1, dapo, Cases([0, 0, 0, 1, 1, 1]), lambda text: None)  # another first step
    rollout = Cases([0, 0, 1, 1])
    again.play(2, dapo, rollout, lambda text: None)
    assert rollout.asked == once
    seeds = [seed for asked in once for _, _, seed in asked]
    assert len(set(seeds)) == len(seeds)
    assert [asked[0] for asked in once] != [asked[0] for asked in played(dapo, [0, 0, 1, 1], step=3)[2].asked]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_group_is_informative_exactly_if_its_advantages_are_not_all_zero(members):
    groups = np.unique([g for g, _ in members], return_inverse=True)[1]
    reward = np.array([10.0 * r for _, r in members])
    useful = differing_groups(reward, groups)
    for g in range(groups.max() + 1):
        own = reward[groups == g]
        assert useful[g] == bool(np.abs(own - own.mean()).max() > 0)


# --- GiGPO --------------------------------------------------------------------------------------------------------


def test_gigpo_golden(baselines):
    case = baselines["GiGPO"]
    batch = batch_from([episode(["start", "won nearly"], True), episode(["start", "lost"], False)])
    algorithm = GiGPO(omega=case["omega"])
    first = [0, 2]
    advantage = algorithm.advantages(batch, uniform_scores(batch), 1).token_M[::2]
    close(advantage[first], case["A"])
    close(advantage[[1, 3]], case["A_E_mean_norm"])  # the second observations differ: no step advantage
    close(GiGPO(omega=0.0).advantages(batch, uniform_scores(batch), 1).token_M[::2][first], case["A_E_mean_norm"])


def test_gigpo_by_hand():
    """Group 1: A meets x, y, x and wins; B meets x, z and fails. Group 2 meets x as well, but is another task."""
    batch = batch_from(
        [episode(["x", "y", "x"], True), episode(["x", "z"], False)],
        [episode(["x"], True, "h", "u"), episode(["x"], True, "h", "u")],
    )
    returns = discounted_returns(np.array([0, 0, 10, 0, 0, 10, 10]), batch.trajectory_K, 0.95)
    close(returns, [9.025, 9.5, 10, 0, 0, 10, 10])
    assert anchor_states(batch).tolist() == [0, 1, 0, 0, 2, 3, 3]
    mean = (9.025 + 10 + 0) / 3
    step = np.array([9.025 - mean, 0, 10 - mean, -mean, 0, 0, 0])
    whole = np.array([5, 5, 5, -5, -5, 0, 0])
    result = GiGPO(omega=0.5).advantages(batch, uniform_scores(batch), 1)
    close(result.token_M[::2], whole + 0.5 * step)
    assert np.mean(result.notes["shared_turns"]) == pytest.approx(5 / 7)
    deviation = np.std([9.025, 10, 0], ddof=1) + 1e-6
    normed = dataclasses.replace(GiGPO(), group=dataclasses.replace(GiGPO().group, group_std=True))
    both = whole / (np.std([10, 0], ddof=1) + 1e-6) + step / deviation
    close(normed.advantages(batch, uniform_scores(batch), 1).token_M[::2], both)


def test_gigpo_takes_the_penalty_off_the_turn_itself():
    batch = batch_from([episode(["x", "y"], True, valid=[False, True]), episode(["x", "z"], False)])
    penal = GiGPO(group=dataclasses.replace(GiGPO().group, invalid_penalty=1.0))
    got = penal.advantages(batch, uniform_scores(batch), 1).token_M[::2]
    # The invalid turn's return 9.5 becomes 8.5; half of A's turns are invalid, so its reward 10 becomes 9.5.
    close(got, [4.75 + 4.25, 4.75, -4.75 - 4.25, -4.75])


def test_gigpo_uses_the_environments_own_rewards_where_the_score_is_rewarded():
    batch = batch_from([episode(["x", "y"], True, rewards=[0.25, 0.75]), episode(["x", "y"], False)])
    score = GiGPO(group=dataclasses.replace(GiGPO().group, reward="score"))
    got = score.advantages(batch, uniform_scores(batch), 1).token_M[::2]
    first, second = 2.5 + 0.95 * 7.5, 7.5
    close(got, [5 + first / 2, 5 + second / 2, -5 - first / 2, -5 - second / 2])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_gigpo_does_not_depend_on_the_order_of_the_trajectories(seed):
    rng = np.random.default_rng(seed)
    members = [
        episode([str(o) for o in rng.integers(0, 3, rng.integers(1, 5))], bool(rng.integers(2)), tokens=1)
        for _ in range(4)
    ]
    order = rng.permutation(4)

    def per_member(given):
        batch = batch_from(given)
        values = GiGPO().advantages(batch, uniform_scores(batch), 1).token_M
        return [values[batch.trajectory_M == n] for n in range(4)]

    straight, shuffled = per_member(members), per_member([members[i] for i in order])
    for place, member in enumerate(order):
        close(shuffled[place], straight[member])


def test_gigpo_without_weight_is_grpo_without_the_deviation():
    batch = batch_from([episode(["x"] * n, n % 2 == 0) for n in (1, 2, 3, 4)])
    grpo = GRPO(group=GroupOptions(group_std=False)).advantages(batch, uniform_scores(batch), 1)
    close(GiGPO(omega=0.0).advantages(batch, uniform_scores(batch), 1).token_M, grpo.token_M)
