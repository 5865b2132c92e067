"""Runs whose teacher gives its top-k tokens from elsewhere are those of the local teacher; others are refused."""

import json

import fake_vllm
import pytest
import torch

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
from safetensors.torch import load_file
from teacher_servers import Foreign, Recording, serving
from toyworld import TOY

from agents.models import load_model
from atod_algos.entropy_aware import EntropyAware
from atod_algos.opd import OPD
from atod_algos.signals.gkd import GKD
from atod_algos.signals.tropd import TrOPD
from atod_algos.teachers import local
from atod_algos.teachers.local import StepScorer
from atod_algos.training.cli import main
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError

pytestmark = pytest.mark.slow


@pytest.fixture
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--style", "compact", "--max-turns", "2", "--max-response", "8",
        "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "2", "--group-size", "2", "--eval-every", "0",
        "--report-tasks", "2", "--minibatches", "1", "--threads", "1", "--steps", "1", "--slots", "4",
    ]  # fmt: skip


def outcome(algorithm, options, run, *more):
    """The numbers of a run of one step that are not times, and its weights."""
    main(algorithm, [*options, *more, "--run", str(run)])
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "speed/", "memory/")
    return {k: v for k, v in row.items() if not k.startswith(clocks)}, load_file(
        run / "checkpoints" / "step_000001" / "model.safetensors"
    )


def assert_alike(found, expected):
    (row, weights), (own, own_weights) = found, expected
    assert row.keys() == own.keys()
    for name, value in own.items():
        assert row[name] == pytest.approx(value, abs=1e-3, rel=1e-3), name
    for name, weight in own_weights.items():
        # AdamW's first update is the whole rate in the gradient's direction; rounding turns it where there is none.
        near = torch.isclose(weights[name], weight, atol=1e-4).float().mean()
        assert near > 0.98, (name, float(near))


@pytest.mark.parametrize("algorithm, k", [(GKD, 32), (TrOPD, 64)])
def test_a_run_with_a_served_teacher_is_that_of_the_local_one(algorithm, k, options, models, teacher, tmp_path):
    expected = outcome(algorithm, options, tmp_path / "local", "--teacher", str(models["teacher"]))
    with serving(Recording, teacher) as running:
        found = outcome(algorithm, options, tmp_path / "served", "--teacher", running.address)
        assert running.asked == [k, k]
    assert_alike(found, expected)
    assert expected[0]["actor/support_loss"] > 0


def test_the_exact_gap_of_a_large_vocabulary_is_had_from_a_server(options, models, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WHOLE", 16)
    exact = [*options, "--gap", "exact", "--gap-topk", "12"]
    expected = outcome(OPD, exact, tmp_path / "local", "--teacher", str(models["teacher"]))
    with serving(Foreign, teacher) as running:
        found = outcome(OPD, exact, tmp_path / "served", "--teacher", running.address)
        assert running.asked == [12, 12]
    assert_alike(found, expected)
    assert expected[0]["actor/divergence"] > 0


def test_a_run_with_a_teacher_in_vllm_is_that_of_the_local_one(options, models, tmp_path, monkeypatch):
    engines = fake_vllm.install(monkeypatch, lambda: load_model(str(models["student"]), "teacher").model)
    there = ["--teacher", str(models["teacher"]), "--teacher-engine", "vllm", "--support", "9"]
    found = outcome(GKD, options, tmp_path / "vllm", *there)
    (engine,) = engines
    assert engine.arguments.max_logprobs == 9 and set(engine.asked) == {9}
    expected = outcome(GKD, options, tmp_path / "local", *there[:2], "--support", "9")
    assert_alike(found, expected)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_what_needs_whole_distributions_is_refused_before_anything_is_asked(engine, student, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was asked")

    monkeypatch.setattr(local, "RemoteScorer", never)
    where = "http://nowhere:1/v1" if engine == "transformers" else "t"
    for algorithm, said in (
        (EntropyAware(), "entropy_aware compares whole distributions"),
        (OPD(), r"--gap exact compares .* \(here 312\)"),
    ):
        config = resolve(TrainConfig(env=TOY, student="s", teacher=where, teacher_engine=engine, gap="exact"))
        with pytest.raises(AtodError, match=f"{said}.*use a local teacher"):
            StepScorer(config, algorithm, student, None, never, "cpu")
