import copy
import dataclasses

import numpy as np
import pytest
import torch
from requests_to_engines import plain_logprobs, prompts, run, small

from agents.engines import kv_cache
from agents.engines.base import EngineDied, SamplingParams, uniform
from agents.engines.decoder import FamilyDecoder
from agents.engines.own_forward import OwnDecoder
from agents.engines.transformers import TransformersEngine
from agents.engines.vllm import VllmEngine
from agents.engines.weight_check import WeightMismatch, verify_weights


def test_greedy_tokens_equal_plain_generation(tiny_model):
    engine = TransformersEngine(tiny_model, slots=4)
    texts = prompts(9)
    done = run(engine, [(str(i), p, SamplingParams(12, temperature=0)) for i, p in enumerate(texts)])
    for i, prompt in enumerate(texts):
        ids = torch.tensor([prompt])
        expected = tiny_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert list(done[str(i)].token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward_pass(tiny_model, temperature):
    engine = TransformersEngine(tiny_model, slots=5)
    texts = prompts(12, seed=1)
    done = run(engine, [(str(i), p, SamplingParams(15, temperature, seed=i)) for i, p in enumerate(texts)])
    for i, prompt in enumerate(texts):
        got = done[str(i)]
        np.testing.assert_allclose(
            got.logprobs, plain_logprobs(tiny_model, prompt, list(got.token_ids), temperature), atol=2e-5
        )


def test_samples_follow_the_distribution(tiny_model):
    engine = TransformersEngine(tiny_model, slots=256)
    prompt = prompts(1, seed=2)[0]
    n = 4000
    done = run(engine, [(str(i), prompt, SamplingParams(1, seed=i)) for i in range(n)])
    counts = np.bincount([c.token_ids[0] for c in done.values()], minlength=97)
    with torch.no_grad():
        p = torch.softmax(tiny_model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    likely = p > 5 / n
    chi2 = ((counts - n * p)[likely] ** 2 / (n * p[likely])).sum()
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_a_request_does_not_depend_on_its_company(tiny_model):
    texts = prompts(10, seed=3)
    together = run(
        TransformersEngine(tiny_model, slots=3), [(str(i), p, SamplingParams(10, seed=i)) for i, p in enumerate(texts)]
    )
    for i in (0, 4, 9):
        alone = run(TransformersEngine(tiny_model, slots=1), [("x", texts[i], SamplingParams(10, seed=i))])["x"]
        assert alone.token_ids == together[str(i)].token_ids


def test_stop_tokens_end_a_response_and_belong_to_it(tiny_model):
    prompt = prompts(1, seed=4)[0]
    free = run(TransformersEngine(tiny_model, slots=2), [("a", prompt, SamplingParams(20, seed=7))])["a"]
    stop = free.token_ids[5]
    cut = run(TransformersEngine(tiny_model, slots=2), [("a", prompt, SamplingParams(20, seed=7, stop_ids=(stop,)))])[
        "a"
    ]
    assert cut.stopped and cut.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert not free.stopped and len(free.token_ids) == 20


def test_the_next_turn_reads_in_only_what_is_new(tiny_model):
    engine = TransformersEngine(tiny_model, slots=4)
    conversations = {str(i): p for i, p in enumerate(prompts(4, seed=5, low=30))}
    for turn in range(3):
        before = engine.prefilled
        done = run(engine, [(f"{k}/{turn}", p, SamplingParams(6, seed=turn)) for k, p in conversations.items()])
        new = engine.prefilled - before
        assert (
            new == sum(map(len, conversations.values())) if turn == 0 else new == 4 * 6
        )  # the last token and 5 new ones
        for key, prompt in conversations.items():
            got = done[f"{key}/{turn}"]
            np.testing.assert_allclose(got.logprobs, plain_logprobs(tiny_model, prompt, list(got.token_ids)), atol=2e-5)
            conversations[key] = [*prompt, *got.token_ids, 1, 2, 3, 4, 5]


def test_equal_prompts_are_read_in_once(tiny_model):
    engine = TransformersEngine(tiny_model, slots=16)
    prompt = prompts(1, seed=6, low=50)[0]
    first = run(engine, [(str(i), prompt, SamplingParams(8, seed=i)) for i in range(8)])
    assert engine.prefilled == len(prompt)
    for got in first.values():
        np.testing.assert_allclose(got.logprobs, plain_logprobs(tiny_model, prompt, list(got.token_ids)), atol=2e-5)
    longer = [*prompt, 11, 12]
    late = run(engine, [("late", longer, SamplingParams(8, seed=1))])["late"]
    assert engine.prefilled < len(prompt) + 8  # another slot's opening was copied
    np.testing.assert_allclose(late.logprobs, plain_logprobs(tiny_model, longer, list(late.token_ids)), atol=2e-5)


def test_new_weights_drop_what_was_cached(tiny_model):
    model = copy.deepcopy(tiny_model)
    engine = TransformersEngine(model, slots=2)
    prompt = prompts(1, seed=8)[0]
    run(engine, [("a", prompt, SamplingParams(5))])
    changed = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    engine.load_weights(changed.items())
    assert engine.version == 1
    got = run(engine, [("b", prompt, SamplingParams(5))])["b"]
    np.testing.assert_allclose(got.logprobs, plain_logprobs(model, prompt, list(got.token_ids)), atol=2e-5)
    with pytest.raises(KeyError, match="no parameter 'nonsense'"):
        engine.load_weights([("nonsense", torch.zeros(1))])


def test_impossible_requests_are_refused(tiny_model):
    engine = TransformersEngine(tiny_model, slots=2, max_context=40)
    with pytest.raises(ValueError, match="exceed the context of 40"):
        engine.submit("a", [1] * 35, SamplingParams(10))
    with pytest.raises(ValueError, match="empty prompt"):
        engine.submit("a", [], SamplingParams(10))
    for bad in ({"max_tokens": 0}, {"max_tokens": 1, "temperature": -1}):
        with pytest.raises(ValueError, match="expected"):
            SamplingParams(**bad)


def test_random_streams_are_uniform_and_distinct():
    seeds, places = np.repeat(np.arange(200, dtype=np.uint64), 100), np.tile(np.arange(100), 200)
    draws = uniform(seeds, places)
    assert draws.min() >= 0 and draws.max() < 1 and len(np.unique(draws)) == len(draws)
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50
    grid = draws.reshape(200, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("kind", "options", "written_out"),
    [
        ("Qwen3", {}, True),
        ("Qwen2", {}, True),
        ("Llama", {"attention_bias": True}, True),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
        ("Mistral", {"sliding_window": None}, True),
        ("Olmo2", {}, False),
        ("Gemma", {}, False),
    ],
)
def test_every_family_gives_the_log_probs_of_its_own_forward_pass(kind, options, written_out):
    model = small(kind, **options)
    engine = TransformersEngine(model, slots=3)
    assert isinstance(engine.decoder, FamilyDecoder) == written_out
    texts = [*prompts(4, seed=9), *prompts(2, seed=10, low=100, high=200)]
    done = run(engine, [(str(i), p, SamplingParams(10, 0.8, seed=i)) for i, p in enumerate(texts)])
    for i, prompt in enumerate(texts):
        got = done[str(i)]
        np.testing.assert_allclose(got.logprobs, plain_logprobs(model, prompt, list(got.token_ids), 0.8), atol=3e-5)
        longer = [*prompt, *got.token_ids, *range(5, 5 + 40 * (i % 3))]
        more = run(engine, [("more", longer, SamplingParams(4, seed=i))])["more"]
        np.testing.assert_allclose(more.logprobs, plain_logprobs(model, longer, list(more.token_ids)), atol=3e-5)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("Mistral", {"sliding_window": 16}, "whole context"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 50.0}, "soft-capped"),
        ("Bloom", {}, "get_mask_sizes"),
        ("StableLm", {}, "keyword options"),
        ("Mamba", {}, "its own forward pass"),
    ],
)
def test_models_that_no_ragged_pass_can_run_go_through_their_own_forward(kind, options, why, caplog):
    model = small(kind, **options)
    engine = TransformersEngine(model, slots=3)
    assert isinstance(engine.decoder, OwnDecoder)
    assert f"{kind}ForCausalLM runs through its own forward" in caplog.text and why in caplog.text
    texts = [*prompts(4, seed=9, low=20), [1, 2, 3]]
    texts.append(list(texts[0]))  # one that is copied
    conversations = dict(enumerate(texts))
    for turn in range(2):
        done = run(engine, [(f"{i}/{turn}", p, SamplingParams(6, 0.8, seed=i)) for i, p in conversations.items()])
        for i, prompt in conversations.items():
            got = done[f"{i}/{turn}"]
            np.testing.assert_allclose(got.logprobs, plain_logprobs(model, prompt, list(got.token_ids), 0.8), atol=3e-5)
            conversations[i] = [*prompt, *got.token_ids, 5, 6, 7]
    assert verify_weights(engine, model) < 1e-4


