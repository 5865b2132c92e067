"""Evaluation on fixed panels: numbers, agents, checkpoints."""

import dataclasses
import json
import os
import shutil
import signal

import gymnasium as gym
import pytest
import torch
from episodes import outcome
from hubcache import commit
from toy import ToyEnv
from toyworld import TOY

from atod_algos.evaluate import Evaluation, compare
from atod_algos.evaluate.command import main, run
from atod_algos.evaluate.journal import EpisodeJournal
from atod_algos.evaluate.paired_command import load_evaluation, show_comparison
from atod_algos.evaluate.settings import EvaluateConfig, episodes_path, make_env, sampling_of
from atod_algos.rollout.environments import describe
from atod_algos.rollout.environments import make_env as make_training_env
from atod_algos.teachers.server import main as serve_teacher
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.run_dir import held
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import read_jsonl, write_jsonl

# --- numbers ----------------------------------------------------------------------------------------------------------


def test_summary_counts_by_label_and_reason():
    e = Evaluation(tuple(outcome(f"t{i}", i < 3, turns=i + 1, label="a" if i < 2 else "b") for i in range(4)))
    s = e.summary()
    assert s["success"] == 0.75 and s["n"] == s["tasks"] == 4 and s["length"] == 2.5
    assert s["by_label"]["a"]["success"] == 1.0 and s["by_label"]["b"]["success"] == 0.5
    assert s["stop_reasons"] == {"success": 3, "turn_limit": 1}


def test_tasks_that_are_all_solved_with_every_seed_say_no_more_than_as_many_tasks():
    """Resampling them shows no spread; more seeds of the same tasks are no reason for certainty."""
    one = Evaluation(tuple(outcome(str(task), True) for task in range(8)))
    three = Evaluation(one.trajectories * 3)
    assert three.interval == one.interval and three.interval[0] < 0.7


def test_tasks_that_are_all_half_solved_have_an_interval_around_a_half():
    halves = Evaluation(tuple(outcome(str(task), seed == 0, seed=seed) for task in range(5) for seed in (0, 1)))
    low, high = halves.interval
    assert low + high == pytest.approx(1) and low < 0.5 < high


def test_interval_of_several_seeds_is_over_tasks():
    outcomes = [i % 3 == 0 for i in range(60)]
    once = Evaluation(tuple(outcome(f"t{i}", won) for i, won in enumerate(outcomes)))
    often = Evaluation(tuple(outcome(f"t{i}", won, seed=s) for s in range(9) for i, won in enumerate(outcomes)))
    width = once.bootstrap_interval[1] - once.bootstrap_interval[0]
    assert often.interval[1] - often.interval[0] == pytest.approx(width)


def test_comparison_pairs_tasks_and_refuses_other_panels():
    a = Evaluation(tuple(outcome(f"t{i}", i < 30, label="x" if i < 20 else "y") for i in range(40)))
    b = Evaluation(tuple(outcome(f"t{i}", i < 15, turns=2, label="x" if i < 20 else "y") for i in range(40)))
    result = compare(a, b)
    assert (result.only_a, result.only_b) == (15, 0) and result.mcnemar == pytest.approx(2 * 0.5**15)
    assert result.success.difference == pytest.approx(0.375) and result.length.difference == -1
    assert result.by_label["x"].difference == pytest.approx(0.25) and result.by_label["y"].difference == 0.5
    with pytest.raises(AtodError, match="same panel and seeds"):
        compare(a, Evaluation(b.trajectories[:-1]))
    other = dataclasses.replace(b.trajectories[0], task="find another thing")
    with pytest.raises(AtodError, match=r"'find another thing' in the other.* needs the same data"):
        compare(a, Evaluation((other, *b.trajectories[1:])))


def test_an_environment_without_files_need_not_take_data(tmp_path):
    class Bare(ToyEnv):
        def __init__(self, split="train", max_turns=None):
            super().__init__(max_turns, split)

    gym.register("toy/Bare-v0", entry_point=Bare, disable_env_checker=True)
    try:
        run(EvaluateConfig(env="toy/Bare-v0", agent="random", panels=("valid/1",), out=tmp_path / "e"), show=False)
        make_training_env(resolve(TrainConfig(env="toy/Bare-v0", student="folder")), "valid").close()
        with pytest.raises(AtodError, match="unknown option of toy/Bare-v0 'data'; expected one of: split, max_turns"):
            run(EvaluateConfig(env="toy/Bare-v0", agent="random", data="builtin", out=tmp_path / "f"), show=False)
    finally:
        gym.registry.pop("toy/Bare-v0")


