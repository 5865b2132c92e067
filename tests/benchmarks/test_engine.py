"""``benchmarks/engine.py``: the contenders answer what they were asked, and what is absent says what to install."""

import re
import sys

import pytest
import torch
from paths import REPOSITORY
from tinymodel import tiny_qwen3

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from engine import Turn, main, replay
from engine_contenders import LlamaCpp, LockStep, Timed, llama_cpp, write_gguf

from agents.engines.base import SamplingParams
from agents.engines.transformers import TransformersEngine
from atod_envs.errors import AtodError

EPISODES = [[Turn([1, 2, 3, 4, 5, 6, 7, 8, 9, 10 + i], 3), Turn([20, 21], 5)] for i in range(3)]


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    return model.eval()


def with_llama_cpp(model, path, **settings):
    try:
        llama_cpp()
    except AtodError as error:
        pytest.skip(str(error))
    return LlamaCpp(write_gguf(model, path, "f32"), 2, 64, keys="f32", **settings)


@pytest.mark.parametrize("kind", ["ours", "lock-step", "llama.cpp"])
def test_every_contender_samples_the_lengths_it_was_told(kind, tmp_path):
    model = tiny_qwen3(64, 1)
    engine = Timed(
        TransformersEngine(model, slots=2)
        if kind == "ours"
        else LockStep(model, 2, 64)
        if kind == "lock-step"
        else with_llama_cpp(model, tmp_path / "model.gguf")
    )
    replay(engine, EPISODES, 0, window=False)
    assert engine.sampled == 3 * (3 + 5) and engine.asked == 3 * (10 + 15)
    engine.close()


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("make", [lambda: tiny_qwen3(64, 1), tiny_llama], ids=["qwen3", "llama"])
def test_llama_cpp_has_the_same_weights(make, unified, tmp_path):
    model = make()
    other, ours = with_llama_cpp(model, tmp_path / "model.gguf", unified=unified), TransformersEngine(model, slots=2)

    def said(engine):
        """Greedy, two turns; with three conversations on two slots, so that openings and turns are read again."""
        prompts, answers = [episode[0].new_ids for episode in EPISODES], []
        for _ in range(2):
            for i, prompt in enumerate(prompts):
                engine.submit(str(i), prompt, SamplingParams(6, temperature=0.0))
            done = {}
            while len(done) < 3:
                done |= {answer.request_id: list(answer.token_ids) for answer in engine.step()}
            answers.append(done)
            prompts = [[*prompt, *done[str(i)], 20, 21] for i, prompt in enumerate(prompts)]
        return answers

    assert said(other) == said(ours)
    other.close()


def test_a_table_names_what_was_not_run(capsys):
    options = "--engines transformers lock-step llama.cpp llama.cpp-file --workloads prefill decode --parameters 0.5 --episodes 1"
    threads = torch.get_num_threads()
    try:
        main([*options.split(" "), "--repeats", "1"])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    for workload, engine, unit in (("prefill", "transformers", "384 read"), ("decode", "lock-step", "96 sampled")):
        assert re.search(rf"^{workload} +{engine} .* {unit} in", said, re.MULTILINE)
    assert len(re.findall("^decode +llama.cpp .*(96 sampled|pip install llama-cpp-python)", said, re.MULTILINE)) == 1
    assert len(re.findall("^decode +llama.cpp-file +not run: ", said, re.MULTILINE)) == 1
