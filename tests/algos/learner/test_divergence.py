"""The teacher's term as a loss (``--gap exact``): its gradient against the plain formula, its updates, its limits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from cases import batch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toyworld import TOY, learner_options, small_model

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from agents.models import load_model
from atod_algos.algorithm import Objective
from atod_algos.atod import ATOD
from atod_algos.batch import make_batch
from atod_algos.gopd import GOPD
from atod_algos.grpo import GRPO
from atod_algos.learner import logprobs as scoring
from atod_algos.learner.distribution import distribution
from atod_algos.learner.learner import SANE_KL, Learner
from atod_algos.learner.lora import add_adapters
from atod_algos.learner.loss import TeacherTokens, aggregation_weights, reverse_kl
from atod_algos.learner.minibatch import DivergenceTerm
from atod_algos.opd import OPD
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.signals.gkd import GKD
from atod_algos.signals.sage_opd import SageOPD
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.teachers.local import StepScorer
from atod_algos.training.cli import _departures, train
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError

ATTEMPTS = [
    {
        "group": "x",
        "reward": reward,
        "turns": [
            {"student_logp": [-1.0, -0.2], "teacher_logp": [-0.5, -0.4], "mask": [1, 1]},
            {"student_logp": [-0.3], "teacher_logp": [-2.0], "mask": [1]},
        ],
    }
    for reward in (10.0, 0.0)
]


@pytest.fixture(scope="module")
def batch(tokenizer):
    import gymnasium as gym

    engine = TransformersEngine(small_model(tokenizer, 3), slots=8, max_context=256)
    rollout = Rollout(
        engine, ChatFormat(tokenizer), lambda: gym.make(TOY), style="compact", max_tokens=8, concurrency=8
    )
    words = ("apple", "pear", "plum", "fig")
    specs = [EpisodeSpec(f"say-{words[i % 4]}-train", f"g{i % 4}", i) for i in range(8)]
    return make_batch(rollout.play_groups(specs))


@pytest.fixture
def pair(tokenizer):
    return small_model(tokenizer, 5), small_model(tokenizer, 6)


def said(teacher, batch, topk=None):
    """What a teacher says, whole or its top-k tokens alone."""
    how = {} if topk is None else {"topk": topk, "whole": 0}
    return distribution(teacher, teacher, batch, temperature=1.0, **how)


def update(model, batch, term, *, advantage=None, objective=None, auxiliary=None, **options):
    """One step; the model it was made on, and the metrics."""
    model = copy.deepcopy(model)
    old = scoring.score(model, batch, temperature=1.0)[0]
    learner = Learner(model, learner_options(lr=1e-3, **{"minibatches": 1, **options}))
    advantage = np.zeros(batch.n_tokens) if advantage is None else advantage
    aim = objective or Objective()
    terms = {"divergence": term, "auxiliary": auxiliary}
    done = learner.update(batch, advantage, old, aim, step=1, temperature=1.0, seed=0, **terms)
    return model, done.metrics, learner


def gradient(model, batch, term, monkeypatch, **options):
    seen = {}

    def keep(updater, lr):
        seen.update({n: p.grad.clone() for n, p in copied.named_parameters() if p.grad is not None})
        updater.zero_grad()
        return 1.0

    copied = copy.deepcopy(model)
    old = scoring.score(copied, batch, temperature=1.0)[0]
    learner = Learner(copied, learner_options(lr=1e-3, minibatches=1, **options))
    monkeypatch.setattr(type(learner.updater), "update", keep)
    learner.update(batch, np.zeros(batch.n_tokens), old, Objective(), step=1, temperature=1.0, seed=0, divergence=term)
    return seen


@pytest.mark.parametrize("topk", [None, 5])
def test_gradient_is_that_of_the_plain_formula_however_the_batch_is_cut(pair, batch, topk, monkeypatch):
    student, teacher = pair
    weight_M = np.random.default_rng(0).uniform(0, 2, batch.n_tokens)
    teacher_M, tokens = said(teacher, batch, topk)
    np.testing.assert_allclose(teacher_M, scoring.score(teacher, batch, temperature=1.0)[0], atol=1e-5)
    term = DivergenceTerm(tokens, weight_M)
    found = gradient(student, batch, term, monkeypatch)
    small = gradient(student, batch, term, monkeypatch, token_budget=1)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 64)
    chunked = gradient(student, batch, term, monkeypatch)

    plain = copy.deepcopy(student)
    averaged = aggregation_weights(batch, np.ones(len(batch.group_N), bool), Objective())
    loss = torch.zeros(())
    for row, ids in enumerate(batch.rows):
        inside = np.flatnonzero(batch.row_M == row)
        before = batch.column_M[inside] - 1
        p, t = (
            torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, before].float(), -1)
            for model in (plain, teacher)
        )
        kl = (p.exp() * (p - t.detach())).sum(-1)
        if topk is not None:
            best = t.topk(topk).indices
            p, t = p.gather(1, best), t.gather(1, best).detach()
            left, their_left = 1 - p.exp().sum(-1), 1 - t.exp().sum(-1)
            kl = (p.exp() * (p - t)).sum(-1) + left * (left / their_left).log()
        loss = loss + (torch.tensor(averaged[inside] * weight_M[inside]) * kl).sum()
    loss.backward()
    for name, parameter in plain.named_parameters():
        for got in (found, small, chunked):
            torch.testing.assert_close(got[name], parameter.grad, atol=3e-6, rtol=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 11))
def test_it_is_the_expected_gap_and_a_bucket_never_raises_it(seed, topk):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 12, generator=rng, requires_grad=True)
    theirs = torch.log_softmax(torch.randn(4, 12, generator=rng), -1)
    own = torch.log_softmax(logits, -1)
    whole = reverse_kl(own, theirs)
    (exact,) = torch.autograd.grad(whole.sum(), logits, retain_graph=True)
    # What eq 7's sampled gap gives on average over the tokens that could have been sampled.
    expected = -(own.exp().detach() * (theirs - own).detach() * own).sum()
    (sampled,) = torch.autograd.grad(expected, logits, retain_graph=True)
    torch.testing.assert_close(exact, sampled, atol=1e-5, rtol=1e-4)
    best = theirs.topk(topk).indices
    part = reverse_kl(own.gather(1, best), theirs.gather(1, best))
    assert (part <= whole + 1e-5).all() and (part >= -1e-5).all()
    order = torch.randperm(12, generator=rng)
    torch.testing.assert_close(reverse_kl(own[:, order], theirs[:, order]), whole)
    assert reverse_kl(own, own.detach()).abs().max() < 1e-6


def test_terms_have_their_own_number_of_updates(pair, batch):
    student, teacher = pair
    term = DivergenceTerm(said(teacher, batch)[1], np.ones(batch.n_tokens))
    advantage = np.random.default_rng(0).normal(size=batch.n_tokens)
    counts = []
    for options, own, epochs in (
        ({"minibatches": 2, "epochs": 3}, 0, 1),
        ({"minibatches": 2}, 4, 2),
        ({"minibatches": 1}, 1, 1),
    ):
        chosen = dataclasses.replace(term, minibatches=own, epochs=epochs)
        _, metrics, learner = update(student, batch, chosen, advantage=advantage, **options)
        counts.append(int(learner.updater.moments()[0]["step"]))
        assert metrics["actor/divergence"] > 0 and metrics["actor/policy_kl"] >= 0
    assert counts == [6, 10, 2]
    _, metrics, _ = update(student, batch, term, advantage=advantage, minibatches=1)
    assert "actor/policy_kl" not in metrics, "nothing is measured after a step's only update"


def test_a_teacher_alone_is_approached_and_updates_with_nothing_to_say_are_left_out(pair, batch):
    student, teacher = pair
    term = DivergenceTerm(said(teacher, batch)[1], np.ones(batch.n_tokens), minibatches=4, epochs=2)
    before = scoring.compare(student, teacher, batch, temperature=1.0).require("reverse_kl").mean()
    model, metrics, learner = update(student, batch, term, minibatches=3, epochs=2)
    after = scoring.compare(model, teacher, batch, temperature=1.0).require("reverse_kl").mean()
    assert after < 0.97 * before
    assert int(learner.updater.moments()[0]["step"]) == 8
    assert "actor/pg_loss" not in metrics  # the reward's passes were not made
    assert metrics["actor/entropy_loss"] > 0, "what watches for a collapse needs it in every run"
    bonus = Objective(entropy_coef=0.01)
    _, metrics, learner = update(student, batch, term, minibatches=3, epochs=2, objective=bonus)
    assert int(learner.updater.moments()[0]["step"]) == 14 and "actor/entropy_loss" in metrics, (
        "it has something to say"
    )
    _, _, learner = update(
        student, batch, term, minibatches=3, epochs=2, auxiliary=lambda logprobs, _: logprobs.square()
    )
    assert int(learner.updater.moments()[0]["step"]) == 14, "so has a loss of the algorithm's own"
    silent = dataclasses.replace(term, weight_M=np.zeros(batch.n_tokens))
    _, metrics, learner = update(student, batch, silent, advantage=np.ones(batch.n_tokens), minibatches=3)
    assert int(learner.updater.moments()[0]["step"]) == 3 and "actor/divergence" not in metrics


def test_a_step_that_goes_too_far_is_said(pair, batch, caplog):
    student, teacher = pair
    term = DivergenceTerm(said(teacher, batch)[1], np.ones(batch.n_tokens), minibatches=4, epochs=4)
    gentle = dataclasses.replace(term, minibatches=1, epochs=2)
    _, metrics, _ = update(student, batch, gentle)
    assert metrics["actor/policy_kl"] < SANE_KL and "moved the policy far" not in caplog.text
    model = copy.deepcopy(student)
    old = scoring.score(model, batch, temperature=1.0)[0]
    learner = Learner(model, learner_options(lr=0.05, minibatches=1))
    learner.update(batch, np.zeros(batch.n_tokens), old, Objective(), step=4, temperature=1.0, seed=0, divergence=term)
    assert "step 4 moved the policy far: KL" in caplog.text and "--gap-epochs" in caplog.text
    assert "ratio clipped" not in caplog.text, "no ratio was clipped or not"


@pytest.mark.parametrize("algorithm", [OPD(opd_coef=0.7), ATOD(), ATOD(weighting="none"), SOD(), TCOD(opd_coef=2.0)])
def test_the_weight_of_the_teacher_is_what_multiplies_the_gap(algorithm):
    batch, scores, _ = batch_of(ATTEMPTS)
    terms = algorithm.advantages(batch, scores, 3)
    np.testing.assert_allclose(terms.distillation_M, terms.teacher_weight_M * (scores.teacher_M - scores.student_M))


def options(tmp_path, models, **changes):
    return resolve(
        TrainConfig(
            env=TOY,
            student=str(models["student"]),
            teacher=str(models["teacher"]),
            run=str(tmp_path / "run"),
            steps=2,
            style="compact",
            max_turns=3,
            max_response=8,
            max_context=256,
            tasks_per_step=2,
            group_size=2,
            eval_every=0,
            report_tasks=2,
            lr=1e-3,
            **changes,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [OPD, ATOD, SOD, TCOD, SageOPD])
def test_every_method_that_bears_it_trains_with_it(algorithm, tmp_path, models, run_metrics):
    config = options(tmp_path, models, gap="exact", gap_minibatches=2, gap_epochs=2)
    train(config, algorithm(), "paper")
    rows = run_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(row["actor/divergence"] > 0 for row in rows)


def test_a_method_tied_to_the_sampled_token_keeps_it_and_says_so(tmp_path, models, run_metrics, caplog):
    train(options(tmp_path, models, gap="exact"), GOPD(), "paper")
    assert "gopd is tied to the sampled token" in caplog.text
    assert "actor/divergence" not in run_metrics(tmp_path / "run")[0]


def test_a_method_that_only_reads_the_teachers_top_token_may_have_the_divergence(batch, models):
    """SAGE-OPD's confidence is the same from the top token alone and from all that the divergence keeps; a method with
    a loss of its own on the top k keeps them."""
    student, teacher = (load_model(str(models[name]), name) for name in ("student", "teacher"))

    def scorer(algorithm, gap):
        config = resolve(TrainConfig(env=TOY, student="x", teacher="y", gap=gap))
        return StepScorer(config, algorithm, student, None, lambda *_: teacher, "cpu")

    assert not scorer(GKD(), "exact").exact and not scorer(SageOPD(), "sampled").exact
    exact = scorer(SageOPD(), "exact")
    assert exact.exact
    whole, top = exact.score(batch), scorer(SageOPD(), "sampled").score(batch)
    assert whole.teacher_support_MS.shape[1] > 1 == top.teacher_support_MS.shape[1]
    found, expected = (SageOPD().advantages(batch, scores, 1) for scores in (whole, top))
    np.testing.assert_allclose(found.teacher_weight_M, expected.teacher_weight_M, atol=1e-4)
    np.testing.assert_allclose(found.token_M, expected.token_M, atol=1e-3)


def test_a_baseline_needs_the_sampled_gap_and_the_start_line_says_so(tmp_path, models, run_metrics, caplog):
    algorithm = ATOD(baseline="kl")
    config = options(tmp_path, models, gap="exact")
    assert "gap=exact" in _departures(config, ATOD(), "paper") and "gap=exact" not in _departures(
        config, algorithm, "paper"
    )
    train(config, algorithm, "paper")
    assert "atod with these options is tied to the sampled token" in caplog.text
    assert "actor/divergence" not in run_metrics(tmp_path / "run")[0]


def test_updates_of_a_term_that_has_none_are_refused(tmp_path, models):
    for changes, said in (
        ({"gap_minibatches": 2}, "--gap-minibatches 2, --gap-epochs 1 with --gap sampled"),
        ({"gap_epochs": 3}, "--gap-epochs 3 with --gap sampled"),
        ({"gap": "exact", "gap_epochs": 3}, "passes of theirs need --gap-minibatches"),
    ):
        with pytest.raises(AtodError, match=said):
            options(tmp_path, models, **changes)


@pytest.mark.parametrize("algorithm", [GRPO(), GOPD(), ATOD(baseline="kl")])
def test_updates_of_a_term_that_a_method_has_not_are_refused_before_a_dry_run(algorithm, tmp_path, models):
    config = options(tmp_path, models, gap="exact", gap_minibatches=2)
    with pytest.raises(AtodError, match=f"--gap-minibatches 2: {algorithm.name} has no divergence"):
        train(config, algorithm, "paper", dry_run=True)


def test_adapters_may_learn_from_the_model_that_they_stand_on(batch, models):
    """Its whole distribution is compared with the student's, so one model with its adapters off cannot give both."""
    student, start = (load_model(str(models["student"]), role) for role in ("student", "teacher"))
    adapters = add_adapters(student.model, rank=2, alpha=4, seed=0)
    place = str(models["student"])
    config = resolve(TrainConfig(env=TOY, student=place, teacher=place, gap="exact", lora_rank=2))
    scores = StepScorer(config, OPD(), student, adapters, lambda *_: start, "cpu").score(batch)
    np.testing.assert_allclose(scores.teacher_M, scores.student_M, atol=1e-5)  # adapters begin at 0
    assert scores.teacher_support_MS.shape[0] == batch.n_tokens


def test_a_server_is_refused(tmp_path, models, monkeypatch):
    from atod_algos.teachers import local

    monkeypatch.setattr(local, "RemoteScorer", lambda *_, **__: object())
    config = options(tmp_path, {**models, "teacher": "http://nowhere:1/v1#m"}, gap="exact")
    with pytest.raises(AtodError, match="--gap exact compares whole distributions"):
        train(config, OPD(), "paper")


@pytest.fixture
def run_metrics():
    import json

    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tokens_of_the_teacher_stand_in_their_places(pair, batch):
    _, teacher = pair
    _, whole = said(teacher, batch)
    _, best = said(teacher, batch, 3)
    assert whole.ids_MS is None and best.ids_MS is not None
    np.testing.assert_allclose(np.take_along_axis(whole.logprobs_MS, best.ids_MS, 1), best.logprobs_MS, atol=1e-5)
    ids, logprobs = TeacherTokens(best.ids_MS, best.logprobs_MS).at(np.array([2, 0]), torch.device("cpu"))
    assert ids.tolist() == best.ids_MS[[2, 0]].tolist() and logprobs.shape == (2, 3)
