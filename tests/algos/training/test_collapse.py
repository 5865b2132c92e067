"""Warnings before a collapse: which steps give which line, how often, and that a resumed run says the same."""

import logging

import pytest

from atod_algos.training.collapse import PAUSE, CollapseWatch
from atod_algos.training.run_dir import RunFolder

STEADY = {
    "episode/success": 0.5,
    "episode/valid_action_ratio": 0.8,
    "actor/entropy_loss": 0.4,
    "group/all_fail": 0.2,
    "atod/raw_kl_mean": 0.3,
}


def said(rows, watch=None):
    """Step -> the first words of what it gave reason to say."""
    watch = watch or CollapseWatch()
    lines = {step: watch.see(step, row) for step, row in enumerate(rows, 1)}
    return {step: [line.partition(": ")[2].split(":")[0] for line in found] for step, found in lines.items() if found}


def rows(n=6, **changes):
    """``n`` steady steps, with other values from step 2 on."""
    return [STEADY, *[STEADY | {key.replace("__", "/"): value for key, value in changes.items()}] * (n - 1)]


def test_a_run_that_unlearned_at_lr_3e3_is_told_before_its_success_is_gone():
    recorded = [
        (0.531, 0.722, 0.130, 0.125),
        (0.312, 0.296, 0.222, 0.5),
        (0.0, 0.084, 0.352, 1.0),
        (0.078, 0.142, 0.362, 0.875),
    ]
    run = [dict(zip(list(STEADY)[:4], values, strict=True)) for values in recorded]
    found = said(run)
    assert list(found) == [2, 4], "one step before success is 0"
    assert found[2] == ["valid actions fell to 51% (at first 72%)"]
    assert found[4] == ["in 94% of the groups every attempt fails (at first 12%)"]


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"actor__entropy_loss": 0.01, "episode__success": 0.3}, "entropy fell to"),
        ({"episode__valid_action_ratio": 0.5, "episode__success": 0.3}, "valid actions fell to"),
        ({"atod__raw_kl_mean": 0.9}, "the gap to the teacher grew to 0.600"),
        ({"group__all_fail": 0.95}, "in 95% of the groups"),
        ({"actor__entropy_loss": 0.01, "episode__success": 0.9}, None),
        ({"episode__valid_action_ratio": 0.5, "episode__success": 0.5}, None),
        ({"episode__valid_action_ratio": 0.7, "episode__success": 0.3}, None),
        ({"atod__raw_kl_mean": 0.45}, None),
        ({"group__all_fail": 0.8}, None),
    ],
)
def test_each_sign_alone(changes, begins):
    found = [line for lines in said(rows(**changes)).values() for line in lines]
    assert len(found) == (begins is not None) and all(line.startswith(begins) for line in found)


def test_what_begins_badly_is_no_collapse():
    assert said([STEADY | {"group/all_fail": 1.0, "episode/success": 0.0}] * 20) == {}, "a cut episode never succeeds"
    assert said([{"sft/loss": 1.0}] * 5) == {}
    only = [{key: value for key, value in row.items() if key != "group/all_fail"} for row in rows(group__all_fail=1.0)]
    assert said(only) == {}
    worlds = rows(**{"toy__atod/raw_kl_mean": 9.0})
    assert said(worlds) == {}, "one world's gap is not the run's"


def test_a_sign_is_told_once_in_a_while_and_a_resumed_run_says_the_same():
    run = rows(2 * PAUSE + 5, group__all_fail=1.0)
    whole = said(run)
    assert list(whole) == [3, 3 + PAUSE, 3 + 2 * PAUSE]
    for cut in (1, 2, 3, 8, 15):
        watch = CollapseWatch([{"step": step, **row} for step, row in enumerate(run[:cut], 1)])
        after = {step: watch.see(step, row) for step, row in enumerate(run[cut:], cut + 1)}
        assert [step for step, lines in after.items() if lines] == [step for step in whole if step > cut]


def test_the_run_folder_warns_in_one_line(tmp_path, caplog):
    run = RunFolder(tmp_path / "r", {"rules": "paper", "train": {"log": ()}, "algorithm": {"name": "grpo"}})
    run.begin(0)
    with caplog.at_level(logging.WARNING):
        for step, row in enumerate(rows(3, group__all_fail=1.0), 1):
            run.log(step, row)
    run.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("step 3: in 100% of the groups") and "lower --lr" in lines[0]