def test_a_window_wider_than_the_context_is_whole_attention():
    model = small("Mistral", sliding_window=64)
    assert isinstance(TransformersEngine(model, slots=2, max_context=64).decoder, FamilyDecoder)
    assert isinstance(TransformersEngine(model, slots=2, max_context=65).decoder, OwnDecoder)


@pytest.mark.parametrize(("bound", "scores"), [(40, 1 << 22), (8192, 500)])
def test_bounds_on_memory_change_nothing(tiny_model, monkeypatch, bound, scores):
    from agents.engines import kv_cache, transformers

    texts = prompts(12, seed=11)
    requests = [(str(i), p, SamplingParams(9, seed=i)) for i, p in enumerate(texts)]
    expected = run(TransformersEngine(tiny_model, slots=12), requests)
    monkeypatch.setattr(transformers, "PASS_TOKENS", bound)
    monkeypatch.setattr(kv_cache, "BLOCK_SCORES", scores)
    got = run(TransformersEngine(tiny_model, slots=12), requests)
    assert {k: c.token_ids for k, c in got.items()} == {k: c.token_ids for k, c in expected.items()}


@pytest.mark.parametrize(("place", "dtype", "shared"), [
    ("cuda", torch.float32, False), ("cuda", torch.bfloat16, True), ("cpu", torch.float32, True),
])  # fmt: skip
def test_heads_share_keys_only_where_a_fused_kernel_lets_them(place, dtype, shared, monkeypatch):
    class Placed(torch.Tensor):
        is_cuda = place == "cuda"

    plain, asked = torch.nn.functional.scaled_dot_product_attention, []

    def fused(*states, enable_gqa, **options):
        asked.append(enable_gqa)
        return plain(*states, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(kv_cache, "scaled_dot_product_attention", fused)
    queries, keys, values = (torch.randn(1, heads, 5, 8).to(dtype).as_subclass(Placed) for heads in (4, 2, 2))
    got = kv_cache.causal_attention(queries, keys, values, 0.3)
    assert asked == [shared]
    expected = plain(queries, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), is_causal=True, scale=0.3)
    torch.testing.assert_close(got, expected)


