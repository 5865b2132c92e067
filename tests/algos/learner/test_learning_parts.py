"""Batches, scoring, the learner and rollouts, each against a plain computation."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toyworld import TOY, learner_options, small_model

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from agents.engines.weight_check import verify_weights
from atod_algos.algorithm import Objective, RolloutLimits
from atod_algos.batch import RowLayout, make_batch
from atod_algos.evaluate import evaluate, wilson
from atod_algos.grpo import GRPO, k3
from atod_algos.learner import logprobs as scoring
from atod_algos.learner.learner import Learner
from atod_algos.learner.loss import aggregation_weights, importance_ratio, surrogate
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.rollout.task_sampler import StepSampler
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer)


def rollout_of(model, chat, style="compact", slots=8, **options):
    engine = TransformersEngine(model, slots=slots)
    return Rollout(engine, chat, lambda: gym.make(TOY), style=style, max_tokens=8, concurrency=slots, **options)


def specs(n, group=4):
    words = ("apple", "pear", "plum", "fig")
    return [EpisodeSpec(f"say-{words[i // group % 4]}-train", f"g{i // group}", 1000 + i) for i in range(n)]


@pytest.fixture(scope="module")
def groups(tokenizer, chat):
    return rollout_of(small_model(tokenizer, 5), chat).play_groups(specs(12))


@pytest.fixture(scope="module")
def batch(groups):
    return make_batch(groups)


def test_rows_hold_the_sampled_ids_where_the_batch_says(groups, batch):
    sampled = [i for g in groups for t in g.trajectories for turn in t.turns for i in turn.response_ids]
    assert [int(batch.rows[r][c]) for r, c in zip(batch.row_M, batch.column_M, strict=True)] == sampled
    logprobs = [x for g in groups for t in g.trajectories for turn in t.turns for x in turn.logprobs]
    assert batch.sampler_logprobs_M.tolist() == logprobs
    assert len(batch.rows) == 12 and batch.n_K.sum() == batch.n_tokens
    assert (batch.trajectory_B == np.arange(12)).all()


def test_a_conversation_is_one_row_and_a_window_one_row_a_turn(tokenizer, chat, groups, batch):
    per_turn = make_batch(groups, RowLayout.PER_TURN)
    assert len(per_turn.rows) == len(batch.trajectory_K) > len(batch.rows)
    assert per_turn.n_tokens == batch.n_tokens
    windows = make_batch(rollout_of(small_model(tokenizer, 5), chat, style="atod").play_groups(specs(4)))
    assert len(windows.rows) == len(windows.trajectory_K)


def test_layouts_score_the_same(tokenizer, groups, batch):
    model = small_model(tokenizer, 5)
    merged, _ = scoring.score(model, batch, temperature=1.0)
    per_turn, _ = scoring.score(model, make_batch(groups, RowLayout.PER_TURN), temperature=1.0)
    np.testing.assert_allclose(merged, per_turn, atol=2e-5)
    np.testing.assert_allclose(merged, batch.sampler_logprobs_M, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_and_entropies_are_those_of_plain_logits(tokenizer, batch, temperature, monkeypatch):
    model = small_model(tokenizer, 7)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 7 * len(tokenizer))  # several chunks
    logprobs, entropy = scoring.score(model, batch, temperature=temperature, budget=200, entropy=True)
    for m in range(0, batch.n_tokens, 17):
        row, column = batch.rows[batch.row_M[m]], batch.column_M[m]
        with torch.no_grad():
            all_logprobs = torch.log_softmax(
                model(torch.from_numpy(row[None, :column])).logits[0, -1] / temperature, -1
            )
        assert logprobs[m] == pytest.approx(float(all_logprobs[row[column]]), abs=2e-5)
        assert entropy[m] == pytest.approx(float(-(all_logprobs.exp() * all_logprobs).sum()), abs=2e-5)


def test_no_tensor_of_rows_by_positions_by_vocabulary_is_made(tokenizer, batch):
    model = small_model(tokenizer, 7)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape and out.shape[-1] == len(tokenizer):
                largest = max(largest, out.numel() // len(tokenizer))
            return out

    limit = scoring.CHUNK_LOGITS
    scoring.CHUNK_LOGITS = 48 * len(tokenizer)
    try:
        with Watch():
            index, logprobs, _ = scoring.row_logprobs(model, batch, np.arange(len(batch.rows)), temperature=1.0)
            logprobs.sum().backward()
    finally:
        scoring.CHUNK_LOGITS = limit
    assert len(index) > 200 and 0 < largest <= 48


def gradient(model, batch, advantage, old, objective, budget, minibatches=1):
    model = copy.deepcopy(model)
    learner = Learner(model, learner_options(lr=1e-3, token_budget=budget, minibatches=minibatches, grad_clip=1e9))
    seen = {}
    learner.updater.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    metrics = learner.update(batch, advantage, old, objective, step=1, temperature=1.0, seed=0).metrics
    return seen, metrics


def test_gradient_does_not_depend_on_the_micro_batches_and_equals_the_formula(tokenizer, batch):
    model = small_model(tokenizer, 5)
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=batch.n_tokens)
    old = batch.sampler_logprobs_M + rng.normal(size=batch.n_tokens) * 0.3
    for how in ("token_mean", "trajectory_mean"):
        objective = Objective(loss_agg=how)
        big, metrics = gradient(model, batch, advantage, old, objective, 10**6)
        small, _ = gradient(model, batch, advantage, old, objective, 1)
        plain = copy.deepcopy(model)
        loss = torch.zeros(())
        weights = aggregation_weights(batch, np.ones(len(batch.group_N), bool), objective)
        for row in range(len(batch.rows)):
            _, logprobs, _ = scoring.row_logprobs(plain, batch, np.array([row]), temperature=1.0)
            inside = np.flatnonzero(batch.row_M == row)
            eta = (logprobs - torch.tensor(old[inside])).exp()
            a = torch.tensor(advantage[inside])
            loss = loss - (torch.tensor(weights[inside]) * torch.minimum(eta * a, eta.clamp(0.8, 1.2) * a)).sum()
        loss.backward()
        assert metrics["actor/pg_loss"] == pytest.approx(float(loss), abs=1e-5)
        assert metrics["actor/pg_clipfrac"] > 0.05
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(big[name], parameter.grad, atol=2e-6, rtol=1e-3)
            torch.testing.assert_close(small[name], parameter.grad, atol=2e-6, rtol=1e-3)


def test_opd_gradient_lowers_the_gap_to_the_teacher(tokenizer, batch):
    """Teacher minus student: following it must raise the log-prob of what the teacher prefers."""
    student, teacher = small_model(tokenizer, 5), small_model(tokenizer, 6)
    old, _ = scoring.score(student, batch, temperature=1.0)
    target, _ = scoring.score(teacher, batch, temperature=1.0)
    delta = target - old
    Learner(student, learner_options(lr=1e-3, minibatches=1)).update(
        batch, delta, old, Objective(loss_agg="token_mean"), step=1, temperature=1.0, seed=0
    )
    new, _ = scoring.score(student, batch, temperature=1.0)
    assert ((new - old) * delta).mean() > 0


def test_a_nan_stops_before_the_weights_change(tokenizer, batch):
    model = small_model(tokenizer, 5)
    before = copy.deepcopy(model.state_dict())
    learner = Learner(model, learner_options(lr=1e-3, minibatches=1))
    with pytest.raises(AtodError, match="step 7: the gradient is nan"):
        learner.update(
            batch,
            np.zeros(batch.n_tokens),
            batch.sampler_logprobs_M,
            Objective(),
            step=7,
            temperature=1.0,
            seed=0,
            auxiliary=lambda logprobs, index_M: logprobs * math.nan,
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_episodes_run_free_and_do_not_depend_on_company(tokenizer, chat):
    model = small_model(tokenizer, 5)
    many = rollout_of(model, chat, slots=8).play(specs(16))
    few = rollout_of(model, chat, slots=3).play(specs(16))
    alone = [rollout_of(model, chat, slots=1).play([spec])[0] for spec in specs(16)[::5]]

    def said(trajectories):
        return [[turn.response_ids for turn in t.turns] for t in trajectories]

    assert said(many) == said(few)
    assert said(alone) == said(many[::5])
    assert [t.task_id for t in many] == [s.task_id for s in specs(16)]
    assert len({tuple(map(tuple, s)) for s in said(many)}) > 8  # members of a group sample differently


def test_a_finished_episode_generates_nothing_more(tokenizer, chat):
    rollout = rollout_of(small_model(tokenizer, 5), chat)
    trajectories = rollout.play(specs(8))
    sampled = sum(len(turn.response_ids) for t in trajectories for turn in t.turns)
    turns = sum(len(t.turns) for t in trajectories)
    assert rollout.engine.decoded == sampled - turns  # the first token of a turn comes with its prompt


def test_prompts_are_kept_token_exact(tokenizer, chat):
    for trajectory in rollout_of(small_model(tokenizer, 5), chat).play(specs(4)):
        for before, after in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            grown = before.prompt_ids + before.response_ids
            assert after.prompt_ids[: len(grown)] == grown


def test_limits_cut_training_episodes_and_leave_no_trace(tokenizer, chat):
    rollout = rollout_of(small_model(tokenizer, 5), chat)
    cut = rollout.play(specs(4), RolloutLimits(max_turns=2))
    whole = rollout.play(specs(4))
    assert max(len(t.turns) for t in cut) == 2 and max(len(t.turns) for t in whole) == 4
    assert {t.stop_reason for t in cut} <= {StopReason.TURN_LIMIT, StopReason.SUCCESS}


@pytest.mark.parametrize("context", [2, 12, 20])  # the probe of the weights fits into any of them
def test_prompts_that_never_fit_name_the_setting(tokenizer, chat, context):
    model = small_model(tokenizer, 5)
    engine = TransformersEngine(model, slots=4, max_context=context)
    assert verify_weights(engine, model) < 1e-4
    rollout = Rollout(engine, chat, lambda: gym.make(TOY), style="compact", max_tokens=8)
    sampler = StepSampler([gym.make(TOY).unwrapped.tasks], seed=0, tasks_per_step=2, group_size=2)
    with pytest.raises(AtodError, match=r"not one of 4 episodes could begin: .* raise --max-context"):
        sampler.play(1, GRPO(), rollout.play, lambda text: None)
    with pytest.raises(AtodError, match=r"not one of 1 episodes could begin: .* raise --max-context"):
        evaluate(rollout.play, ["say-fig-train"])
    rollout.close()


def test_an_episode_that_outgrows_the_context_ends_by_itself(tokenizer, chat):
    engine = TransformersEngine(small_model(tokenizer, 5), slots=4, max_context=60)
    rollout = Rollout(engine, chat, lambda: gym.make(TOY), style="compact", max_tokens=8)
    trajectories = rollout.play(specs(8))
    assert StopReason.CONTEXT_LIMIT in {t.stop_reason for t in trajectories}
    assert all(t.turns for t in trajectories)


def test_an_environment_that_waits_holds_up_nobody(tokenizer, chat):
    import threading

    from toy import ToyEnv

    waiting, together = [], threading.Event()

    class Slow(ToyEnv):
        """None goes on before eight are waiting at the same time."""

        blocking = True

        def _act(self, action):
            waiting.append(action)
            if len(waiting) == 8:
                together.set()
            assert together.wait(120), "each waited for the one before"
            return super()._act(action)

    engine = TransformersEngine(small_model(tokenizer, 5), slots=16)
    rollout = Rollout(engine, chat, Slow, style="compact", max_tokens=8)
    slow = rollout.play(specs(16))
    fast = rollout_of(small_model(tokenizer, 5), chat, slots=16).play(specs(16))
    assert [[t.response_ids for t in e.turns] for e in slow] == [[t.response_ids for t in e.turns] for e in fast]


def test_aborted_episodes_are_not_trained_on(groups):
    import dataclasses

    member = groups[0].trajectories[0]
    aborted = dataclasses.replace(member, stop_reason=StopReason.ABORTED)
    assert len(make_batch([Group(member.task_id, (member, aborted))]).group_N) == 1
    with pytest.raises(AtodError, match="no episode of the step holds a token"):
        make_batch([Group(member.task_id, (aborted,))])


@given(st.integers(1, 2000), st.data())
@settings(max_examples=50, deadline=None)
def test_wilson_interval_contains_the_rate(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_a_step_in_which_the_student_said_nothing_is_an_error_of_settings(groups):
    """A guide played every turn, or none of the student's prompts fitted."""
    silent = tuple(
        replace(turn, prompt_ids=(), response_ids=(), logprobs=()) for turn in groups[0].trajectories[0].turns
    )
    with pytest.raises(
        AtodError, match=r"no episode of the step holds a token that the student sampled.*--max-context"
    ):
        make_batch([Group(groups[0].task_id, (replace(groups[0].trajectories[0], turns=silent),))])


