"""The learner's ways to save memory, each against the plain one; adapters; and what happens when memory runs out."""

import copy
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toyworld import learner_options, small_model

from atod_algos.algorithm import Objective
from atod_algos.batch import make_batch
from atod_algos.learner import logprobs, memory
from atod_algos.learner.learner import Learner, recompute_layers
from atod_algos.learner.logprobs import score
from atod_algos.learner.lora import add_adapters, load_adapters, merged_weights, without_adapters
from atod_algos.learner.optimizer import Updater, make_adamw
from atod_algos.teachers.local import LocalScorer
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    opening = tuple(rng.integers(0, 60, 12).tolist())
    trajectories = []
    for i in range(10):
        prompt, response = opening + tuple(rng.integers(0, 60, 3 + 5 * i).tolist()), tuple(rng.integers(0, 60, 4 + i))
        turn = Turn(0, "", (), prompt, tuple(map(int, response)), (0.0,) * len(response), "", "", True, True, 0.0)
        trajectories.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
    return make_batch([Group("t", tuple(trajectories))])


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer, 4)


def teach(model, batch, steps=1, learner=None, **options):
    learner = learner or Learner(model, learner_options(lr=1e-3, minibatches=2, **options))
    advantage_M = np.random.default_rng(1).normal(size=batch.n_tokens)
    old_M = score(model, batch, temperature=1.0)[0]
    for step in range(1, steps + 1):
        metrics = learner.update(batch, advantage_M, old_M, Objective(), step=step, temperature=1.0, seed=step).metrics
    return learner, metrics


def close(a, b, rtol=1e-3):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.allclose(x, y, rtol=rtol, atol=2e-5), name


