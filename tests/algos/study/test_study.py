"""A small study on the toy world: complete, resumable at any point, and honest about what it decides."""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import time

import pytest

from agents.models import REFERENCE
from atod_algos.evaluate import Evaluation
from atod_algos.evaluate.settings import sampling_of
from atod_algos.study import METHODS, PRESETS, Preset
from atod_algos.study.cells import (
    Tuned,
    _evaluation,
    algorithm_of,
    command_of,
    config_of,
    finish_cell,
    read_study,
)
from atod_algos.study.claims import decide
from atod_algos.study.command import StudyConfig, main, run
from atod_algos.training import cli
from atod_algos.training.run_dir import Busy
from atod_algos.training.trainer import Trainer
from atod_envs import ROOMS
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import StopReason, read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

NAMES = ("vanilla", "teacher", "grpo", "atod", "atod-uniform")


def results(folder):
    cells = json.loads((folder / "study-results.json").read_text())["cells"]
    return [{k: v for k, v in cell.items() if not k.startswith("seconds") and k != "commits"} for cell in cells]


def solve_all(evaluation):
    """Store an evaluation as if every task had been solved."""
    (path,) = (evaluation / "episodes").glob("*.jsonl.gz")
    solved = [dataclasses.replace(t, success=True, stop_reason=StopReason.SUCCESS) for t in read_jsonl(path)]
    write_jsonl(path, solved)
    summary = json.loads(json.dumps(Evaluation(tuple(solved)).summary()))
    (evaluation / "result.json").write_text(json.dumps({"panels": {"test/4": summary}}))


def test_a_study_runs_every_method_and_goes_on_where_it_stopped(preset, tmp_path, monkeypatch, capsys):
    run(StudyConfig("toy", out=tmp_path / "whole", methods=NAMES))
    cells = results(tmp_path / "whole")
    assert [(c["method"], c["seed"]) for c in cells] == [(name, seed) for name in NAMES for seed in (0, 1)]
    assert all(cell["last"]["n"] == 4 for cell in cells)
    assert cells[-1]["command"].startswith("atod train atod --env ") and "--run" not in cells[-1]["command"]
    assert set(cells[-1]["validation"]) == {"1", "2"} and cells[0]["method"] == "vanilla" and "best" not in cells[0]

    stops = iter([3, 2, 7])
    step = Trainer.train_step
    left = next(stops)

    def breaking(self, *given):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(Trainer, "train_step", breaking)
    for after in [*stops, 10**6, None]:
        try:
            run(StudyConfig("toy", out=tmp_path / "parts", methods=NAMES, seeds=(0,)))
        except KeyboardInterrupt:
            left = after
    assert results(tmp_path / "parts") == [cell for cell in cells if cell["seed"] == 0]

    monkeypatch.setattr(Trainer, "train_step", lambda *given: pytest.fail("trained again"))
    run(StudyConfig("toy", out=tmp_path / "whole", methods=NAMES))
    text = (tmp_path / "whole" / "tables.md").read_text(encoding="utf-8")
    for words in (
        "| Vanilla |",
        "ATOD w/o T-DUR",
        "ATOD beats GRPO",
        "turn weights are needed",
        "the runner-up",
        "Choice of the settings",
    ):
        assert words in text
    assert "toy  ATOD  seed 1: last" in capsys.readouterr().out.replace("\n", " ")

    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for seed in (0, 1):  # rows of one algorithm are lines of their own
        level = tmp_path / "whole" / "toy" / "atod-level" / f"seed{seed}"
        shutil.copytree(tmp_path / "whole" / "toy" / "atod" / f"seed{seed}", level)
        cell = json.loads((level / "cell.json").read_text())
        solve_all(level / "evaluation-last")
        best = {"last": json.loads((level / "evaluation-last" / "result.json").read_text())["panels"]["test/4"]}
        (level / "cell.json").write_text(json.dumps(cell | {"method": "atod-level"} | best))
    run(StudyConfig("toy", out=tmp_path / "whole", tables_only=True))
    assert "the first, ATOD, weights" not in (tmp_path / "whole" / "tables.md").read_text()  # a variant is no method
    figure = (tmp_path / "whole" / "figures" / "figure5-toy.svg").read_text()
    for line in ("GRPO", "ATOD", "ATOD, weights of mean 1"):
        assert f">{line} (2 seeds)<" in figure


