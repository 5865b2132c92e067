"""Asynchronous rollout: which weights play which step, the correction, and resuming bit for bit."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toyworld import TOY

from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.rollout.async_rollout import AsyncRollout, correction_metrics, importance_weights, version_of
from atod_algos.training.cli import main
from atod_envs.errors import AtodError
from atod_envs.trajectory import read_jsonl

pytestmark = pytest.mark.slow


def weights_of(number):
    return {"w": torch.tensor(float(number))}


@given(st.integers(1, 2), st.integers(1, 9), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_every_step_is_played_once_by_the_weights_that_are_promised(staleness, steps, killed_after):
    """Also when the process ends after some step and another goes on from what was kept."""
    played = []

    def play(step, version, weights, ask):
        assert float(weights["w"]) == version
        played.append((step, version))
        return step

    kept, done = {}, 0
    for last in (min(killed_after, steps), steps):
        ahead = AsyncRollout(staleness, steps, play, 1)
        ahead.begin(done, weights_of(done), kept)
        for step in range(done + 1, last + 1):
            assert ahead.take(step) == step
            ahead.learned(step, weights_of(step))
            assert len(ahead.kept) <= staleness + 1
        done, kept = last, ahead.kept_weights(last)
        ahead.close()
    assert set(played) == {(step, max(0, step - 1 - staleness)) for step in range(1, steps + 1)}


def test_the_next_step_is_played_while_one_is_learned():
    started = {step: threading.Event() for step in range(1, 6)}

    def play(step, version, weights, ask):
        started[step].set()
        return step

    ahead = AsyncRollout(1, 5, play, 1)
    ahead.begin(0, weights_of(0), {})
    assert ahead.take(1) == 1
    assert started[2].wait(60)  # while step 1 is learned: both are played by the first weights
    time.sleep(0.05)
    assert not started[3].is_set()
    ahead.learned(1, weights_of(1))
    assert started[3].wait(60)
    ahead.close()


def test_what_fails_while_playing_is_raised_where_it_is_waited_for():
    def play(step, version, weights, ask):
        raise ValueError("the kitchen is on fire")

    ahead = AsyncRollout(1, 3, play, 1)
    ahead.begin(0, weights_of(0), {})
    with pytest.raises(ValueError, match="kitchen"):
        ahead.take(1)
    ahead.close()


def test_closing_gives_up_what_is_being_played():
    def play(step, version, weights, ask):
        while True:
            ask()
            time.sleep(0.01)

    ahead = AsyncRollout(1, 3, play, 1)
    ahead.begin(0, weights_of(0), {})
    ahead.close()  # would never return


def test_importance_weights_are_ratios_up_to_the_cap():
    old, sampler = np.log([0.2, 0.5, 0.9, 1e-3]), np.log([0.4, 0.5, 0.1, 0.9])
    weight_M = importance_weights(old, sampler, 2.0)
    assert weight_M == pytest.approx([0.5, 1.0, 2.0, 1e-3 / 0.9])
    found = correction_metrics(weight_M, 2.0, 1)
    assert found["staleness/truncated"] == 0.25 and found["staleness/steps"] == 1.0
    assert importance_weights(np.array([0.0]), np.array([-1e4]), 2.0) == pytest.approx([2.0])  # no overflow


def test_the_truncated_estimate_moves_towards_the_true_one():
    """Over samples of mu the weighted mean of f estimates its mean under pi; the cap bounds every weight."""
    rng = np.random.default_rng(0)
    mu, pi, f = np.array([0.6, 0.3, 0.1]), np.array([0.45, 0.35, 0.2]), np.array([1.0, 2.0, 4.0])
    drawn = rng.choice(3, 200_000, p=mu)
    loose = importance_weights(np.log(pi)[drawn], np.log(mu)[drawn], 100.0)
    assert (loose * f[drawn]).mean() == pytest.approx((pi * f).sum(), rel=0.02)
    tight = importance_weights(np.log(pi)[drawn], np.log(mu)[drawn], 1.5)
    truth, none = (pi * f).sum(), (mu * f).sum()
    assert abs((tight * f[drawn]).mean() - truth) < abs(none - truth) and tight.max() <= 1.5


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4",
        "--minibatches", "2", "--threads", "1",
    ]  # fmt: skip


def rows(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in lines]


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_stale_run_resumes_bit_for_bit(staleness, options, tmp_path):
    stale = [*options, "--staleness", str(staleness)]
    main(ATOD, [*stale, "--steps", "6", "--run", str(tmp_path / "whole")])
    for steps in ("2", "4", "6"):
        main(ATOD, [*stale, "--steps", steps, "--run", str(tmp_path / "parts")])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / n / "checkpoints/step_000006/model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for step in (1, 3, 6):
        stored = read_jsonl(tmp_path / "whole" / "trajectories" / f"step_{step:06d}.jsonl.gz")
        assert {t.policy_version for t in stored} == {version_of(step, staleness)}
    found = rows(tmp_path / "whole")
    assert [row["staleness/steps"] for row in found] == [min(step - 1, staleness) for step in range(1, 7)]
    assert found[0]["staleness/weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(found[-1]["staleness/weight_min"] - 1.0) > 1e-3


def test_what_ended_the_episodes_played_meanwhile_is_said_first():
    """A validation comes before the step that failed is asked for; the engine is in the middle of its episodes."""

    def play(step, version, weights, ask):
        if step == 2:
            raise AtodError("the retriever does not answer; start it")

    rollout = AsyncRollout(1, 9, play, 1)
    rollout.begin(0, {"w": torch.zeros(1)}, {})
    with pytest.raises(AtodError, match="the retriever does not answer"):
        rollout.call(lambda: pytest.fail("the engine is not free"))
    rollout.close()


def test_without_staleness_nothing_is_corrected(options, tmp_path):
    main(GRPO, [*options, "--steps", "2", "--run", str(tmp_path / "r")])
    assert not [name for row in rows(tmp_path / "r") for name in row if name.startswith("staleness/")]
    for step in (1, 2):
        stored = read_jsonl(tmp_path / "r" / "trajectories" / f"step_{step:06d}.jsonl.gz")
        assert {t.policy_version for t in stored} == {step - 1}


def test_adapters_train_stop_and_resume_bit_for_bit(options, tmp_path, capsys):
    pytest.importorskip("peft", reason="adapters need peft")
    lora = [*options, "--lora-rank", "4", "--lr", "5e-3"]
    main(GRPO, [*lora, "--rules", "released", "--steps", "4", "--run", str(tmp_path / "whole")])
    for steps in ("2", "4"):
        main(GRPO, [*lora, "--rules", "released", "--steps", steps, "--run", str(tmp_path / "parts")])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    saved = tmp_path / "whole" / "checkpoints" / "step_000004"
    assert (saved / "adapter_model.safetensors").exists() and not list(saved.glob("model*.safetensors"))
    # The engine samples with the sums: the learner's log-probs, with adapters, are the sampler's.
    assert max(row["sampler/logprob_gap_max"] for row in rows(tmp_path / "whole")) < 1e-4
    assert rows(tmp_path / "whole")[-1]["actor/auxiliary_loss"] > 0  # the distance to the base, adapters off


def test_the_engines_own_log_probs_give_nearly_the_same_run(options, tmp_path, capsys):
    main(GRPO, [*options, "--steps", "1", "--run", str(tmp_path / "a")])
    main(GRPO, [*options, "--steps", "1", "--old-logprobs", "sampler", "--run", str(tmp_path / "b")])
    (mine,), (other,) = rows(tmp_path / "b"), rows(tmp_path / "a")
    assert mine["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)
    assert "sampler/logprob_gap_max" in other and "sampler/logprob_gap_max" not in mine
    with pytest.raises(SystemExit):
        main(
            GRPO,
            [*options, "--steps", "1", "--old-logprobs", "sampler", "--staleness", "1", "--run", str(tmp_path / "c")],
        )
    assert "the weights that sampled are not those that learn" in capsys.readouterr().err


def test_a_step_of_one_update_runs_one_pass_less_and_still_checks_the_engine(options, tmp_path, monkeypatch):
    from atod_algos.teachers import local

    scored = []
    score = local.score
    monkeypatch.setattr(local, "score", lambda *a, **k: scored.append(1) or score(*a, **k))
    plain = [*options, "--steps", "2", "--minibatches", "1"]
    main(GRPO, [*plain, "--run", str(tmp_path / "less")])
    assert not scored
    monkeypatch.setattr(GRPO, "needs_student", True)
    main(GRPO, [*plain, "--run", str(tmp_path / "more")])
    assert len(scored) == 2
    for mine, other in zip(rows(tmp_path / "less"), rows(tmp_path / "more"), strict=True):
        assert mine["actor/ppo_kl"] == 0.0
        assert max(mine["sampler/logprob_gap_max"], other["sampler/logprob_gap_max"]) < 1e-4
        assert mine["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)
    monkeypatch.setattr(GRPO, "needs_student", False)
    main(GRPO, [*plain, "--minibatches", "2", "--run", str(tmp_path / "several")])
    assert len(scored) == 4


def test_every_step_says_what_memory_and_episodes_it_took(options, tmp_path):
    main(GRPO, [*options, "--steps", "1", "--run", str(tmp_path / "r")])
    (line,) = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["episode/aborted"] == 0.0
    for name in ("rollout", "score", "update"):
        assert 100 < row[f"memory/{name}_peak_mib"] < 100_000 and row[f"time/{name}"] > 0
    assert 100 < row["memory/predicted_mib"] < 100_000 and row["memory/peak_mib"] > 100
