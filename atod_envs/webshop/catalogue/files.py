"""The official files: finding them, and reading them record by record.

The full catalogue is several gigabytes of JSON in one array; ``stream_array`` and ``stream_object`` decode one element
at a time, so reading costs the memory of one record. The invariant: a broken file ends in a ``DataError`` that names
the file and the place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from atod_envs.errors import DataError

DATA_VARIABLE = "WEBSHOP_DATA"
_CHUNK = 1 << 20
_LONGEST_VALUE = 1 << 28
_SPACE = " \t\r\n"
_AFTER_NUMBER = frozenset(" \t\r\n,]}")
_HOW = (
    "expected the official items_shuffle*.json (princeton-nlp/WebShop, setup.sh); without data= the built-in catalogue "
    "is used"
)


@dataclass(frozen=True, slots=True)
class CatalogueFiles:
    """Where a catalogue's parts lie; only ``items`` must exist."""

    items: Path
    attributes: Path | None
    human: Path | None
    reviews: Path | None

    def present(self) -> tuple[Path, ...]:
        """The files that exist."""
        return tuple(p for p in (self.items, self.attributes, self.human, self.reviews) if p is not None)


def find_files(data: str | os.PathLike[str]) -> CatalogueFiles:
    """Find a catalogue in a folder, or around its items file.

    The other parts are looked up next to the items file: first with the same ending (``_1000``), then any.

    Args:
        data: a folder with one ``items_shuffle*.json``, or such a file itself.

    Raises:
        DataError: there is none, or several without a word on which.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(path.glob("items_shuffle*.json"))
        if not found:
            raise DataError(f"{path}: no items_shuffle*.json in this folder; {_HOW}")
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise DataError(f"{path}: several catalogues ({names}); pass the one to use as data={found[0]}")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; {_HOW}")
    ending = path.stem.removeprefix("items_shuffle") if path.stem.startswith("items_shuffle") else ""

    def next_to_items(stem: str) -> Path | None:
        exact = path.with_name(f"{stem}{ending}.json")
        if exact.is_file():
            return exact
        others = sorted(path.parent.glob(f"{stem}*.json"))
        return others[0] if len(others) == 1 else None

    return CatalogueFiles(
        path, next_to_items("items_ins_v2"), next_to_items("items_human_ins"), next_to_items("reviews")
    )


def stream_array(path: Path) -> Iterator[Any]:
    """Decode the elements of a JSON array one by one.

    Raises:
        DataError: the file holds something else, is cut off, or is not JSON.
    """
    with _open(path) as file:
        reader = _Reader(path, file)
        reader.expect("[")
        while not reader.closes("]"):
            yield reader.value()
        reader.finish()


def stream_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Decode the members of a JSON object one by one.

    Raises:
        DataError: the file holds something else, is cut off, or is not JSON.
    """
    with _open(path) as file:
        reader = _Reader(path, file)
        reader.expect("{")
        while not reader.closes("}"):
            key = reader.value()
            if not isinstance(key, str):
                raise reader.error("a key")
            reader.expect(":")
            yield key, reader.value()
        reader.finish()


def _open(path: Path) -> TextIO:
    try:
        return open(path, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_HOW}") from error


class _Reader:
    """A window over a text file from which JSON values are decoded in turn."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.buffer = ""
        self.at = 0
        self.passed = 0
        self.decoder = json.JSONDecoder(strict=False)
        self.first = True

    def more(self) -> bool:
        """Read on; false at the end of the file. The chunk grows with the window, so that a huge value stays linear."""
        try:
            chunk = self.file.read(max(_CHUNK, len(self.buffer) - self.at))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: expected UTF-8 after character {self.passed + len(self.buffer)} ({error.reason}); "
                "is the file damaged, or saved in another encoding?"
            ) from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); {_HOW}") from None
        self.passed += self.at
        self.buffer = self.buffer[self.at :] + chunk
        self.at = 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not space, or ``""`` at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in _SPACE:
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def expect(self, mark: str) -> None:
        """Pass over a punctuation mark."""
        if self.peek() != mark:
            raise self.error(repr(mark))
        self.at += 1

    def closes(self, mark: str) -> bool:
        """Whether the array or object ends here; otherwise passes over the comma before the next element."""
        found = self.peek()
        if found == mark:
            self.at += 1
            return True
        if not self.first:
            if found != ",":
                raise self.error(f"',' or {mark!r}")
            self.at += 1
        self.first = False
        return False

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # The window may end inside the value: read on, and fail only at the end of the file.
                if len(self.buffer) - self.at > _LONGEST_VALUE or not self.more():
                    raise self.error("a JSON value", f" ({error.msg})") from error
                continue
            except RecursionError:
                raise self.error("a value nested less deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise self.error("a JSON value", f" ({error})") from None
            rest = self.buffer[end : end + 1]
            if (
                isinstance(value, (int, float))
                and rest not in _AFTER_NUMBER
                and len(self.buffer) - end < 4
                and self.more()
            ):
                continue  # a number may go on in the next chunk: "1", "1." and "1e-" are all that has come of "1e-5"
            self.at = end
            return value

    def finish(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self.error("the end of the file")

    def error(self, wanted: str, detail: str = "") -> DataError:
        """What is wrong at the present place."""
        found = self.buffer[self.at : self.at + 20] or "the end of the file"
        return DataError(
            f"{self.path}: expected {wanted} at character {self.passed + self.at}, found {found!r}{detail}; "
            "is the file cut off?"
        )
