"""The learner's linear layers through oneDNN against plain ones, and the pass that a single update saves."""

import copy

import numpy as np
import pytest
import torch
from tinymodel import tiny_qwen3
from torch.nn.functional import linear
from toyworld import learner_options, small_model

from atod_algos.algorithm import Objective
from atod_algos.batch import make_batch
from atod_algos.learner import logprobs, onednn
from atod_algos.learner.learner import Learner, recompute_layers
from atod_algos.learner.logprobs import drops_out, score
from atod_algos.learner.packing import pack, packable, packed_states
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def on_every_cpu(monkeypatch):
    """Where it does not pay it is tried, too."""
    monkeypatch.setattr(onednn, "FASTER", onednn.AVAILABLE)


def episodes(rows, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        prompt, response = (tuple(rng.integers(0, 60, int(n)).tolist()) for n in rng.integers(10, longest, 2))
        turn = Turn(0, "", (), prompt, response, (0.0,) * len(response), "", "", True, True, 0.0)
        made.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
    return make_batch([Group("t", tuple(made))])


@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (96, 64), (64, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(7,), (3, 5), (1, 600)])
def test_a_linear_layer_and_its_gradients_are_the_plain_ones(inner, outer, bias, lead):
    torch.manual_seed(0)
    x, weight = torch.randn(*lead, inner, requires_grad=True), torch.randn(outer, inner, requires_grad=True)
    offset = torch.randn(outer, requires_grad=True) if bias else None
    leaves = [tensor for tensor in (x, weight, offset) if tensor is not None]
    plain = linear(x, weight, offset)
    direction = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, leaves, direction)
    with onednn.onednn_linear(CPU):
        fast = linear(x, weight, offset)
    assert torch.allclose(fast, plain, rtol=1e-5, atol=1e-4)
    if onednn.AVAILABLE:
        node = fast.grad_fn.next_functions[0][0] if bias else fast.grad_fn  # the bias is added to the matmul
        assert "_Linear" in node.name()
    for got, wanted in zip(torch.autograd.grad(fast, leaves, direction), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_only_large_float32_linear_layers_on_a_cpu_are_replaced():
    def replaced(x, weight, device=CPU):
        with onednn.onednn_linear(device):
            return "_Linear" in linear(x, weight).grad_fn.name()

    large, small = torch.randn(64, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    x = torch.randn(5, 64)
    assert replaced(x, large)
    assert not replaced(x, small)
    assert not replaced(x[:0], large)
    assert not replaced(x, large, torch.device("cuda"))
    assert not replaced(x.bfloat16(), large.detach().bfloat16().requires_grad_())


def test_a_cpu_on_which_it_is_slower_keeps_the_default(monkeypatch):
    monkeypatch.setattr(onednn, "FASTER", False)
    with onednn.onednn_linear(CPU):
        got = linear(torch.randn(5, 64), torch.randn(64, 64, requires_grad=True))
    assert "_Linear" not in got.grad_fn.name()
    assert onednn.row_padding(1000, CPU) == 0


@needs_onednn
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_takes_the_same_step_with_and_without_them(tokenizer, monkeypatch, recompute):
    batch = episodes(12)
    start = tiny_qwen3(64, 3, hidden=64)
    advantage_M = np.random.default_rng(1).normal(size=batch.n_tokens)
    calls, ends = [], []
    matmul = onednn.matmul
    monkeypatch.setattr(onednn, "matmul", lambda a, b: calls.append(1) or matmul(a, b))
    for smallest in (1, 1 << 40, 1):
        monkeypatch.setattr(onednn, "SMALLEST", smallest)
        model = copy.deepcopy(start)
        if recompute:
            recompute_layers(model)
        before = len(calls)
        old_M = score(model, batch, temperature=1.0)[0]
        learner = Learner(model, learner_options(lr=1e-3, minibatches=2, token_budget=200))
        learner.update(batch, advantage_M, old_M, Objective(), step=1, temperature=1.0, seed=0)
        assert (len(calls) > before) == (smallest == 1)
        ends.append([weight.detach().clone() for weight in model.parameters()])
    for fast, plain, again in zip(*ends, strict=True):
        assert torch.allclose(fast, plain, rtol=1e-3, atol=2e-5)
        assert torch.equal(fast, again)  # repeatable to the bit


@pytest.mark.parametrize("shared", [False, True])
def test_padding_changes_no_state_and_no_gradient(shared):
    model = tiny_qwen3(64, 5)
    assert packable(model)
    rng = np.random.default_rng(0)
    rows = sorted((rng.integers(0, 60, int(n)) for n in rng.integers(60, 200, 9)), key=lambda row: row.tolist())
    if shared:
        rows = [np.concatenate([rows[0][:25], row]) for row in rows]
    packed = pack(rows)
    assert (packed.keep_T is not None) == shared
    found = []
    for even in (1, 64):
        onednn.EVEN_ROWS, kept = even, onednn.EVEN_ROWS
        try:
            padding = onednn.row_padding(len(packed.ids_T), CPU)
            states, ids = packed_states(model, packed)
        finally:
            onednn.EVEN_ROWS = kept
        assert (padding > 0) == (even == 64 and onednn.AVAILABLE)
        assert len(states) == len(ids) == len(packed.ids_T)
        gradient = torch.autograd.grad(states.square().sum(), list(model.get_decoder().parameters()))
        found.append((states.detach(), *gradient))
    for plain, filled in zip(*found, strict=True):
        assert torch.allclose(plain, filled, rtol=1e-3, atol=1e-4)


def test_one_update_gives_the_old_log_probs_by_its_own_pass(tokenizer, monkeypatch):
    batch = episodes(9, seed=3)
    start = small_model(tokenizer, 4)
    advantage_M = np.random.default_rng(1).normal(size=batch.n_tokens)
    passes = []
    predict = logprobs.predict
    monkeypatch.setattr(logprobs, "predict", lambda *a, **k: passes.append(1) or predict(*a, **k))
    options = learner_options(lr=1e-3, minibatches=1, token_budget=150)
    results = []
    for known in (True, False):
        model = copy.deepcopy(start)
        old_M = score(model, batch, temperature=1.0)[0] if known else None
        update = Learner(model, options).update(batch, advantage_M, old_M, Objective(), step=1, temperature=1.0, seed=0)
        results.append((update.old_logprobs_M, update.metrics, list(model.parameters())))
    (old_M, metrics, weights), (found_M, own, moved) = results
    assert np.allclose(old_M, found_M, atol=1e-5)
    assert own["actor/ppo_kl"] == 0.0 and own["actor/pg_clipfrac"] == 0.0
    assert own["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-4)
    for a, b in zip(weights, moved, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="several updates"):
        Learner(start, learner_options(minibatches=2)).update(
            batch, advantage_M, None, Objective(), step=1, temperature=1.0, seed=0
        )


def test_a_model_that_leaves_something_out_by_chance_is_told_apart():
    plain = tiny_qwen3(64, 5)
    assert not drops_out(plain)
    assert drops_out(tiny_qwen3(64, 5, attention_dropout=0.1))
