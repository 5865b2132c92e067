"""``atod train sft``: every source, filters, layouts, adapters, and going on bit for bit."""

import json
import os
import shutil
import signal

import gymnasium as gym
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from toyworld import small_model

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from agents.models import load_model
from agents.reference.tokenizer import train_tokenizer
from atod_algos.evaluate.command import run as evaluate
from atod_algos.evaluate.settings import EvaluateConfig
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.training.demonstrations import demonstrate, read_recorded, require_episodes_of, tokenized
from atod_algos.training.imitation import Imitator
from atod_algos.training.sft import SftCommand, main, train_sft
from atod_envs.errors import AtodError
from atod_envs.styles import as_conversation
from atod_envs.trajectory import read_jsonl, write_jsonl


def world():
    return gym.make("atod/ALFWorld-v0", data="builtin", split="train", max_turns=20)


@pytest.fixture(scope="module")
def chat():
    bare = ChatFormat(train_tokenizer(["a b"], tags=["<think>"]))
    shown = demonstrate(world().unwrapped.tasks[:24], world, bare, style="compact", seed=0)
    texts = [text for t in shown for turn in t.turns for text in (turn.observation, turn.response)]
    return ChatFormat(train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>"]))


@pytest.fixture(scope="module")
def student(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    small_model(chat.tokenizer, 1).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The expert's and the random agent's episodes, as ``atod eval`` stores them: bare actions, no tokens."""
    root = tmp_path_factory.mktemp("evaluations")
    for agent in ("expert", "random"):
        asked = EvaluateConfig(agent=agent, data="builtin", panels=("train/6",), max_turns=20, out=root / agent)
        evaluate(asked, show=False)
    return root


SHORT = ["--data", "builtin", "--episodes", "6", "--epochs", "1", "--batch-tokens", "1500", "--max-turns", "20", "--max-context", "512",
         "--max-response", "12", "--lr", "1e-3", "--device", "cpu"]  # fmt: skip


def sft(student, out, *options):
    main(["--student", str(student), "--out", str(out), *SHORT, *options])
    return load_file(out / "model.safetensors")


def losses(out):
    return [json.loads(line)["sft/loss"] for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--lora-rank", "4")], ids=["all weights", "adapters"])
def test_it_goes_on_bit_for_bit(student, tmp_path, extra, capsys):
    if extra:
        pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    options = ("--rounds", "3", "--first-beta", "0.3", "--last-beta", "0.5", *extra)
    whole = sft(student, tmp_path / "whole", *options)
    sft(student, tmp_path / "parts", *options, "--stop", "2")
    parts = sft(student, tmp_path / "parts", *options)
    assert "going on after round 2" in capsys.readouterr().out
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 3
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    before = load_file(student / "model.safetensors")
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    loaded = load_model(str(tmp_path / "whole"), "student")
    assert loaded.n_parameters == load_model(str(student), "student").n_parameters, "a plain model, adapters or not"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_the_same_command_goes_on(student, tmp_path, number, monkeypatch, capsys):
    options = ("--rounds", "2")
    whole = sft(student, tmp_path / "whole", *options)
    honest = Imitator.fit

    def fit(self, episodes, round_, seed):
        if round_ == 1:
            os.kill(os.getpid(), number)
        return honest(self, episodes, round_, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Imitator, "fit", fit)
        with pytest.raises(SystemExit) as stop:
            sft(student, tmp_path / "parts", *options)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 128 + number and f"kept in {tmp_path / 'parts'}" in said and "finished rounds 1" in said
    parts = sft(student, tmp_path / "parts", *options)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_place_that_cannot_hold_the_model_is_refused_before_training(student, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Imitator, "fit", lambda *_: pytest.fail("trained"))
    for out, said in (("file", "File exists"), ("file/x", "Not a directory"), ("x" * 300, "File name too long")):
        with pytest.raises(SystemExit):
            main(["--student", str(student), "--out", str(tmp_path / out), "--run", str(tmp_path / "run"), *SHORT])
        assert f"cannot be made: {said}; choose another with --out" in capsys.readouterr().err


def test_a_model_that_could_not_be_written_is_written_by_the_same_command(student, tmp_path, monkeypatch, capsys):
    words = ["--student", str(student), "--out", str(tmp_path / "out"), "--rounds", "1", *SHORT]

    def no_space(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        model = type(load_model(str(student), "student").model)
        honest = model.save_pretrained
        full.setattr(
            model, "save_pretrained", lambda self, to: no_space() if str(to).endswith("out") else honest(self, to)
        )
        with pytest.raises(SystemExit):
            main(words)
    err = capsys.readouterr().err
    assert "out could not be written: I/O error: No space left" in err and "every round is kept in" in err
    main(words)
    assert "going on after round 1" in capsys.readouterr().out and load_model(str(tmp_path / "out"), "student")


def test_episodes_of_another_environment_are_refused_and_held_out_ones_named(evaluation, caplog):
    found = read_recorded([evaluation / "expert"], only="all", best_of=0)
    require_episodes_of(found, "atod/ALFWorld-v0", "train")
    assert not caplog.records
    require_episodes_of(found, "atod/ALFWorld-v0", "valid_seen")
    assert "6 of 6 recorded episodes are not of the split 'valid_seen'" in caplog.text
    with pytest.raises(AtodError, match=r"holds episodes of atod/ALFWorld-v0, but --env is atod/WebShop-v0"):
        require_episodes_of(found, "atod/WebShop-v0", "train")


def test_other_weights_or_episodes_than_before_are_refused(student, evaluation, tmp_path, capsys):
    model = shutil.copytree(student, tmp_path / "model")
    source = shutil.copytree(evaluation / "expert", tmp_path / "episodes")
    options = ("--rounds", "2", "--episodes", "2", "--source", str(source), "--stop", "1")
    sft(model, tmp_path / "o", *options)
    sft(model, tmp_path / "o", *options)
    (file,) = (source / "episodes").iterdir()
    whole = file.read_bytes()
    write_jsonl(file, list(read_jsonl(file))[1:])
    for wanted in ("on other episodes than --source", "with another model"):
        with pytest.raises(SystemExit):
            sft(model, tmp_path / "o", *options)
        assert wanted in capsys.readouterr().err
        file.write_bytes(whole)
        (model / "generation_config.json").write_text('{"eos_token_id": 1}')


def test_another_setting_is_refused(student, tmp_path, capsys):
    sft(student, tmp_path / "o", "--rounds", "1")
    with pytest.raises(SystemExit):
        sft(student, tmp_path / "o", "--rounds", "1", "--only", "all")
    assert "holds a run with algorithm.only='success', but now it is 'all'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["trajectory", "turns", "window"])
def test_recorded_episodes_teach_in_every_layout(student, evaluation, tmp_path, layout):
    style = ("--style", "atod" if layout == "window" else "compact", "--max-context", "2048")
    options = ("--layout", layout, *style, "--rounds", "3", "--episodes", "3", "--source", str(evaluation / "expert"))
    if layout == "window":  # the small student reads 256 tokens
        model = small_model(load_model(str(student), "student").tokenizer, 1)
        model.config.max_position_embeddings = 2048
        model.save_pretrained(tmp_path / "long")
        load_model(str(student), "student").tokenizer.save_pretrained(tmp_path / "long")
        student = tmp_path / "long"
    sft(student, tmp_path / "o", *options)
    found = losses(tmp_path / "o")
    assert found[-1] < 0.97 * found[0]


def test_filters_choose_solved_and_short_episodes(evaluation, tmp_path):
    both = [evaluation / "expert", evaluation / "random"]
    everything = read_recorded(both, only="all", best_of=0)
    assert len(everything) == 12
    solved = read_recorded(both, only="success", best_of=0)
    assert 6 <= len(solved) < 12 and all(t.success for t in solved)
    best = read_recorded([*both, *both], only="all", best_of=1)
    assert len(best) == 6 and all(t.success for t in best)
    file = tmp_path / "lost.jsonl"
    write_jsonl(file, [t for t in everything if not t.success])
    with pytest.raises(AtodError, match="none is left with --only success"):
        read_recorded([file], only="success", best_of=0)
    with pytest.raises(AtodError, match="expected 'expert', a file of episodes"):
        read_recorded([tmp_path / "nothing"], only="all", best_of=0)


@pytest.mark.parametrize("style", ["compact", "atod"])
def test_recorded_prompts_are_those_that_were_shown(chat, style):
    """Episodes with ids, laid out again from their texts: the same prompts, for responses that the expert wrote."""
    shown = demonstrate(world().unwrapped.tasks[:4], world, chat, style=style, seed=0)
    found = world().unwrapped.prompt_styles()[style]
    again = tokenized(shown, found, chat, 10**6)
    assert [[turn.prompt_ids for turn in t.turns] for t in again] == [
        [turn.prompt_ids for turn in t.turns] for t in shown
    ]
    assert [[turn.response_ids for turn in t.turns] for t in again] == [
        [u.response_ids for u in t.turns] for t in shown
    ]


def test_the_best_of_the_experts_own_episodes_are_not_chosen():
    with pytest.raises(AtodError, match="--best-of 2: it chooses among recorded episodes"):
        train_sft(SftCommand("builtin", "out", best_of=2), print)


def test_bare_actions_and_other_forms_are_phrased_by_the_style(chat, evaluation):
    (file,) = sorted((evaluation / "expert" / "episodes").glob("*.gz"))
    recorded = list(read_jsonl(file))
    style = as_conversation(world().unwrapped.prompt_styles()["compact"])
    for trajectory, laid in zip(recorded, tokenized(recorded, style, chat, 10**6), strict=True):
        for turn, said in zip(trajectory.turns, laid.turns, strict=True):
            assert turn.response == turn.action != said.response
            assert style.parse(said.response).format_ok and chat.decode(said.response_ids) == said.response


def test_turns_that_do_not_fit_are_left_out(chat, evaluation):
    recorded = read_recorded([evaluation / "expert"], only="all", best_of=0)
    style = world().unwrapped.prompt_styles()["compact"]
    cut = tokenized(recorded, style, chat, 150)
    assert all(len(turn.prompt_ids) + len(turn.response_ids) <= 150 for t in cut for turn in t.turns)
    assert 0 < sum(bool(turn.prompt_ids) for t in cut for turn in t.turns) < sum(len(t.turns) for t in recorded)
    with pytest.raises(AtodError, match="recorded turns fits --max-context 5"):
        tokenized(recorded, style, chat, 5)


@pytest.mark.slow
def test_a_runs_own_episodes_are_taken(student, chat, tmp_path):
    engine = TransformersEngine(load_model(str(student), "student").model, slots=4, max_context=256)
    rollout = Rollout(engine, chat, world, style="compact", max_tokens=8)
    tasks = world().unwrapped.tasks
    (tmp_path / "run" / "trajectories").mkdir(parents=True)
    write_jsonl(
        tmp_path / "run" / "trajectories" / "step_000001.jsonl.gz",
        rollout.play([EpisodeSpec(tasks[n], str(n), n) for n in range(4)]),
    )
    sft(student, tmp_path / "o", "--rounds", "1", "--only", "all", "--source", str(tmp_path / "run"))
    assert len(losses(tmp_path / "o")) == 1
