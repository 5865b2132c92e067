"""Stored episodes are scored again by data set, as the environment scored them."""

import pytest

from atod_envs.prompting import prompted
from atod_envs.recording import RecordTurns
from atod_envs.searchqa.env import SearchQAEnv
from atod_envs.searchqa.report import main
from atod_envs.trajectory import write_jsonl


def test_episodes_are_scored_by_data_set(tmp_path, capsys):
    env = RecordTurns(prompted(SearchQAEnv("test"), "compact"))
    tasks = env.unwrapped.tasks
    played, expected = [], {}
    for place, task_id in enumerate(tasks.panel(24)):
        env.reset(seed=0, options={"task_id": task_id})
        question = tasks.questions[task_id]
        env.step("<search>no name</search>")
        answer = (question.answers[0], f"{question.answers[0]} indeed", "nothing")[place % 3]
        *_, info = env.step(f"<answer>{answer}</answer>")
        played.append(info["trajectory"])
        expected.setdefault(question.dataset, []).append((info["searchqa/em"], info["searchqa/f1"]))
    env.reset(seed=0, options={"task_id": tasks.panel(1)[0]})  # an episode that never answers
    for _ in range(4):
        *_, info = env.step("what?")
    played.append(info["trajectory"])
    expected[tasks.questions[tasks.panel(1)[0]].dataset].append((0.0, 0.0))
    write_jsonl(tmp_path / "episodes.jsonl.gz", played)
    assert main([str(tmp_path / "episodes.jsonl.gz"), "--data", "builtin"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = {cells[1].strip(): cells[2:5] for cells in (line.split("|") for line in lines)}
    assert set(rows) == {*expected, "average", "all"} and rows["all"][0].strip() == "25"
    for name, pairs in expected.items():
        em, f1 = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert [float(cell) for cell in rows[name][1:]] == pytest.approx([em, f1], abs=0.051)
        assert 0 < em < f1 < 100


def test_what_cannot_be_scored_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "no.jsonl")]) == 1
    assert "no.jsonl" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main([str(tmp_path / "empty.jsonl")]) == 1
    assert "no results" in capsys.readouterr().err