def test_wilson_known_value():
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)


def test_ratios_and_losses_stay_finite_at_any_log_prob():
    current = torch.tensor([0.0, -119.0, -0.5], requires_grad=True)
    ratio = importance_ratio(current, torch.tensor([-500.0, 0.0, -0.5]))
    assert torch.isfinite(ratio).all() and ratio[2] == 1
    loss, _ = surrogate(ratio, torch.tensor([-1.0, 1.0, 1.0]), Objective())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(current.grad).all()
    nothing, active = surrogate(torch.tensor([float("inf"), 1.0]), torch.zeros(2), Objective(dual_clip=3.0))
    assert nothing.tolist() == [0.0, 0.0] and not active.any()
    kl = k3(torch.tensor([-120.0, 0.0, -1.0]), torch.tensor([-1.0, -200.0, -2.0]))
    assert torch.isfinite(kl).all() and kl[0] > 1e8 and kl[2] == pytest.approx(np.exp(-1) + 1 - 1)


def test_a_step_without_advantages_moves_no_weight(tokenizer, batch, caplog):
    """Neither momentum nor decay may act where nothing was learned."""
    model = small_model(tokenizer, 3)
    learner = Learner(model, learner_options(lr=1e-2, minibatches=2))
    old = np.full(batch.n_tokens, -1.0)
    learner.update(batch, np.ones(batch.n_tokens), old, Objective(), step=1, temperature=1.0, seed=0)
    before = [weight.detach().clone() for weight in model.parameters()]
    with caplog.at_level("INFO"):
        update = learner.update(batch, np.zeros(batch.n_tokens), old, Objective(), step=2, temperature=1.0, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert update.metrics["actor/still_updates"] == 1.0 and "nothing was learned" in caplog.text
