"""GRPO's forms, GiGPO and the relatives of on-policy distillation, by numbers worked out by hand and by brute force."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_equations import batch_of
from toyworld import TOY, learner_options, small_model

from agents.chat import ChatFormat
from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Advantages, Objective, RolloutLimits
from atod_algos.batch import Scores, make_batch
from atod_algos.entropy_aware import EntropyAware
from atod_algos.gigpo import GiGPO, anchor_states, discounted_returns
from atod_algos.gopd import GOPD
from atod_algos.grpo import GRPO, differing_groups
from atod_algos.learner import logprobs
from atod_algos.learner.learner import Learner, SupportTerm
from atod_algos.learner.loss import aggregation_weights
from atod_algos.opd import OPD
from atod_algos.rollout.task_sampler import StepSampler
from atod_algos.tip import TIP, largest
from atod_algos.training.cli import main, with_rules
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def golden():
    path = Path(os.environ.get("ATOD_GOLDEN", REPOSITORY.parent / "shared" / "paper" / "golden_atod.json"))
    if not path.is_file():
        pytest.skip(f"no golden numbers at {path}; set ATOD_GOLDEN")
    return json.loads(path.read_text())["baselines"]


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=tolerance)


def episode(observations, success, group="g", task="t", valid=None, rewards=None, tokens=2):
    """An episode that answers the given observations with ``tokens`` tokens each."""
    turns = tuple(
        Turn(
            k,
            observation,
            (),
            (1, 2, 3),
            tuple(range(4, 4 + tokens)),
            (-0.5,) * tokens,
            "",
            "",
            True,
            valid[k] if valid else True,
            rewards[k] if rewards else 0.0,
        )
        for k, observation in enumerate(observations)
    )
    stop = StopReason.SUCCESS if success else StopReason.TURN_LIMIT
    return Trajectory("e", task, "train", "", group, 0, turns, "", success, float(success), stop)


def batch_from(*groups):
    return make_batch([Group(members[0].task_id, tuple(members)) for members in groups])


def uniform_scores(batch):
    return Scores(np.full(batch.n_tokens, -0.5))


# --- GRPO's forms -------------------------------------------------------------------------------------------------


def test_every_average_by_hand(golden):
    """Two trajectories: one of two turns with 3 and 1 tokens, one of a single turn with 1 token."""
    case = golden["loss_aggregation"]
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


def test_dr_grpo_neither_divides_by_the_deviation_nor_by_the_length(golden):
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
    return StepSampler(TaskSet("train", [f"t{i}" for i in range(5)]), seed=3, tasks_per_step=per_step, group_size=4)


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


def test_gigpo_golden(golden):
    case = golden["GiGPO"]
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
    for group in np.unique(anchor_states(batch_from(members))):
        assert group >= 0


def test_gigpo_without_weight_is_grpo_without_the_deviation():
    batch = batch_from([episode(["x"] * n, n % 2 == 0) for n in (1, 2, 3, 4)])
    grpo = GRPO(group=GroupOptions(group_std=False)).advantages(batch, uniform_scores(batch), 1)
    close(GiGPO(omega=0.0).advantages(batch, uniform_scores(batch), 1).token_M, grpo.token_M)


# --- whole distributions ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer)


@pytest.fixture(scope="module")
def batch(tokenizer):
    rng = np.random.default_rng(0)
    members = []
    for _ in range(3):
        turns, before = [], ()
        for k in range(2):
            prompt = before + tuple(int(i) for i in rng.integers(0, len(tokenizer), 5))
            response = tuple(int(i) for i in rng.integers(0, len(tokenizer), 6))
            turns.append(Turn(k, "o", (), prompt, response, (0.0,) * 6, "", "", True, True, 0.0))
            before = prompt + response
        members.append(Trajectory("e", "t", "s", "", "g", 0, tuple(turns), "", False, 0.0, StopReason.FAILURE))
    return make_batch([Group("t", tuple(members))])


def plain_logprobs(model, batch, temperature=1.0):
    """[M, V] log-probs by plain calls, one token at a time."""
    out = []
    for row, column in zip(batch.row_M, batch.column_M, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.rows[row][None, :column])).logits[0, -1]
        out.append(torch.log_softmax(logits.double() / temperature, -1).numpy())
    return np.array(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_comparison_equals_brute_force_in_any_chunks(tokenizer, batch, temperature, monkeypatch):
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6, hidden=48)
    own, theirs = plain_logprobs(student, batch, temperature), plain_logprobs(teacher, batch, temperature)
    ids = np.array([batch.rows[r][c] for r, c in zip(batch.row_M, batch.column_M, strict=True)])
    for limit in (1 << 24, 4 * 5 * len(tokenizer)):
        monkeypatch.setattr(logprobs, "CHUNK_LOGITS", limit)
        found = logprobs.compare(student, teacher, batch, temperature=temperature, budget=40, support=7)
        close(found.student_M, own[np.arange(len(ids)), ids], 2e-5)
        close(found.teacher_M, theirs[np.arange(len(ids)), ids], 2e-5)
        close(found.entropy_M, -(np.exp(own) * own).sum(1), 2e-5)
        close(found.teacher_entropy_M, -(np.exp(theirs) * theirs).sum(1), 2e-5)
        close(found.reverse_kl_M, (np.exp(own) * (own - theirs)).sum(1), 2e-5)
        best = np.sort(theirs, axis=1)[:, ::-1][:, :7]
        close(found.teacher_support_MS, best, 2e-5)
        close(np.take_along_axis(theirs, found.support_MS.astype(int), 1), best, 2e-5)
        assert found.vocabulary == len(tokenizer)


def test_comparison_equals_the_plain_scores_and_holds_no_large_tensor(tokenizer, batch, monkeypatch):
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6)
    logprobs.compare(student, teacher, batch, temperature=1.0)  # each model is tried once, on a few rows of logits
    weights = {model.get_output_embeddings().weight.data_ptr() for model in (student, teacher)}
    largest_seen = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest_seen
            out = func(*args, **(kwargs or {}))
            of_logits = isinstance(out, torch.Tensor) and out.shape and out.shape[-1] == len(tokenizer)
            if of_logits and out.data_ptr() not in weights:
                largest_seen = max(largest_seen, out.numel() // len(tokenizer))
            return out

    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * 3 * len(tokenizer))
    with Watch():
        found = logprobs.compare(student, teacher, batch, temperature=1.0, support=4)
    assert 0 < largest_seen <= 3 < batch.n_tokens
    close(found.student_M, logprobs.score(student, batch, temperature=1.0)[0])
    close(found.teacher_M, logprobs.score(teacher, batch, temperature=1.0)[0])


def test_padded_vocabularies_are_compared_where_both_have_ids(tokenizer, batch):
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6)
    teacher.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[len(tokenizer) :] = 0.05
    found = logprobs.compare(student, teacher, batch, temperature=1.0, support=10**6)
    assert found.vocabulary == len(tokenizer) and found.support_MS.shape == (batch.n_tokens, len(tokenizer))
    theirs = plain_logprobs(teacher, batch)[:, : len(tokenizer)]
    theirs -= np.log(np.exp(theirs).sum(1, keepdims=True))
    own = plain_logprobs(student, batch)
    close(found.reverse_kl_M, (np.exp(own) * (own - theirs)).sum(1), 2e-5)


def test_student_and_teacher_alike_leave_nothing_to_learn(tokenizer, batch):
    model = small_model(tokenizer, 5)
    found = logprobs.compare(model, model, batch, temperature=1.0)
    close(found.reverse_kl_M, np.zeros(batch.n_tokens))
    close(TIP(keep=1.0).advantages(batch, found, 1).token_M, np.zeros(batch.n_tokens))


# --- G-OPD --------------------------------------------------------------------------------------------------------


def test_gopd_golden(golden):
    for case in golden["G_OPD_advantage"]:
        turn = {"student_logp": case["student_logp_old"], "teacher_logp": case["teacher_logp"], "mask": [1, 1, 1]}
        batch, scores, _ = batch_of([{"group": "x", "reward": 0.0, "turns": [turn]}])
        scores = dataclasses.replace(scores, base_M=np.array(case["base_logp"]))
        close(GOPD(extrapolation=case["lambda"]).advantages(batch, scores, 1).token_M, case["A"])
        if case["lambda"] == 1.0:
            close(OPD().advantages(batch, scores, 1).token_M, case["A"])


def test_gopd_with_the_student_as_base_scales_the_gap():
    rng = np.random.default_rng(0)
    student, teacher = -rng.random(6), -rng.random(6)
    batch, _, _ = batch_of(
        [
            {
                "group": "x",
                "reward": 0.0,
                "turns": [{"student_logp": student, "teacher_logp": teacher, "mask": [1] * 6}],
            }
        ]
    )
    got = GOPD(extrapolation=1.25).advantages(batch, Scores(student, teacher, base_M=student), 1).token_M
    close(got, 1.25 * (teacher - student))


# --- TIP ----------------------------------------------------------------------------------------------------------


def test_tip_by_hand():
    entropy = np.array([0.0, 0.5, 1.0, 0.25]) * math.log(16)
    kl = np.array([2.0, 0.0, 1.0, 0.0])
    student, teacher = np.array([-1.0, -1.0, -2.0, -1.0]), np.array([-0.5, -3.0, -1.0, -1.5])
    turn = {"student_logp": student, "teacher_logp": teacher, "mask": [1] * 4}
    batch, _, _ = batch_of([{"group": "x", "reward": 0.0, "turns": [turn]}])
    scores = Scores(student, teacher, entropy_M=entropy, reverse_kl_M=kl, vocabulary=16)
    # Uncut: h~ = 0, .5, 1, .25 and d~ = 1, 0, .5, 0, so s = 1, .5, 1, .25.
    half = TIP(keep=0.5, entropy_quantile=1.0).advantages(batch, scores, 1)
    close(half.token_M, [2 * 0.5, 0, 2 * 1.0, 0])
    assert np.mean(half.notes["kept_ratio"]) == 0.5 and np.mean(half.notes["kept_kl_mean"]) == 1.5
    close(np.mean(half.notes["score_mean"]), 2.75 / 4)
    three = TIP(keep=0.75, entropy_quantile=1.0).advantages(batch, scores, 1)
    close(three.token_M, np.array([0.5, -2.0, 1.0, 0]) * 4 / 3)
    close(TIP(keep=1.0).advantages(batch, scores, 1).token_M, teacher - student)
    # Cut at the median, 0.375: h~ = 0, 1, 1, 2/3, so the second token overtakes and ties are settled by place.
    cut = TIP(keep=0.5, entropy_quantile=0.5).advantages(batch, scores, 1)
    close(cut.token_M, [2 * 0.5, 2 * -2.0, 0, 0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_largest_share_is_exact_and_on_top(values, share):
    scores = np.array(values)
    kept = largest(scores, share)
    assert 1 <= kept.sum() <= len(scores) and abs(kept.sum() - share * len(scores)) < 1
    if not kept.all():
        assert scores[kept].min() >= scores[~kept].max()


# --- entropy-aware ------------------------------------------------------------------------------------------------


def test_forward_kl_and_its_gradient_by_finite_differences():
    """Two places, five tokens; the whole vocabulary as support: the textbook KL(p_T || p_theta) and its gradient p_theta - p_T."""
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(2, 5)), dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([[0.1, 0.2, 0.0, 0.1, 0.3], [9.0, 0, 0, 0, 0]]).double(), -1).numpy()
    entropy = -(np.exp(teacher) * teacher).sum(1)
    assert entropy[0] > 0.8 > entropy[1]
    scores = Scores(np.zeros(2), np.zeros(2), teacher_entropy_M=entropy, teacher_support_MS=teacher)
    algorithm = EntropyAware(forward_coef=0.5)

    def loss(values):
        return algorithm.support_loss(torch.log_softmax(values, -1), np.array([0, 1]), scores)

    own = torch.log_softmax(logits, -1).detach().numpy()
    close(loss(logits).detach(), [0.5 * (np.exp(teacher[0]) * (teacher[0] - own[0])).sum(), 0.0])
    (gradient,) = torch.autograd.grad(loss(logits).sum(), logits)
    close(gradient, [0.5 * (np.exp(own[0]) - np.exp(teacher[0])), np.zeros(5)])
    for i, j in np.ndindex(2, 5):
        bump = torch.zeros_like(logits)
        bump[i, j] = 1e-6
        numeric = (loss(logits + bump).sum() - loss(logits - bump).sum()) / 2e-6
        assert gradient[i, j].item() == pytest.approx(numeric.item(), abs=1e-6)


def test_truncated_support_by_hand():
    teacher = np.log([[0.5, 0.3]])  # 0.2 of the mass is left out
    scores = Scores(np.zeros(1), np.zeros(1), teacher_entropy_M=np.array([1.0]), teacher_support_MS=teacher)
    got = EntropyAware().support_loss(torch.log(torch.tensor([[0.25, 0.6]])), np.array([0]), scores)
    close(got, [0.5 * math.log(2) + 0.3 * math.log(0.5)], 1e-6)


def test_the_learner_follows_the_whole_distribution(tokenizer, batch):
    """With no advantage at all, a step on the support loss alone is the gradient of the brute-force forward KL."""
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6)
    scores = logprobs.compare(student, teacher, batch, temperature=1.0, support=len(tokenizer))
    algorithm = EntropyAware(entropy_threshold=float(np.median(scores.teacher_entropy_M)))
    learner = Learner(student, learner_options(lr=1e-3, minibatches=1, grad_clip=1e9, token_budget=30))
    seen = {}
    learner.updater._optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in student.named_parameters()})
    metrics = learner.update(
        batch,
        np.zeros(batch.n_tokens),
        scores.student_M,
        Objective(loss_agg="token_mean"),
        step=1,
        temperature=1.0,
        seed=0,
        support=SupportTerm(scores.support_MS, lambda logprobs, index: algorithm.support_loss(logprobs, index, scores)),
    ).metrics
    theirs = torch.from_numpy(plain_logprobs(teacher, batch))
    marked = scores.teacher_entropy_M > algorithm.entropy_threshold
    student.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for m in np.flatnonzero(marked):
        row = torch.from_numpy(batch.rows[batch.row_M[m]][None, : batch.column_M[m]])
        own = torch.log_softmax(student(row).logits[0, -1].double(), -1)
        loss = loss + (theirs[m].exp() * (theirs[m] - own)).sum() / batch.n_tokens
    loss.backward()
    assert 0 < marked.sum() < batch.n_tokens
    assert metrics["actor/support_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, atol=2e-6, rtol=1e-3)


def test_support_needs_no_large_tensor_in_the_backward_pass(tokenizer, batch, monkeypatch):
    """Chunks are recomputed: the gradient does not depend on their size."""
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6)
    scores = logprobs.compare(student, teacher, batch, temperature=1.0, support=3)
    gradients = []
    for limit in (1 << 24, 4 * len(tokenizer)):
        monkeypatch.setattr(logprobs, "CHUNK_LOGITS", limit)
        student.zero_grad()
        found = logprobs.predict(
            student, batch, np.arange(len(batch.rows)), temperature=1.0, support_MS=scores.support_MS
        )
        assert found.support.shape == (batch.n_tokens, 3)
        found.support.sum().backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-4)


# --- in training --------------------------------------------------------------------------------------------------


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "2", "--max-response", "8", "--max-context", "128", "--lr", "4e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "0", "--report-tasks", "4", "--minibatches", "2", "--threads", "1",
        "--checkpoint-every", "2", "--keep-trajectories", "0",
    ]  # fmt: skip


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ends(rows, name, n=3):
    return sum(r[name] for r in rows[:n]) / n, sum(r[name] for r in rows[-n:]) / n


@pytest.mark.parametrize("algorithm, extra", [(GiGPO, []), (GRPO, ["--rules", "dr_grpo"])], ids=["gigpo", "dr_grpo"])
def test_reward_rises(algorithm, extra, options, tmp_path):
    bigger = ["--group-size", "8", "--lr", "2e-3", "--steps", "16"]
    main(algorithm, [*options, *bigger, *extra, "--run", str(tmp_path / "r")])
    before, after = ends(metrics_of(tmp_path / "r"), "episode/success", 4)
    assert after > before + 0.1


def test_dapo_learns_from_mixed_groups_only_and_resumes_bit_for_bit(options, tmp_path):
    dapo = [*options, "--rules", "dapo", "--max-turns", "1"]
    main(GRPO, [*dapo, "--steps", "4", "--run", str(tmp_path / "whole")])
    main(GRPO, [*dapo, "--steps", "2", "--run", str(tmp_path / "parts")])
    main(GRPO, [*dapo, "--steps", "4", "--run", str(tmp_path / "parts")])

    def timeless(run):
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))}
            for row in metrics_of(run)
        ]

    rows = timeless(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == rows
    for row in rows:
        assert 1 <= row["sampling/rounds"] <= 10 and row["sampling/episodes"] == 16 * row["sampling/rounds"]
        assert row["group/all_fail"] == row["group/all_success"] == 0


@pytest.mark.parametrize("algorithm", [GOPD, TIP, EntropyAware])
def test_relatives_close_the_gap_to_the_teacher(algorithm, options, tmp_path):
    extra = ["--entropy-threshold", "0.1"] if algorithm is EntropyAware else []
    main(algorithm, [*options, *extra, "--lr", "2e-3", "--steps", "10", "--run", str(tmp_path / "r")])
    rows = metrics_of(tmp_path / "r")
    before, after = ends(rows, f"{algorithm.name}/teacher_student_gap_mean")
    assert before < 0 and after > before + 0.02
    if algorithm is EntropyAware:
        assert "actor/support_loss" in rows[0] and 0 < rows[0]["entropy_aware/forward_ratio"] < 1


def test_rows_of_an_algorithm_hold_one_value_for_each_sampled_token(batch):
    for algorithm in (GiGPO(), GRPO()):
        result = algorithm.advantages(batch, Scores(np.zeros(batch.n_tokens)), 1)
        assert isinstance(result, Advantages) and result.token_M.shape == (batch.n_tokens,)
        assert algorithm.limits(1) == RolloutLimits()


@pytest.mark.parametrize(
    "algorithm, option, words",
    [
        (TIP, ["--keep", "0"], "--keep 0.0"),
        (EntropyAware, ["--support", "0"], "--support 0"),
        (GiGPO, ["--discount", "1.5"], "--discount 1.5"),
    ],
)
def test_impossible_options_are_answered_in_one_line(algorithm, option, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(algorithm, [*option, "--dry-run"])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in err and len(err.splitlines()) == 1


def test_a_base_model_of_ones_own(options, models, tmp_path):
    """The teacher as its own base has gained nothing, and what is left is OPD."""
    main(GOPD, [*options, "--steps", "1", "--base", str(models["teacher"]), "--run", str(tmp_path / "r")])
    (row,) = metrics_of(tmp_path / "r")
    assert row["gopd/teacher_gain_mean"] == 0
    assert row["gopd/student_drift_mean"] == pytest.approx(-row["gopd/teacher_student_gap_mean"])
