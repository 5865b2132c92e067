"""What a step of the built-in engine asks of a GPU, counted on a device that is none."""

import pytest
import torch
from fake_device import fake_device
from requests_to_engines import prompts, run, small

from agents.engines.base import SamplingParams
from agents.engines.decoder import FamilyDecoder
from agents.engines.transformers import TransformersEngine

TEMPERATURES = (0.0, 0.7, 1.0)


def asked(count, *, seed=0, low=3, high=40, tokens=4):
    """Requests of different lengths and temperatures."""
    return [
        (str(i), prompt, SamplingParams(tokens + i % 3, TEMPERATURES[i % 3], seed=i))
        for i, prompt in enumerate(prompts(count, seed, low, high))
    ]


def test_the_fake_device_counts_every_way_of_waiting():
    with fake_device(torch.nn.Linear(2, 2)) as device:
        x = torch.arange(4).to("meta")
        for wait in (
            lambda: x.tolist(),
            lambda: x.sum().item(),
            lambda: bool(x.sum() > 0),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x.cpu(),
        ):
            device.crossings.clear()
            wait()
            assert "out" in device.crossings and "in" not in device.crossings
        device.crossings.clear()
        assert (x + torch.tensor([1, 2, 3, 4], device="meta")).near.tolist() == [1, 3, 5, 7]
        assert device.crossings == ["in"]
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.arange(4)


@pytest.mark.parametrize(("kind", "layers"), [("Qwen3", 2), ("Llama", 4), ("Olmo2", 2)])
def test_a_step_sends_twice_and_waits_once(kind, layers):
    model = small(kind, num_hidden_layers=layers)
    requests = asked(6)
    expected = run(TransformersEngine(model, slots=4), requests)
    with fake_device(model) as device:
        engine = TransformersEngine(model, slots=4)
        assert isinstance(engine.decoder, FamilyDecoder) == (kind != "Olmo2")
        for request in requests:
            engine.submit(*request)
        done = {}
        while len(done) < len(requests):
            device.crossings.clear()
            done |= {completion.request_id: completion for completion in engine.step()}
            # The pass's indices, and what is needed to draw; back come ids and log-probs together.
            assert device.crossings == ["in", "in", "out"]
    assert {key: answer.token_ids for key, answer in done.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }


def test_a_group_that_shares_its_prompt_costs_two_small_copies_more():
    model = small("Qwen3")
    with fake_device(model) as device:
        engine = TransformersEngine(model, slots=8)
        for i in range(8):
            engine.submit(str(i), [5, 6, 7], SamplingParams(4, 1.0, seed=i))
        device.crossings.clear()
        engine.step()
        assert device.crossings == ["in"] * 4 + ["out"]
        device.crossings.clear()
        engine.step()
        assert device.crossings == ["in", "in", "out"]
