"""``atod export``: what it writes is the trained model, or it writes nothing and says why."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from episodes import outcome
from safetensors.torch import load_file, save_file
from tinymodel import tiny_qwen3

from agents.models import load_model
from atod_algos.evaluate import Evaluation
from atod_algos.evaluate.settings import episodes_path, weights_digest
from atod_algos.export.command import main
from atod_algos.learner.lora import add_adapters
from atod_algos.training.checkpoint import save_checkpoint
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.run_dir import RunFolder
from atod_envs.trajectory import write_jsonl

ALONE = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] in ("agents", "atod_algos", "atod_envs") for name in sys.modules)
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
text = tokenizer.apply_chat_template([{"role": "user", "content": "look"}], tokenize=False, add_generation_prompt=True)
ids = tokenizer.encode(text, add_special_tokens=False)
with torch.no_grad():
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
out = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
print(json.dumps({"ids": ids, "logprobs": logprobs.tolist(), "eos": model.generation_config.eos_token_id, "new": out.shape[1] - len(ids)}))
"""


def llama(tokenizer, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256, rope_theta=5e5, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(model, seed=3):
    """Every weight that learns, somewhere else: a training in a line."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def run_of(path, student, *, lora_rank=0, name="step_000003", dtype="auto", algorithm="atod"):
    """A run's folder with a checkpoint, a final table and a validation, as training writes them; its trained model."""
    config = resolve(
        TrainConfig(
            student=str(student), teacher="/secret/teacher", style="compact", lora_rank=lora_rank, dtype=dtype, max_response=24,
            max_context=256, eval_temperature=0.5, data="/secret/data",
        )
    )  # fmt: skip
    run = RunFolder(path, {"train": vars(config), "algorithm": {"name": algorithm, "kappa": 1.0}})
    loaded = load_model(str(student), "student", dtype="auto")
    adapters = add_adapters(loaded.model, rank=lora_rank, alpha=8.0, seed=0) if lora_rank else None
    moved(loaded.model)
    extra = {"step": 3, "best": {}, "algorithm": "atod", "data": "games 1.0"}
    save_checkpoint(
        run.checkpoints, name, model=adapters or loaded.model, tokenizer=loaded.tokenizer, state={"x": torch.zeros(1)}, extra=extra
    )  # fmt: skip
    before, last = (Evaluation(tuple(outcome(f"t{i}", i < n) for i in range(20))).summary() for n in (2, 13))
    run.finish({"step": 3, "panel": "valid_unseen, 20 tasks", "table": {"before": before, "last (step 3)": last}})
    run.store_validation(3, [outcome(f"v{i}", i < 5) for i in range(10)])
    return loaded


@pytest.fixture(scope="module")
def students(tokenizer, tmp_path_factory):
    made = {"qwen3": tiny_qwen3(len(tokenizer), 1, eos_token_id=tokenizer.eos_token_id), "llama": llama(tokenizer, 2)}
    made["half"] = tiny_qwen3(len(tokenizer), 1, eos_token_id=tokenizer.eos_token_id).bfloat16()
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def alone(folder):
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["qwen3", "llama", "half"])
def test_a_whole_model(students, tmp_path, kind, capsys):
    trained = run_of(tmp_path / "run", students[kind])
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "log-probs of the trained model to 0 nats" in said and "step 3" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert expected == files
    written, own = load_file(tmp_path / "out" / "model.safetensors"), dict(trained.model.named_parameters())
    assert all(torch.equal(written[name], own[name].cpu()) for name in written)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (
        generation["temperature"] == 0.5
        and generation["top_k"] == 0
        and generation["eos_token_id"] == list(trained.chat().stop_ids)
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == ("bfloat16" if kind == "half" else "float32")
    assert config["rope_theta"] == (5e5 if kind == "llama" else 1e4), "older readers look here"
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.slow
def test_transformers_alone_reads_the_builtin_student(tmp_path):
    trained = run_of(tmp_path / "run", "agents/reference/alfworld/student")
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    found = alone(tmp_path / "out")
    with torch.no_grad():
        own = torch.log_softmax(trained.model(torch.tensor([found["ids"]])).logits[0], -1)
    assert torch.allclose(torch.tensor(found["logprobs"]), own, atol=1e-5)
    assert found["eos"] == list(trained.chat().stop_ids) and 1 <= found["new"] <= 3


@pytest.mark.parametrize("kind", ["qwen3", "llama", "half"])
def test_adapters(students, tmp_path, kind, capsys):
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    trained = run_of(tmp_path / "run", students[kind], lora_rank=4)
    main([str(tmp_path / "run"), "--to", str(tmp_path / "adapters"), "--card"])
    assert f"adapters for {students[kind]}" in capsys.readouterr().out
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (tmp_path / "adapters").iterdir()
    }
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    main([str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merge"])
    merged = load_model(str(tmp_path / "merged"), "student", dtype="auto")
    assert merged.n_parameters == load_model(str(students[kind]), "student").n_parameters
    ids = torch.arange(20)[None]
    with torch.no_grad():
        with_adapters = trained.model(ids).logits.float()
        base = load_model(str(students[kind]), "student", dtype="auto").model(ids).logits.float()
        sums = merged.model(ids).logits.float()
    tolerance = 0.1 if kind == "half" else 1e-4
    assert torch.allclose(sums, with_adapters, atol=tolerance) and not torch.allclose(
        base, with_adapters, atol=3 * tolerance
    )


def test_the_card_holds_the_numbers_with_their_intervals(students, tmp_path, capsys):
    run_of(tmp_path / "run", students["qwen3"])
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--card"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| last (step 3) | 65.0% | 43.3 - 81.9 | 20 |" in text and "| before | 10.0% | 2.8 - 30.1 | 20 |" in text
    assert "validation panel (choices were made on it)" in text and "| step 3 | 50.0% | 23.7 - 76.3 | 10 |" in text
    assert "data `games 1.0`" in text and '"kappa": 1.0' in text and '"torch":' in text
    assert "/secret" not in text and str(tmp_path) not in text, "a card may be published"


def test_an_evaluation_of_other_weights_is_refused(students, tmp_path, capsys):
    run_of(tmp_path / "run", students["qwen3"])
    run_of(tmp_path / "other", students["llama"])
    for name, run in (("own", "run"), ("strange", "other")):
        folder = tmp_path / name
        (folder / "episodes").mkdir(parents=True)
        write_jsonl(episodes_path(folder, "valid_seen/10", 0), [outcome(f"t{i}", i < 7) for i in range(10)])
        weights = weights_digest(str(tmp_path / run / "checkpoints" / "step_000003"))
        settings = {"env": "atod/ALFWorld-v0", "agent": run, "weights": weights, "sampling": {"temperature": 0.5}}
        settings |= {"panels": [{"name": "valid_seen/10", "tasks": 10}], "seeds": [0]}
        (folder / "config.json").write_text(json.dumps({"settings": settings}))
        (folder / "result.json").write_text("{}")  # the numbers are those of the episodes
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--card", "--evaluation", str(tmp_path / "own")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "atod/ALFWorld-v0, valid_seen/10, temperature 0.5, seeds 0:" in text
        and "| this model | 70.0% | 39.7 - 89.2 | 10 |" in text
    )
    err = refused(capsys, tmp_path / "run", "--to", tmp_path / "x", "--card", "--evaluation", tmp_path / "strange")
    assert "is an evaluation of other weights (other)" in err and not (tmp_path / "x").exists()


def test_what_cannot_be_exported_is_said_in_a_line(students, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert "no folder at" in refused(capsys, tmp_path / "nothing", "--to", out)
    (tmp_path / "empty").mkdir()
    assert "is no run: expected config.json and checkpoints/" in refused(capsys, tmp_path / "empty", "--to", out)
    run_of(run, students["qwen3"])
    assert "no checkpoint 'best'; there is: step_000003" in refused(capsys, run, "--to", out, "--checkpoint", "best")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("mine")
    assert "exists and is not empty" in refused(capsys, run, "--to", full) and (full / "a").read_text() == "mine"
    assert "is no folder" in refused(capsys, run, "--to", full / "a")
    assert "--evaluation is for the card" in refused(capsys, run, "--to", out, "--evaluation", full)
    settings = (run / "config.json").read_text()
    for text in ("", "{", "[1]", "[" * 100_000, "\udcff", settings.replace('"versions"', '"version"')):
        (run / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "config.json" in (said := refused(capsys, run, "--to", out)) and "restore the file" in said
    (run / "config.json").write_text(settings)
    broken = run / "checkpoints" / "step_000003" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    assert "model.safetensors is not as it was written" in refused(capsys, run, "--to", out)
    assert not out.exists()
    empty = RunFolder(tmp_path / "new", {"train": {}, "algorithm": {}})
    assert "no checkpoint of a step yet; train for a step" in refused(capsys, empty.path, "--to", out)


def test_another_model_than_the_trained_one_is_refused(students, tmp_path, capsys, monkeypatch):
    """A writer that loses a weight is noticed; so is a base model that changed under its adapters."""
    import atod_algos.export.folder as folder

    run_of(tmp_path / "run", students["qwen3"])
    plain = folder._write_model

    def careless(trained, part, train):
        plain(trained, part, train)
        weights = load_file(part / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(folder, "_write_model", careless)
    err = refused(capsys, tmp_path / "run", "--to", tmp_path / "out")
    assert "the exported model is not the trained one: on " in err and "nothing was written" in err
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*")) == []


def test_a_full_disk_leaves_nothing(students, tmp_path, capsys):
    run_of(tmp_path / "run", students["qwen3"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the system refuses what goes beyond
    try:
        err = refused(capsys, tmp_path / "run", "--to", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written" in err and "nothing is left of it" in err
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize(("algorithm", "taught"), [("atod", True), ("opd", True), ("sdar", False), ("opsa", False)])
def test_the_card_names_a_teacher_where_one_taught(algorithm, taught, students, tmp_path):
    run_of(tmp_path / "run", students["qwen3"], algorithm=algorithm)
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--card"])
    assert ("; teacher" in (tmp_path / "out" / "README.md").read_text()) == taught


def test_sft_and_best_and_a_checkpoint_by_its_folder(students, tmp_path, capsys):
    run_of(tmp_path / "sft" / "training", students["qwen3"], algorithm="sft")
    main([str(tmp_path / "sft"), "--to", str(tmp_path / "a"), "--card"])
    text = (tmp_path / "a" / "README.md").read_text()
    assert "with sft for 3 rounds. Tasks" in text and '"style"' in text, "no teacher"
    assert '"group_size"' not in text, "demonstrations know no groups"
    run_of(tmp_path / "sft" / "training", students["qwen3"], name="best", algorithm="sft")
    main([str(tmp_path / "sft"), "--to", str(tmp_path / "b"), "--checkpoint", "best"])
    main([str(tmp_path / "sft" / "training" / "checkpoints" / "best"), "--to", str(tmp_path / "c")])
    same = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    assert all(torch.equal(same[0][name], other[name]) for name in same[0] for other in same)


def test_rows_that_the_run_played_are_compared(students, tmp_path, capsys):
    from dataclasses import replace

    run_of(tmp_path / "run", students["qwen3"])
    episode = outcome("t", True)
    turns = tuple(
        replace(turn, prompt_ids=tuple(range(5, 40)), response_ids=(7, 8), logprobs=(0.0, 0.0))
        for turn in episode.turns
    )
    (tmp_path / "run" / "trajectories").mkdir()
    write_jsonl(tmp_path / "run" / "trajectories" / "step_000003.jsonl.gz", [replace(episode, turns=turns)])
    main([str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    assert "on 37 places of episodes of the run" in capsys.readouterr().out
