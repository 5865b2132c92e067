"""Variable-length records in two memory-mapped files: the bytes, and where each record begins.

The invariant: a reader maps both files and copies only the records that it decodes, so any number of processes share
one copy through the page cache.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from atod_envs.files import load_array

_BLOCK = 1 << 16


class BlobWriter:
    """Appends JSON records to ``<path>.bin`` and, on closing, writes ``<path>.npy`` with n + 1 offsets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path.with_suffix(".bin"), "wb")  # noqa: SIM115 (closed in __exit__)
        self._blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._offsets = [0]

    def append(self, record: Any) -> None:
        """Write one record."""
        # Half a surrogate pair can occur in crawled text; it must survive the round trip.
        packed = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        self._file.write(packed)
        self._offsets.append(self._offsets[-1] + len(packed))
        if len(self._offsets) > _BLOCK:
            self._blocks.append(np.array(self._offsets[:-1], dtype=np.int64))
            del self._offsets[:-1]

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            np.save(
                self._path.with_suffix(".npy"), np.concatenate([*self._blocks, np.array(self._offsets, dtype=np.int64)])
            )


class Blobs:
    """Reads what :class:`BlobWriter` wrote."""

    def __init__(self, path: Path) -> None:
        self._offsets = load_array(path.with_suffix(".npy"), "delete the store's folder to have it built anew")
        with open(path.with_suffix(".bin"), "rb") as file:
            # An empty file cannot be mapped.
            empty = len(self._offsets) < 2
            self._bytes: mmap.mmap | bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Any:
        """Decode one record."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return json.loads(self._bytes[start:end].decode("utf-8", "surrogatepass"))
