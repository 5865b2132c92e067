"""The relatives of on-policy distillation, by numbers worked out by hand and by brute force."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import batch_of, close
from hypothesis import given, settings
from hypothesis import strategies as st
from toyworld import learner_options, small_model

from agents.chat import ChatFormat
from atod_algos.algorithm import Objective
from atod_algos.batch import Scores, make_batch
from atod_algos.entropy_aware import EntropyAware
from atod_algos.gopd import GOPD
from atod_algos.learner import logprobs
from atod_algos.learner.learner import Learner
from atod_algos.learner.minibatch import SupportTerm
from atod_algos.opd import OPD
from atod_algos.tip import TIP, largest
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn


@pytest.fixture(scope="module")
def baselines(golden):
    """The recorded numbers of the other methods."""
    return golden["baselines"]


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


def test_gopd_golden(baselines):
    for case in baselines["G_OPD_advantage"]:
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
    """Two places, five tokens, all as support: the textbook KL(p_T || p_theta) and its gradient p_theta - p_T."""
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
    learner.updater.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in student.named_parameters()})
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