def test_scattered_slots_attend_to_their_own_rows(tiny_model):
    engine = TransformersEngine(tiny_model, slots=16)
    texts = prompts(16, seed=12)
    # Only the first and the last slot outlive the others: their rows are gathered, not viewed.
    lengths = [30 if i in (0, 15) else 2 for i in range(16)]
    done = run(engine, [(str(i), p, SamplingParams(lengths[i], seed=i)) for i, p in enumerate(texts)])
    for i in (0, 15):
        got = done[str(i)]
        np.testing.assert_allclose(got.logprobs, plain_logprobs(tiny_model, texts[i], list(got.token_ids)), atol=2e-5)


def test_an_engine_that_failed_stays_dead_and_says_why(tiny_model):
    model = copy.deepcopy(tiny_model)
    engine = TransformersEngine(model, slots=2)
    engine.submit("a", [1, 2, 3], SamplingParams(5))
    model.get_decoder().embed_tokens.forward = lambda ids: 1 / 0
    for _ in range(2):
        with pytest.raises(EngineDied, match=r"transformers engine died \(ZeroDivisionError.*again to go on"):
            engine.step()


def test_memory_grows_with_what_is_used_and_seldom(tiny_model):
    """Slots that nothing used cost nothing; a long conversation is not copied at every few positions."""
    engine = TransformersEngine(tiny_model, slots=64, max_context=2000)
    shapes, known = [], {str(i): [5 + i] * 60 for i in range(3)}
    while len(known["0"]) < 1900:
        got = run(engine, [(name, ids, SamplingParams(2, seed=1)) for name, ids in known.items()])
        known = {name: [*ids, *got[name].token_ids, *[7] * 98] for name, ids in known.items()}
        shapes.append(tuple(engine.store.keys[0].shape[::2]))
    assert {rows for rows, _ in shapes} == {3}
    lengths = sorted({length for _, length in shapes})
    assert lengths[-1] == 2048 and len(lengths) <= 7 and all(length % 256 == 0 for length in lengths)
    run(engine, [(str(i), [5, 6], SamplingParams(1, seed=i)) for i in range(64)])
    assert engine.store.keys[0].shape[::2] == (64, 2048)


