"""Every method in short runs of the trainer."""

import json

import numpy as np
import pytest
from episodes import batch_from, episode
from toyworld import TOY

from atod_algos.algorithm import Advantages, RolloutLimits
from atod_algos.batch import Scores
from atod_algos.entropy_aware import EntropyAware
from atod_algos.gigpo import GiGPO
from atod_algos.gopd import GOPD
from atod_algos.grpo import GRPO
from atod_algos.tip import TIP
from atod_algos.training.cli import main

pytestmark = pytest.mark.slow

# --- in training --------------------------------------------------------------------------------------------------


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "2", "--max-response", "8", "--max-context", "128", "--lr", "4e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "0", "--report-tasks", "4", "--minibatches", "2", "--threads", "1",
        "--checkpoint-every", "2", "--store", "nothing",
    ]  # fmt: skip


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ends(rows, name, n=3):
    return sum(r[name] for r in rows[:n]) / n, sum(r[name] for r in rows[-n:]) / n


@pytest.mark.parametrize("algorithm, extra", [(GiGPO, []), (GRPO, ["--rules", "dr_grpo"])], ids=["gigpo", "dr_grpo"])
def test_reward_rises(algorithm, extra, options, tmp_path):
    bigger = ["--group-size", "8", "--lr", "2e-3", "--steps", "16"]
    main(algorithm, [*options, *bigger, *extra, "--run", str(tmp_path / "r")])
    before, after = ends(metrics_of(tmp_path / "r"), "episode/success", 4)
    assert after > before + 0.1


def test_dapo_learns_from_mixed_groups_only_and_resumes_bit_for_bit(options, tmp_path):
    dapo = [*options, "--rules", "dapo", "--max-turns", "1"]
    main(GRPO, [*dapo, "--steps", "4", "--run", str(tmp_path / "whole")])
    main(GRPO, [*dapo, "--steps", "2", "--run", str(tmp_path / "parts")])
    main(GRPO, [*dapo, "--steps", "4", "--run", str(tmp_path / "parts")])

    def timeless(run):
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))}
            for row in metrics_of(run)
        ]

    rows = timeless(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == rows
    for row in rows:
        assert 1 <= row["sampling/rounds"] <= 10 and row["sampling/episodes"] == 16 * row["sampling/rounds"]
        assert row["group/all_fail"] == row["group/all_success"] == 0


@pytest.mark.parametrize("algorithm", [GOPD, TIP, EntropyAware])
def test_relatives_close_the_gap_to_the_teacher(algorithm, options, tmp_path):
    extra = ["--entropy-threshold", "0.1"] if algorithm is EntropyAware else []
    main(algorithm, [*options, *extra, "--lr", "2e-3", "--steps", "10", "--run", str(tmp_path / "r")])
    rows = metrics_of(tmp_path / "r")
    before, after = ends(rows, f"{algorithm.name}/teacher_student_gap_mean")
    assert before < 0 and after > before + 0.02
    if algorithm is EntropyAware:
        assert "actor/support_loss" in rows[0] and 0 < rows[0]["entropy_aware/forward_ratio"] < 1


def test_rows_of_an_algorithm_hold_one_value_for_each_sampled_token():
    batch = batch_from([episode(["a", "b"], True), episode(["a"], False)])
    for algorithm in (GiGPO(), GRPO()):
        result = algorithm.advantages(batch, Scores(np.zeros(batch.n_tokens)), 1)
        assert isinstance(result, Advantages) and result.token_M.shape == (batch.n_tokens,)
        assert algorithm.limits(1) == RolloutLimits()


@pytest.mark.parametrize(
    "algorithm, option, words",
    [
        (TIP, ["--keep", "0"], "--keep 0.0"),
        (EntropyAware, ["--support", "0"], "--support 0"),
        (GiGPO, ["--discount", "1.5"], "--discount 1.5"),
    ],
)
def test_impossible_options_are_answered_in_one_line(algorithm, option, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(algorithm, [*option, "--dry-run"])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in err and len(err.splitlines()) == 1


def test_a_base_model_of_ones_own(options, models, tmp_path):
    """The teacher as its own base has gained nothing, and what is left is OPD."""
    main(GOPD, [*options, "--steps", "1", "--base", str(models["teacher"]), "--run", str(tmp_path / "r")])
    (row,) = metrics_of(tmp_path / "r")
    assert row["gopd/teacher_gain_mean"] == 0
    assert row["gopd/student_drift_mean"] == pytest.approx(-row["gopd/teacher_student_gap_mean"])
