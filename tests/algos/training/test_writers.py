"""Where metrics go besides metrics.jsonl: writers by name, another package's, and what each holds after a resume."""

import sys

import pytest

from atod_algos.training import writers
from atod_algos.training.config import TrainConfig
from atod_algos.training.run_dir import RunFolder
from atod_envs.errors import AtodError

KEPT: dict[str, list] = {}


class Memory:
    """A writer as another package would offer it."""

    def __init__(self, opening):
        self.rows = KEPT.setdefault(opening.project, [])
        self.rows[:] = [(row["step"], row["x"]) for row in opening.rows]

    def log(self, step, metrics):
        self.rows.append((step, metrics["x"]))

    def close(self):
        self.rows.append("closed")


class Point:
    name = "memory"

    def load(self):
        return Memory


def folder(path, *log):
    train = vars(TrainConfig()) | {"log": log}
    return RunFolder(path, {"rules": "paper", "horizon": None, "train": train, "algorithm": {"name": "opd"}})


def interrupted(path, *log):
    """Three steps, of which the last is lost; then a resumed run's steps 3 and 4."""
    run = folder(path, *log)
    run.begin(0)
    for step in (1, 2, 3):
        run.log(step, {"x": step})
    run.close()
    run = folder(path, *log)
    run.begin(2)
    for step in (3, 4):
        run.log(step, {"x": 10.0 * step})
    run.close()


def test_a_writer_of_another_package_holds_what_an_uninterrupted_run_would(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "entry_points", lambda group: [Point()] if group == "atod.writers" else [])
    interrupted(tmp_path, "memory=mine", "memory")
    assert {name: [(1, 1), (2, 2), (3, 30.0), (4, 40.0), "closed"] for name in ("mine", "atod")} == KEPT


def test_the_packages_writers_are_offered():
    assert {"wandb", "trackio", "mlflow"} <= {point.name for point in writers.entry_points(group="atod.writers")}


def test_an_unknown_writer_names_the_known_ones(tmp_path):
    with pytest.raises(AtodError, match=r"--log comet: expected one of mlflow, trackio, wandb"):
        folder(tmp_path, "comet").begin(0)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named_with_its_installation(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AtodError, match=rf"--log {name} needs a package .*pip install"):
        folder(tmp_path, f"{name}=mine").begin(0)


def test_mlflow_holds_a_resumed_run_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    interrupted(tmp_path / "r", "mlflow=mine")
    client = mlflow.MlflowClient((tmp_path / "r" / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "r" and run.info.status == "FINISHED" and run.data.params["algorithm/name"] == "opd"
    history = client.get_metric_history(run.info.run_id, "x")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "r" / "mlflow").as_uri())
    interrupted(tmp_path / "elsewhere" / "r", "mlflow=mine")
    assert len(client.search_runs([run.info.experiment_id])) == 2, "another run whose folder has the same name"


def test_trackio_holds_a_resumed_run_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    interrupted(tmp_path / "r", "trackio=mine")
    (run,) = trackio.Api().runs("mine")
    assert run.name.startswith("r-")
    logs = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage.get_logs("mine", run.name)
    assert [(row["step"], row["x"]) for row in logs] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    interrupted(tmp_path / "elsewhere" / "r", "trackio=mine")
    names = sorted(run.name for run in trackio.Api().runs("mine"))
    assert len(names) == 2 and run.name in names, "another run whose folder has the same name"