def test_running_out_of_memory_splits_the_batch_and_changes_no_result(model, batch, monkeypatch, caplog):
    import atod_algos.learner.minibatch as module

    whole = copy.deepcopy(model)
    _, expected = teach(whole, batch)
    honest, passes = module.predict, []

    def tight(model, batch, rows, **options):
        tokens = sum(len(batch.rows[row]) for row in rows)
        if len(passes) == 1:
            # The second pass fails after the first has left its gradient behind.
            passes.append("failed")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        passes.append(tokens)
        if tokens > 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(model, batch, rows, **options)

    monkeypatch.setattr(module, "predict", tight)
    with caplog.at_level(logging.WARNING):
        learner, metrics = teach(model, batch, token_budget=400)
    assert "going on with --token-budget" in caplog.text and learner.budget.tokens < 400
    close(model, whole)
    assert metrics["actor/pg_loss"] == pytest.approx(expected["actor/pg_loss"], abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(expected["actor/grad_norm"], rel=1e-4)
    # A resumed run goes on with the budget that fitted: its sums are rounded in the same order.
    again = Learner(model, learner_options(token_budget=400))
    again.load_state(learner.state())
    assert again.budget.tokens == learner.budget.tokens


def test_a_row_that_can_not_be_split_is_said_to_be_too_long(model, batch, monkeypatch):
    import atod_algos.learner.minibatch as module

    def never(*_, **__):
        raise MemoryError

    before = copy.deepcopy(model)
    monkeypatch.setattr(module, "predict", never)
    with pytest.raises(AtodError, match=r"one row of \d+ tokens does not fit.*--gradient-checkpointing"):
        teach(model, batch)
    close(model, before, rtol=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, batch, monkeypatch):
    import atod_algos.learner.minibatch as module

    def wrong(*_, **__):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(module, "predict", wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        teach(model, batch)


LIMITED = """
import logging, resource, numpy as np
logging.basicConfig(level=logging.WARNING)
from transformers import Qwen3Config, Qwen3ForCausalLM
from toyworld import learner_options
from atod_algos.learner import memory
from atod_algos.batch import make_batch
from atod_algos.algorithm import Objective
from atod_algos.learner.learner import Learner
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=16,
    num_attention_heads=4, num_key_value_heads=4))
rng = np.random.default_rng(0)
ids = lambda n: tuple(rng.integers(0, 64, n).tolist())
turns = [Turn(0, "", (), ids(700), ids(60), (0.0,) * 60, "", "", True, True, 0.0) for _ in range(24)]
batch = make_batch([Group("t", tuple(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE) for turn in turns))])
learner = Learner(model, learner_options(lr=1e-3, minibatches=1, token_budget=10**6))
free = memory.available
memory.available = lambda device: None
address = memory._field(memory.Path("/proc/self/status"), "VmSize")
resource.setrlimit(resource.RLIMIT_AS, (address + 160 * memory.MIB,) * 2)
metrics = learner.update(batch, np.ones(batch.n_tokens), np.full(batch.n_tokens, -4.0), Objective(), step=1, temperature=1.0, seed=1).metrics
print(learner.budget.tokens, np.isfinite(metrics["actor/grad_norm"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux only")
def test_a_real_failed_allocation_is_survived(runner, tmp_path):
    end, said = runner(code=LIMITED, out=str(tmp_path / "out")), (tmp_path / "out").read_text()
    assert end["code"] == 0, said[-2000:]
    tokens, finite = said.split()[-2:]
    assert finite == "True" and int(tokens) < 10**6 and "out of memory in the update" in said


def test_the_budget_is_lowered_before_memory_runs_out(model, batch, monkeypatch, caplog):
    monkeypatch.setattr(memory, "available", lambda device: 1 << 20)
    with caplog.at_level(logging.WARNING):
        learner, _ = teach(model, batch, token_budget=1000)
    assert "MiB more, but 1 are free" in caplog.text
    assert learner.budget.tokens == max(len(row) for row in batch.rows)


def predicted_and_used(shape="deep", dtype="float32", recompute=False):
    """MiB of a large update, as foreseen and as it was: of a deep model, or of one that is a large head on little else.

    The head's chunks are small then: its gradient and what is added to it outweigh them.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from atod_algos.learner import learner as module

    torch.manual_seed(0)
    deep = shape == "deep"
    rows, prompt, response = (16, 300, 60) if deep else (4, 20, 40)
    ids, sizes = (
        (512, {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4})
        if deep
        else (20_000, {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 1})
    )
    if not deep:
        logprobs.CHUNK_LOGITS = module.CHUNK_LOGITS = 1 << 20
    config = Qwen3Config(
        vocab_size=ids, head_dim=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=not deep, **sizes
    )
    big = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    if recompute:
        recompute_layers(big)
    rng = np.random.default_rng(0)
    turns = [
        Turn(0, "", (), tuple(rng.integers(0, ids, prompt)), tuple(rng.integers(0, ids, response)), (0.0,) * response, "", "", True, True, 0.0)
        for _ in range(rows)
    ]  # fmt: skip
    lone = [Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE) for turn in turns]
    batch = make_batch([Group("t", tuple(lone))])
    learner = Learner(big, learner_options(lr=1e-3, minibatches=1, token_budget=4096 if deep else 130))
    if not deep:
        teach(big, batch, learner=learner)  # the moments exist: what is measured is a gradient's making
    before = memory.used(torch.device("cpu")) / memory.MIB
    _, metrics = teach(big, batch, learner=learner)
    needed, used = metrics["memory/predicted_mib"] - before, metrics["memory/peak_mib"] - before
    return needed, used


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, least, most",
    [
        ("'deep'", 0.7, 1.4),
        ("'wide'", 0.8, 1.4),
        ("'wide', recompute=True", 0.8, 1.4),
        ("'wide', 'bfloat16'", 0.8, 1.5),
    ],
)
def test_predicted_memory_is_near_what_a_large_update_uses(case, least, most, runner, tmp_path):
    """In a process of its own: one that has run other tests holds memory that it uses again."""
    folder = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); import test_learner; "
        f"print(*test_learner.predicted_and_used({case}))"
    )
    end, said = runner(code=code, out=str(tmp_path / "out")), (tmp_path / "out").read_text()
    assert end["code"] == 0, said[-2000:]
    needed, used = map(float, said.split()[-2:])
    assert used > 100, "too small to measure"
    assert least < needed / used < most


