"""Whole runs on the toy world: they learn, resume bit for bit, and answer a user's mistakes in one line."""

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hubcache import commit
from safetensors.torch import load_file
from toy import WORDS
from toyworld import TOY, learner_options, small_model

from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.opd import OPD
from atod_algos.sdar import SDAR
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.training.cli import main, with_rules
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.trajectory import read_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4", "--checkpoint-every", "2",
        "--minibatches", "2", "--threads", "1",
    ]  # fmt: skip


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in rows]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


@pytest.mark.parametrize("algorithm", [GRPO, OPD, ATOD, SDAR, SOD, TCOD])
@pytest.mark.parametrize("rules", ["paper", "released"])
def test_every_algorithm_runs_under_both_rule_sets(algorithm, rules, options, tmp_path, capsys):
    if algorithm is SDAR:
        (tmp_path / "skills.md").write_text("# General\n\nSpeak.\n\n## fruit\n\nYou say apple.\n")
        options = [*options, "--skills", str(tmp_path / "skills.md")]
    main(algorithm, [*options, "--steps", "2", "--run", str(tmp_path / "r"), "--rules", rules])
    rows = metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == [1, 2]
    stored = json.loads((tmp_path / "r" / "config.json").read_text())["settings"]
    assert stored["rules"] == rules and stored["algorithm"]["name"] == algorithm.name
    expected = with_rules(algorithm, rules).objective.loss_agg
    assert stored["algorithm"]["objective"]["loss_agg"] == expected
    out = capsys.readouterr().out
    assert f"rules: {rules}" in out and f"loss_agg={expected}" in out and "95 % interval" in out
    assert ("actor/auxiliary_loss" in rows[0]) == (algorithm is SDAR or (algorithm is GRPO and rules == "released"))


def test_reward_alone_teaches_the_toy_world(options, tmp_path):
    main(
        GRPO,
        [
            *options,
            "--steps",
            "14",
            "--run",
            str(tmp_path / "r"),
            "--eval-every",
            "0",
            "--max-turns",
            "1",
            "--lr",
            "4e-3",
        ],
    )
    rows = metrics(tmp_path / "r")
    before = sum(r["episode/success"] for r in rows[:3]) / 3
    after = sum(r["episode/success"] for r in rows[-3:]) / 3
    assert after > before + 0.2
    assert max(r["sampler/logprob_gap_max"] for r in rows) < 1e-4


def test_distillation_closes_the_gap_to_the_teacher(options, tmp_path):
    # At the other tests' rate the gap wanders; at this one it closes for every seed that was tried.
    options[options.index("--lr") + 1] = "5e-4"
    main(OPD, [*options, "--steps", "14", "--run", str(tmp_path / "r"), "--eval-every", "0"])
    gaps = [row["opd/teacher_student_gap_mean"] for row in metrics(tmp_path / "r")]
    assert sum(gaps[-3:]) / 3 > sum(gaps[:3]) / 3 + 0.1 and gaps[0] < 0


def test_stopped_and_resumed_equals_uninterrupted(options, tmp_path):
    main(ATOD, [*options, "--steps", "6", "--run", str(tmp_path / "whole")])
    main(ATOD, [*options, "--steps", "4", "--run", str(tmp_path / "parts")])
    main(ATOD, [*options, "--steps", "6", "--run", str(tmp_path / "parts")])
    assert timeless(metrics(tmp_path / "parts")) == timeless(metrics(tmp_path / "whole"))
    for name, tensor in weights(tmp_path / "whole", 6).items():
        assert torch.equal(tensor, weights(tmp_path / "parts", 6)[name])


def test_other_data_than_the_run_was_trained_on_is_refused(options, tmp_path, capsys, monkeypatch):
    main(ATOD, [*options, "--steps", "2", "--run", str(tmp_path / "r")])
    monkeypatch.setattr("toy.ToyEnv.data_version", "toy/2")
    message = failing(ATOD, [*options, "--steps", "4", "--run", str(tmp_path / "r")], capsys)
    assert "was trained on the data ''" in message and "now plays 'toy/2'" in message and "--run" in message


