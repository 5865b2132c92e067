"""The leaderboard: what is measured anew, what is refused, how seeds become one row."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from toyworld import TOY

from atod_algos.command import main as atod
from atod_algos.evaluate.statistics import t_interval, wilson
from atod_algos.opd import OPD
from atod_algos.study import METHODS, PRESETS, leaderboard
from atod_algos.study.cells import algorithm_of, without
from atod_algos.training import config as profiles
from atod_algos.training import run_dir
from atod_algos.training.cli import main
from atod_algos.training.source import source_commit
from atod_envs.errors import AtodError, DataError

PAGE = "# Title\n\ntext\n\n<!-- rows: made by atod leaderboard add -->\n<!-- rows: end -->\nafter\n"


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    monkeypatch.setitem(leaderboard.FIXED, TOY, 4)
    monkeypatch.setitem(profiles.BUILTIN_WORLDS, TOY, {"max_turns": 4})
    monkeypatch.setattr(run_dir, "source_commit", lambda: "0123456789abcdef")


@pytest.fixture
def train(models, tmp_path):
    def made(name, *further, seed=0):
        options = [
            "--env", TOY, "--data", "builtin", "--student", str(models["student"]), "--teacher", str(models["teacher"]),
            "--style", "compact", "--max-turns", "4", "--max-response", "8", "--max-context", "128", "--eval-temperature", "1",
            "--tasks-per-step", "2", "--group-size", "2", "--eval-every", "0", "--report-tasks", "4", "--threads", "1",
            "--steps", "1", "--seed", str(seed), "--run", str(tmp_path / name),
        ]  # fmt: skip
        main(OPD, [*options, *further])
        return tmp_path / name

    return made


def test_a_run_becomes_a_row_and_a_second_seed_joins_it(train, tmp_path, capsys):
    page = tmp_path / "leaderboard.md"
    page.write_text(PAGE)
    first = train("a")
    assert atod(["leaderboard", "add", str(first), "--page", str(page)]) == 0
    assert f"OPD in {TOY}, seed 0:" in capsys.readouterr().out
    (row,) = json.loads(page.with_suffix(".json").read_text())["rows"]
    (one,) = row["runs"]
    evaluated = json.loads(next((first / "leaderboard").glob("*/result.json")).read_text())["panels"][row["panel"]]
    assert (one["n"], one["solved"]) == (4, round(evaluated["success"] * 4)), "measured anew, by the evaluation"
    cpu = sum(json.loads(line)["time/cpu"] for line in (first / "metrics.jsonl").open())
    assert one["cpu_minutes"] == round(cpu / 60, 1) and cpu > 0
    low, high = wilson(one["solved"], 4)
    text = page.read_text()
    assert text.startswith("# Title\n\ntext") and text.endswith("after\n")
    cells = [cell.strip() for cell in re.search(r"^\| OPD (.+)\|$", text, re.MULTILINE)[0].split("|")]
    assert cells[2:5] == [f"{one['solved'] / 4:.1%}", f"{100 * low:.1f} - {100 * high:.1f}", "0"]
    assert cells[6] == "0123456" and "--seed" not in cells[7] and "--run" not in cells[7]
    assert cells[7].startswith(f"`atod train opd --env {TOY} --data builtin --student ") and cells[7].endswith(
        "--steps 1`"
    )

    leaderboard.add(train("b", seed=1), page)
    leaderboard.add(first, page)
    (row,) = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [run["seed"] for run in row["runs"]] == [0, 1], "a seed counts once"
    leaderboard.add(train("c", "--opd-coef", "0.5"), page)
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [len(row["runs"]) for row in rows] == [2, 1]
    assert page.read_text().count("| OPD |") == 2 and page.read_text().count("## ") == 1


def test_several_seeds_have_a_t_interval_and_the_best_stands_first():
    def row(method, *solved):
        runs = [
            {"seed": n, "n": 100, "solved": s, "cpu_minutes": 2.0 + n, "commit": f"{n}" * 9}
            for n, s in enumerate(solved)
        ]
        return {"env": "atod/ALFWorld-v0", "panel": "valid_unseen/100", "digest": "d", "data": "v", "method": method,
                "command": f"atod train {method}", "settings": {"m": method}, "runs": runs}  # fmt: skip

    text = leaderboard.tables([row("grpo", 50), row("opd", 60, 70, 80)])
    low, high = t_interval([0.6, 0.7, 0.8])
    assert f"| opd | 70.0% | {100 * low:.1f} - {100 * high:.1f} | 0, 1, 2 | 3.0 | 0000000, 1111111, 2222222 |" in text
    assert text.index("| opd") < text.index("| grpo") and "## ALFWorld" in text
    with pytest.raises(AtodError, match="the page has rows of panel valid_unseen/100 \\(d, v\\)"):
        leaderboard.merged([row("opd", 60)], row("grpo", 50) | {"digest": "e"})


def test_what_cannot_be_compared_is_refused(train, tmp_path, capsys):
    page = tmp_path / "leaderboard.md"
    with pytest.raises(AtodError, match="expected a page with the line"):
        leaderboard.add(tmp_path, page)
    page.write_text(PAGE)
    run = train("a")
    config = json.loads((run / "config.json").read_text())
    lines = (run / "metrics.jsonl").read_text()

    def refused(words, **changes):
        changed = json.loads(json.dumps(config))
        for key, value in changes.items():
            place = changed["settings"]["train"] if key in changed["settings"]["train"] else changed
            place[key] = value
        (run / "config.json").write_text(json.dumps(changed))
        with pytest.raises(AtodError, match=words):
            leaderboard.add(run, page)

    refused("its source is not that of one commit", commits=["0123+changes"])
    refused("its source is not that of one commit", commits=["unknown"])
    refused("its source is not that of one commit \\(commits: a, b", commits=["a", "b"])
    refused("command: not stored", command="")
    refused("1 of 9 steps", steps=9)
    refused("has no place here", env="other/World-v0")
    refused("differs in its turn limit: 3, the leaderboard's is 4", max_turns=3)
    refused("differs in its temperature", eval_temperature=0.4)
    (run / "metrics.jsonl").write_text(lines.replace("time/cpu", "time/other"))
    refused("no time/cpu")
    (run / "metrics.jsonl").write_text(lines)
    refused("has 1 of 2 steps|its last checkpoint", steps=2)
    refused("expected train.seed of type int", seed="0")
    refused("expected texts as 'commits'", commits=[5])
    (run / "metrics.jsonl").write_text(lines + lines.replace('"step": 1', '"step": 2'))
    refused("said to have 1 steps, logged 2")
    assert page.read_text() == PAGE and not page.with_suffix(".json").exists()
    page.write_text(PAGE.replace("<!-- rows: end -->", ""))
    with pytest.raises(AtodError, match="rows: end"):
        leaderboard.add(run, page)


GOOD = {"env": "e", "panel": "p", "digest": "d", "data": "v", "method": "m", "command": "c", "settings": {},
        "runs": [{"seed": 0, "n": 4, "solved": 2, "cpu_minutes": 1.0, "commit": "a"}]}  # fmt: skip


ALSO_GOOD = {
    "runs.seed": [-1, 10**400],
    "runs.cpu_minutes": [1.5],
    "runs.n": [],
    "runs.solved": [],
    "settings": [{}],
    "runs": [],
}


@pytest.mark.parametrize("name", [*GOOD, *(f"runs.{name}" for name in GOOD["runs"][0])])
@pytest.mark.parametrize("value", [None, [], "", -1, 1.5, {}, [None], [{}], True, 10**400], ids=str)
def test_rows_that_are_none_are_named(name, value, tmp_path):
    """The numbers next to the page, changed by hand or cut off: read, or refused with the row's place."""
    store, row = tmp_path / "leaderboard.json", json.loads(json.dumps(GOOD))
    outer, _, inner = name.partition(".")
    if inner:
        row["runs"][0][inner] = value
    else:
        row[outer] = value
    store.write_text(json.dumps({"rows": [GOOD, row]}))
    if any(value == good and type(value) is type(good) for good in ALSO_GOOD.get(name, [""])):
        assert leaderboard.tables(leaderboard.read_rows(store))
        return
    with pytest.raises(DataError, match=re.escape(f"{store}, row 2: expected")):
        leaderboard.read_rows(store)