def test_a_head_that_learns_needs_room_for_a_share_of_its_gradient():
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    assert memory.head_bytes(weight) == 4 * 8 * 4
    assert memory.head_bytes(torch.nn.Parameter(weight.bfloat16())) == 4 * 8 * (2 + 4)
    assert memory.head_bytes(weight.requires_grad_(False)) == 0  # adapters learn


def test_chunks_of_the_head_add_up_their_gradient_in_full_precision():
    """Sixty-four shares of one size: in bfloat16 a sum would stand still long before the last of them."""
    states = torch.ones(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    updater = Updater([weight], learner_options())

    class Head:
        rows = logprobs.CHUNK_LOGITS  # a place a chunk

        def __call__(self, states):
            return torch.nn.functional.linear(states, weight).float()

    found = logprobs.head_logprobs(states, torch.zeros(64, dtype=torch.long), Head(), 1.0, entropy=True)
    (found[0].sum() * 1.01).backward()
    share = torch.tensor(1.01 * 0.25, dtype=torch.bfloat16).float()
    expected = torch.stack([torch.tensor(1.01 * 0.75, dtype=torch.bfloat16).float(), -share, -share, -share]) * 64
    torch.testing.assert_close(updater.master_weights[0].grad, expected[:, None].expand(4, 8))
    assert states.grad is not None and weight.grad is None


def test_recomputed_layers_give_the_same_update_for_less_memory(model, batch):
    plain, recomputed = copy.deepcopy(model), copy.deepcopy(model)
    recompute_layers(recomputed)
    teach(plain, batch)
    teach(recomputed, batch)
    close(plain, recomputed)
    plain.eval(), recomputed.eval()  # as a run asks for it, before it trains
    assert memory.bytes_per_token(recomputed) < 0.8 * memory.bytes_per_token(plain)


def test_half_precision_weights_have_full_precision_originals(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    rate = 1e-6  # far below what a bfloat16 weight near 1 can take in
    learner = Learner(half, learner_options(lr=rate, minibatches=1, weight_decay=0.0))
    start = [original.clone() for original in learner.updater.master_weights]
    teach(half, batch, steps=3, learner=learner)
    moved = [(a - b).abs().max() for a, b in zip(learner.updater.master_weights, start, strict=True)]
    assert all(0 < float(m) < 5 * rate for m in moved)
    for weight, original in zip(half.parameters(), learner.updater.master_weights, strict=True):
        assert torch.equal(weight, original.to(torch.bfloat16)) and weight.dtype == torch.bfloat16
        assert weight.grad is None and original.grad is None


def test_half_precision_gradients_add_up_in_full_precision(tokenizer):
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    updater = Updater([weight], learner_options())
    for share in (256.0, 1.0):  # 257 is no bfloat16
        (weight * share).sum().backward()
    assert updater.master_weights[0].grad.tolist() == [257.0] * 4


def test_a_resumed_half_precision_run_goes_on_bit_for_bit(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    learner, _ = teach(half, batch, steps=2)
    weights, state = copy.deepcopy(half.state_dict()), copy.deepcopy(learner.state())
    teach(half, batch, learner=learner)
    other = copy.deepcopy(model).to(torch.bfloat16)
    again = Learner(other, learner.options)
    other.load_state_dict(weights)
    again.load_state(state)
    teach(other, batch, learner=again)
    for a, b in zip(again.updater.master_weights, learner.updater.master_weights, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_in_float32_is_none_of_a_half_precision_run(model):
    """Its master weights would stay those of the untrained model."""
    saved = Learner(copy.deepcopy(model), learner_options()).state()
    half = Learner(copy.deepcopy(model).to(torch.bfloat16), learner_options())
    with pytest.raises(
        AtodError, match="made in float32, but here weights are in half precision; give the --device it was made on"
    ):
        half.load_state(saved)


def test_a_budget_that_was_asked_for_may_be_asked_for_differently(model):
    small = Learner(copy.deepcopy(model), learner_options(token_budget=100))
    state = small.state()
    large = Learner(copy.deepcopy(model), learner_options(token_budget=400))
    large.load_state(state)
    assert large.budget.tokens == 400
    small.budget.tokens = 50  # memory ran short
    large.load_state(small.state())
    assert large.budget.tokens == 50


def test_eight_bit_moments_are_refused_without_a_gpu(model):
    with pytest.raises(AtodError, match="adamw8bit runs on a GPU only"):
        Learner(model, learner_options(optimizer="adamw8bit"))


def test_eight_bit_moments_name_the_missing_package(monkeypatch):
    class OnGpu(torch.nn.Parameter):
        is_cuda = True

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(AtodError, match="pip install bitsandbytes"):
        make_adamw([{"params": [OnGpu(torch.zeros(2))], "weight_decay": 0.0}], learner_options(optimizer="adamw8bit"))


def test_numbers_that_are_none_stop_the_run_before_anything_is_learned(model, batch):
    learner = Learner(model, learner_options())
    before = copy.deepcopy(model)
    advantage_M = np.ones(batch.n_tokens)
    advantage_M[3] = math.nan
    with pytest.raises(AtodError, match=r"step 7: advantage nan.*at token 3 of task 't'"):
        learner.update(batch, advantage_M, np.zeros(batch.n_tokens), Objective(), step=7, temperature=1.0, seed=0)
    close(model, before, rtol=0)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(model):
    pytest.importorskip("peft", reason="adapters need peft")
    original = copy.deepcopy(model)
    return model, original, add_adapters(model, rank=4, alpha=8.0, seed=1)


def test_adapters_learn_and_the_base_stays(adapted, batch):
    model, original, wrapper = adapted
    expected = score(original, batch, temperature=1.0)[0]
    assert np.allclose(score(model, batch, temperature=1.0)[0], expected, atol=1e-6)
    teach(model, batch, steps=3)
    assert np.abs(score(model, batch, temperature=1.0)[0] - expected).max() > 1e-3
    with without_adapters(wrapper):
        assert np.allclose(score(model, batch, temperature=1.0)[0], expected, atol=1e-6)


def test_merged_weights_are_a_plain_model_that_computes_the_same(adapted, batch):
    model, original, _ = adapted
    teach(model, batch, steps=3)
    merged = dict(merged_weights(model))
    assert set(merged) == {name for name, _ in original.named_parameters()}
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.copy_(merged[name])
    assert np.allclose(score(original, batch, temperature=1.0)[0], score(model, batch, temperature=1.0)[0], atol=1e-5)


def test_saved_adapters_load_again_and_as_a_plain_model(adapted, batch, tokenizer, tmp_path, models):
    from agents.models import load_model

    base = load_model(str(models["student"]), "student").model
    wrapper = add_adapters(base, rank=4, alpha=8.0, seed=1)
    teach(base, batch, steps=3)
    wrapper.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = score(base, batch, temperature=1.0)[0]
    assert np.allclose(
        score(load_model(str(tmp_path), "student").model, batch, temperature=1.0)[0], expected, atol=1e-5
    )
    fresh = load_model(str(models["student"]), "student").model
    load_adapters(add_adapters(fresh, rank=4, alpha=8.0, seed=9), tmp_path)
    assert np.array_equal(score(fresh, batch, temperature=1.0)[0], expected)


def test_a_model_at_home_elsewhere_leaves_no_copy_behind(models, batch, monkeypatch):
    """A clone stands in for the copy on a GPU."""
    from agents.models import load_model

    loaded = load_model(str(models["teacher"]), "teacher")
    expected = score(loaded.model, batch, temperature=1.0)[0]
    scorer = LocalScorer(loaded, "cpu")
    scorer.device = torch.device("meta")
    home = [p.data_ptr() for p in loaded.model.parameters()]
    monkeypatch.setattr("atod_algos.teachers.local._moved", lambda tensor, device: tensor.clone())
    with scorer.on_device() as model:
        assert not set(home) & {p.data_ptr() for p in model.parameters()}
        assert np.array_equal(score(model, batch, temperature=1.0)[0], expected)
    assert [p.data_ptr() for p in loaded.model.parameters()] == home
    assert np.array_equal(score(loaded.model, batch, temperature=1.0)[0], expected)
