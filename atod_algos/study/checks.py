"""What a study keeps between its runs, checked when it is read: choices and the numbers of cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_algos.study import row_of
from atod_algos.training.run_dir import read_object
from atod_envs.errors import DataError

RESULTS = "study-results.json"
"""The file of a study's numbers."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What is chosen for each method.

    Attributes:
        lr: learning rate.
        updates: updates a step; 0 for the training's own.
    """

    lr: float
    updates: int = 0

    def __str__(self) -> str:
        return f"learning rate {self.lr:g}" + (f", {self.updates} updates a step" if self.updates else "")


def read_tuned(path: Path) -> tuple[Tuned, float]:
    """What was tried, and the mean of the later validations.

    Raises:
        DataError: the file is broken.
    """
    advice = "delete it to choose again"
    one = read_object(path, advice)
    lr: Any = one.get("lr")
    updates: Any = one.get("updates", 0)
    score: Any = one.get("score")
    good = is_number(lr) and type(updates) is int and is_number(score)
    if not good or lr <= 0 or updates < 0 or not 0 <= score <= 1:
        raise DataError(f"{path}: expected lr above 0, updates from 0 and a score from 0 to 1; {advice}")
    return Tuned(float(lr), updates), float(score)


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def require_whole_cell(cell: Mapping[str, Any]) -> None:
    """Refuse a cell that lacks a number that the tables show.

    Raises:
        DataError: names the number.
    """
    trained = bool(row_of(cell["method"]).algorithm)
    wanted: dict[str, bool] = {"seconds": is_number(cell.get("seconds"))}
    if trained:
        validation = cell.get("validation")
        whole = isinstance(validation, dict) and all(s.isdecimal() and is_number(v) for s, v in validation.items())
        wanted |= {"validation": whole and bool(validation), "lr": is_number(cell.get("lr"))}
        wanted["updates"] = type(cell.get("updates", 0)) is int
    for which in ("last", "best") if trained else ("last",):
        part = cell.get(which)
        found = part if isinstance(part, dict) else {}
        labels = found.get("by_label")
        wanted |= {f"{which}.{name}": is_number(found.get(name)) for name in ("success", "length", "n")}
        wanted[f"{which}.by_label"] = isinstance(labels, dict) and all(
            isinstance(label, dict) and is_number(label.get("success")) for label in labels.values()
        )
    if missing := [name for name, good in wanted.items() if not good]:
        raise DataError(
            f"{cell['folder']}/cell.json: expected a number as {missing[0]}; delete it to evaluate the cell again"
            if "folder" in cell
            else f"{cell['source']}, {cell['world']}, {cell['method']}, seed {cell['seed']}: expected a number as {missing[0]}; take the "
            "file from where it was published"
        )
