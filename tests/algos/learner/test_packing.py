"""Packed rows against the same rows run alone: states, gradients, and what is refused."""

import copy
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_algos.learner import packing
from atod_algos.learner.packing import pack, packable, packed_states, packs, shared_prefix


def qwen(**options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **{
            "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "use_cache": False,
        } | options
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # far from the initial values, where attention is nearly uniform
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def some_rows(seed=0, n=7):
    """Rows of unequal length; some begin alike, one is the beginning of another, two are equal."""
    rng = np.random.default_rng(seed)
    opening = rng.integers(0, 50, 20)
    rows = [np.concatenate([opening, rng.integers(0, 50, int(k))]) for k in rng.integers(1, 30, n)]
    return [*rows, opening, rng.integers(0, 50, 33), rows[0].copy(), rows[1][:25]]


def alone(model, rows):
    return [
        model.get_decoder()(input_ids=torch.from_numpy(r)[None], use_cache=False).last_hidden_state[0] for r in rows
    ]


@pytest.mark.parametrize("make", [qwen, llama])
def test_states_and_gradients_equal_those_of_each_row_alone(make):
    model, rows = make(), some_rows()
    reference = copy.deepcopy(model)
    weights = [torch.randn(len(row), 32, generator=torch.Generator().manual_seed(i)) for i, row in enumerate(rows)]
    expected = alone(reference, rows)
    sum((state * weight).sum() for state, weight in zip(expected, weights, strict=True)).backward()

    assert packable(model)
    packed = pack(rows)
    states, _ = packed_states(model, packed)
    got = states[torch.from_numpy(packed.place_R)]
    assert torch.allclose(got, torch.cat(expected), atol=2e-5)
    (got * torch.cat(weights)).sum().backward()
    for (name, mine), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(mine.grad, other.grad, atol=1e-4 * float(other.grad.abs().max())), name


def test_gradients_survive_recomputed_layers():
    model, rows = qwen(), some_rows()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, checkpointed):
        each.train()
        packed_states(each, pack(rows))[0].pow(2).sum().backward()
    for mine, other in zip(checkpointed.parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_common_beginnings_stand_in_the_stream_once():
    rows = some_rows()
    packed = pack(rows)
    assert len(packed.ids_T) < sum(map(len, rows)) - 8 * 20
    for row, start, end in zip(rows, packed.bounds[:-1], packed.bounds[1:], strict=True):
        place = packed.place_R[start:end]
        assert (packed.ids_T[place] == row).all() and (packed.position_T[place] == np.arange(len(row))).all()


def test_rows_that_share_nothing_are_left_as_they_are():
    rows = [np.arange(5), np.arange(9) + 7]
    packed = pack(rows)
    assert packed.keep_T is None and len(packed.ids_T) == 14


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=20), st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_pack_and_packs_keep_their_budget(lists, budget):
    rows = [np.array(row) for row in lists]
    chosen = list(packs(rows, budget))
    assert sorted(i for part in chosen for i in part) == list(range(len(rows)))
    for part in chosen:
        packed = pack([rows[i] for i in part])
        assert len(packed.ids_T) <= budget or len(part) == 1
        rebuilt = packed.ids_T[packed.place_R]
        assert (rebuilt == np.concatenate([rows[i] for i in part])).all()
        if packed.keep_T is not None:
            assert (packed.place_R[packed.keep_T] == np.arange(len(packed.ids_T))).all()


def test_packing_costs_no_more_tokens_than_there_are():
    rows = some_rows(3, 30)
    total = sum(len(pack([rows[i] for i in part]).ids_T) for part in packs(rows, 200))
    assert total < sum(map(len, rows)) and shared_prefix(rows[0], rows[0]) == len(rows[0])


def test_another_attention_gives_no_number_rather_than_mixed_rows(monkeypatch):
    model = qwen()
    assert packable(model)
    monkeypatch.setattr(packing, "ATTENTION", "sdpa")
    model.config._attn_implementation = "sdpa"
    states, _ = packed_states(model, pack(some_rows()))
    assert bool(states.isnan().all())


def test_models_with_other_layers_are_padded():
    windowed = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not packable(windowed) and windowed.config._attn_implementation == "sdpa"
    eager = qwen()
    eager.config._attn_implementation = "eager"
    assert not packable(eager)


def test_a_model_whose_packed_states_are_wrong_is_padded(monkeypatch):
    def leaky(states, bounds, scaling, dropout):
        whole = (0, bounds[-1])
        return honest(states, whole, scaling, dropout)

    honest = packing.loop_rows
    monkeypatch.setattr(packing, "loop_rows", leaky)
    assert not packable(qwen())


def test_the_engine_still_sees_plain_attention():
    model = qwen()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, use_cache=False).logits
    assert packable(model)
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, before, atol=1e-6)


def test_the_flash_kernel_is_called_as_this_torch_declares_it():
    kernel = packing.flash_kernel()
    if kernel is None:
        pytest.skip("this torch has no variable-length attention")
    inspect.signature(kernel).bind(
        0, 0, 0, 0, 0, 1, 1, scale=1.0, **({"window_size": (-1, 0)} if packing.flash_has("window_size") else {})
    )