def test_a_clock_that_is_set_changes_no_duration(preset, tmp_path, monkeypatch):
    now, world = time.time(), preset.worlds[0]
    monkeypatch.setattr("time.time", lambda: now - 3600 * len(list(tmp_path.rglob("*"))))
    cell = finish_cell(tmp_path, METHODS["vanilla"], world, "paper", 0, Tuned(1e-3), "test")
    assert 0 < cell["seconds"] < 600


def test_a_signal_is_one_line(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("atod_algos.study.command.run", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "toy", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 143 and said.startswith(f"error: ended by SIGTERM; kept in {tmp_path}: finished cells 0")


def test_textcraft_is_studied_where_it_is_named(tmp_path, monkeypatch):
    laptop = PRESETS["laptop"]
    assert {world.name for world in (*laptop.worlds, *laptop.others)} == set(ROOMS), "every environment"
    textcraft = next(world for world in laptop.others if world.name == "textcraft")
    quick = {"steps": 1, "max_turns": 2, "max_response": 4, "tasks_per_step": 1, "group_size": 2, "minibatches": 1,
             "eval_every": 1, "checkpoint_every": 1, "threads": 1, "eval_tasks": 2}  # fmt: skip
    small = dataclasses.replace(textcraft, train={**textcraft.train, **quick}, report_tasks=2)
    monkeypatch.setattr(
        "atod_algos.study.command.PRESETS", {"toy": Preset(laptop.worlds, (1e-3,), (0,), others=(small,))}
    )
    methods = ("vanilla", "atod")
    model = str(REFERENCE / "alfworld" / "student")  # a stranger there: only the plumbing is looked at
    run(StudyConfig("toy", tmp_path, ("textcraft",), methods, student=model, teacher=(f"textcraft={model}",)))
    assert [(c["world"], c["method"], c["last"]["n"]) for c in results(tmp_path)] == [
        ("textcraft", method, 2) for method in methods
    ]
    science = next(world for world in laptop.others if world.name == "scienceworld")
    assert science.train["env"] == "atod/ScienceWorld-v0" and science.options["atod"]["coef_anneal_steps"] == 11


def test_cells_of_other_learning_rates_are_not_mixed_in(preset, tmp_path):
    arguments = (tmp_path, METHODS["grpo"], preset.worlds[0], "paper", 0)
    first = finish_cell(*arguments, Tuned(1e-3), "test")
    assert finish_cell(*arguments, Tuned(1e-3), "test") == first
    with pytest.raises(AtodError, match=r"trained with learning rate 0.001, but now it is learning rate 0.002"):
        finish_cell(*arguments, Tuned(2e-3), "test")
    second = finish_cell(tmp_path, METHODS["grpo"], preset.worlds[0], "paper", 1, Tuned(1e-3, 1), "test")
    assert (first.get("updates"), second["updates"]) == (None, 1)
    with pytest.raises(AtodError, match=r"0.001, 1 updates a step, but now it is learning rate 0.001, 3 updates"):
        finish_cell(tmp_path, METHODS["grpo"], preset.worlds[0], "paper", 1, Tuned(1e-3, 3), "test")


def test_a_finished_study_is_not_taken_for_one_with_other_settings(preset, tmp_path, models):
    """Another student, other rules, settings that are gone, cells that are copied or lack a number: each is refused."""
    world, tuned = preset.worlds[0], Tuned(1e-3)
    other = replace_train(world, student=str(models["teacher"]))
    for name, rules in (("grpo", "released"), ("vanilla", "paper")):
        finish_cell(tmp_path, METHODS[name], world, "paper", 0, tuned, "test")
        with pytest.raises(AtodError, match="but now it is"):
            finish_cell(tmp_path, METHODS[name], other, "paper", 0, tuned, "test")
        if rules != "paper":
            with pytest.raises(AtodError, match="rules='paper', but now it is 'released'"):
                finish_cell(tmp_path, METHODS[name], world, rules, 0, tuned, "test")
    folder = tmp_path / "toy" / "grpo" / "seed0"
    cell = json.loads((folder / "cell.json").read_text())
    for name, value in (("seconds", None), ("validation", {"x": 1}), ("validation", {}), ("last", {"success": 0.5}), ("best", 5),
                        ("lr", 10**400), ("updates", "4")):  # fmt: skip
        (folder / "cell.json").write_text(json.dumps({**cell, name: value}))
        with pytest.raises(DataError, match=rf"cell\.json: expected a number as {name}"):
            run(StudyConfig("toy", tmp_path, tables_only=True))
    (folder / "cell.json").write_text(json.dumps(cell))
    copied = shutil.copytree(folder, tmp_path / "toy" / "grpo" / "seed1")
    with pytest.raises(DataError, match="is the cell of toy/grpo/seed0; was it copied"):
        read_study(tmp_path)
    shutil.rmtree(copied)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "cell.json").unlink()
    (folder / "metrics.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match="expected the steps 1 to 2 of a finished run"):
        finish_cell(tmp_path, METHODS["grpo"], world, "paper", 0, tuned, "test")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: cannot be read"):
        finish_cell(tmp_path, METHODS["grpo"], world, "paper", 0, tuned, "test")


def test_a_finished_cell_is_refused_once_a_model_was_replaced_under_its_name(preset, tmp_path, models):
    copies = {role: shutil.copytree(models[role], tmp_path / role) for role in ("student", "teacher")}
    world = replace_train(preset.worlds[0], **{role: str(path) for role, path in copies.items()})
    for name in ("vanilla", "teacher", "atod"):
        finish_cell(tmp_path / "s", METHODS[name], world, "paper", 0, Tuned(1e-3), "test")
    template = copies["teacher"] / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    finish_cell(tmp_path / "s", METHODS["vanilla"], world, "paper", 0, Tuned(1e-3), "test")
    for name, said in (("teacher", "was evaluated with model="), ("atod", "was trained with another model")):
        with pytest.raises(AtodError, match=said):
            finish_cell(tmp_path / "s", METHODS[name], world, "paper", 0, Tuned(1e-3), "test")


def test_all_rows_of_a_world_are_played_in_the_same_environment(tmp_path):
    """The built-in models of Search-QA read one passage a search; so does any other model that stands next to them."""
    world = next(world for world in PRESETS["laptop"].worlds if world.name == "searchqa")
    world = replace_train(world, thinking="keep")
    asked = [_evaluation(tmp_path / "e", agent, world, 0, "test") for agent in ("builtin:student", str(tmp_path))]
    mine, others = map(sampling_of, asked)
    assert mine.option == others.option == ("topk=1",) and mine.thinking == others.thinking == "keep"
    assert mine == others


def test_a_cell_that_another_process_holds_is_left_to_it(preset, tmp_path):
    folder = tmp_path / "toy" / "vanilla" / "seed0"
    folder.mkdir(parents=True)
    arguments = (tmp_path, METHODS["vanilla"], preset.worlds[0], "paper", 0, Tuned(1e-3), "test")
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            finish_cell(*arguments)
    assert finish_cell(*arguments)["last"]["n"] == 4


def write_cell(root, method, seed, solved, prefix=""):
    """A finished cell whose evaluation solved some tasks."""
    from episodes import outcome

    from atod_envs.trajectory import write_jsonl

    folder = root / method / f"seed{seed}"
    (folder / "evaluation-last" / "episodes").mkdir(parents=True)
    tasks = [outcome(f"{prefix}t{i}", won, seed=seed, label="x" if i % 2 else "y") for i, won in enumerate(solved)]
    write_jsonl(folder / "evaluation-last" / "episodes" / f"test-{len(solved)}-seed{seed}.jsonl.gz", tasks)
    panel = {"name": f"test/{len(solved)}"}
    (folder / "evaluation-last" / "config.json").write_text(
        json.dumps({"settings": {"seeds": [seed], "panels": [panel]}})
    )
    (folder / "evaluation-last" / "result.json").write_text("{}")
    return {"seed": seed, "folder": str(folder), "last": {"success": sum(solved) / len(solved)}}


def test_a_claim_needs_both_tasks_and_seeds(tmp_path):
    strong = [write_cell(tmp_path, "a", seed, [i < 80 + seed for i in range(100)]) for seed in range(3)]
    weak = [write_cell(tmp_path, "b", seed, [i < 50 + seed for i in range(100)]) for seed in range(3)]
    clear = decide("x", strong, weak)
    assert (
        clear.verdict == "holds" and clear.tasks.difference == pytest.approx(0.3) and set(clear.by_label) == {"x", "y"}
    )
    assert decide("x", weak, strong).verdict == "reversed"
    # The same mean difference, carried by one lucky seed: the tasks say yes, the seeds say no.
    lucky = [write_cell(tmp_path, "c", seed, [i < (98 if seed == 0 else 52) for i in range(100)]) for seed in range(3)]
    doubtful = decide("x", lucky, weak)
    assert doubtful.tasks.p_value < 0.05 and doubtful.p_seeds > 0.05 and doubtful.verdict == "ahead, not decided"
    one = decide("x", strong[:1], weak)
    assert one.seeds == (0,) and one.p_seeds == 1.0 and one.verdict == "ahead, not decided"
    assert decide("x", strong[:1], weak[1:]) is None


def test_worlds_are_decided_together_on_the_seeds_that_all_have(tmp_path):
    def cells(method, solved_by_world, seeds):
        return [
            write_cell(tmp_path / world, method, seed, [i < solved for i in range(100)], prefix=world)
            | {"world": world}
            for world, solved in solved_by_world.items()
            for seed in seeds
        ]

    ahead, behind = cells("a", {"one": 60, "two": 90}, range(3)), cells("b", {"one": 50, "two": 80}, range(2))
    both = decide("x", ahead, behind)
    assert both.seeds == (0, 1) and both.tasks.difference == pytest.approx(0.1) and both.tasks.tasks == 200
    assert decide("x", ahead, [cell for cell in behind if cell["world"] == "one"]) is None


def replace_train(world, **settings):
    return dataclasses.replace(world, train={**world.train, **settings})


@pytest.mark.parametrize("rules", ["paper", "released"])
@pytest.mark.parametrize("name", ["laptop", "paper-0.6b"])
def test_a_cells_command_is_its_run(name, rules, tmp_path, monkeypatch):
    """Parsed as the command line parses it, the command asks for the run that the study trains."""
    asked = []
    monkeypatch.setattr(cli, "train", lambda config, algorithm, its, **_: asked.append((config, algorithm, its)))
    preset = PRESETS[name]
    given = [replace_train(world, teacher=("builtin",)) for world in (*preset.worlds[:1], *preset.others)]
    worlds = [*(preset.worlds if name == "laptop" else ()), *given]
    for number, world in enumerate(worlds):
        # The first world takes every method; the others share the methods out, each taking every n-th.
        trained = [method for method in METHODS.values() if method.algorithm and not (number and method.asked_for)]
        for method in trained[number - 1 :: len(worlds) - 1] if number else trained:
            arguments = (method, world, rules, 3, Tuned(1e-3, 12), tmp_path)
            cli.main_by_name(method.algorithm, shlex.split(command_of(*arguments))[3:])
            assert asked.pop() == (config_of(world, *arguments[3:]), algorithm_of(*arguments[:3]), rules)


def test_the_laptop_preset_scales_its_schedules():
    (alfworld, *_), methods = PRESETS["laptop"].worlds, METHODS
    steps = alfworld.train["steps"]
    assert algorithm_of(methods["atod"], alfworld, "paper").coef_anneal_steps == round(steps * 80 / 150)
    assert algorithm_of(methods["atod-uniform"], alfworld, "paper").coef_anneal_steps == round(steps * 80 / 150)
    assert algorithm_of(methods["atod-constant"], alfworld, "paper").coef_anneal_steps == 0
    assert algorithm_of(methods["guided-opd"], alfworld, "paper").guide_steps == round(steps * 0.8)
    published = PRESETS["laptop-150"].worlds[0]
    assert (published.train["steps"], algorithm_of(methods["atod"], published, "paper").coef_anneal_steps) == (150, 80)
    tcod = algorithm_of(methods["tcod"], alfworld, "paper")
    assert tcod.turns(steps // 2) >= alfworld.train["max_turns"] - 1
    for method in methods.values():
        if method.algorithm:
            for world in PRESETS["laptop"].worlds:
                algorithm_of(method, world, "released")
    wrong = dataclasses.replace(methods["grpo"], options={"kapa": 1})
    with pytest.raises(AtodError, match="GRPO has no option 'kapa'"):
        algorithm_of(wrong, alfworld, "paper")


def test_the_paper_presets_are_the_published_settings(tmp_path):
    preset = PRESETS["paper-1.7b"]
    assert [w.name for w in preset.worlds] == ["alfworld", "webshop", "searchqa"] and preset.lrs == (1e-6,)
    alfworld = preset.worlds[0]
    config = config_of(alfworld, 3, Tuned(1e-6), tmp_path)
    assert (config.student, config.steps, config.max_turns, config.seed, config.lr) == (
        "Qwen/Qwen3-1.7B",
        150,
        50,
        3,
        1e-6,
    )
    assert algorithm_of(METHODS["atod"], alfworld, "paper").coef_anneal_steps == 150
    assert algorithm_of(METHODS["atod-constant"], alfworld, "paper").coef_anneal_steps == 0
    with pytest.raises(AtodError, match="--teacher"):
        finish_cell(tmp_path, METHODS["teacher"], alfworld, "paper", 0, Tuned(1e-6), "valid_unseen")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{}",
        '{"world": "toy", "method": "grop", "seed": 0}',
        '{"world": "toy", "method": "grpo"}',
        "[" * 9999,
    ],
)
def test_a_broken_cell_is_named(content, tmp_path):
    path = tmp_path / "toy" / "grpo" / "seed0" / "cell.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"world": "toy", "method": "grpo", "seed": 0}))
    assert len(read_study(tmp_path)) == 1
    path.write_text(content)
    with pytest.raises(DataError, match=r"cell\.json.*delete it to evaluate the cell again"):
        read_study(tmp_path)


def test_numbers_of_a_cell_that_are_not_its_evaluations_are_refused(preset, tmp_path):
    finish_cell(tmp_path, METHODS["vanilla"], preset.worlds[0], "paper", 0, Tuned(1e-3), "test")
    folder = tmp_path / "toy" / "vanilla" / "seed0"
    path, result = folder / "cell.json", folder / "evaluation-last" / "result.json"
    run(StudyConfig("toy", out=tmp_path, tables_only=True))
    whole = json.loads(path.read_text())
    for name, value in (("success", 0.875), ("length", 2.5)):
        path.write_text(json.dumps(whole | {"last": whole["last"] | {name: value}}))
        with pytest.raises(DataError, match=r"cell\.json has other numbers than the cell's evaluations; delete it"):
            run(StudyConfig("toy", out=tmp_path, tables_only=True))
    both = whole["last"] | {"success": 0.875}  # its episodes say otherwise
    result.write_text(json.dumps({"panels": {"test/4": both}}))
    with pytest.raises(DataError, match="other numbers"):
        run(StudyConfig("toy", out=tmp_path, tables_only=True))
    path.unlink()
    finish_cell(tmp_path, METHODS["vanilla"], preset.worlds[0], "paper", 0, Tuned(1e-3), "test")
    assert json.loads(path.read_text())["last"] == whole["last"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--preset", "lap"], "unknown preset 'lap'; did you mean 'laptop'"),
        (["--methods", "grop"], "unknown method 'grop'; did you mean 'grpo'"),
        (["--worlds", "alf"], "unknown world 'alf'"),
        (["--data", "alfworld"], "unknown world in --data 'alfworld'"),
        (
            ["--worlds", "alfworld", "--data", "webshop=X"],
            "--data webshop=X: webshop is none of this study's worlds (alfworld)",
        ),
        (["--teacher", "textcraft=X"], "textcraft is none of this study's worlds (alfworld, "),
        (["--settings-of", "X", "--lrs", "1e-3"], "nothing is chosen from --lrs and --updates"),
        (["--seeds", "1000"], "is the seed that chooses rate and updates"),
        (["--seeds", "1", "1"], "expected different whole numbers from 0"),
        (["--updates", "0"], "expected different whole numbers from 1"),
        (["--lrs", "1e-3", "1.0000001e-3"], "expected rates above 0 that differ in six digits"),
        (["--lrs", "nan"], "expected rates above 0"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), *options])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in err and len(err.splitlines()) == 1
