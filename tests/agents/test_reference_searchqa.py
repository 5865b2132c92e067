"""Search-QA's reference models copy names they have never seen, differ as they should, and can be trained."""

import json
import sys

import gymnasium as gym
import pytest
from reference import play_panel

from agents.models import REFERENCE, load_model, require_same_tokenizer
from atod_algos.atod import ATOD
from atod_algos.training.cli import main
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.sft import main as imitation
from atod_envs.options import read_options
from atod_envs.prompting import prompted
from atod_envs.searchqa.builtin import make_encyclopedia

pytestmark = pytest.mark.slow

ENV = "atod/SearchQA-v0"


@pytest.fixture(scope="module")
def student():
    return load_model("builtin", "student", world="searchqa")


@pytest.fixture(scope="module")
def teacher():
    return load_model("builtin", "teacher", world="searchqa")


def test_both_can_be_improved_on(student, teacher):
    require_same_tokenizer(student, teacher, "teacher")
    assert student.n_parameters <= teacher.n_parameters < 1_000_000
    weak, strong = (play_panel(loaded, ENV, 96).success for loaded in (student, teacher))
    assert 0.25 < weak < 0.5 and 0.55 < strong < 0.8 and strong > weak + 0.15


def test_the_teacher_reads_an_encyclopedia_that_nobody_has_seen(teacher):
    assert play_panel(teacher, ENV, 96, "builtin:7").success > 0.45


def test_the_profile_shows_one_passage_a_search_unless_told_otherwise():
    config = resolve(TrainConfig(env=ENV))
    assert config.option == ("topk=1",) and resolve(config) == config
    asked = resolve(TrainConfig(env=ENV, option=("topk=3", "dataset=single")))
    assert read_options(asked.option) == {"topk": 3, "dataset": "single"} and vars(resolve(asked)) == vars(asked)
    assert resolve(TrainConfig(env=ENV, student="owner/model")).option == ()


def test_a_name_is_the_same_tokens_wherever_it_stands(student):
    """Else it could not be copied from the question to the query, and from a passage to the answer."""
    tokenizer = student.tokenizer
    env = prompted(gym.make(ENV, data="builtin", split="test"), "compact")

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def holds(text, part):
        whole = ids(text)
        return any(whole[place : place + len(part)] == part for place in range(len(whole)))

    entities = [entity for entity in make_encyclopedia().entities["test"] if entity.kind != "event"]
    for entity in entities[::7]:
        message, _ = env.reset(seed=0)
        message, *_ = env.step(f"<think> find x </think><search> {entity.name} </search>")
        name = ids(f" {entity.name}")
        assert len(name) <= 8
        assert f"- {entity.name}: " in message and holds(message, name)
        assert holds(f"Who taught {entity.name}?", name)
        assert holds(f"<think> find x </think><search> {entity.name} </search>", name)


@pytest.mark.parametrize(
    "text", ["- Grakfun Trorek: Born in Raildal in 1693.", "größer 12 🦊", "was anything found in?"]
)
def test_the_shipped_tokenizer_is_lossless(student, text):
    tokenizer = student.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_atod_trains_on_it(tmp_path, capsys):
    options = [
        "--env", ENV, "--data", "builtin", "--steps", "2", "--tasks-per-step", "4", "--group-size", "4", "--eval-tasks", "12",
        "--report-tasks", "16", "--run", str(tmp_path / "r"), "--option", "train.dataset=single:3,bridge:1",
    ]  # fmt: skip
    main(ATOD, options)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["actor/grad_norm"] > 0 for row in rows)
    table = json.loads((tmp_path / "r" / "result.json").read_text())["table"]
    assert set(table["teacher"]["by_label"]) == {"single", "bridge", "comparison", "compositional"}
    assert "95 % interval" in capsys.readouterr().out


def test_imitation_goes_on_from_the_command_line(tmp_path, monkeypatch, capsys):
    student = str(REFERENCE / "searchqa" / "student")
    options = ["--student", student, "--out", str(tmp_path / "m"), "--env", ENV, "--data", "builtin:8"]
    options += ["--option", "dataset=single", "--rounds", "2", "--episodes", "8", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["imitation", *options])
    imitation()
    assert "round 2: loss" in capsys.readouterr().out
    assert load_model(str(tmp_path / "m"), "student").n_parameters == load_model(student, "student").n_parameters
