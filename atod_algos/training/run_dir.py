"""A run's folder: settings, metrics, trajectories, checkpoints, result.

    config.json               what was asked for, resolved; versions, the command, commits of the source
    metrics.jsonl             one line a step
    tensorboard/              the same as event files, where tensorboard is installed (``atod_algos.training.writers``)
    trajectories/step_*.jsonl.gz   the episodes (``atod_envs.trajectory``)
    validation/step_*.jsonl.gz     the episodes of each validation, that of the untrained student (step 0) among them
    turns/step_*.json.gz      columns, one entry a turn, from which the published figures are redrawn; what each column
                              holds is said by ``atod_algos.metrics.turn_table``
    checkpoints/              see ``atod_algos.training.checkpoint``
    result.json               the final table

The invariant: after a resume the files hold what an uninterrupted run would have written; lines of steps that were lost
with the process are dropped before they are written again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from atod_algos.algorithm import Algorithm, find_algorithm
from atod_algos.training.collapse import CollapseWatch
from atod_algos.training.config import RunConfig, TrainConfig
from atod_algos.training.source import source_commit
from atod_algos.training.writers import TensorBoard, Writer, open_writers
from atod_envs import files
from atod_envs.errors import FULL, AtodError, DataError
from atod_envs.files import make_folder, parse_json, read_text
from atod_envs.trajectory import Trajectory, write_jsonl

log = logging.getLogger(__name__)

FREE_SETTINGS = (
    "run", "steps", "device", "threads", "checkpoint_every", "store", "slots", "engine_memory", "token_budget",
    "gradient_checkpointing", "wandb", "log", "cluster", "workers",
)  # fmt: skip
"""Settings that a resumed run may change: they do not alter what is computed, only how long or where."""

_GONE = ("keep_trajectories", "keep_tokens", "worker_cpus", "worker_gpus")
"""Settings of earlier versions that altered nothing that is computed."""

_FIXED = {"importance_cap": 2.0}
"""Settings of earlier versions that have one value now."""

_ADVICE = "restore the file, or delete the folder to begin again"


class Busy(AtodError):
    """Another process works in the folder."""


class RunFolder:
    """Opens or creates a run's folder.

    Args:
        path: the folder.
        settings: resolved settings, JSON-compatible; must equal those of a run that is already there.
        command: the command line that asks for it.

    Raises:
        AtodError: the folder holds a run with other settings, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], command: str = "") -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        if (path / "config.json").exists() and "panels" in read_settings(path):
            raise AtodError(f"{path} holds an evaluation; choose another folder with --run")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise AtodError(
                f"run folder {path} cannot be written: {error.strerror}; choose another with --run"
            ) from error
        plain = json.loads(json.dumps(settings))
        # A run that ended before its first step (a slip in an option) binds no later one.
        begun = (path / "metrics.jsonl").exists() or any(self.checkpoints.iterdir())
        if begun:
            require_settings(path, plain)
        elif (path / "config.json").exists():
            read_settings(path, "train", "algorithm")
        self._about: dict[str, Any] = {"settings": plain, "versions": versions()}
        if begun:  # the file says what was trained until a step more is: a run may only be looked at
            before = read_object(path / "config.json", _ADVICE)
            self._about |= {name: before[name] for name in ("command", "commits") if name in before}
        else:
            if command:
                self._about["command"] = command
            self._write("config.json", self._about)
        self._settings = plain
        self._writers: list[Writer] = []
        self._watch = CollapseWatch()

    def begin(self, step: int) -> None:
        """Drop what was logged after ``step`` and open the writers. One line says what is missing of earlier steps.

        Raises:
            AtodError: a writer was asked for that is not known or not installed.
            DataError: the log is broken.
        """
        commits = self._about.setdefault("commits", [])
        if (commit := source_commit()) not in commits:
            commits.append(commit)
        self._write("config.json", self._about)
        kept = [row for row in self.metrics() if row["step"] <= step]
        if len(kept) < step:
            log.warning(
                "%s lacks %d of the %d steps before this one", self.path / "metrics.jsonl", step - len(kept), step
            )
        if kept or (self.path / "metrics.jsonl").exists():
            replace_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._watch = CollapseWatch(kept)
        train = self._settings["train"]
        wanted = [*train.get("log", ()), *([f"wandb={train['wandb']}"] if train.get("wandb") else [])]
        self._writers = open_writers(self.path, wanted, self._settings, step, kept)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's metrics, and warn where they look like the beginning of a collapse."""
        with written(self.path / "metrics.jsonl") as path, open(path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for writer in self._writers:
            with written(self.path / "tensorboard" if isinstance(writer, TensorBoard) else self.path):
                writer.log(step, metrics)
        for line in self._watch.see(step, metrics):
            log.warning("%s", line)

    def metrics(self) -> list[dict[str, float]]:
        """All logged steps."""
        return read_metrics(self.path)

    def store(self, step: int, trajectories: Iterable[Trajectory], turns: Mapping[str, list[Any]]) -> None:
        """Keep a step's episodes and per-turn quantities."""
        with written(self.path / "trajectories" / f"step_{step:06d}.jsonl.gz") as path:
            path.parent.mkdir(exist_ok=True)
            write_jsonl(path, trajectories)
        packed = gzip.compress(json.dumps(turns).encode(), 3, mtime=0)
        with written(self.path / "turns" / f"step_{step:06d}.json.gz") as path:
            path.parent.mkdir(exist_ok=True)
            with files.written_aside(path) as part:
                part.write_bytes(packed)

    def store_validation(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Keep the episodes of a validation."""
        with written(self.path / "validation" / f"step_{step:06d}.jsonl.gz") as path:
            path.parent.mkdir(exist_ok=True)
            write_jsonl(path, trajectories)

    def result(self) -> dict[str, Any] | None:
        """The final table, if the run has ended.

        Raises:
            DataError: the file is broken.
        """
        path = self.path / "result.json"
        return read_object(path, _ADVICE, step=int, panel=str, table=dict) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the final table."""
        self._write("result.json", result)

    def close(self) -> None:
        """Close the event file and whatever else is logged to."""
        while self._writers:
            self._writers.pop().close()

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        replace_text(self.path / name, json.dumps(value, indent=1) + "\n")


class Onlooker(RunFolder):
    """The run's folder as all but the first rank of a distributed run have it: they read, the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def begin(self, step: int) -> None:
        """Nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def store(self, step: int, trajectories: Iterable[Trajectory], turns: Mapping[str, list[Any]]) -> None:
        """Nothing."""

    def store_validation(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Nothing."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def require_settings(folder: Path, settings: Mapping[str, Any], option: str = "--run") -> None:
    """Refuse a run that was trained with other settings, or whose settings are gone.

    Raises:
        AtodError: the settings of :func:`settings_of` differ; names the first, and the option that names the folder.
        DataError: the file with the run's own cannot be read.
    """
    plain = json.loads(json.dumps(settings))
    held = read_settings(folder, "train", "algorithm")
    if (was := held["algorithm"].get("name")) != (now := plain["algorithm"]["name"]):
        raise AtodError(f"{folder} holds a run of {was}, not of {now}; choose another folder with {option}")
    if changed := _difference(_of_this_version(held, plain["algorithm"]), plain):
        name, old, new = changed
        why = " (--steps: its learning rate falls towards the last step)" if name == "horizon" else ""
        raise AtodError(
            f"{folder} holds a run with {name}={old!r}{why}, but now it is {new!r}; "
            f"give the old value to resume it, or choose another folder with {option}"
        )


def read_settings(folder: Path, *parts: str) -> dict[str, Any]:
    """The settings in the ``config.json`` of a run or of an evaluation.

    Args:
        folder: of the run or the evaluation.
        parts: settings that must be objects.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    path = folder / "config.json"
    settings: dict[str, Any] = read_object(path, _ADVICE, settings=dict)["settings"]
    for part in parts:
        if not isinstance(settings.get(part), dict):
            raise DataError(f"{path}: expected an object settings.{part}; {_ADVICE}")
    return settings


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All steps in a run's ``metrics.jsonl``; a last line that was being written is left out.

    Raises:
        DataError: the file cannot be read, or another line is broken.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines, rows = read_text(path, _ADVICE).splitlines(), []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, where, _ADVICE)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise DataError(f"{where}: expected an object with a step; {_ADVICE}")
        except DataError:
            if number == len(lines):
                break
            raise
        rows.append(row)
    return rows


def read_object(path: Path, advice: str, **kinds: type) -> dict[str, Any]:
    """The object in a JSON file, with what must be in it.

    Args:
        path: the file.
        advice: what to do if it is broken.
        kinds: entry -> its type.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    value = files.read_object(path, advice)
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            raise DataError(f"{path}: expected an entry {name!r} of type {kind.__name__}; {advice}")
    return value


@contextmanager
def held(folder: Path, option: str = "--run") -> Iterator[None]:
    """Hold a folder; the lock goes with the process, however that ends.

    Args:
        folder: the folder; made if it does not exist.
        option: what names it on the command line.

    Raises:
        Busy: another process holds it.
        AtodError: the folder cannot be written.
    """
    make_folder(folder, option)
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise AtodError(f"folder {folder} cannot be written: {error.strerror}; choose another with {option}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"{folder} is in use by another process; wait for it, or choose another folder with {option}"
            ) from error
        yield


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it holds either the old or the new text, whenever the process ends."""
    part = path.with_name(path.name + ".part")
    with written(path):
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Say in one line what could not be written, and how to go on.

    Raises:
        AtodError: the system refused: a full disk, no permission.
    """
    try:
        yield path
    except OSError as error:
        advice = "Make room" if error.errno in FULL else "Make it writable"
        raise AtodError(
            f"{path} could not be written: {error.strerror or error}. {advice}, and run the same command again to go on"
        ) from error


def _of_this_version(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version's run, in the words of this one; what it did not know stands at its default.

    A setting that has one value now, but had another in that run, stays, so that the run is refused by its name.
    """
    train = {
        name: value
        for name, value in settings["train"].items()
        if name not in _GONE and not (name in _FIXED and value == _FIXED[name])
    }
    algorithm = dict(settings["algorithm"])
    if "base" in train:
        base = train.pop("base")
        if algorithm["name"] == "gopd":
            algorithm["base"] = base
    if unknown := options.keys() - algorithm.keys():
        try:
            kind: Any = find_algorithm(str(algorithm["name"]))
        except AtodError:  # no package offers it by this name, so its defaults cannot be told
            kind = None
        algorithm |= {
            name: getattr(kind, name) for name in unknown if isinstance(getattr(kind, name, None), str | int | float)
        }
    return {**settings, "train": dataclasses.asdict(TrainConfig()) | train, "algorithm": algorithm}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if name in FREE_SETTINGS and not prefix.startswith("algorithm"):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if (inner := _difference(a, b, f"{prefix}{name}.")) is not None:
                return inner
        elif a != b:
            return f"{prefix}{name}", a, b
    return None


def settings_of(config: RunConfig, algorithm: Algorithm, rules: str) -> dict[str, Any]:
    """Everything that defines a run, JSON-compatible."""
    # A run may be prolonged, but not one whose learning rate falls towards its last step.
    horizon = None if config.lr_floor == 1.0 else config.steps
    return {
        "rules": rules,
        "horizon": horizon,
        "train": config.stored(),
        "algorithm": {"name": algorithm.name, **dataclasses.asdict(cast("Any", algorithm))},
        **({"worlds": worlds} if (worlds := config.stored_worlds()) else {}),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("atod", "torch", "transformers", "gymnasium", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
