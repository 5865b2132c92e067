"""Reading what the index commands wrote: descriptions and arrays, with errors that say which file to make again.

The invariant: whatever is missing, cut off or of another kind ends in a `DataError` that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from atod_envs import files
from atod_envs.errors import DataError

_AGAIN = "build the index again"


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
    return description


def load_array(file: Path) -> npt.NDArray[Any]:
    """An array, memory-mapped; see :func:`atod_envs.files.load_array`.

    Raises:
        DataError: the file is missing or cut off.
    """
    return files.load_array(file, _AGAIN)
