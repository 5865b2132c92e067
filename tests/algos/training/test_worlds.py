"""Algorithms that need something from an environment (skills, an expert) run everywhere, through the one trainer."""

import gzip
import json

import gymnasium as gym
import numpy as np
import pytest
import tiny

from agents.expert import expert_solution
from agents.models import REFERENCE
from atod_algos.sdar import HEADING, SDAR
from atod_algos.tcod import TCOD
from atod_algos.training.cli import main
from atod_envs.alfworld.household import TASK_TYPES
from atod_envs.errors import DataError, UnknownName
from atod_envs.scienceworld.env import TASKS as SCIENCE
from atod_envs.searchqa.language import KINDS
from atod_envs.searchqa.questions import DATASETS
from atod_envs.skills import read_skills, skills_of
from atod_envs.trajectory import Group, StopReason, Trajectory, read_jsonl

pytestmark = pytest.mark.slow

KINDS_OF_TASK = {
    "alfworld": TASK_TYPES,
    "webshop": ("beauty", "electronics", "fashion", "garden", "grocery"),
    "searchqa": (*DATASETS, *KINDS),
    "textcraft": ("depth_2", "depth_3", "depth_4"),
    "scienceworld": tuple(SCIENCE),
}
ALONE = Group("t", ())
WORLDS = pytest.mark.parametrize("env", tiny.BUILTIN)


def of_kind(label, kind):
    return Trajectory("e", "t", "s", "", "g", 0, (), "", False, 0.0, StopReason.FAILURE, labels={label: kind})


@pytest.mark.parametrize("world", KINDS_OF_TASK)
def test_every_kind_of_task_has_skills_of_its_own_and_the_general_ones(world):
    book = skills_of(world)
    assert set(book.by_kind) == set(KINDS_OF_TASK[world])
    for kind in KINDS_OF_TASK[world]:
        text = SDAR().privileged_text(of_kind(f"{world}/label", kind), ALONE)
        assert text.startswith(HEADING) and book.general in text and book.by_kind[kind] in text


def test_the_categories_are_those_of_the_official_catalogue(realdata):
    items = json.loads((realdata / "webshop" / "items_shuffle_1000.json").read_text())
    assert {item["category"] for item in items} == set(KINDS_OF_TASK["webshop"])


def test_missing_skills_are_an_error_and_never_half_a_text(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown kind of task 'dance'.*pick_and_place_simple.*add '## dance'"):
        SDAR().privileged_text(of_kind("alfworld/task_type", "dance"), ALONE)
    with pytest.raises(DataError, match=r"no skills at .*chess"):
        SDAR().privileged_text(of_kind("chess/opening", "gambit"), ALONE)
    with pytest.raises(DataError, match=r"no skills at .*nowhere\.md"):
        SDAR(skills=str(tmp_path / "nowhere.md")).reads()
    with pytest.raises(DataError, match=r"no skills at .*nowhere\.md"):
        SDAR(skills=str(tmp_path / "nowhere.md")).privileged_text(of_kind("alfworld/task_type", TASK_TYPES[0]), ALONE)
    with pytest.raises(DataError, match="has no kind"):
        SDAR().privileged_text(Trajectory("e", "t", "s", "", "g", 0, (), "", False, 0.0, StopReason.FAILURE), ALONE)
    for name, text, words in (
        ("a", "## dance\n\nJump.\n", "no section '# General'"),
        ("b", "# General\n\nMove.\n\n## dance\n\n## sing\n\nLa.\n", "section for 'dance' is empty"),
        ("c", "# General\n\nMove.\n\n## dance\n\nJump.\n\n## sing, dance\n\nLa.\n", "two sections for 'dance'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=words):
            read_skills(tmp_path / name)


def test_a_skill_file_of_ones_own(tmp_path):
    (tmp_path / "mine.md").write_text("For me.\n\n# General\n\nMove.\n\n## dance, sing\n\nJump.\n")
    text = SDAR(skills=str(tmp_path / "mine.md")).privileged_text(of_kind("stage/art", "sing"), ALONE)
    assert text == f"{HEADING}\nMove.\n\nJump.\n\n"


@WORLDS
def test_the_expert_can_begin_episodes_everywhere(env):
    world = gym.make(env, **tiny.BUILTIN[env])
    tasks = world.unwrapped.tasks.panel(2 if "Science" in env else 6)
    lengths = [len(expert_solution(world, task, 3)) for task in tasks]
    assert sum(length > 1 for length in lengths) >= len(tasks) - 1
    world.close()


@WORLDS
@pytest.mark.parametrize("algorithm, extra", [(SDAR, []), (TCOD, ["--curriculum", "back_to_front"])])
def test_one_step_in_every_world(algorithm, extra, env, tmp_path):
    student = REFERENCE / "alfworld" / "student"  # a stranger in the others: only the plumbing is looked at
    if not student.is_dir():
        pytest.skip("no reference models")
    options = [
        "--env", env, "--student", str(student), "--teacher", str(student), "--style", "compact", "--max-response", "8",
        "--max-context", "3000", "--max-turns", "4" if algorithm is SDAR or "Search" in env else "15", "--tasks-per-step", "2", "--group-size", "2",
        "--minibatches", "1", "--steps", "1", "--eval-every", "0", "--eval-tasks", "1", "--report-tasks", "1", "--threads", "1",
        "--store",
        "tokens",
    ]  # fmt: skip
    for name, value in tiny.BUILTIN[env].items():
        options += ["--option", f"{name}={value}"] if name not in ("data", "max_turns") else []
    run = tmp_path / "r"
    main(algorithm, [*options, *extra, "--run", str(run)])
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    table = json.loads(gzip.decompress((run / "turns" / "step_000001.json.gz").read_bytes()))
    stored = list(read_jsonl(run / "trajectories" / "step_000001.jsonl.gz"))
    assert len(stored) == 4 and len(set(table["trajectory_uid"])) == 4
    if algorithm is SDAR:
        assert 0 < row["sdar/gate_mean"] < 1 and row["actor/auxiliary_loss"] != 0
        assert np.abs(table["sum_privileged_gap"]).max() > 0
    else:
        # One turn is left to the student in the first step; what stands before it is the expert's.
        played = [[turn for turn in t.turns if turn.prompt_ids] for t in stored]
        assert row["tcod/expert_turns_mean"] == np.mean(
            [len(t.turns) - len(p) for t, p in zip(stored, played, strict=True)]
        )
        assert row["tcod/expert_turns_mean"] > 0
        assert [turn.index for p in played for turn in p] == table["turn"]


def test_a_privileged_text_that_does_not_fit_is_not_cut(tmp_path, capsys):
    (tmp_path / "long.md").write_text("# General\n\n" + "word " * 3000 + "\n\n## " + ", ".join(TASK_TYPES) + "\n\nx\n")
    if not (REFERENCE / "alfworld" / "student").is_dir():
        pytest.skip("no reference models")
    with pytest.raises(SystemExit):
        main(SDAR, ["--skills", str(tmp_path / "long.md"), "--data", "builtin", "--tasks-per-step", "1", "--group-size", "2",
                    "--eval-tasks", "1", "--max-turns", "2", "--run", str(tmp_path / "r")])  # fmt: skip
    err = capsys.readouterr().err
    assert "nothing is cut" in err and "but the student reads 4096" in err
