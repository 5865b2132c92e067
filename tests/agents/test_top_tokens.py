"""The top-k tokens of prompts, in the shapes that vLLM answers with; vLLM itself is faked."""

import math

import fake_vllm
import numpy as np
import pytest
import torch
from requests_to_engines import prompts
from tinymodel import tiny_qwen3

from agents.engines.top_tokens import TooFew, most_likely, top_tokens
from agents.engines.vllm import VllmEngine
from atod_envs.errors import AtodError

THREE = [(7, -0.5, 1), (3, -1.5, 2), (5, -2.5, 3)]


@pytest.mark.parametrize(
    "entries",
    [
        THREE,
        THREE[::-1],  # their order says nothing
        [*THREE, (9, -6.0, 41)],  # the own id is one more
        [(9, -2.5, 3), *THREE],  # the own id is as likely as the last, and not among the k
        [*THREE, (9, -2.5, 3)],
        [*THREE, (9, -6.0, None)],
        [*THREE, (4, -3.5, 4)],  # more than were asked for
    ],
)
def test_the_k_most_likely_are_kept_by_their_rank(entries):
    assert most_likely(entries, 3, 9) == ([7, 3, 5], [-0.5, -1.5, -2.5])


def test_the_own_id_counts_where_it_is_one_of_them():
    assert most_likely(THREE, 3, 3) == ([7, 3, 5], [-0.5, -1.5, -2.5])
    assert most_likely([*THREE, (9, -6.0, 41)], 1, 9) == ([7], [-0.5])


@pytest.mark.parametrize("entries", [THREE[:2], [], [*THREE[:2], (9, -6.0, 41)], [*THREE[:2], (9, -6.0, None)]])
def test_too_few_are_counted(entries):
    with pytest.raises(TooFew, match=f"{min(2, len(entries))} of the 3 most likely ids"):
        most_likely(entries, 3, 9)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        *(((5, value, 3), "expected a number") for value in (math.nan, -math.inf, math.inf, None, "-2.5", True, 0.1)),
        ((5, -1.0, 3), "do not fall with the rank"),
        ((7, -2.5, 3), "are no 3 ids"),
        ((-5, -2.5, 3), "are no 3 ids"),
        ((1 << 31, -2.5, 3), "are no 3 ids"),
    ],
)
def test_what_is_no_number_or_does_not_fit_is_refused(last, said):
    with pytest.raises(ValueError, match=said):
        most_likely([*THREE[:2], last], 3, 9)
    with pytest.raises(ValueError, match="both have rank 2"):
        most_likely([*THREE, (8, -1.5, 2)], 3, 9)
    with pytest.raises(ValueError, match=r"of 2 ids add up to 1\.2"):
        most_likely([(1, math.log(0.6), 1), (2, math.log(0.6), 2)], 2, 9)


def test_places_are_joined():
    found = top_tokens([math.nan, -1.0], [([7, 3], [-0.5, -1.5])], 2)
    assert found.ids_PS.tolist() == [[7, 3]] and found.logprobs_PS.dtype == np.float32 and len(found) == 4
    assert top_tokens([math.nan], [], 0).ids_PS.shape == (0, 0)


# --- vLLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return tiny_qwen3(97, 4)


@pytest.fixture
def engine(model, monkeypatch):
    fake_vllm.install(monkeypatch, lambda: tiny_qwen3(97, 9))
    return VllmEngine(model, slots=4, max_context=128, top=5)


@pytest.mark.parametrize("k", [1, 5])
def test_an_engine_gives_the_models_own_most_likely(engine, model, k):
    texts = prompts(4, seed=3, high=90)
    places = [sorted({1, 2, len(ids) - 1}) for ids in texts]
    for ids, at, found in zip(texts, places, engine.prompt_top(texts, places, k), strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        best = rows[torch.tensor(at) - 1].topk(k)
        assert found.ids_PS.tolist() == best.indices.tolist()
        np.testing.assert_allclose(found.logprobs_PS, best.values, atol=1e-6)
        assert np.isnan(found.own_T[0])
        np.testing.assert_allclose(found.own_T[1:], rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0], atol=1e-6)
    alone = engine.prompt_logprobs(texts)
    assert [len(values) for values in alone] == [len(ids) for ids in texts]
    assert engine.llm.arguments.max_logprobs == 5 and engine.llm.asked == [k] * 4 + [0] * 4


@pytest.mark.parametrize("value", [*fake_vllm.NOT_NUMBERS, None])
def test_an_engine_that_gives_no_numbers_is_refused(engine, value):
    engine.llm.change = fake_vllm.broken(value)
    with pytest.raises(AtodError, match="vLLM was asked for 3 tokens and gave, at place 2: "):
        engine.prompt_top([[1, 2, 3, 4]], [[2, 3]], 3)
