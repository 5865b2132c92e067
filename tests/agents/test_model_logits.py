"""Every model's log-probs are its own forward pass's, in engine, learner, scorers and weight check."""

import copy

import numpy as np
import pytest
import torch
from requests_to_engines import plain_logprobs, prompts, run, small

from agents.engines.base import SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.engines.weight_check import verify_weights
from agents.logits import (
    UnsupportedModel,
    decoder_states,
    logit_head,
    longest_context,
    own_logits,
    probe_ids,
)
from atod_algos.learner.logprobs import compare, predict, score
from atod_algos.teachers.server import row_batch

AFTER_THE_HEAD = [
    ("Granite", {"logits_scaling": 8.0}),
    ("GraniteMoe", {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Cohere", {"logit_scale": 0.0625}),
    ("Gemma2", {"final_logit_softcapping": 30.0}),
    ("NanoChat", {}),
]


def large_head(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)
    return model


@pytest.mark.parametrize(("kind", "options"), AFTER_THE_HEAD)
def test_what_a_model_does_behind_its_head_is_in_every_log_prob(kind, options):
    model = large_head(small(kind, tie_word_embeddings=False, **options))
    ids = probe_ids(model, 30, 3)
    own = torch.log_softmax(own_logits(model, ids), -1).detach()
    expected = own[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    head = model.get_output_embeddings()
    with torch.no_grad():
        without = torch.log_softmax(head(decoder_states(model, torch.tensor([ids]))[0]), -1)
    assert float((without - own).abs().max()) > 1.0  # what the output layer alone would say

    batch = row_batch([np.array(ids)])
    np.testing.assert_allclose(score(model, batch, temperature=1.0)[0], expected, atol=1e-3)
    np.testing.assert_allclose(
        compare(model, copy.deepcopy(model), batch, temperature=1.0).teacher_M, expected, atol=1e-3
    )
    engine = TransformersEngine(model, slots=3)
    done = run(engine, [(str(i), p, SamplingParams(8, 0.9, seed=i)) for i, p in enumerate(prompts(4, seed=2))])
    for i, prompt in enumerate(prompts(4, seed=2)):
        got = done[str(i)]
        np.testing.assert_allclose(got.logprobs, plain_logprobs(model, prompt, list(got.token_ids), 0.9), atol=1e-3)
    assert verify_weights(engine, model) < 1e-4


@pytest.mark.parametrize(("kind", "options"), AFTER_THE_HEAD)
def test_gradients_go_through_what_stands_behind_the_head(kind, options):
    model = large_head(small(kind, tie_word_embeddings=False, **options))
    ids = probe_ids(model, 20, 3)
    batch = row_batch([np.array(ids)])
    found = predict(model, batch, np.array([0]), temperature=0.7, entropy=True)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    got = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float() / 0.7, -1)
    (rows.gather(1, torch.tensor(ids[1:])[:, None]).sum() - (rows.exp() * rows).sum()).backward()
    expected = model.get_output_embeddings().weight.grad
    assert float((got - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(("places", "size", "fits"), [(3, 0.25, True), (26, 0.04, True), (26, 0.3, False)])
def test_rounding_of_half_precision_refuses_no_model(places, size, fits, monkeypatch):
    """A GPU's kernels round a lone row otherwise than padded ones: at some places by much, at most by little."""
    model = small("Llama").bfloat16()

    def rounded(model, ids):
        found = own_logits(model, ids)
        spread = (found - found.mean(-1, keepdim=True)).abs().amax(-1)
        found[:places, 5] += size * spread[:places]
        return found

    monkeypatch.setattr("agents.logits.own_logits", rounded)
    if fits:
        assert logit_head(model).plain
    else:
        with pytest.raises(UnsupportedModel, match="are not those of its own forward pass"):
            logit_head(model)


def test_a_cap_is_seen_although_the_weights_make_small_logits():
    model = small("Gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert not logit_head(model).plain
    assert logit_head(small("Gemma2", final_logit_softcapping=None)).plain
    assert logit_head(small("Qwen3")).plain


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
GROWING = [
    ("Llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}, "max_position_embeddings": 99}),
    ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 99}),
    (
        "Qwen3",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 32,
        },
    ),
]


@pytest.mark.parametrize(("kind", "options"), GROWING)
def test_frequencies_that_change_with_the_length_bound_the_context(kind, options):
    model = small(kind, **options)
    assert longest_context(model) == 32
    long, ids = probe_ids(model, 40, 1), probe_ids(model, 32, 1)
    assert float((own_logits(model, long)[:20] - own_logits(model, long[:20])).detach().abs().max()) > 0.1
    with pytest.raises(UnsupportedModel, match=r"beyond 32 positions.* set --max-context to at most 32"):
        TransformersEngine(model, slots=2, max_context=40)
    with pytest.raises(UnsupportedModel, match="40 are wanted"):
        score(model, row_batch([np.array(long)]), temperature=1.0)
    done = run(TransformersEngine(model, slots=2), [("a", ids[:12], SamplingParams(20, seed=1))])["a"]
    expected = plain_logprobs(model, ids[:12], list(done.token_ids))
    np.testing.assert_allclose(done.logprobs, expected, atol=1e-4)
    got = score(model, row_batch([np.array([*ids[:12], *done.token_ids])]), temperature=1.0)[0]
    np.testing.assert_allclose(got[11:], expected, atol=1e-4)


def test_a_decoder_that_transformers_does_not_find_is_found():
    from transformers import Llama4ForCausalLM, Llama4TextConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64}
    for model in (
        Llama4ForCausalLM(Llama4TextConfig(**shape, **ends, **more)).eval(),
        ModernBertDecoderForCausalLM(
            ModernBertDecoderConfig(**shape, **ends, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=1)
        ).eval(),
    ):
        assert verify_weights(TransformersEngine(model, slots=2, max_context=64), model) < 1e-4
        ids = probe_ids(model, 20, 1)
        rows = torch.log_softmax(own_logits(model, ids), -1).detach()[:-1]
        expected = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(score(model, row_batch([np.array(ids)]), temperature=1.0)[0], expected, atol=1e-4)


def test_a_model_that_sees_what_comes_after_is_refused_by_name():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    model = BertLMHeadModel(
        BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    with pytest.raises(UnsupportedModel, match=r"BertLMHeadModel cannot be used here: .*Use a causal decoder"):
        TransformersEngine(model, slots=1)
    with pytest.raises(UnsupportedModel, match="BertLMHeadModel"):
        score(model, row_batch([np.arange(1, 9)]), temperature=1.0)