def test_other_models_than_the_run_was_trained_with_are_refused(options, models, tmp_path, capsys):
    """A teacher may be the best checkpoint of a run that goes on, and be replaced by a better one."""
    teacher = shutil.copytree(models["teacher"], tmp_path / "teacher")
    command = [*options, "--teacher", str(teacher), "--run", str(tmp_path / "r"), "--eval-every", "0"]
    main(ATOD, [*command, "--steps", "1", "--checkpoint-every", "1"])
    (teacher / "README.md").write_text("what is said about it decides nothing")
    main(ATOD, [*command, "--steps", "2"])
    for name in ("chat_template.jinja", "model.safetensors"):
        before = (teacher / name).read_bytes()
        (teacher / name).write_bytes((models["student"] / name).read_bytes() + b"{# #}" * (name[0] == "c"))
        message = failing(ATOD, [*command, "--steps", "3"], capsys)
        assert f"with another model {teacher}: its files have changed" in message and "--run" in message
        (teacher / name).write_bytes(before)
    (teacher / "model.safetensors").write_bytes((models["student"] / "model.safetensors").read_bytes())
    done = tmp_path / "r" / "checkpoints" / "step_000002" / "complete.json"
    whole = json.loads(done.read_text())
    assert whole["models"].keys() == {str(teacher), str(models["student"])} and all(whole.pop("models").values())
    done.write_text(json.dumps(whole))  # as versions wrote it that did not look
    main(ATOD, [*command, "--steps", "3"])


