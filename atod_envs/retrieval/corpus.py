"""Passages: readers of the public corpus forms, and a store that every process of a machine shares.

A passage is an id and its contents; the first line of the contents is the title in quotes, the rest the text, as in the
published wiki-18 corpus. The invariant: a store returns for an id exactly the contents that were put in, and knows
the checksum of the whole, by which an index recognises its corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atod_envs.errors import DataError, UnknownName
from atod_envs.files import json_lines, parquet_rows

from .storage import begin_anew, load_array, read_description, write_description
from .strings import Digest, Strings, StringTable, pack_strings

_ARRAYS: Final = ("passage_bytes", "passage_offsets", "id_bytes", "id_offsets", "id_hashes", "id_numbers")
_ID_KEYS: Final = ("id", "_id", "docid", "pid")


def read_passages(path: str | Path) -> Iterator[tuple[str, str]]:
    """Read a corpus file: JSON lines (`.jsonl`, also `.gz`) or Parquet.

    Each row has an id and either `contents` (title line, then text) or `title` and `text`.

    Args:
        path: the file.

    Yields:
        Pairs of id and contents; a row without an id is named by its position, from 0.

    Raises:
        DataError: the file is missing, a line is no JSON object, or a row has neither form.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a corpus file (.jsonl, .jsonl.gz or .parquet)")
    for number, (place, row) in enumerate(parquet_rows(path) if path.suffix == ".parquet" else json_lines(path)):
        yield _passage(row, number, f"{path}, passage {number + 1} (row or line {place})")


def _passage(row: dict[str, Any], number: int, where: str) -> tuple[str, str]:
    given = next((row[key] for key in _ID_KEYS if row.get(key) is not None), number)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise DataError(f"{where}: the id is {given!r:.60}; expected text or a whole number")
    contents, title, text = row.get("contents"), row.get("title"), row.get("text")
    if contents is not None and isinstance(contents, str):
        return str(given), contents
    if contents is not None or not isinstance(text, str) or not (title is None or isinstance(title, str)):
        found = ", ".join(sorted(row))
        raise DataError(f"{where}: expected the text 'contents', or the texts 'title' and 'text'; found {found}")
    return str(given), contents_of(title or "", text)


def contents_of(title: str, text: str) -> str:
    """The contents of a passage: its title in quotes, a line break, its text."""
    return f'"{title}"\n{text}'


class Corpus:
    """The passages of one corpus by id, in memory or memory-mapped.

    Args:
        arrays: the arrays of `_ARRAYS` by name.
        checksum: SHA-256 of ids and contents in order.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], checksum: str) -> None:
        self._arrays = {name: np.asarray(values) for name, values in arrays.items()}
        self.checksum = checksum
        self._contents = Strings(self._arrays["passage_bytes"], self._arrays["passage_offsets"])
        self._ids = Strings(self._arrays["id_bytes"], self._arrays["id_offsets"])
        self._table = StringTable(self._ids, self._arrays["id_hashes"], self._arrays["id_numbers"])

    @classmethod
    def build(cls, passages: Iterable[tuple[str, str]]) -> Corpus:
        """Keep passages in memory."""
        digest = Digest()
        ids: list[str] = []

        def contents() -> Iterator[str]:
            for docid, text in passages:
                digest.add(docid, text)
                ids.append(docid)
                yield text

        parts = (*pack_strings(contents()), *pack_strings(ids), *StringTable.arrays(ids))
        return cls(dict(zip(_ARRAYS, parts, strict=True)), digest.value())

    @classmethod
    def write(cls, passages: Iterable[tuple[str, str]], directory: str | Path) -> Corpus:
        """Write passages to a folder as they come, and open it; memory holds the ids only."""
        names = ["passage_bytes.bin", *(f"{name}.npy" for name in _ARRAYS[1:])]
        folder = begin_anew(Path(directory), "corpus.json", names)
        digest = Digest()
        ids: list[str] = []
        offsets = [0]
        with (folder / "passage_bytes.bin").open("wb") as out:
            for docid, text in passages:
                digest.add(docid, text)
                ids.append(docid)
                offsets.append(offsets[-1] + out.write(text.encode("utf-8", "surrogatepass")))
        np.save(folder / "passage_offsets.npy", np.array(offsets, dtype=np.int64))
        parts: tuple[npt.NDArray[Any], ...] = (*pack_strings(ids), *StringTable.arrays(ids))
        for name, values in zip(_ARRAYS[2:], parts, strict=True):
            np.save(folder / f"{name}.npy", values)
        description = {"kind": "corpus", "passages": len(ids), "sha256": digest.value()}
        write_description(folder / "corpus.json", description, names)
        return cls.open(folder)

    @classmethod
    def open(cls, directory: str | Path) -> Corpus:
        """Open a folder that `write` made, memory-mapped.

        Raises:
            DataError: the folder holds no corpus.
        """
        folder = Path(directory)
        description = read_description(folder / "corpus.json", kind="corpus")
        data = folder / "passage_bytes.bin"
        if not data.is_file():
            raise DataError(f"{data} is missing; build the corpus again")
        arrays: dict[str, npt.NDArray[Any]] = {
            "passage_bytes": np.memmap(data, mode="r") if data.stat().st_size else np.zeros(0, np.uint8)
        }
        arrays |= {name: load_array(folder / f"{name}.npy") for name in _ARRAYS[1:]}
        if len(arrays["passage_bytes"]) != int(arrays["passage_offsets"][-1]):
            raise DataError(f"{data} is cut off; build the corpus again")
        return cls(arrays, description["sha256"])

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Pairs of id and contents in the order of the corpus."""
        for number in range(len(self)):
            yield self._ids[number], self._contents[number]

    def __getitem__(self, docid: str) -> str:
        """The contents of a passage.

        Raises:
            UnknownName: no passage has this id.
        """
        number = self._table.find(docid)
        if number is None:
            raise UnknownName("passage id", docid, advice=f"the corpus of {len(self)} passages does not hold it")
        return self._contents[number]
