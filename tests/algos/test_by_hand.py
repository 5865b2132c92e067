"""Parts of a step against plain formulas: what a test that compares a run with itself cannot notice."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from cases import RAGGED, batch_of, close, published
from episodes import outcome
from tinymodel import tiny_qwen3
from toyworld import ECHO, TOY, learner_options, small_model

from agents.chat import ChatFormat
from agents.engines.base import Completion, SamplingParams, uniform
from agents.engines.transformers import TransformersEngine
from agents.models import LoadedModel
from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Objective, RolloutLimits
from atod_algos.atod import ATOD
from atod_algos.batch import Scores, make_batch
from atod_algos.evaluate import Evaluation, episode_seed
from atod_algos.learner.learner import Learner
from atod_algos.learner.logprobs import score
from atod_algos.learner.optimizer import Updater, learning_rate
from atod_algos.opd import OPD
from atod_algos.report.data import Run
from atod_algos.rollout.async_rollout import correct
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.rollout.pools import Conditions, local_pool
from atod_algos.rollout.stage import Stage
from atod_algos.rollout.task_sampler import StepSampler
from atod_algos.study.outcomes import groups_of
from atod_algos.study.tables import with_spread
from atod_algos.teachers.local import StepScorer
from atod_algos.teachers.routing import scaled_gaps
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.demonstrations import ImitationOptions
from atod_algos.training.imitation import Imitator
from atod_algos.training.terms import loss_terms
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    made = []
    for i in range(8):
        prompt, response = (tuple(map(int, rng.integers(0, 60, n))) for n in (5 + i, 4 + i))
        turn = Turn(0, "", (), prompt, response, (-3.0,) * len(response), "", "", True, True, 0.0)
        made.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
    return make_batch([Group("t", tuple(made))])


def test_temperature_and_entropy_bonus_reach_the_gradient(tokenizer, batch):
    model = small_model(tokenizer, 5)
    advantage = np.random.default_rng(1).normal(size=batch.n_tokens)
    current = score(model, batch, temperature=0.7)[0]
    old = current + 0.05
    learner = Learner(copy.deepcopy(model), learner_options(minibatches=1, grad_clip=1e9))
    seen = {}
    learner.updater.optimizer.step = lambda: seen.update(
        {n: p.grad.clone() for n, p in learner.model.named_parameters()}
    )
    aim = Objective(loss_agg="token_mean", entropy_coef=0.3)
    metrics = learner.update(batch, advantage, old, aim, step=1, temperature=0.7, seed=0).metrics
    loss = torch.zeros(())
    for row, ids in enumerate(batch.rows):
        at, ids = np.flatnonzero(batch.row_M == row), torch.from_numpy(ids)
        logs = torch.log_softmax(model(ids[None]).logits[0, batch.column_M[at] - 1] / 0.7, -1)
        eta = (logs.gather(1, ids[batch.column_M[at], None])[:, 0] - torch.tensor(old[at])).exp()
        entropy = -(logs.exp() * logs).sum(-1)
        loss = loss - (eta * torch.tensor(advantage[at]) + 0.3 * entropy).sum() / batch.n_tokens
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, atol=3e-6, rtol=2e-3)
    assert metrics["actor/ppo_kl"] == pytest.approx(0.05, abs=1e-4)


def test_updates_are_adamws_with_the_runs_betas_decay_and_bound():
    options = learner_options(weight_decay=0.5, adam_beta2=0.9, grad_clip=1.0)
    own = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in own]
    groups = [{"params": plain[:1], "weight_decay": 0.5}, {"params": plain[1:], "weight_decay": 0.0}]
    updater, reference = Updater(own, options), torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.9))
    for scale in (0.1, 5.0, -3.0):
        for weights in (own, plain):
            torch.stack([scale * (i + 1) * (w**2).sum() for i, w in enumerate(weights)]).sum().backward()
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        reference.step()
        reference.zero_grad()
        updater.update(0.1)
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_each_step_has_its_rate(tokenizer, batch):
    options = learner_options(lr=0.01, lr_floor=0.1, warmup_steps=2, steps=5, minibatches=1)
    learner = Learner(small_model(tokenizer, 3), options)
    for step in (1, 2, 5):
        old = np.full(batch.n_tokens, -3.0)
        done = learner.update(batch, -old, old, Objective(), step=step, temperature=1.0, seed=0)
        assert (
            done.metrics["actor/lr"] == learner.updater.optimizer.param_groups[0]["lr"] == learning_rate(options, step)
        )


def test_minibatches_are_shuffled_anew_in_each_pass_and_step(tokenizer):
    learner = Learner(small_model(tokenizer, 3), learner_options(minibatches=4, epochs=2))
    one, other = ([part.tolist() for part, *_ in learner._plan(True, None, 16, seed)] for seed in (0, 1))
    assert sorted(itertools.chain(*one[:4])) == sorted(itertools.chain(*one[4:])) == list(range(16))
    assert one[:4] != one[4:] and one != other and one[0] != list(range(4))


def test_every_token_is_drawn_at_its_own_number(tokenizer):
    model = tiny_qwen3(97, 1)
    engine, prompt, done = TransformersEngine(model, slots=4), [5, 6, 7], {}
    for i in range(12):
        engine.submit(str(i), prompt, SamplingParams(4, seed=i))
    while len(done) < 12:
        done |= {c.request_id: c.token_ids for c in engine.step()}
    for i in range(12):
        ids = list(done[str(i)])
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([[*prompt, *ids]])).logits[0, 2:-1].double(), -1)
        upto = p.cumsum(-1)
        for k, token in enumerate(ids):
            (u,) = uniform(np.array([i]), np.array([k]))
            assert upto[k, token] - p[k, token] - 1e-5 <= u <= upto[k, token] + 1e-5


class Asked:
    """An engine that keeps what it was asked for."""

    version, max_context = 0, 512

    def __init__(self, ids):
        self.ids, self.open, self.params = tuple(ids), [], []

    def submit(self, request_id, prompt_ids, params):
        self.open.append(request_id)
        self.params.append(params)

    def step(self):
        open_, self.open = self.open, []
        return [Completion(name, self.ids, (-0.5,) * len(self.ids), True, 0.0) for name in open_]


def test_every_turn_is_asked_for_with_a_seed_of_its_own_at_the_rollouts_temperature(tokenizer):
    chat = ChatFormat(tokenizer)
    engine = Asked(chat.encode_response("hm"))
    rollout = Rollout(engine, chat, lambda: gym.make(TOY), style="compact", max_tokens=5, temperature=0.4)
    played = rollout.play([EpisodeSpec("say-fig-train", "g", seed) for seed in (3, 4)])
    assert len(engine.params) == sum(len(t.turns) for t in played) == 8
    assert len({p.seed for p in engine.params}) == 8
    assert {(p.temperature, p.max_tokens, p.stop_ids) for p in engine.params} == {(0.4, 5, chat.stop_ids)}


def test_an_algorithms_limit_never_lengthens_an_episode():
    stage = Stage(lambda: gym.make(TOY, max_turns=2), None)
    for limit, turns in ((9, 2), (1, 1), (None, 2)):
        env = stage.take(RolloutLimits(max_turns=limit))
        assert env.unwrapped.max_turns == turns
        stage.idle.append(env)


def test_another_runs_seed_plays_other_orders_and_episodes_and_every_epoch_has_its_own():
    def specs(seed, steps=(1, 2)):
        tasks = TaskSet("train", [f"t{i}" for i in range(20)])
        drawn = StepSampler([tasks], seed=seed, tasks_per_step=20, group_size=2)
        return [drawn.specs(step) for step in steps]

    (first, second), (other, _) = specs(0), specs(1)
    assert not {s.seed for s in first} & {s.seed for s in other}
    orders = [[s.task_id for s in part[::2]] for part in (first, second, other)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1] != orders[2] != orders[0]


def test_another_evaluation_seed_plays_other_episodes():
    assert len({episode_seed(seed, task) for seed in range(3) for task in "ab"}) == 6


def test_stale_tokens_are_weighted():
    old, sampler = np.log([0.2, 0.5, 0.9]), np.log([0.4, 0.5, 0.1])
    found, metrics = correct(np.array([1.0, 2.0, -3.0]), old, sampler, step=3, staleness=1)
    close(found, [0.5, 2.0, -6.0])
    assert metrics["staleness/steps"] == 1
    assert correct(np.ones(3), old, sampler, step=3, staleness=0) == (pytest.approx(np.ones(3)), {})


def test_under_an_exact_gap_the_policy_gradient_is_the_rewards_alone():
    batch, scores, _ = batch_of(RAGGED)
    scores = dataclasses.replace(scores, teacher_support_MS=np.log(np.full((batch.n_tokens, 2), 0.5)))
    config = resolve(TrainConfig(env=TOY, student="x", teacher="y", gap="exact"))
    for algorithm in (ATOD(), OPD()):
        terms = algorithm.advantages(batch, scores, 3)
        found = loss_terms(config, algorithm, batch, scores, terms, 3)
        close(found.advantage_M, np.zeros(batch.n_tokens) if terms.reward_M is None else terms.reward_M)
        close(found.divergence.weight_M, terms.teacher_weight_M)
        plain = loss_terms(dataclasses.replace(config, gap="sampled"), algorithm, batch, scores, terms, 3)
        close(plain.advantage_M, terms.token_M)
        assert plain.divergence is None


def test_a_given_scale_reaches_the_teachers_term(batch):
    config = resolve(TrainConfig(env=(TOY, ECHO), student="s", style="compact", gap_scale=("echo=0.25",)))
    mine = tuple(dataclasses.replace(t, env_id=TOY if n % 2 else ECHO) for n, t in enumerate(batch.trajectories))
    batch = dataclasses.replace(batch, trajectories=mine)
    scores = Scores(np.full(batch.n_tokens, -1.0), np.full(batch.n_tokens, -3.0))
    terms = OPD().advantages(batch, scores, 1)
    scaled, metrics = scaled_gaps(config, batch, scores, terms, ["toy", "echo"])
    close(scaled.distillation_M, np.where(batch.trajectory_M % 2, -2.0, -0.5))
    assert metrics == {"toy/gap_scale": 1.0, "echo/gap_scale": 0.25}


def test_teacher_and_student_are_scored_at_the_samplings_temperature(tokenizer, batch):
    student, teacher = (LoadedModel(n, small_model(tokenizer, s), tokenizer) for n, s in (("s", 5), ("t", 6)))
    config = resolve(TrainConfig(env=TOY, student="s", teacher="t", temperature=0.7))
    found = StepScorer(config, OPD(), student, None, lambda *_: teacher, "cpu").score(batch)
    close(found.student_M, score(student.model, batch, temperature=0.7)[0], 1e-5)
    close(found.teacher_M, score(teacher.model, batch, temperature=0.7)[0], 1e-5)


def test_what_a_step_publishes_by_hand():
    batch, scores, _ = batch_of(RAGGED)
    algorithm = ATOD(group=GroupOptions(invalid_penalty=0.5), tdur_min_turns=2)
    found = published(algorithm, batch, scores, 1)
    # Rewards 10, 0, 10, 0 of 3, 2, 1, 2 turns, one of them invalid.
    assert found["critic/rewards/mean"] == pytest.approx((40 - 0.5) / 8)
    assert found["response_length/mean"] == 14 / 8 and found["episode/tokens/mean"] == 14 / 4
    assert found["tip/n_skipped_few_turns"] == 1 and found["tip/n_skipped_low_div"] == 0
    assert found["tip/avg_max_div"] == pytest.approx((0.5 + 0.2 + 0.35 + 0.5) / 4)
    gap = scores.teacher_M - scores.student_M
    assert found["atod/teacher_student_gap_std"] == pytest.approx(np.sqrt((gap**2).mean()))
    first = batch.index_K[batch.turn_M] == 0
    assert found["sod_turn/teacher_entropy/turn_0"] == pytest.approx(-scores.teacher_M[first].mean())
    assert found["sod_turn/student_entropy/turn_0"] == pytest.approx(-scores.student_M[first].mean())


def test_a_turn_of_the_wrong_form_is_not_valid():
    good = outcome("a", True)
    bad = dataclasses.replace(good, task_id="b", turns=(dataclasses.replace(good.turns[0], format_ok=False),))
    assert Evaluation((good, bad)).valid == 0.5


def test_a_tables_spread_and_quarters(tmp_path):
    cells = [{"last": {"success": s}} for s in (0.6, 0.7, 0.8)]
    assert with_spread(cells, "last") == "70.0 ± 24.8" and with_spread(cells[:1], "last") == "60.0"
    rows = [{"step": n, "group/all_fail": float(n), "group/all_success": -float(n)} for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert groups_of({"folder": str(tmp_path)}) == {"fail_first": 1.5, "fail_last": 7.5, "success_last": -7.5}


def test_the_rate_of_imitation_rises_and_falls(tokenizer):
    fit = Imitator(small_model(tokenizer, 1), ImitationOptions(rounds=2, lr=1.0, warmup=0.1))
    close([fit._rate(x) for x in (0.0, 0.05, 0.1, 0.55, 1.0)], [0.01, 0.51, 1.0, 0.55, 0.1])


def test_each_world_has_its_own_longest_response(tokenizer):
    lengths = {"max_response": ("toy=8", "echo=6"), "max_context": ("toy=128", "echo=64")}
    config = resolve(TrainConfig(env=(TOY, ECHO), student="s", teacher="t", style="compact", **lengths))
    style = gym.make(TOY).unwrapped.prompt_styles()["compact"]
    pool = local_pool(config, [style] * 2, small_model(tokenizer, 1), ChatFormat(tokenizer))
    stages = pool._make(Conditions(None, 0.9)).stages
    found = [(s.policy.max_tokens, s.policy.context, s.policy.temperature) for s in stages]
    assert found == [(8, 128, 0.9), (6, 64, 0.9)]


def test_episodes_of_a_validation_are_scored_at_its_temperature():
    run = Run(Path(), {"train": {"temperature": 1.0, "eval_temperature": 0.4}}, {}, [], None)
    assert (run.temperature("train"), run.temperature("valid")) == (1.0, 0.4)
