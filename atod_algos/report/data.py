"""Reads runs: settings, metrics, episodes, and the quantities of every turn.

The invariant: only complete files are read, so a run may be read while it is being written.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_envs.errors import DataError
from atod_envs.trajectory import Trajectory, read_jsonl

KINDS = {"train": "trajectories", "valid": "validation"}
"""Kind of episode -> folder of a run that holds them."""

_NAMES = {"grpo": "GRPO", "opd": "OPD", "atod": "ATOD", "sdar": "SDAR", "sod": "SOD", "tcod": "TCOD", "gigpo": "GiGPO"}


@dataclass(frozen=True)
class Run:
    """One stored training run.

    Attributes:
        path: its folder.
        settings: what was asked for, resolved.
        versions: what it ran with.
        metrics: one dictionary a step.
        result: the final table; ``None`` while it trains.
    """

    path: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: list[dict[str, float]] = field(repr=False)
    result: Mapping[str, Any] | None = field(repr=False)

    @property
    def method(self) -> str:
        """The algorithm, with what makes it an ablation; runs that differ in their seed alone have the same."""
        return method_of(self.settings["algorithm"])

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.settings["train"]["seed"])

    @property
    def name(self) -> str:
        """The method and what tells the run from others of it."""
        return f"{self.method}, seed {self.seed}"

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """A metric by step; a leading slash matches any algorithm's."""
        points = []
        for row in self.metrics:
            value = row.get(key)
            if value is None and key.startswith("/"):
                value = next((v for name, v in row.items() if name.endswith(key)), None)
            if value is not None:
                points.append((row["step"], value))
        return [x for x, _ in points], [y for _, y in points]

    def validations(self) -> tuple[list[float], list[float]]:
        """Validation success by step, the untrained student first where its episodes are stored."""
        steps, values = self.series("val/success_rate")
        if 0 in self.steps("valid") and 0 not in steps:
            episodes = self.episodes("valid", 0)
            steps, values = [0.0, *steps], [sum(t.success for t in episodes) / max(1, len(episodes)), *values]
        return steps, values

    def steps(self, kind: str) -> list[int]:
        """Steps whose episodes are stored."""
        found = (self.path / KINDS[kind]).glob("step_*.jsonl.gz")
        return sorted(int(path.name.removeprefix("step_").removesuffix(".jsonl.gz")) for path in found)

    def episodes(self, kind: str, step: int) -> list[Trajectory]:
        """The episodes of a step; none if the file is not complete yet."""
        try:
            return list(read_jsonl(self.path / KINDS[kind] / f"step_{step:06d}.jsonl.gz"))
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return []

    def turn_table(self, step: int) -> dict[str, list[Any]] | None:
        """Columns, one entry a turn, of a training step (``atod_algos.diagnostics.turn_table``)."""
        return read_packed(self.path / "turns" / f"step_{step:06d}.json.gz")

    def scores_path(self, kind: str, step: int) -> Path:
        """Where the scores of single tokens are kept."""
        return self.path / "scores" / f"{kind}_{step:06d}.json.gz"


def method_of(algorithm: Mapping[str, Any]) -> str:
    """An algorithm's name as printed, from its stored options."""
    name = str(algorithm["name"])
    label = _NAMES.get(name, name.upper())
    if name != "atod":
        return label
    if algorithm["weighting"] == "none":
        return f"{label} w/o T-DUR"
    if algorithm["weighting"] == "token":
        return f"{label} token-level"
    return label if algorithm["coef_anneal_steps"] else f"{label} w/o annealing"


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        DataError: it is none; says what was looked for.
    """
    config = path / "config.json"
    if not config.is_file() or "algorithm" not in (known := _json(config)).get("settings", {}):
        raise DataError(f"{path} is not a run's folder: no config.json of a training run in it")
    metrics = []
    if (path / "metrics.jsonl").exists():
        for line in (path / "metrics.jsonl").read_text().splitlines():
            try:
                metrics.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that is being written
    result = path / "result.json"
    return Run(path, known["settings"], known["versions"], metrics, _json(result) if result.exists() else None)


def read_packed(path: Path) -> dict[str, list[Any]] | None:
    """A compressed JSON file, or None where it is missing or not complete yet."""
    try:
        return dict(json.loads(gzip.decompress(path.read_bytes())))
    except (FileNotFoundError, EOFError, ValueError, zlib.error, gzip.BadGzipFile):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