def test_a_hub_model_that_was_replaced_under_its_name_is_refused(options, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit(tmp_path / "hub", "someone/teacher", models["teacher"])
    commit(tmp_path / "hub", "someone/student", models["student"])
    monkeypatch.chdir(tmp_path)
    command = [*options, "--teacher", "someone/teacher", "--student", "someone/student", "--run", str(tmp_path / "r")]
    main(ATOD, [*command, "--steps", "1", "--checkpoint-every", "1"])
    main(ATOD, [*command, "--steps", "2"])
    commit(tmp_path / "hub", "someone/teacher", models["student"])
    said = failing(ATOD, [*command, "--steps", "3"], capsys)
    assert "with another model someone/teacher: its files have changed" in said
    kept = commit(tmp_path / "hub", "someone/teacher", models["teacher"])
    (kept / "pytorch_model.bin").write_text("the same weights in an older form, fetched by another program")
    main(ATOD, [*command, "--steps", "3"])
    blob = (kept / "generation_config.json").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    assert "with another model someone/" in failing(ATOD, [*command, "--steps", "4"], capsys)


def test_a_slip_in_an_option_costs_nothing(options, tmp_path, capsys):
    run = ["--run", str(tmp_path / "r"), "--steps", "1"]
    assert "unknown option of toy/Say-v0 'colour'; expected one of" in failing(
        ATOD, [*options, *run, "--option", "colour=red"], capsys
    )
    assert "--option 'colour': expected NAME=VALUE" in failing(ATOD, [*options, *run, "--option", "colour"], capsys)
    main(ATOD, [*options, *run])
    assert (tmp_path / "r" / "result.json").exists()


def test_ctrl_c_says_how_to_go_on(options, runner, tmp_path):
    arguments = [*options, "--steps", "10000", "--run", str(tmp_path / "r")]
    out = tmp_path / "out"
    order = {"place": "log", "count": 2, "after": True, "signal": signal.SIGINT}
    assert runner(arguments=arguments, out=str(out), **order) == {"killed": False, "code": 130}
    said = out.read_text()
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: interrupted after step 2") and "same command" in error
    assert "Traceback" not in said


def failing(algorithm, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(algorithm, arguments)
    assert stop.value.code not in (0, None)
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "change, words",
    [
        (["--env", "atod/ALFWrold-v0"], "unknown environment 'atod/ALFWrold-v0'; did you mean 'atod/ALFWorld-v0'"),
        (["--student", "./nowhere"], "student model: no folder at nowhere"),
        (["--teacher", "no-such-org/no-such-model"], "teacher model 'no-such-org/no-such-model' could not be loaded"),
        (["--env", "atod/ALFWorld-v0", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--style", "chatty"], "unknown prompt style 'chatty'"),
        (["--run", "/proc/nowhere"], "folder /proc/nowhere cannot be made"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--rules", "mine"], "unknown rule set 'mine'"),
    ],
)
def test_mistakes_are_answered_in_one_clear_line(change, words, options, tmp_path, capsys):
    if change[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    err = failing(ATOD, [*options, "--steps", "1", "--run", str(tmp_path / "r"), *change], capsys)
    assert words in err and len(err.splitlines()) == 1


def test_a_mistyped_option_is_named(options, tmp_path, capsys):
    err = failing(ATOD, [*options, "--kappa-int", "2"], capsys)
    assert "--kappa-int" in err and "--kappa-init" in err


def test_other_tokenizers_are_refused(options, tmp_path, capsys):
    from agents.reference.tokenizer import train_tokenizer

    folder = tmp_path / "other"
    other = train_tokenizer(["You sit on chair 4."] * 30)
    small_model(other, 3).save_pretrained(folder)
    other.save_pretrained(folder)
    err = failing(OPD, [*options, "--teacher", str(folder), "--steps", "1", "--run", str(tmp_path / "r")], capsys)
    assert "different tokenizers: token" in err


def test_a_run_folder_of_another_run_is_not_touched(options, tmp_path, capsys):
    main(OPD, [*options, "--steps", "2", "--run", str(tmp_path / "r")])
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    err = failing(OPD, [*options, "--steps", "2", "--run", str(tmp_path / "r"), "--seed", "5"], capsys)
    assert "train.seed=0, but now it is 5" in err
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_shown_again_without_training(options, tmp_path, capsys, monkeypatch):
    arguments = [*options, "--steps", "2", "--run", str(tmp_path / "r")]
    main(OPD, arguments)
    first = capsys.readouterr().out
    for work in ("training.trainer.Trainer.train_step", "rollout.episodes.Rollout.play"):
        monkeypatch.setattr(f"atod_algos.{work}", lambda *a, **k: pytest.fail("played or trained again"))
    main(OPD, arguments)
    assert capsys.readouterr().out.split("95 %")[1] == first.split("95 %")[1]


def test_a_full_disk_leaves_the_last_checkpoint(options, tmp_path, capsys, monkeypatch):
    run = tmp_path / "r"
    main(OPD, [*options, "--steps", "2", "--run", str(run)])
    monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    err = failing(OPD, [*options, "--steps", "4", "--run", str(run)], capsys)
    assert "No space left on device" in err and "earlier ones are kept" in err
    monkeypatch.undo()
    assert not list((run / "checkpoints").glob(".*part"))
    main(OPD, [*options, "--steps", "4", "--run", str(run)])
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_named(options, tmp_path, capsys):
    run = tmp_path / "r"
    main(OPD, [*options, "--steps", "2", "--run", str(run)])
    path = run / "checkpoints" / "step_000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    err = failing(OPD, [*options, "--steps", "4", "--run", str(run)], capsys)
    assert "step_000002 is not a complete checkpoint" in err


def test_out_of_memory_says_what_to_lower(options, tmp_path, capsys, monkeypatch):
    def burst(*a, **k):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr("atod_algos.teachers.local.score", burst)
    err = failing(OPD, [*options, "--steps", "2", "--run", str(tmp_path / "r")], capsys)
    assert "out of memory; lower --token-budget" in err


@pytest.mark.parametrize("reads", [64, 127, 128])
def test_a_teacher_that_reads_less_than_a_row_is_refused(reads, options, tmp_path, capsys):
    """Past its context a model with rotary positions gives numbers without a meaning, and says nothing."""
    teacher = tmp_path / "teacher"
    shutil.copytree(options[options.index("--teacher") + 1], teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": reads}))
    options[options.index("--teacher") + 1] = str(teacher)
    arguments = [*options, "--steps", "1", "--run", str(tmp_path / "r")]
    if reads < 128:
        err = failing(OPD, arguments, capsys)
        assert f"reads {reads} tokens, but a row of this run may have 128; use --max-context {reads}" in err
    else:
        main(OPD, arguments)


def test_a_checkpoint_is_a_model_that_loads_as_student(options, tmp_path):
    main(OPD, [*options, "--steps", "2", "--run", str(tmp_path / "a")])
    checkpoint = tmp_path / "a" / "checkpoints" / "best"
    arguments = [*options, "--steps", "1", "--lr", "1e-12", "--run", str(tmp_path / "b")]
    original = Path(arguments[arguments.index("--student") + 1])
    arguments[arguments.index("--student") + 1] = str(checkpoint)
    main(OPD, arguments)
    begun, trained, started = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "b" / "checkpoints" / "step_000001", checkpoint, original)
    )
    assert all(torch.allclose(begun[name], trained[name], atol=1e-9) for name in trained)
    assert not all(torch.allclose(started[name], trained[name], atol=1e-4) for name in trained)


def test_profiles_fill_in_only_what_was_left_open():
    builtin, real = resolve(TrainConfig(lr=0.5)), resolve(TrainConfig(student="Qwen/Qwen3-0.6B"))
    assert builtin.lr == 0.5 and builtin.style == "compact" and real.style == "atod" and real.lr == 1e-6
    assert real.max_response == 512 and real.steps == 150 and real.max_turns is None


def test_learning_rate_warms_up_and_falls():
    from atod_algos.learner.optimizer import learning_rate

    falling = learner_options(lr=1.0, lr_floor=0.1, steps=11)
    rates = [learning_rate(falling, step) for step in range(1, 12)]
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    constant = learner_options(lr=1.0, lr_floor=1.0, warmup_steps=4, steps=11)
    assert [learning_rate(constant, step) for step in (1, 2, 4, 11)] == [0.25, 0.5, 1.0, 1.0]


def test_a_run_with_a_falling_rate_cannot_be_prolonged(options, tmp_path, capsys):
    falling = [*options, "--lr-floor", "0.5", "--run", str(tmp_path / "r")]
    main(OPD, [*falling, "--steps", "2"])
    err = failing(OPD, [*falling, "--steps", "4"], capsys)
    assert "horizon=2 (--steps: its learning rate falls towards the last step), but now it is 4" in err


def test_rules_preset_nested_options():
    released = with_rules(ATOD, "released")
    assert (released.tdur_min_turns, released.objective.dual_clip, released.group.group_stats) == (3, 3.0, "turn_row")
    assert with_rules(ATOD, "paper") == ATOD()


def test_trajectories_and_turn_tables_are_kept(options, tmp_path):
    import gzip

    from atod_envs.trajectory import read_jsonl

    main(ATOD, [*options, "--steps", "2", "--run", str(tmp_path / "r")])
    stored = list(read_jsonl(tmp_path / "r" / "trajectories" / "step_000002.jsonl.gz"))
    assert len(stored) == 16 and {t.task_id.split("-")[1] for t in stored} == set(WORDS)
    table = json.loads(gzip.decompress((tmp_path / "r" / "turns" / "step_000002.json.gz").read_bytes()))
    assert len(table["weight"]) == sum(len(t.turns) for t in stored) == len(table["sum_abs_gap"])
    d = [a / n for a, n in zip(table["sum_abs_gap"], table["n"], strict=True)]
    assert all(x >= 0 for x in d) and all(0 <= w <= 1 for w in table["weight"])


def test_the_final_report_of_a_model_that_one_engine_alone_runs(options, tmp_path, monkeypatch):
    from agents.engines.transformers import TransformersEngine
    from agents.logits import UnsupportedModel
    from atod_algos.rollout import pools

    def only_vllm(name, model, *, slots, max_context, memory):
        if name == "transformers":
            raise UnsupportedModel("this engine does not run the model; use --engine vllm")
        return TransformersEngine(copy.deepcopy(model), slots=slots, max_context=max_context)

    plain, other = tmp_path / "plain", tmp_path / "other"
    command = [*options, "--steps", "2", "--eval-every", "2"]
    main(ATOD, [*command, "--run", str(plain)])
    monkeypatch.setattr(pools, "make_engine", only_vllm)
    main(ATOD, [*command, "--run", str(other), "--engine", "vllm"])
    tables = [json.loads((run / "result.json").read_text())["table"] for run in (plain, other)]
    assert list(tables[0]) == ["before", "last (step 2)", next(name for name in tables[0] if "best" in name), "teacher"]
    assert tables[0] == tables[1], "the same policies, whichever pool plays them"


def test_before_learning_a_line_says_what_the_student_can_do(options, tokenizer, tmp_path, capsys):
    command = [*options, "--steps", "1", "--eval-every", "0"]
    main(GRPO, [*command, "--run", str(tmp_path / "able")])
    said = capsys.readouterr().out
    (step,) = read_jsonl_groups(tmp_path / "able")
    assert f"solves {step} of 4 tasks at least once in 4 tries (pass@4)" in said and step > 0
    assert "reward alone has nothing to say" not in said
    small_model(tokenizer, 9).save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    main(GRPO, [*command, "--run", str(tmp_path / "unable"), "--student", str(tmp_path / "mute")])
    said = capsys.readouterr().out
    assert "solves 0 of 4 tasks at least once in 4 tries (pass@4): reward alone has nothing to say" in said
    assert f"atod train sft --student {tmp_path / 'mute'} --out FOLDER" in said
    main(TCOD, [*command, "--run", str(tmp_path / "cut")])
    assert "pass@" not in capsys.readouterr().out, "cut episodes say nothing about the student"


def read_jsonl_groups(run):
    """Of each stored step, how many groups hold a solved episode."""
    for path in sorted((run / "trajectories").glob("*.gz")):
        yield len({t.group_id for t in read_jsonl(path) if t.success})
