"""Where a run's metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio, MLflow, or your own.

A writer is opened when a run begins or goes on, is given each step's metrics, and is closed with the run. Another
package offers one under the entry-point group ``atod.writers``, by a name that ``--log NAME`` or ``--log NAME=PROJECT``
then takes; the entry point names a function like those below. ``metrics.jsonl`` is the record: a writer that cannot
take steps back is given all that the run has logged, anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from atod_envs.errors import AtodError

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes a step's metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics, name -> value."""

    def close(self) -> None:
        """Finish what was written."""


@dataclass(frozen=True)
class Opening:
    """What a writer is opened with."""

    path: Path
    """The run's folder; its name is the run's name."""
    project: str
    """Project, or experiment, that the run belongs to."""
    settings: Mapping[str, Any]
    """The run's settings, JSON-compatible."""
    step: int
    """The last step that counts: 0 at a run's beginning. What was written of later ones was lost with its process."""
    rows: Sequence[Mapping[str, float]]
    """What the run has logged so far, one row a step with its ``step``: empty at a run's beginning."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder; steps that were lost with a process are taken back."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(opening.path / "tensorboard"), purge_step=opening.step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a metric."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file."""
        self._board.close()


def _identity(path: Path) -> str:
    """What tells a run from others whose folders have the same name: the name, and a digest of where it is."""
    whole = path.resolve()
    return f"{whole.name}-{hashlib.blake2b(str(whole).encode(), digest_size=4).hexdigest()}"


class Wandb:
    """Weights & Biases. The run's id there comes from its folder, so a resumed run goes on in the same place."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        name = opening.path.resolve().name
        identity = {"project": opening.project, "id": _identity(opening.path), "name": name, "resume": "allow"}
        self._run: Any = wandb.init(**identity, config=dict(opening.settings), dir=str(opening.path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of the run's history."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """trackio, on this machine (``trackio show --project PROJECT``); a resumed run is written anew under its name."""

    def __init__(self, opening: Opening) -> None:
        import trackio

        name = _identity(opening.path)
        with contextlib.suppress(ValueError):  # there is no such project yet
            for run in list(trackio.Api().runs(opening.project)):
                if run.name == name:
                    run.delete()
        self._run: Any = trackio.init(
            project=opening.project, name=name, config=dict(opening.settings), embed=False, auto_log_cpu=False
        )
        for row in opening.rows:
            self.log(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of the run's history."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """MLflow, at ``$MLFLOW_TRACKING_URI`` or in ``mlflow/`` of the run's folder; a resumed run is written anew."""

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient

        if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow wants to be told that files alone are meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        here = (opening.path / "mlflow").resolve().as_uri()
        self._client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", here))
        found = self._client.get_experiment_by_name(opening.project)
        experiment = self._client.create_experiment(opening.project) if found is None else found.experiment_id
        tags = {"atod.folder": _identity(opening.path)}
        for old in self._client.search_runs([experiment], f"tags.`atod.folder` = '{tags['atod.folder']}'"):
            self._client.delete_run(old.info.run_id)
        name = opening.path.resolve().name
        self._id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        for part, values in opening.settings.items():
            for key, value in (values if isinstance(values, Mapping) else {"": values}).items():
                self._client.log_param(self._id, f"{part}/{key}".rstrip("/"), value)
        for row in opening.rows:
            self.log(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of the step at once."""
        from mlflow.entities import Metric

        values = [Metric(name, float(value), 0, step) for name, value in metrics.items()]
        for first in range(0, len(values), 1000):  # MLflow takes no more at once
            self._client.log_batch(self._id, metrics=values[first : first + 1000])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


INSTALLS = {
    "wandb": "pip install wandb",
    "trackio": "pip install 'atod[trackio]'",
    "mlflow": "pip install 'atod[mlflow]'",
}
"""Writer -> how its package is installed."""


def open_writers(
    path: Path, wanted: Sequence[str], settings: Mapping[str, Any], step: int, rows: Sequence[Mapping[str, float]]
) -> list[Writer]:
    """TensorBoard where it is installed, and the writers that are asked for.

    Args:
        path: the run's folder.
        wanted: 'NAME' or 'NAME=PROJECT'; the project is 'atod' unless given.
        settings: the run's settings.
        step: the last step that counts.
        rows: what the run has logged up to there.

    Raises:
        AtodError: a writer is not known or not installed.
    """
    offered = {point.name: point for point in entry_points(group="atod.writers")}
    writers: list[Writer] = []
    for choice in wanted:
        name, _, project = choice.partition("=")
        if name not in offered:
            raise AtodError(f"--log {choice}: expected one of {', '.join(sorted(offered))}, each also as NAME=PROJECT")
        try:
            writers.append(offered[name].load()(Opening(path, project or "atod", settings, step, rows)))
        except ImportError as error:
            how = INSTALLS.get(name, "install its package")
            raise AtodError(f"--log {name} needs a package ({error}): {how}, or leave the option out") from error
    try:
        writers.append(TensorBoard(Opening(path, "atod", settings, step, rows)))
    except ImportError:
        log.info("tensorboard is not installed; metrics go to metrics.jsonl only")
    return writers