def test_a_run_keeps_its_command_and_commits(train, monkeypatch):
    run = train("a")
    kept = json.loads((run / "config.json").read_text())
    assert kept["commits"] == ["0123456789abcdef"] and kept["command"].startswith(f"atod train opd --env {TOY}")
    monkeypatch.setattr(run_dir, "source_commit", lambda: "another")
    train("a")  # it has ended: shown again, not trained
    assert json.loads((run / "config.json").read_text()) == kept
    train("a", "--steps", "2")
    assert json.loads((run / "config.json").read_text())["commits"] == ["0123456789abcdef", "another"]


def test_the_command_of_a_row_has_no_seed_and_no_folder():
    said = "atod train opd --seed 3 --env a b --run 'x y' --seed=4 --lr 1e-3 --verbose"
    assert without(said, "--seed", "--run") == "atod train opd --env a b --lr 1e-3 --verbose"


def test_the_commit_of_a_clone_and_of_none(tmp_path, monkeypatch):
    from atod_algos.training import source

    monkeypatch.setattr(source, "__file__", str(tmp_path / "source.py"))
    assert source_commit() == "unknown"
    (tmp_path / "source.py").write_text("1")

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, stdout=sys.stderr)

    git("init", "-q")
    assert source_commit() == "unknown", "in a project that does not hold it"
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert re.fullmatch("[0-9a-f]{40}", source_commit())
    (tmp_path / "source.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{40}\\+changes", source_commit())


def test_a_row_bears_the_studys_name_of_its_options():
    iw = dataclasses.asdict(algorithm_of(METHODS["iw-opd-level"], PRESETS["laptop"].worlds[0], "paper"))
    assert leaderboard.label_of({"name": "iw_opd", **iw}) == METHODS["iw-opd-level"].label
    assert leaderboard.label_of({"name": "iw_opd", **iw, "mean_preserve": False}) == METHODS["iw-opd"].label
    assert leaderboard.label_of({"name": "gigpo"}) == "gigpo"
