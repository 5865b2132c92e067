"""Models are accepted as a whole or refused by name: files, adapters, vocabularies."""

import copy
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from requests_to_engines import run, small
from safetensors.torch import load_file, save_file
from tinymodel import tiny_qwen3

from agents import models
from agents.engines.base import SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.engines.weight_check import verify_weights
from agents.logits import (
    limit_vocabulary,
    own_logits,
    probe_ids,
    text_config,
    usable_ids,
)
from agents.models import LoadedModel, accept, like, load_model, share_vocabulary
from agents.reference.tokenizer import train_tokenizer
from atod_algos.learner.logprobs import compare, entropies, score
from atod_algos.learner.lora import add_adapters, merged_weights
from atod_algos.teachers.server import row_batch
from atod_algos.training.checkpoint import save_checkpoint
from atod_envs.errors import AtodError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["You see a apple 1. take it"] * 30, tags=["<think>"], words=20, phrases=5)


@pytest.fixture
def saved(tokenizer, tmp_path):
    def save(name, model):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def rename(weights, old, new):
    weights[new] = weights.pop(old)


UP = "model.layers.1.mlp.up_proj.weight"
HALF = [
    ("lack 1 of its weights", {}, lambda w: w.pop(UP)),
    ("lack 1 of its weights", {}, lambda w: rename(w, UP, f"{UP}s")),
    ("lack 1 of its weights", {"tie_word_embeddings": False}, lambda w: w.pop("lm_head.weight", None)),
    ("lack 25 of its weights", {}, lambda w: [rename(w, name, f"module.{name}") for name in list(w)]),
    (
        "no place .*layers.1.input_layernorm",
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        lambda w: None,
    ),
    ("no place .*q_proj.bias", {}, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
    (None, {}, lambda w: w.update({"v_head.weight": torch.ones(1, 32)})),
    (None, {}, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
]


@pytest.mark.parametrize(("said", "settings", "change"), HALF)
def test_files_that_are_not_the_whole_model_are_refused(saved, tokenizer, said, settings, change):
    """transformers makes up what is missing and leaves out what has no place; log-probs would be another model's."""
    model = tiny_qwen3(len(tokenizer), 0)
    folder = Path(saved("whole", model))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    if said is None:
        ids = probe_ids(model, 12, 1)
        loaded = load_model(str(folder), "student").model
        np.testing.assert_allclose(own_logits(loaded, ids).detach(), own_logits(model, ids).detach(), atol=1e-5)
    else:
        with pytest.raises(AtodError, match=said):
            load_model(str(folder), "student")


def test_adapters_of_another_model_are_refused(saved, tokenizer, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    model = tiny_qwen3(len(tokenizer), 0)
    saved("base", model)
    folder = tmp_path / "adapters"
    add_adapters(model, rank=2, alpha=4, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    load_model(str(folder), "student")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    rename(weights, name, name.replace("layers.", "blocks."))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AtodError, match="its adapters do not fit the model"):
        load_model(str(folder), "student")


def test_weights_that_stay_quantized_are_refused(saved, tokenizer, monkeypatch):
    from transformers import Qwen3ForCausalLM

    folder, plain = saved("m", tiny_qwen3(len(tokenizer), 0)), Qwen3ForCausalLM.from_pretrained

    def quantized(dequantize):
        def load(*arguments, **options):
            model, info = plain(*arguments, **options)
            settings = SimpleNamespace(quant_method="awq", dequantize=dequantize)
            model.hf_quantizer = SimpleNamespace(quantization_config=settings)
            return model, info

        monkeypatch.setattr(models, "_kind", lambda *_: SimpleNamespace(from_pretrained=load))

    quantized(dequantize=True)
    load_model(folder, "student")
    quantized(dequantize=False)
    with pytest.raises(AtodError, match=r"quantized \(awq\), .*use the checkpoint that it was made from"):
        load_model(folder, "student")


def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(saved, tokenizer):
    model = small("Qwen3", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(
        AtodError, match=r"student model .*layers\.1\.mlp\.up_proj\.weight holds values that are no finite"
    ):
        load_model(saved("broken", model), "student")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda data: data[:-9]),
        ("model.safetensors", lambda data: data[:40] + b"\x00" + data[41:]),
        ("model.safetensors", lambda data: b""),
        ("config.json", lambda data: b"[" * 100_000),
        ("config.json", lambda data: b"\xff" + data),
        ("tokenizer.json", lambda data: data[: len(data) // 2]),
        ("tokenizer.json", lambda data: b"{}"),
        ("tokenizer_config.json", lambda data: b"[]"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line(saved, tokenizer, file, damage):
    folder = Path(saved("damaged", small("Qwen3", vocab_size=len(tokenizer))))
    assert load_model(str(folder), "teacher").n_parameters > 0
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(AtodError, match=r"teacher model .*damaged' could not be loaded: ") as caught:
        load_model(str(folder), "teacher")
    assert "\n" not in str(caught.value)


def test_ids_without_a_token_are_never_sampled_nor_given_probability(saved, tokenizer):
    n = len(tokenizer)
    model = small("Qwen3", vocab_size=n + 23)
    with torch.no_grad():
        model.get_output_embeddings().weight[n:] *= 5  # as likely as can be
    loaded = load_model(saved("padded", model), "student").model
    assert usable_ids(loaded).tolist() == list(range(n))
    for policy in (loaded, copy.deepcopy(loaded)):
        engine = TransformersEngine(policy, slots=32)
        prompt = [5, 6, 7, 8]
        done = run(engine, [(str(i), prompt, SamplingParams(20, i / 8, seed=i)) for i in range(24)])
        assert max(max(c.token_ids) for c in done.values()) < n
        with torch.no_grad():
            c = done["8"]
            rows = torch.log_softmax(policy(torch.tensor([[*prompt, *c.token_ids]])).logits[0, 3:-1, :n], -1)
        np.testing.assert_allclose(c.logprobs, rows.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0], atol=2e-5)
        assert verify_weights(engine, policy) < 1e-4
    values, entropy = score(loaded, row_batch([np.array([*prompt, *c.token_ids])]), temperature=1.0, entropy=True)
    np.testing.assert_allclose(values[3:], c.logprobs, atol=2e-5)
    assert np.isfinite(entropy).all()
    np.testing.assert_allclose(entropy[3:], -(rows.exp() * rows).sum(-1), atol=2e-5)


def test_holes_in_a_vocabulary_are_shut_too():
    model = small("Qwen3")
    limit_vocabulary(model, [i for i in range(97) if i % 3])
    engine = TransformersEngine(model, slots=16)
    done = run(engine, [(str(i), [1, 2, 4], SamplingParams(30, seed=i)) for i in range(16)])
    assert not any(token % 3 == 0 for c in done.values() for token in c.token_ids)


def test_vllm_is_given_a_model_without_the_ids_that_have_no_token():
    from agents.engines.vllm import spoken_rows

    model = small("Qwen3", tie_word_embeddings=False)
    assert spoken_rows(model) == (97, {"model.embed_tokens.weight", "lm_head.weight"})
    limit_vocabulary(model, range(90))
    assert spoken_rows(model)[0] == 90
    limit_vocabulary(model, [*range(40), *range(41, 90)])
    with pytest.raises(AtodError, match="1 ids without a token between others"):
        spoken_rows(model)


def test_the_smaller_vocabulary_is_the_support_of_both(tokenizer):
    n = len(tokenizer)
    student, teacher = small("Qwen3", vocab_size=n + 5), small("Qwen3", vocab_size=n - 7)
    for model in (student, teacher):
        accept(model, tokenizer, "model")
    assert share_vocabulary([student, teacher], tokenizer) == n - 7
    done = run(
        TransformersEngine(student, slots=16), [(str(i), [1, 2, 4], SamplingParams(30, seed=i)) for i in range(16)]
    )
    rows = [np.array([1, 2, 4, *c.token_ids]) for c in done.values()]
    assert max(row.max() for row in rows) < n - 7
    found = compare(student, teacher, row_batch(rows), temperature=1.0, support=10**6)
    assert found.vocabulary == n - 7 and found.support_MS.shape[1] == n - 7 and np.isfinite(found.reverse_kl_M).all()
    np.testing.assert_allclose(found.teacher_M, score(teacher, row_batch(rows), temperature=1.0)[0], atol=1e-5)
    with pytest.raises(AtodError, match=rf"embeddings for {n - 7:,} ids, but a prompt holds id {n - 1}"):
        score(teacher, row_batch([np.array([1, n - 1, 2])]), temperature=1.0)
    tiny = small("Qwen3", vocab_size=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    with pytest.raises(AtodError, match="end of a response is id 1"):
        share_vocabulary([student, tiny], tokenizer)


def test_ids_that_are_masked_have_no_entropy_and_no_divergence():
    logits = torch.tensor([[0.0, 1.0, float("-inf")], [2.0, float("-inf"), float("-inf")]], requires_grad=True)
    rows = torch.log_softmax(logits, -1)
    p = torch.tensor([1.0, np.e]) / (1 + np.e)
    found = entropies(rows)
    np.testing.assert_allclose(found.detach(), [float(-(p * p.log()).sum()), 0.0], atol=1e-6)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_multimodal_checkpoint_is_its_text_model(saved, tokenizer):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
    }
    sight = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=sight.to_dict(), mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    loaded = load_model(saved("sees", model), "student")
    assert text_config(loaded.model).hidden_size == 32
    engine = TransformersEngine(loaded.model, slots=2, max_context=128)
    assert verify_weights(engine, loaded.model) < 1e-4
    ids = probe_ids(loaded.model, 30, 3)
    own = torch.log_softmax(own_logits(loaded.model, ids)[:, : len(tokenizer)], -1).detach()
    expected = own[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(score(loaded.model, row_batch([np.array(ids)]), temperature=1.0)[0], expected, atol=1e-3)


# --- adapters -----------------------------------------------------------------------------------------------------

EXPERTS = [
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize(("kind", "options"), EXPERTS)
def test_adapters_leave_routers_alone_and_their_sums_reach_the_engine(kind, options):
    pytest.importorskip("peft", reason="needs the lora extra")
    model = small(kind, **options)
    policy = copy.deepcopy(model)
    engine = TransformersEngine(policy, slots=2)
    names = {name for name, _ in policy.named_parameters()}
    add_adapters(model, rank=2, alpha=4, seed=0)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted and not any(
        name.rsplit(".", 1)[-1] in ("gate", "router", "shared_expert_gate", "layer") for name in adapted
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.3)
    merged = dict(merged_weights(model))
    assert set(merged) == names
    engine.load_weights(merged.items())
    assert verify_weights(engine, model) < 1e-4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_was_changed_is_refused_wherever_it_is_read(name, tokenizer, tmp_path):
    model = small("Qwen3", vocab_size=len(tokenizer))
    folder = save_checkpoint(
        tmp_path, "step_1", model=model, tokenizer=tokenizer, state={"x": torch.zeros(1)}, extra={"step": 1}
    )
    (folder / "trainer_state.pt").unlink()  # of no use to a reader
    load_model(str(folder), "student")
    data = bytearray((folder / name).read_bytes())
    data[-9] ^= 1 if name == "model.safetensors" else 0
    (folder / name).write_bytes(bytes(data) if name == "model.safetensors" else data + b"\n")
    with pytest.raises(AtodError, match=f"its file {name} is not as the training wrote it; restore it"):
        load_model(str(folder), "student")
    (folder / "complete.json").write_text("{")
    with pytest.raises(AtodError, match=r"complete\.json: broken JSON"):
        load_model(str(folder), "student")


def test_adapters_find_their_model_from_any_folder_and_never_ask_a_hub(saved, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs the lora extra")
    model = small("Qwen3", vocab_size=len(tokenizer))
    saved("models/base", model)
    wrapper = add_adapters(model, rank=2, alpha=4, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.3)
    folder = tmp_path / "run" / "checkpoints" / "step_1"
    wrapper.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "adapter_config.json"

    def no_network(*_, **__):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    ids = probe_ids(model, 12, 1)
    for base in ("../../../models/base", "models/base", str(tmp_path / "models" / "base")):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": base}))
        loaded = load_model(str(folder), "student")
        assert isinstance(loaded, LoadedModel)
        np.testing.assert_allclose(own_logits(loaded.model, ids).detach(), own_logits(model, ids).detach(), atol=1e-4)
    for base in ("models/gone", "base", "./gone"):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(AtodError, match="neither a folder in or above"):
            load_model(str(folder), "student")
    settings.write_text("[]")
    with pytest.raises(AtodError, match="names no base model"):
        load_model(str(folder), "student")


def test_models_are_alike_but_for_their_values():
    assert like(tiny_qwen3(64, 1), tiny_qwen3(64, 2))
    assert not like(tiny_qwen3(64, 1), tiny_qwen3(64, 1, hidden=64)), "a larger one of the same family"
    assert not like(tiny_qwen3(64, 1), torch.nn.Linear(2, 2))
