"""What the index commands write: descriptions and arrays, with errors that say which file to make again.

The invariant: whatever is missing, cut off, changed or of another kind ends in a `DataError` that names the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from atod_envs import files
from atod_envs.caches import check_sealed, sealed
from atod_envs.errors import DataError

_AGAIN = "build the index again"


SCRATCH = ".scratch-"
"""What folders begin with that a build needs within an index's folder, and removes."""


def begin_anew(folder: Path, description: str, names: Iterable[str] = ()) -> Path:
    """Make a folder, without the files of an earlier index: its description first, so that no half of one is opened.

    They are removed and not written over, because a process that has them mapped goes on reading what it opened. What
    a killed build could not remove goes too.

    Args:
        folder: the folder.
        description: name of the JSON file.
        names: of the arrays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (description, *names):
        (folder / name).unlink(missing_ok=True)
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    return folder


def write_description(file: Path, about: Mapping[str, Any], names: Iterable[str]) -> None:
    """Describe an index whose files are written.

    Args:
        file: the JSON file, next to them.
        about: what it says.
        names: the index's files, relative to its folder.
    """
    description = sealed(file.parent, about, names)
    file.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def verify(file: Path) -> int:
    """Read every file that a description names and compare it; how many there are (none, if it is from before 0.2).

    Raises:
        DataError: one is missing, or is not what was built.
    """
    description = files.read_object(file, _AGAIN)
    if "files" in description or "checksum" in description:
        check_sealed(file.parent, description, file, _AGAIN, whole=True)
    return len(description.get("files", ()))


def read_description(file: Path, **expected: object) -> dict[str, Any]:
    """A description written next to an index.

    Args:
        file: the JSON file.
        **expected: fields and the values that they must have.

    Raises:
        DataError: it is missing, no JSON, or describes something else.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist; expected a folder written by python -m atod_envs.retrieval.build")
    description = files.read_object(file, _AGAIN)
    for name, value in expected.items():
        found = description.get(name)
        if found != value:
            raise DataError(f"{file} has {name} {found!r}; expected {value!r}: build the index again")
    if "files" in description or "checksum" in description:  # older indexes have neither
        check_sealed(file.parent, description, file, _AGAIN)
    return description


def load_array(file: Path) -> npt.NDArray[Any]:
    """An array, memory-mapped; see :func:`atod_envs.files.load_array`.

    Raises:
        DataError: the file is missing or cut off.
    """
    return files.load_array(file, _AGAIN)