def test_a_sleeping_engine_holds_no_memory_and_answers_as_before(tiny_model):
    engine = TransformersEngine(tiny_model, slots=4)
    request = ("a", prompts(1, seed=13)[0], SamplingParams(6, seed=1))
    before = run(engine, [request])["a"].token_ids
    assert engine.store.length
    engine.sleep()
    assert engine.store.length == 0
    engine.wake()
    engine.submit(*request)
    with pytest.raises(RuntimeError, match="while requests are running"):
        engine.sleep()
    done = []
    while not done:
        done = engine.step()
    assert done[0].token_ids == before


def test_vllm_finds_free_what_torch_has_freed(monkeypatch):
    """vLLM takes its memory from the driver, so what the learner has freed must be there before weights come back."""
    calls = []

    class Core:
        def __getattr__(self, name):
            return lambda *_, **options: calls.append((name, *options.get("tags", ())))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    engine = object.__new__(VllmEngine)
    engine.__dict__ |= {
        "_dead": None, "_running": {}, "_gpu": True, "_sleeps": True, "_asleep": False, "_tied": False, "_rows": 97, "version": 0,
        "_vocabulary": frozenset(), "llm": Core(),
    }  # fmt: skip
    engine.sleep()
    calls.clear()
    engine.load_weights([])
    assert calls[:3] == ["empty_cache", ("wake_up", "weights"), ("collective_rpc",)]
    assert calls[3:] == [("wake_up", "kv_cache"), ("reset_prefix_cache",)]


def test_other_weights_than_the_trained_ones_are_noticed(tiny_model):
    model = copy.deepcopy(tiny_model)
    engine = TransformersEngine(copy.deepcopy(model), slots=4)
    model.train()
    assert verify_weights(engine, model) < 1e-5
    assert model.training
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.01 * torch.randn_like(model.get_output_embeddings().weight))
    with pytest.raises(WeightMismatch, match="tied to its embedding"):
        verify_weights(engine, model)
    engine.load_weights(model.named_parameters())
    assert verify_weights(engine, model) < 1e-5


@pytest.mark.parametrize(("scale", "fits"), [(1.0, False), (100.0, True)])
def test_half_precision_may_err_by_steps_of_its_largest_logits(tiny_model, scale, fits, monkeypatch):
    """Between 32 and 64 neighbouring bfloat16 numbers differ by 0.25: as much as is an error where logits are small."""
    model = copy.deepcopy(tiny_model).bfloat16()
    with torch.no_grad():
        logits = model(torch.tensor([list(range(5, 17))])).logits
        model.get_output_embeddings().weight.mul_(scale * 0.4 / logits.abs().max())  # 0.4 and 40
    engine = TransformersEngine(model, slots=2)
    step = engine.step

    def off():
        return [dataclasses.replace(done, logprobs=[value - 0.4 for value in done.logprobs]) for done in step()]

    monkeypatch.setattr(engine, "step", off)
    if fits:
        assert 0.1 < verify_weights(engine, model) < 0.8
    else:
        with pytest.raises(WeightMismatch, match=r"may differ by 0\.25"):
            verify_weights(engine, model)


def test_packed_matrices_follow_their_weights(tiny_model, monkeypatch):
    from agents.engines import decoder

    monkeypatch.setattr(decoder, "PACK_ELEMENTS", 1)
    model = copy.deepcopy(tiny_model)
    engine = TransformersEngine(model, slots=4)
    texts = prompts(5, seed=14)
    requests = [(str(i), p, SamplingParams(6, seed=i)) for i, p in enumerate(texts)]
    for change in range(3):
        done = run(engine, requests)
        assert len(engine.decoder.packed) == 2 * 7 + 1
        for i, prompt in enumerate(texts):
            got = done[str(i)]
            np.testing.assert_allclose(got.logprobs, plain_logprobs(model, prompt, list(got.token_ids)), atol=2e-5)
        with torch.no_grad():  # in place, as an optimizer does; the second time the engine is not told
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        engine.load_weights(model.named_parameters()) if change == 0 else engine.sleep()
