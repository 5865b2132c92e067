"""An algorithm of another package: the one that docs/add_algorithm.md shows, built, installed and trained with."""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import REPOSITORY, SUPPORT
from toyworld import TOY

from atod_algos import command

pytestmark = pytest.mark.slow

PAGE = REPOSITORY / "docs" / "add_algorithm.md"


def block(language: str) -> str:
    """The page's first code block of a language."""
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the package of the page is installed into, as pip does it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "my_algorithms").mkdir()
    (source / "my_algorithms" / "__init__.py").write_text("")
    # The toy world is the package's own, so that a run needs nothing else.
    (source / "my_algorithms" / "rloo.py").write_text(block("python"))
    (source / "my_algorithms" / "world.py").write_text("import toyworld\n")
    broken = '\n[project.entry-points."atod.algorithms"]\n'
    project = block("toml").replace(broken, f'{broken}broken = "my_algorithms.rloo:NoSuchClass"\n')
    (source / "pyproject.toml").write_text(project)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot build here: {done.stderr.strip()[-300:]}")
    return target


def atod(installed, *words):
    here = [str(installed), str(REPOSITORY), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "atod_algos.command", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, here)), "COLUMNS": "200"},
    )


def test_it_is_short():
    assert len(block("python").splitlines()) < 100


def test_it_trains_by_name_with_its_own_options(installed, models, tmp_path):
    done = atod(
        installed, "train", "rloo", "--env", f"my_algorithms.world:{TOY}", "--student", str(models["student"]), "--style",
        "compact", "--max-turns", "2", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step",
        "4", "--group-size", "4", "--eval-every", "0", "--report-tasks", "4", "--threads", "1", "--steps", "2", "--run",
        str(tmp_path / "r"), "--baseline-scale", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "rloo/baseline_mean" in rows[0]
    stored = json.loads((tmp_path / "r" / "config.json").read_text())["settings"]["algorithm"]
    assert stored["name"] == "rloo" and stored["baseline_scale"] == 0.5


@pytest.fixture
def here(installed, monkeypatch):
    """The package on this process's own path."""
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("COLUMNS", "200")


def test_its_help_is_its_own_and_slips_are_answered(here, capsys):
    command.main(["train", "rloo", "--help"])
    shown = capsys.readouterr().out
    assert "usage: atod train rloo" in shown and "leave-one-out baseline" in shown and "--baseline-scale" in shown
    assert "0 is plain REINFORCE" in shown
    assert command.main(["train", "rlo"]) == 2 and "did you mean 'rloo'" in capsys.readouterr().err
    assert command.main(["train", "broken", "--dry-run"]) == 1
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert "algorithm 'broken' is offered as my_algorithms.rloo:NoSuchClass, but" in err


def test_presets_and_estimates_hold_for_it_too(here, capsys):
    assert command.main(["train", "rloo", "--preset", "paper-0.6b", "--dry-run"]) == 0
    assert "596,049,920 numbers" in capsys.readouterr().out


def test_its_advantages_by_hand():
    import numpy as np
    from episodes import batch_from, episode

    from atod_algos.batch import Scores

    space = {"__name__": "rloo_page"}
    exec(block("python"), space)
    batch = batch_from([episode(["a"] * n, won) for n, won in ((1, True), (2, False), (1, True))])
    got = space["RLOO"]().advantages(batch, Scores(np.zeros(batch.n_tokens)), 1).token_M
    assert got.tolist() == [5.0] * 2 + [-10.0] * 4 + [5.0] * 2