# --- agents and checkpoints -------------------------------------------------------------------------------------------


def test_default_panels_are_the_held_out_splits(tmp_path, capsys):
    main(["--env", TOY, "--agent", "random", "--seeds", "0", "1", "--out", str(tmp_path / "e")])
    stored = json.loads((tmp_path / "e" / "config.json").read_text())["settings"]
    assert [p["name"] for p in stored["panels"]] == ["valid/4", "test/4"] and len(stored["panels"][0]["digest"]) == 16
    result = json.loads((tmp_path / "e" / "result.json").read_text())["panels"]["valid/4"]
    assert result["n"] == 8 and result["tasks"] == 4 and set(result["by_seed"]) == {"0", "1"}
    episodes = list(read_jsonl(episodes_path(tmp_path / "e", "valid/4", 1)))
    assert len({t.task_id for t in episodes}) == 4 and all(t.turns for t in episodes)
    assert "valid/4" in capsys.readouterr().out


def test_the_same_call_gives_the_same_numbers_and_another_is_refused(tmp_path):
    first = run(EvaluateConfig(env=TOY, agent="random", out=tmp_path / "a"))
    assert first == run(EvaluateConfig(env=TOY, agent="random", out=tmp_path / "b"))
    with pytest.raises(AtodError, match=r"seeds=\[0\], but now it is \[1\]"):
        run(EvaluateConfig(env=TOY, agent="random", seeds=(1,), out=tmp_path / "a"))


def test_a_finished_part_is_not_played_again(tmp_path, monkeypatch):
    config = EvaluateConfig(env=TOY, agent="random", out=tmp_path / "a")
    first = run(config)
    monkeypatch.setattr("agents.random.RandomAgent.act", lambda self: 1 / 0)
    assert run(config) == first


