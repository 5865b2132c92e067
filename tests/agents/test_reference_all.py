"""One student that knows three worlds, and a teacher for each of them."""

import json

import pytest
from reference import play_panel

from agents.models import load_model, require_same_tokenizer
from atod_algos.atod import ATOD
from atod_algos.training.cli import main
from atod_algos.training.worlds import ALL, key_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student():
    return load_model("builtin", "student", world="all")


@pytest.mark.parametrize("env", ALL)
def test_each_world_can_be_improved_on(student, env):
    teacher = load_model("builtin", "teacher", world=f"all/{key_of(env)}")
    require_same_tokenizer(student, teacher, "teacher")
    assert student.n_parameters == teacher.n_parameters < 1_000_000
    weak, strong = (play_panel(loaded, env, 64).success for loaded in (student, teacher))
    assert 0.05 < weak < 0.7 and strong > weak + 0.1


def test_all_three_are_trained_at_once(tmp_path):
    folder = tmp_path / "r"
    options = [
        "--env", "all", "--data", "builtin", "--steps", "1", "--tasks-per-step", "3", "--group-size", "2", "--staleness", "0",
        "--eval-every", "0", "--eval-tasks", "2", "--report-tasks", "4", "--threads", "1", "--run", str(folder),
    ]  # fmt: skip
    main(ATOD, options)
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row[f"{key_of(env)}/episode/valid_action_ratio"] > 0.3 for env in ALL)
    assert row["actor/grad_norm"] > 0
    given = json.loads((folder / "config.json").read_text())["settings"]["train"]
    assert given["gap"] == "exact" and given["lr"] == 4e-4
