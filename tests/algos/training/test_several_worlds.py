"""Several environments in a run, and several teachers: who is played how often, by whose limits, taught by whom."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toyworld import ECHO, TOY

from atod_algos.atod import ATOD
from atod_algos.evaluate.settings import EvaluateConfig, sampling_of
from atod_algos.export.command import main as export
from atod_algos.grpo import GRPO
from atod_algos.report.data import read_run
from atod_algos.rollout.task_sampler import StepSampler
from atod_algos.training.cli import main
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.console import result_tables
from atod_algos.training.presets import builtin_run
from atod_algos.training.worlds import ALL
from atod_envs.errors import AtodError, UnknownName
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import read_jsonl


@pytest.fixture
def options(models):
    return [
        "--env", TOY, f"{ECHO}=2", "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style",
        "compact", "--max-turns", "3", "echo=2", "--max-response", "8", "--max-context", "128", "--lr", "2e-3",
        "--tasks-per-step", "4", "--group-size", "2", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4",
        "--checkpoint-every", "2", "--threads", "1",
    ]  # fmt: skip


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in rows]


def config_of(**changes):
    settings = {"env": (TOY, ECHO), "student": "folder", "style": "compact"} | changes
    return resolve(TrainConfig(**settings))


# --- settings -----------------------------------------------------------------------------------------------------


def test_each_environment_has_its_own_values_and_shares_the_rest():
    config = config_of(
        env=(TOY, f"{ECHO}=0.5"),
        data=("/all", "echo=/own"),
        max_turns=("toy=3",),
        option=("a=1", "echo/b=2", "toy/train.c=3"),
        teacher=("t0", "echo=t1", "echo/small=t2"),
        gap_clip=2.5,
        lr=0.1,
    )
    toy, echo = config.worlds
    assert (toy.name, toy.env, toy.weight, echo.name, echo.env, echo.weight) == ("toy", TOY, 1.0, "echo", ECHO, 0.5)
    assert (toy.data, echo.data, toy.max_turns, echo.max_turns) == ("/all", "/own", 3, None)
    assert (toy.option, echo.option) == (("a=1", "train.c=3"), ("a=1", "b=2"))
    assert (toy.teacher, toy.label_teachers) == ("t0", ())
    assert (echo.teacher, echo.label_teachers) == ("t1", (("small", "t2"),))
    assert toy.gap_clip == echo.gap_clip == 2.5 and toy.lr == echo.lr == 0.1


def test_built_in_environments_keep_their_profiles():
    worlds = resolve(TrainConfig(env=("atod/WebShop-v0", "atod/SearchQA-v0", "atod/ALFWorld-v0"))).worlds
    assert [(w.max_turns, w.max_response, w.option) for w in worlds] == [
        (6, 32, ()),
        (4, 24, ("topk=1",)),
        (14, 24, ()),
    ]
    assert {(w.steps, w.lr) for w in worlds} == {(100, 4e-4)}, "what all share is the first one's"


@pytest.mark.parametrize("env", ["all", ("all",)])
def test_all_is_three_worlds_with_models_of_their_own(env):
    config = resolve(TrainConfig(env=env))
    assert [world.env for world in config.worlds] == list(ALL) and config.models == "all"
    assert [config.models_of(world) for world in config.worlds] == ["all/alfworld", "all/webshop", "all/searchqa"]
    written_out, _ = builtin_run(ATOD(), "all")
    assert (written_out.tasks_per_step, written_out.minibatches, written_out.gap) == (24, 12, "exact")


def test_one_environment_is_stored_as_ever():
    config = resolve(TrainConfig(env=TOY, student="folder", data="x=y"))
    assert config.worlds == (config,) and config.data == "x=y"
    assert config.stored_worlds() == {} and not {"others", "weight", "label_teachers"} & config.stored().keys()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"env": (TOY, "toy/Eco-v0")}, UnknownName, "unknown environment 'toy/Eco-v0'"),
        ({"env": (TOY, TOY)}, AtodError, "named twice"),
        ({"env": (TOY, f"{ECHO}=0")}, AtodError, "expected a weight above 0"),
        ({"env": (TOY, f"{ECHO}=much")}, AtodError, "expected a weight above 0"),
        ({"env": ()}, AtodError, "expected the id of an environment"),
        ({"data": ("eco=/x",)}, UnknownName, "unknown world in --data 'eco'; did you mean 'echo'"),
        ({"data": "eco=/x"}, UnknownName, "unknown world in --data"),
        ({"data": ("/x", "/y")}, AtodError, "expected one value for all environments, or NAME=VALUE"),
        ({"option": ("eco/a=1",)}, UnknownName, "unknown world in --option 'eco/a=1'"),
        ({"max_turns": ("echo=few",)}, AtodError, "--max-turns few: expected a whole number"),
        ({"max_turns": ("echo=0",)}, AtodError, "--max-turns 0: expected a number above 0"),
        ({"gap_clip": ("echo=-1",)}, AtodError, "--gap-clip -1.0: expected 0 or more"),
        ({"teacher": ("eco/small=t",)}, UnknownName, "unknown world in --teacher"),
        ({"teacher": ("echo=",)}, UnknownName, "unknown world in --teacher"),
    ],
)
def test_a_slip_is_answered_in_a_line(changes, error, message):
    with pytest.raises(error) as caught:
        config_of(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- who is played ------------------------------------------------------------------------------------------------


def sampler(weights, tasks=(5, 3, 2), per_step=4):
    sets = [TaskSet("train", [f"{n}/{i}" for i in range(size)]) for n, size in enumerate(tasks)]
    return StepSampler(sets, seed=3, tasks_per_step=per_step, group_size=2, weights=weights)


def test_environments_take_turns_by_weight_and_groups_stay_within_a_task():
    drawn = sampler((1, 2, 0.5), per_step=7)
    for step in range(1, 9):
        specs = drawn.specs(step)
        assert Counter(spec.world for spec in specs) == {0: 4, 1: 8, 2: 2}
        for group in {spec.group_id for spec in specs}:
            assert len({(s.world, s.task_id) for s in specs if s.group_id == group}) == 1
        assert all(spec.task_id.startswith(f"{spec.world}/") for spec in specs)
    seen = Counter(spec.task_id for step in range(1, 6) for spec in drawn.specs(step) if spec.world == 0)
    assert set(seen.values()) == {4}, "each epoch of an environment goes once through its own tasks"


def test_shares_hold_to_within_one_at_any_time_and_do_not_depend_on_the_past():
    drawn, weights = sampler((3, 1, 1), per_step=1), np.array([3, 1, 1]) / 5
    worlds = [drawn.specs(step)[0].world for step in range(1, 41)]
    for n in range(1, 41):
        assert (np.abs(np.bincount(worlds[:n], minlength=3) - n * weights) < 1).all()
    assert sampler((3, 1, 1), per_step=1).specs(23) == drawn.specs(23)


def test_further_rounds_are_played_in_the_same_shares():
    drawn = sampler((1, 1, 2), per_step=8)
    specs = drawn.further_specs(2, 1)
    assert Counter(spec.world for spec in specs) == {0: 4, 1: 4, 2: 8}
    assert specs == sampler((1, 1, 2), per_step=8).further_specs(2, 1) != drawn.further_specs(2, 2)


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_limits_options_and_splits_are_each_environments_own(options, tmp_path, capsys):
    main(
        ATOD,
        [*options, "--steps", "2", "--option", "echo/loud=true", "--gap-scale", "equal", "--run", str(tmp_path / "r")],
    )
    episodes = [t for step in (1, 2) for t in read_jsonl(tmp_path / "r" / "trajectories" / f"step_{step:06d}.jsonl.gz")]
    by_env = {env: [t for t in episodes if t.env_id == env] for env in (TOY, ECHO)}
    assert [len(by_env[TOY]), len(by_env[ECHO])] == [6, 10], "of 8 groups of 2, one and two thirds, to within one"
    assert max(len(t.turns) for t in by_env[TOY]) == 3 and max(len(t.turns) for t in by_env[ECHO]) == 2
    assert {t.split for t in by_env[TOY]} == {"train"} and {t.split for t in by_env[ECHO]} == {"learn"}
    validated = list(read_jsonl(tmp_path / "r" / "validation" / "step_000002.jsonl.gz"))
    assert {(t.env_id, t.split) for t in validated} == {(TOY, "valid"), (ECHO, "choose")} and len(validated) == 8
    (row,) = metrics(tmp_path / "r")[1:]
    for key in ("episode/success", "atod/teacher_student_gap_mean", "atod/opd_abs_mean", "atod/rl_abs_mean"):
        assert {f"toy/{key}", f"echo/{key}", key} <= row.keys()
    sizes = [row[f"{name}/gap_scale"] * row[f"{name}/atod/raw_kl_mean"] for name in ("toy", "echo")]
    assert sizes[0] == pytest.approx(sizes[1]), "both teachers are equally loud"
    second = [t for t in read_jsonl(tmp_path / "r" / "trajectories" / "step_000002.jsonl.gz")]
    for name, env in (("toy", TOY), ("echo", ECHO)):
        own = [t for t in second if t.env_id == env]
        assert row[f"{name}/episode/success"] == sum(t.success for t in own) / len(own)
        assert row[f"{name}/batch/tokens"] == sum(len(turn.response_ids) for t in own for turn in t.turns)
        shown = [t.success for t in validated if t.env_id == env]
        assert row[f"{name}/val/success_rate"] == sum(shown) / 4
    assert row["val/success_rate"] == (row["toy/val/success_rate"] + row["echo/val/success_rate"]) / 2
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    last = result["table"]["last (step 2)"]
    assert last["success"] == pytest.approx(np.mean([last["worlds"][n]["success"] for n in ("toy", "echo")]))
    assert set(result["table"]["teacher"]["worlds"]) == {"toy", "echo"} and "report" in result["panel"]
    stored = json.loads((tmp_path / "r" / "config.json").read_text())["settings"]
    assert stored["worlds"]["echo"]["option"] == ["loud=true"] and stored["worlds"]["echo"]["weight"] == 2
    out = capsys.readouterr().out
    assert f"atod on {TOY}, {ECHO}" in out and "mean success over the environments" in out
    assert "toy tasks at least once" in out and "echo tasks at least once" in out
    assert (tmp_path / "r" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", ["0", "1"])
def test_two_worlds_stopped_and_resumed_equal_an_uninterrupted_run(staleness, options, tmp_path):
    options += ["--staleness", staleness]
    main(ATOD, [*options, "--steps", "4", "--run", str(tmp_path / "whole")])
    main(ATOD, [*options, "--steps", "2", "--run", str(tmp_path / "parts")])
    main(ATOD, [*options, "--steps", "4", "--run", str(tmp_path / "parts")])
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    last = "checkpoints/step_000004/model.safetensors"
    whole, parts = (load_file(tmp_path / run / last) for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_what_becomes_of_such_a_run(options, tmp_path, capsys):
    """Its checkpoint is evaluated with each environment's own settings, and exported with a card that names all."""
    run = tmp_path / "r"
    main(ATOD, [*options, "--max-response", "8", "echo=6", "--steps", "1", "--run", str(run)])
    best = str(run / "checkpoints" / "best")
    for env, turns, longest in ((TOY, 3, 8), (ECHO, 2, 6)):
        sampling = sampling_of(EvaluateConfig(env=env, agent=best))
        assert (sampling.max_turns, sampling.max_response, sampling.style) == (turns, longest, "compact")
    assert read_run(run).env == f"{TOY}, {ECHO}" and read_run(run).teacher is None
    assert {"before, toy", "before, echo", "teacher, echo"} <= read_run(run).table.keys()
    export([str(run), "--to", str(tmp_path / "out"), "--card"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# atod on {TOY}, {ECHO}" in card and f"{ECHO}, choose, validation panel" in card
    assert f"{TOY}, valid, validation panel" in card and "| last (step 1), echo |" in card
    assert f"{ECHO}: prompt style `compact`; responses up to 6 tokens" in card
    main(ATOD, [*options, "--dry-run"])
    assert "teacher: weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_keeps_its_environments(options, tmp_path, capsys):
    main(GRPO, [*options, "--steps", "1", "--run", str(tmp_path / "r")])
    with pytest.raises(SystemExit):
        main(GRPO, [*options, "--steps", "2", "--run", str(tmp_path / "r"), "--max-turns", "3", "echo=3"])
    assert "worlds.echo.max_turns=2" in capsys.readouterr().err.replace("\n", "")


def test_the_means_of_a_final_table_are_over_all_environments():
    """A teacher of one environment alone has no mean: it would stand next to means over others."""
    part = {"success": 0.5, "low": 0.2, "high": 0.8, "n": 4, "length": 2.0, "by_label": {}}
    both = {"success": 0.5, "worlds": {"a": part, "b": part}}
    found = result_tables({"before": both, "teacher": {"success": 0.9, "worlds": {"a": part}}}, "panel")
    assert found[-1].caption == "mean success over the environments: before 50.0%"
