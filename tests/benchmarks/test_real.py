"""``make real``: its stages are commands that exist, what is done is left alone, the whole runs from start to end."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import tyro
from forks import forked_runs
from paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from real import Stage, copy_model, main, parse, stages

from atod_algos.atod import ATOD
from atod_algos.evaluate.settings import EvaluateConfig
from atod_algos.training.cli import main as train
from atod_algos.training.sft import SftCommand

TINY = ["--student", "builtin", "--games", "4", "--vanilla", "2", "--rounds", "2", "--early", "1", "--episodes", "3", "--steps", "1", "--tasks", "2",
        "--group", "2", "--panel", "2", "--max-turns", "3"]  # fmt: skip


def planned(tmp_path, *more):
    return stages(parse(["--out", str(tmp_path / "out"), *more]))


def test_every_stage_is_a_command_line_that_its_command_understands(tmp_path, capsys):
    plan = {stage.module: stage for stage in planned(tmp_path, "--data", "builtin", "--dtype", "float32")}
    assert list(plan) == ["atod_algos.evaluate", "atod_algos.training.sft", "atod_algos.atod"]
    shown = tyro.cli(EvaluateConfig, args=plan["atod_algos.evaluate"].arguments)
    assert shown.agent == "smollm2-135m" and shown.panels == ("valid_unseen/8",) and shown.style == "compact"
    taught = tyro.cli(SftCommand, args=plan["atod_algos.training.sft"].arguments, config=(tyro.conf.OmitArgPrefixes,))
    assert taught.fit.stop is None and taught.fit.first_beta == 0.2 and taught.dtype == "float32"
    train(ATOD, [*plan["atod_algos.atod"].arguments, "--dry-run"])
    said = capsys.readouterr().out
    assert '"minibatches": 4' in said and '"coef_anneal_steps": 3' in said


def test_generated_games_come_first_where_there_are_no_others(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    plan = planned(tmp_path)
    assert [stage.module for stage in plan[:3]] == ["atod_envs.alfworld.generate"] * 3
    games = str(tmp_path / "out" / "games")
    assert all(games in stage.arguments for stage in plan[3:])


def test_student_and_teacher_learn_on_one_schedule(tmp_path):
    early, late = [s for s in planned(tmp_path, "--data", "builtin") if s.module == "atod_algos.training.sft"]
    assert early.arguments == (*late.arguments, "--stop", "3")


def test_a_teacher_is_whole_only_once_its_stage_has_ended(tmp_path):
    """Its folder holds the student's weights before, and the last round is logged before the last weights are."""
    teacher = next(stage for stage in planned(tmp_path, "--data", "builtin") if "the teacher" in stage.title)
    folder = tmp_path / "out" / "teacher"
    (folder / "training").mkdir(parents=True)
    (folder / "model.safetensors").write_text("the student's")
    (folder / "training" / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 7)))
    assert not teacher.done()
    teacher.after()
    assert teacher.done()
    longer = next(
        stage for stage in planned(tmp_path, "--rounds", "8", "--data", "builtin") if "teacher" in stage.title
    )
    assert not longer.done()


def test_a_stage_that_fails_ends_it_and_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    import real

    ran = tmp_path / "ran"
    good = Stage("good", "timeit", ("-n", "1", "-r", "1", "pass"), lambda: False, lambda: ran.touch())
    bad = Stage("bad", "json.tool", (str(tmp_path / "missing.json"),), lambda: False, lambda: ran.unlink())
    skipped = Stage("skipped", "no.such.module", (), lambda: True)
    monkeypatch.setattr(real, "stages", lambda options: [skipped, good, bad])
    assert main(["--out", str(tmp_path / "out"), "--dtype", "float32"]) != 0
    said = capfd.readouterr()
    assert ran.exists() and "2 of 3 stages" in said.out and "== good" in said.out and "skipped" not in said.out
    assert "the same command goes on from here" in said.err and "json.tool" in said.err
    kept = [json.loads(line)["stage"] for line in (tmp_path / "out" / "seconds.jsonl").read_text().splitlines()]
    assert kept == ["good"]


def test_a_signal_ends_the_stage_that_runs(tmp_path):
    pid = tmp_path / "pid"
    script = f"""
import real, sys
sleeps = "import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
real.stages = lambda options: [real.Stage("sleeps", "timeit", ("-n", "1", "-r", "1", sleeps), lambda: False)]
real.guarded(lambda: sys.exit(real.main(["--out", {str(tmp_path / "out")!r}, "--dtype", "float32"])), "go on")
"""
    path = os.pathsep.join((str(REPOSITORY / "benchmarks"), str(REPOSITORY)))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 143 and said.startswith("error: ended by SIGTERM; go on")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_model_is_kept_whole(tmp_path):
    (tmp_path / "a" / "training").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "a" / name).write_text(name)
    copy_model(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def forked(run, said, command, env):
    """Carries out a stage's command line in a process that has imported everything."""
    assert command[:2] == [sys.executable, "-m"] and env["OMP_NUM_THREADS"] == "1"
    end = run(module=command[2], arguments=list(command[3:]), out=str(said))
    print(said.read_text())
    return SimpleNamespace(returncode=end["code"])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seconds of the CPU are few; a busy machine takes many of the clock
def test_from_start_to_end(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("REAL_THREADS", "1")
    out = tmp_path / "out"
    with forked_runs() as run, monkeypatch.context() as patch:
        patch.setattr("real.subprocess", SimpleNamespace(run=partial(forked, run, tmp_path / "said")))
        assert main(["--out", str(out), *TINY]) == 0
    said = capfd.readouterr()
    assert "7 of 7 stages" in said.out and "95 % interval" in said.out and "teacher" in said.out
    assert "builtin as it comes: " in said.out and "atod export" in said.out
    assert (out / "student" / "model.safetensors").is_file()
    assert (out / "student" / "model.safetensors").read_bytes() != (out / "teacher" / "model.safetensors").read_bytes()
    assert set(json.loads((out / "atod" / "result.json").read_text())["table"]) == {
        "before",
        "last (step 1)",
        "teacher",
    }
    assert main(["--out", str(out), *TINY]) == 0
    again = capfd.readouterr().out
    assert "1 of 7 stages" in again and "95 % interval" in again, "a finished run shows its table"