def test_episodes_that_are_missing_are_not_left_out_of_the_mean(tmp_path):
    """A part that is whole as a file, with an episode too few or one twice."""
    config = EvaluateConfig(env=TOY, agent="random", panels=("test/4",), seeds=(0, 1), out=tmp_path / "a")
    run(config, show=False)
    path = tmp_path / "a" / "episodes" / "test-4-seed1.jsonl.gz"
    episodes = list(read_jsonl(path))
    for changed in (episodes[:-1], [*episodes[:-1], episodes[0]]):
        write_jsonl(path, changed)
        with pytest.raises(DataError, match="expected one episode of each of the panel's 4 tasks"):
            run(config, show=False)
    write_jsonl(path, episodes[:-1])
    with pytest.raises(DataError, match="expected 4 episodes of test/4 for each of 2 seeds, found 7 in all"):
        load_evaluation(tmp_path / "a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_what_had_ended_is_kept(number, tmp_path, monkeypatch, capsys):
    asked = ["--env", TOY, "--agent", "random", "--panels", "valid/4", "test/4", "--concurrency", "1", "--out"]
    main([*asked, str(tmp_path / "whole")])
    honest, played = EpisodeJournal.add, []

    def add(self, trajectory):
        honest(self, trajectory)
        played.append(trajectory.task_id)
        if len(played) == 6:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EpisodeJournal, "add", add)
    with pytest.raises(SystemExit) as stop:
        main([*asked, str(tmp_path / "parts")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 128 + number
    assert f"kept in {tmp_path / 'parts'}: finished panels 1, episodes of others 2; run the same command" in said
    main([*asked, str(tmp_path / "parts")])
    assert len(played) == 8, "nothing was played twice"
    results = [(tmp_path / name / "result.json").read_text() for name in ("whole", "parts")]
    assert results[0] == results[1]


def test_a_hub_model_that_was_replaced_under_its_name_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    asked = EvaluateConfig(
        env=TOY, agent="someone/model", panels=("valid/2",), out=tmp_path / "e", device="cpu", max_response=4
    )
    with pytest.raises(AtodError, match="'someone/model' could not be loaded"):
        run(asked, show=False)
    commit(tmp_path / "hub", "someone/model", models["student"])
    first = run(asked, show=False)
    assert run(asked, show=False) == first
    commit(tmp_path / "hub", "someone/model", models["teacher"])
    with pytest.raises(AtodError, match="holds an evaluation with model="):
        run(asked, show=False)


def test_a_folder_has_one_process(tmp_path):
    with held(tmp_path), pytest.raises(AtodError, match=r"in use by another process.* with --out"):
        run(EvaluateConfig(env=TOY, agent="random", out=tmp_path))
    run(EvaluateConfig(env=TOY, agent="random", out=tmp_path))


@pytest.mark.parametrize("damage", [b"\xff\n", b'{"a": ' * 5000, b"null\n", b"{}\n", b"\x00" * 9])
def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path, damage):
    run(EvaluateConfig(env=TOY, agent="random", out=tmp_path, panels=("test/2",)))
    played = list(read_jsonl(episodes_path(tmp_path, "test/2", 0)))
    journal = EpisodeJournal(tmp_path / "journal.jsonl")
    for trajectory in played:
        journal.add(trajectory)
    whole = journal.path.read_bytes()
    for place in (len(whole), whole.index(b"\n") + 1):  # cut off at the end; damaged before another one
        journal.path.write_bytes(whole[:place] + damage.rstrip(b"\n") + b"\n" * (place < len(whole)) + whole[place:])
        assert journal.read() == played == journal.read()


@pytest.mark.parametrize(
    ("option", "said"),
    [("tset.topk=2", "unknown split in --option 'tset.topk=2'"), ("data=other", "give --data alone instead")],
)
def test_an_option_of_no_split_or_of_another_setting_is_refused(option, said):
    asked = EvaluateConfig(env="atod/SearchQA-v0", data="builtin", agent="random", panels=("test/2",), option=(option,))
    with pytest.raises(AtodError, match=said):
        run(asked, show=False)
    with pytest.raises(AtodError, match=said):
        describe(resolve(TrainConfig(env="atod/SearchQA-v0", data="builtin", option=(option,))))


def test_a_training_runs_folder_is_not_taken_for_an_evaluation(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {"train": {}}}')
    with pytest.raises(AtodError, match="holds a training run; choose another folder with --out"):
        run(EvaluateConfig(env=TOY, agent="random", panels=("test/2",), out=tmp_path), show=False)
    assert not (tmp_path / "episodes").exists()


def test_a_model_that_was_changed_is_another_policy(models, tmp_path):
    """Whatever of it decides what it says: not its weights alone."""
    model = shutil.copytree(models["student"], tmp_path / "model")
    config = EvaluateConfig(
        env=TOY, agent=str(model), panels=("test/2",), out=tmp_path / "e", max_context=128, max_turns=2, max_response=8
    )
    first = run(config)
    (model / "notes.txt").write_text("decides nothing")
    assert run(config) == first
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("Be brief. " + template)
    with pytest.raises(AtodError, match=r"holds an evaluation with model=.*--out"):
        run(config)
    settings = json.loads((tmp_path / "e" / "config.json").read_text())
    del settings["settings"]["model"]  # as earlier versions wrote them
    (tmp_path / "e" / "config.json").write_text(json.dumps(settings))
    assert run(config) == first


def test_a_checkpoint_is_sampled_as_its_run_was(models, tmp_path, monkeypatch):
    from atod_algos.opd import OPD
    from atod_algos.training.cli import main as train

    options = [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "2", "--max-response", "8", "--max-context", "128", "--tasks-per-step", "2", "--group-size", "2",
        "--eval-tasks", "4", "--report-tasks", "4", "--steps", "1", "--threads", "1", "--run", str(tmp_path / "r"),
    ]  # fmt: skip
    train(OPD, options)
    last = tmp_path / "r" / "checkpoints" / "step_000001"
    got = run(EvaluateConfig(env=TOY, agent=str(last), panels=("test",), out=tmp_path / "e"))
    stored = json.loads((tmp_path / "e" / "config.json").read_text())["settings"]
    assert stored["sampling"]["style"] == "compact" and stored["sampling"]["max_turns"] == 2 and stored["weights"]
    table = json.loads((tmp_path / "r" / "result.json").read_text())["table"]
    assert got["panels"]["test/4"]["success"] == table["last (step 1)"]["success"]
    with pytest.raises(AtodError, match="is a run's folder; give one of its checkpoints"):
        run(EvaluateConfig(env=TOY, agent=str(tmp_path / "r"), out=tmp_path / "f"))
    profile = sampling_of(EvaluateConfig(env=TOY, agent="builtin"))
    assert profile.max_turns != 2
    for place, name in ((last, "."), (last.parent, last.name), (tmp_path, "r/checkpoints/step_000001")):
        monkeypatch.chdir(place)
        assert sampling_of(EvaluateConfig(env=TOY, agent=name)).max_turns == 2, "wherever one stands"
        assert sampling_of(EvaluateConfig(env=TOY, agent="builtin")) == profile


def test_a_run_in_whole_conversations_is_evaluated_in_them(tmp_path):
    """A window style in a conversation gives other prompts: the second continues the first."""
    run_folder = tmp_path / "r"
    (run_folder / "checkpoints" / "best").mkdir(parents=True)
    (run_folder / "metrics.jsonl").touch()
    train = dataclasses.asdict(resolve(TrainConfig(layout="turns", style="atod", max_turns=2)))
    (run_folder / "config.json").write_text(json.dumps({"settings": {"train": train}}))
    best = str(run_folder / "checkpoints" / "best")
    assert sampling_of(EvaluateConfig(agent=best)).layout == "turns"
    for layout, continues in (("auto", False), ("turns", True)):
        asked = EvaluateConfig(
            data="builtin", style="atod", layout=layout, max_turns=2, max_context=4096, panels=("valid_seen/1",),
            out=tmp_path / layout,
        )  # fmt: skip
        run(asked, show=False)
        (episode,) = read_jsonl(episodes_path(tmp_path / layout, "valid_seen/1", 0))
        first, second = episode.turns
        whole = first.prompt_ids + first.response_ids
        assert (second.prompt_ids[: len(whole)] == whole) == continues
        stored = json.loads((tmp_path / layout / "config.json").read_text())["settings"]["sampling"]
        assert stored.get("layout") == (layout if continues else None), "left out as evaluations of before have it"


@pytest.mark.parametrize(
    ("agent", "given"),
    [
        ("expert", "thinking"),
        ("random", "chat_date"),
        ("expert", "layout"),
        ("api:m", "max_context"),
        ("api:m", "thinking"),
    ],
)
def test_what_does_not_act_on_an_agent_is_refused(agent, given):
    value = {"thinking": "on", "chat_date": "2026-01-01", "layout": "turns", "max_context": 64}[given]
    with pytest.raises(AtodError, match=f"--{given.replace('_', '-')} means nothing for --agent {agent}"):
        sampling_of(EvaluateConfig(agent=agent, **{given: value}))


def test_the_world_is_the_runs_or_the_profiles_unless_told_otherwise(tmp_path):
    """The built-in models of Search-QA read one passage a search; so do the checkpoints of a run that they begin."""
    search = "atod/SearchQA-v0"

    def options(agent="builtin", env=search, **changes):
        return sampling_of(EvaluateConfig(env=env, agent=agent, **changes)).option

    assert options() == options("builtin:teacher") == options(option=("topk=1",)) == ("topk=1",)
    assert options(option=("topk=2",)) == ("topk=1", "topk=2")
    assert options("api:some/model") == options("expert") == options("random") == options(env=TOY) == ()
    run = tmp_path / "r"
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    train = dataclasses.asdict(resolve(TrainConfig(env=search, option=("dataset=single",))))
    (run / "config.json").write_text(json.dumps({"settings": {"train": train}}))
    best = str(run / "checkpoints" / "best")
    assert options(best) == ("topk=1", "dataset=single") and options(best, TOY) == ()
    turns = [sampling_of(EvaluateConfig(env=env, agent=best)).max_turns for env in (search, "atod/ALFWorld-v0")]
    assert turns[0] == 4 != turns[1], "a limit is that of the environment it was set for"
    config = EvaluateConfig(env=search, data="builtin", agent=best, option=("test.topk=2",))
    env = make_env(config, sampling_of(config), "test").unwrapped
    _, info = env.reset(seed=0)
    found = env.step(f"<search>{info['task']}</search>")[0]
    assert "Doc 2" in found and "Doc 3" not in found


def test_what_differs_besides_who_plays_is_said(tmp_path, caplog, monkeypatch, capsys):
    asked = EvaluateConfig(env=TOY, agent="random", panels=("valid/2",))
    run(dataclasses.replace(asked, out=tmp_path / "a"), show=False)
    run(dataclasses.replace(asked, out=tmp_path / "same"), show=False)
    monkeypatch.setattr("toy.ToyEnv.data_version", "toy/2")
    run(dataclasses.replace(asked, out=tmp_path / "b", max_turns=2), show=False)
    show_comparison(tmp_path / "a", tmp_path / "same")
    assert not caplog.records
    assert "+0.0%" in (said := capsys.readouterr().out) and "+0.0 - +0.0" not in said, "no spread is no interval"
    show_comparison(tmp_path / "a", tmp_path / "b")
    assert "max_turns is None in A and 2 in B" in caplog.text
    assert "data of valid/2 is '' in A and 'toy/2' in B" in caplog.text


def test_builtin_expert_beats_random_task_by_task(tmp_path, capsys):
    for agent in ("expert", "random"):
        run(EvaluateConfig(data="builtin", agent=agent, panels=("valid_unseen/20",), out=tmp_path / agent))
    main(["--compare", str(tmp_path / "expert"), str(tmp_path / "random")])
    assert "McNemar" in capsys.readouterr().out
    expert = load_evaluation(tmp_path / "expert")["valid_unseen/20"]
    assert expert.success >= 0.9
    result = compare(expert, load_evaluation(tmp_path / "random")["valid_unseen/20"])
    assert result.success.p_value < 0.001 and result.only_b == 0


def test_the_official_games_are_played_in_full(realdata):
    from atod_algos.evaluate.settings import Sampling, held_out_splits, read_panels

    config = EvaluateConfig(data=str(realdata / "alfworld" / "sample_12"), agent="expert")
    make = lambda split: make_env(config, Sampling(), split).unwrapped  # noqa: E731
    panels = read_panels(make, held_out_splits(config.env))
    assert [p.name for p in panels] == ["valid_seen/6", "valid_unseen/6"]  # all that the folder holds


def test_what_is_compared_must_be_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--compare", str(tmp_path), str(tmp_path)])
    assert "holds no finished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--panels", "test/9"], "expected a size from 1 to 4, or all"),
        (["--agent", "expert"], "unknown scripted expert 'toy'"),
        (["--agent", "random", "--temperature", "1"], "--temperature means nothing for --agent random"),
        (["--agent", "api:m"], "give --api-base"),
        (["--concurrency", "0"], "--concurrency 0: expected 1 or more episodes"),
        (["--max-turns", "0"], "--max-turns 0: expected a whole number from 1"),
        (["--option", "max_turns=3"], "--option max_turns=3: give --max-turns instead"),
        (["--option", "split=test"], "--option split=test: give --panels instead"),
        (["--agent", "api:m", "--api-base", "http://127.0.0.1:9/v1", "--api-extra", "3"], "expected a JSON object"),
        (
            ["--agent", "api:m", "--api-base", "http://127.0.0.1:9/v1", "--temperature", "-1"],
            "expected a number from 0",
        ),
        (
            ["--agent", "api:m", "--api-base", "http://127.0.0.1:9/v1", "--max-response", "0"],
            "--max-response 0: expected",
        ),
        (["--api-timeout", "nan"], "--api-timeout nan: expected seconds above 0"),
        (["--api-retries", "-1"], "--api-retries -1: expected a whole number from 0"),
        (["--out", ""], "--out is empty or the current folder"),
        (["--agent", "./nowhere"], "no folder at nowhere"),
        (["--compare", "nowhere", "nowhere"], "--compare takes two finished evaluations alone; leave --agent out"),
        (["--env", "toy/Sya-v0"], "unknown environment 'toy/Sya-v0'"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["--env", TOY, "--agent", "random", "--out", str(tmp_path / "e"), *options])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
@pytest.mark.parametrize("command", ["eval", "serve teacher"])
def test_a_model_computes_in_the_type_that_training_computes_in(command, device, dtype, tmp_path, monkeypatch, capsys):
    def asked(name, role, **options):
        raise AtodError(f"asked for {options['dtype']} on {options['device']}")

    monkeypatch.setattr("agents.models.load_model", asked)
    monkeypatch.setattr("agents.models.device_of", lambda name: device)
    with pytest.raises(SystemExit):
        if command == "eval":
            main(["--env", TOY, "--agent", "some/model", "--out", str(tmp_path / "e")])
        else:
            serve_teacher(["some/model", "--port", "0"])
    assert f"asked for {dtype} on {device}" in capsys.readouterr().err
