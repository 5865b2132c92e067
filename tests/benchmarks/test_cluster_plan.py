"""The pipeline's simulator: it gives back what it was calibrated on, and says the right thing is in the way."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from paths import REPOSITORY

from atod_envs.errors import DataError

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from cluster_plan import fit_engine, from_run, main
from cluster_simulator import Rates, Workload, episode_lengths, simulate

WORK = Workload(groups=16, group_size=8, turns=6.0, longest=14, prefill=50.0, response=10.0, rows=50_000.0)
RATES = Rates(
    engines=1, slots=128, prefill=20_000.0, decode_one=100.0, decode_all=2_000.0, env_seconds=1e-4, learn=20_000.0, score=60_000.0,
    teach=60_000.0, weight_bytes=1e6, bandwidth=1e9,
)  # fmt: skip


def test_lengths_have_the_mean_and_the_limit_they_were_asked_for():
    lengths = episode_lengths(replace(WORK, groups=200), np.random.default_rng(1))
    assert lengths.shape == (200, 8) and lengths.min() >= 1 and lengths.max() == 14
    assert lengths.mean() == pytest.approx(6.0, rel=0.05)


def test_one_request_alone_takes_what_its_tokens_take():
    one = replace(WORK, groups=1, group_size=1, turns=3.0, longest=3)
    step = simulate(one, replace(RATES, env_seconds=0.5))
    assert step.seconds["rollout"] == pytest.approx(3 * (10 / 100 + 50 / 20_000 + 0.5), rel=0.01)
    assert step.seconds["update"] == 50_000 / 20_000 and step.seconds["weights"] == 1e-3


def test_a_full_engine_is_bound_by_what_all_requests_share():
    many = replace(WORK, groups=64, turns=4.0, longest=4)
    step = simulate(many, RATES)
    tokens = 64 * 8 * 4 * (10 + 5)
    assert step.seconds["rollout"] == pytest.approx(tokens / 2_000, rel=0.1) and step.busy > 0.95


def test_a_step_of_the_engine_takes_time_in_a_straight_line():
    rates = replace(RATES, env_seconds=0.0)
    times = [rates.turn(replace(WORK, prefill=0.0), running) / 10 for running in (1, 64, 128)]
    assert times[0] == pytest.approx(1 / 100) and times[2] == pytest.approx(128 / 2_000)
    assert times[1] == pytest.approx(times[0] + (times[2] - times[0]) * 63 / 127)


def test_what_dispatching_takes_is_added_to_every_rollout():
    plain = simulate(WORK, replace(RATES, engines=2)).seconds["rollout"]
    assert simulate(WORK, replace(RATES, engines=2, dispatch=0.7)).seconds["rollout"] == pytest.approx(plain + 0.7)


def test_an_engine_is_fitted_to_a_full_rollout_and_to_a_few_episodes_alone():
    true = replace(RATES, prefill=8 * RATES.decode_all)
    few = 8, true.turn(WORK, 8)
    rates = fit_engine(
        WORK, replace(true, decode_one=1.0, decode_all=1.0), simulate(WORK, true).seconds["rollout"], few
    )
    assert (rates.decode_one, rates.decode_all) == pytest.approx((100.0, 2_000.0), rel=0.01)


def test_more_engines_help_until_the_longest_episode_is_alone():
    times = [simulate(WORK, replace(RATES, engines=count)).seconds["rollout"] for count in (1, 2, 4, 8, 16)]
    assert all(later <= sooner * 1.001 for sooner, later in itertools.pairwise(times))
    assert 0.5 * times[0] < times[1] < 0.7 * times[0], "half the requests leave an engine less well used"
    assert simulate(WORK, replace(RATES, engines=16, learn=1e9)).bottleneck == "the longest episodes"
    assert simulate(WORK, replace(RATES, learn=1e9)).bottleneck == "engine"


@pytest.mark.parametrize(
    "change, name",
    [
        ({"learn": 100.0}, "learner"),
        ({"teach": 100.0}, "teacher"),
        ({"bandwidth": 1e3}, "network"),
        ({"env_seconds": 5.0}, "environment"),
    ],
)
def test_the_slowest_part_is_named(change, name):
    assert simulate(WORK, replace(RATES, **change)).bottleneck == name


def stored_run(folder, rollout=3.0):
    from atod_envs.trajectory import StopReason, Trajectory, Turn, write_jsonl

    (folder / "trajectories").mkdir(parents=True)
    train = {"tasks_per_step": 4, "group_size": 2, "slots": 8}
    (folder / "config.json").write_text(json.dumps({"settings": {"train": train}}))
    row = {
        "step": 1, "time/step": 7.0, "time/rollout": rollout, "time/score": 1.0, "time/update": 2.5, "speed/tokens_per_second": 100.0,
    }  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    turns = tuple(
        Turn(i, "o", (), tuple(range(20 + 12 * i)), tuple(range(4)), (0.0,) * 4, "r", "a", True, True, 0.0, 0.1, 0.01)
        for i in range(3)
    )
    episode = Trajectory("e", "t", "train", "task", "g", 0, turns, "end", True, 1.0, StopReason.SUCCESS)
    write_jsonl(folder / "trajectories" / "step_000001.jsonl.gz", [episode] * 8)
    return folder


def test_rates_of_a_run_give_back_its_step(tmp_path, capsys):
    work, rates = from_run(stored_run(tmp_path / "run"))
    assert (work.turns, work.response, work.rows) == (3.0, 4.0, 700.0)
    assert work.prefill == pytest.approx((20 + 8 + 8) / 3), "what a conversation adds to a turn, not the whole prompt"
    step = simulate(work, rates)
    assert step.total == pytest.approx(7.0, rel=0.02) and step.seconds["rollout"] == pytest.approx(3.0, rel=0.02)
    assert main(["--run", str(tmp_path / "run"), "--engines", "1", "4"]) == 0
    assert "4 groups of 2, 3.0 turns" in capsys.readouterr().out


def test_presets_are_worked_out_and_slips_answered(tmp_path, capsys):
    assert main(["--preset", "paper-0.6b", "--env", "atod/SearchQA-v0", "--engines", "8"]) == 0
    assert "128 groups of 8" in capsys.readouterr().out
    for words in ([], ["--preset", "paper-9b"], ["--run", str(tmp_path)]):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(DataError, match="is not a run with steps"):
        from_run(tmp_path)
