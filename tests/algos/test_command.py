"""The `atod` command: what it runs, what it answers to mistakes, and that the shell completes it."""

import dataclasses
import errno
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from paths import REPOSITORY

from atod_algos import command
from atod_algos.command import commands, main
from atod_algos.guard import explanations
from atod_algos.training.config import GROUPS


def shell(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "atod_algos.command", *words],
        capture_output=True,
        text=True,
        cwd=environment.pop("cwd", REPOSITORY),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )


def test_overview_names_every_command_and_algorithm(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in [*commands(), "completion", *(point.name for point in entry_points(group="atod.algorithms"))]:
        assert name in shown


def test_every_command_is_there():
    for name, found in commands().items():
        for word, module in found.modules.items():
            if not module.startswith(command.ALGORITHM):
                assert callable(importlib.import_module(module.split()[0]).main), (name, word)


@pytest.mark.parametrize(
    "words, answer",
    [
        (["pay"], "unknown command 'pay'; did you mean 'play'?"),
        (["train", "ato"], "atod train: unknown name 'ato'; did you mean 'atod'?"),
        (["make", "gmes"], "did you mean 'games'?"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(words, answer, capsys):
    assert main(words) == 2
    assert answer in capsys.readouterr().err


def test_usage_lines_say_what_was_typed(capsys):
    for words, usage in (
        (["play", "--help"], "usage: atod play"),
        (["train", "atod", "--help"], "usage: atod train atod"),
        (["data", "get", "--help"], "usage: atod data get"),
        (["make", "games", "--help"], "usage: atod make games"),
        (["make", "encyclopedia", "--help"], "usage: atod make encyclopedia"),
        (["make", "recipes", "--help"], "usage: atod make recipes"),
    ):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith(usage)


def test_the_help_has_a_box_a_topic_and_no_line_breaks_of_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    assert main(["train", "atod", "--help"]) == 0
    shown = capsys.readouterr().out
    boxes = ["run", "models", "rollout", "optimizer", "evaluation", "storage", "cluster", "atod"]
    places = [shown.index(f"{box} options") for box in boxes]
    assert places == sorted(places)
    for name, texts in ((name, explanations(kind)) for name, kind in GROUPS.items()):
        fields = {field.name for field in dataclasses.fields(GROUPS[name])}
        assert set(texts) == fields, "every option is explained"
        flat = " ".join(shown.replace("│", " ").split())
        assert all(text in flat for text in texts.values())


def test_it_runs_what_it_names(tmp_path, capsys):
    assert main(["make", "games", "--out", str(tmp_path), "--games", "1", "--seed", "0", "--size", "small"]) == 0
    assert len(list(tmp_path.rglob("game.tw-pddl"))) == 1
    assert main(["make", "games", "--out", str(tmp_path)]) == 2, "argparse's own status comes through"
    assert main(["play", "--env", "atod/Nothing-v0"]) == 2
    assert "unknown environment" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["make", "games"], ["data", "status"], ["train", "atod"]])
def test_ctrl_c_is_no_traceback(words, capsys, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", pressed)
    assert main(words) == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "tyro" or name.startswith(("tyro.", "atod_algos"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train", "atod", "--help"]) == 1
    assert "atod train atod needs tyro, which is not installed: pip install 'atod[train]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("words", [("play", "--help"), ("train", "atod", "--help")])
def test_another_agents_package_is_explained(tmp_path, words):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("def run(): pass\n")
    done = shell(*words, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}", cwd=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the package 'agents' at {tmp_path / 'agents'} belongs to" in done.stderr
    assert "virtual environment" in done.stderr
    assert shell("data", "status", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}", cwd=str(tmp_path)).returncode == 0


def test_agents_whose_init_was_overwritten_are_explained(tmp_path):
    for package in ("atod_envs", "agents", "atod_algos"):
        shutil.copytree(
            f"{REPOSITORY}/{package}", tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    (tmp_path / "agents" / "__init__.py").write_text("from .run import Runner\n")
    done = shell("train", "atod", "--help", PYTHONPATH=str(tmp_path), cwd=str(tmp_path))
    assert done.returncode == 1 and "hides or has overwritten" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_algorithms_options_and_environments(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "atod.sh"
    script.write_text(capsys.readouterr().out)

    def complete(*words):
        text = " ".join(f"'{word}'" for word in words)
        ask = (
            f'source {script}; COMP_WORDS=({text}); COMP_CWORD={len(words) - 1}; _shtab_atod; echo "${{COMPREPLY[@]}}"'
        )
        return subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split()

    assert complete("atod", "tr") == ["train"]
    assert "grpo" in complete("atod", "train", "g")
    assert "--group-size" in complete("atod", "train", "grpo", "--grou")
    assert "atod/WebShop-v0" in complete("atod", "train", "atod", "--env", "")
    assert complete("atod", "data", "get", "--bun") == ["--bundle"]


def test_completion_of_an_unknown_shell_is_refused(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "sh"]) == 2
    assert "usage: atod completion bash|zsh" in capsys.readouterr().err


def test_a_command_that_moved_says_where_it_is(capsys):
    assert main(["plan", "--preset", "paper-4b"]) == 2
    said = capsys.readouterr().err
    assert "atod plan is python benchmarks/cluster_plan.py" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("make", "encyclopedia", "--scale", "0.02", "--out"),
        ("make", "catalogue", "--products", "3", "--out"),
        ("make", "recipes", "--out"),
        ("make", "games", "--games", "1", "--seed", "1", "--size", "small", "--out"),
        ("report", "--no-figures"),
        ("export", "RUN", "--to"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(words, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file/x", "loop", "x" * 300):
        assert main([*words, str(tmp_path / place)]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")


def test_an_encyclopedia_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    words = ["make", "encyclopedia", "--out", str(tmp_path), "--scale", "0.02"]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def cut_short(made):
        yield "0", "a passage"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("atod_envs.searchqa.builtin.Encyclopedia.passages", cut_short)
    capsys.readouterr()
    assert main([*words, "--seed", "9"]) == 1
    assert "No space left on device; make room, or choose another folder with --out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m atod_algos.command train atod --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "Traceback" not in done.stderr and done.stdout.startswith("usage: atod train atod")


def test_importing_an_algorithm_loads_no_torch():
    modules = sorted({point.value.partition(":")[0] for point in entry_points(group="atod.algorithms")})
    assert "atod_algos.atod" in modules
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False", done.stderr
