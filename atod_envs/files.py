"""Reading files that may hold anything: JSON, JSON lines, gzip and Parquet, with one error for whatever is wrong.

The invariant: whatever bytes a file holds, a reader here yields what they say or raises a ``DataError`` that names the
file and the line or row. Nothing is skipped and nothing is guessed. A byte order mark and Windows line ends are
understood.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from atod_envs.errors import AtodError, DataError

AGAIN = "is the file cut off or damaged? Get it again"
_EMPTY = 128  # bytes of a .npy file without data; an empty file cannot be mapped
_BROKEN = (EOFError, OSError, zlib.error)
_NO_ARRAY = (ValueError, OSError, EOFError, TypeError, KeyError, SyntaxError, TokenError, MemoryError, OverflowError)
_NAME = re.compile(r"[\w.:/-]+", re.ASCII)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def file_stamp(path: Path) -> tuple[int, int, int]:
    """What tells that something read from a file is stale; see :func:`stamp_of`.

    Raises:
        OSError: there is no such file.
    """
    return stamp_of(path.stat())


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """Size, time of change and time of status of a file. They are compared for being equal, never for being later.

    A program can write bytes of equal number and set the time of change back, not the time of status; and a clock that
    is set back makes a changed file look older, not equal.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_of(files: Iterable[Path]) -> hashlib.blake2b:
    """A hash of sixteen hexadecimal digits, of the names and contents of files in their order."""
    whole = hashlib.blake2b(digest_size=8)
    for file in files:
        whole.update(file.name.encode())
        with open(file, "rb") as content:
            hashlib.file_digest(content, lambda: whole)
    return whole


def parse_json(text: str | bytes, where: str, advice: str = AGAIN) -> Any:
    """Decode one JSON value.

    Args:
        text: the value.
        where: the file and the place in it, for the message.
        advice: what to do if it is broken.

    Raises:
        DataError: it is no JSON, is nested too deeply, holds a number of thousands of digits, or names a field twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_fields)
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply to be read); {advice}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected JSON or text in UTF-8 ({error.reason} at byte {error.start}); {advice}"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: broken JSON ({error}); {advice}") from None


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; for ``json.loads(object_pairs_hook=...)``.

    Raises:
        ValueError: a field stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the field {next(name for name, count in counts.items() if count > 1)!r} stands twice")
    return found


def read_text(path: Path, advice: str = AGAIN) -> str:
    """The text of a file, decompressed if its name ends in ``.gz``, without a byte order mark.

    Raises:
        DataError: the file cannot be read, is damaged, or is not UTF-8.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _BROKEN as error:
        raise _unreadable(path, error, advice) from None
    return _decoded(data, str(path), advice).removeprefix("\ufeff")


def read_json(path: Path, advice: str = AGAIN) -> Any:
    """The value in a JSON file; see :func:`read_text` and :func:`parse_json`.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, advice), str(path), advice)


def read_object(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {_kind(value)}; {advice}")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file one by one, with the numbers of their lines, from 1; blank lines are allowed.

    Raises:
        DataError: the file cannot be read or is damaged, or a line is not a JSON object.
    """
    number = 0
    try:
        if path.suffix == ".gz" and path.is_file() and not path.stat().st_size:  # Python takes it for an empty text
            raise EOFError("the file is empty")
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                text = _decoded(line, where, AGAIN)
                if number == 1:
                    text = text.removeprefix("\ufeff")
                if not text.strip():
                    continue
                row = parse_json(text, where, AGAIN)
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {_kind(row)}; {AGAIN}")
                yield number, row
    except _BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, error, AGAIN, f", line {number + 1}", "JSON lines") from None


def parquet_rows(path: Path, batch: int = 4096) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file one by one, with their numbers, from 1.

    Args:
        path: the file.
        batch: rows that are decoded at a time.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read or is no Parquet.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'atod[parquet]'") from error
    number = 0
    batches: Iterator[Any] | None = None
    while True:
        try:  # the consumer's own errors stay outside
            batches = batches or pq.ParquetFile(path).iter_batches(batch)
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError) as error:
            place = f", after row {number}" if number else ""
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}{place}: expected Parquet ({reason}); {AGAIN}") from None
        for row in rows:
            number += 1
            yield number, row


def package_path(package: str, place: str) -> Path | None:
    """A folder or file of an installed Python package, found without importing it; None where it is not installed.

    Args:
        package: the name that it is installed by.
        place: where it lies in the package, with ``/``.
    """
    try:
        return Path(str(distribution(package).locate_file(place)))
    except PackageNotFoundError:
        return None


def entries_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file and folder below a folder, in folders that links lead to as well.

    Raises:
        DataError: a folder cannot be read, or a link leads nowhere or back. Nothing is left out for that: it would be
            missed without a word.
    """
    pending: list[tuple[str, tuple[str, ...]]] = [(str(folder), (os.path.realpath(folder),))]
    while pending:
        place, linked = pending.pop()
        try:
            with os.scandir(place) as items:
                for item in items:
                    if item.is_symlink():
                        item.stat()  # or what it leads to is not there
                    yield item
                    if not item.is_dir():
                        continue
                    if not item.is_symlink():
                        pending.append((item.path, linked))
                    elif (target := os.path.realpath(item.path)) in linked or _lies_in(place, target):
                        raise DataError(f"{item.path} is a link to a folder that it lies in itself; remove it")
                    else:
                        pending.append((item.path, (*linked, target)))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); repair it, or remove it") from None


def _lies_in(place: str, folder: str) -> bool:
    return Path(os.path.realpath(place)).is_relative_to(folder)


def as_path(value: object, option: str) -> Path:
    """A path as a user writes it: ``~`` and ``$NAME`` stand for what they stand for in a shell.

    Args:
        value: what was given.
        option: the argument it was given for, for the message.

    Raises:
        DataError: it is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise DataError(f"{option}={value!r:.60}; expected a path, as text or as a Path")
    try:
        return Path(os.path.expandvars(os.fspath(value))).expanduser()
    except (TypeError, RuntimeError) as error:  # bytes; a home folder that is not known
        raise DataError(f"{option}={value!r:.60}; {error}") from None


def make_folder(folder: Path, option: str) -> None:
    """Make a folder, unless it is there.

    Raises:
        AtodError: it cannot be made; names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtodError(f"folder {folder} cannot be made: {error.strerror}; choose another with {option}") from error


@contextmanager
def writing_into(folder: Path, option: str) -> Iterator[None]:
    """Make a folder and write into it.

    Raises:
        AtodError: it cannot be made, or a file in it not written; names the option.
    """
    make_folder(folder, option)
    try:
        yield
    except OSError as error:
        raise AtodError(
            f"{error.filename or folder} could not be written: {error.strerror or error}; make room, or choose another folder with {option}"
        ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file next to ``path`` that takes its place once it is whole; a pipe or a device is written to itself."""
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_texts(folder: Path, texts: Mapping[str, str], option: str) -> None:
    """Write a command's files into a folder, each whole.

    Args:
        folder: made where it is missing.
        texts: by the files' names.
        option: the option that named the folder.

    Raises:
        SystemExit: says in a line what cannot be written.
    """
    try:
        with writing_into(folder, option):
            for name, text in texts.items():
                with written_aside(folder / name) as part:
                    part.write_text(text, encoding="utf-8")
    except AtodError as error:
        raise SystemExit(f"error: {error}") from None


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; nothing of it stays where it cannot be written whole, so that the next one stands alone.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "ab", buffering=0) as out:
        before, left = out.tell(), memoryview(line.encode() + b"\n")
        try:
            while left:
                left = left[out.write(left) :]
        except OSError:
            out.truncate(before)
            raise


def as_text(value: object) -> str:
    """A value that must be text; TypeError if it is not."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r:.60}")
    return value


def as_name(value: object) -> str:
    """A value that must be a name that can stand in a sentence; TypeError or ValueError if it is not."""
    if not _NAME.fullmatch(name := as_text(value)):
        raise ValueError(
            f"{name!r:.60} is no name; expected letters, digits and _ . : / -, such as minecraft:oak_planks"
        )
    return name


def as_count(value: object) -> int:
    """A value that must be a whole number from 1; ValueError if it is not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"count is {value!r:.60}, expected a whole number from 1")
    return value


def load_array(path: Path, advice: str = AGAIN) -> npt.NDArray[Any]:
    """An array of a ``.npy`` file, memory-mapped.

    Raises:
        DataError: the file is missing, cut off, or no array.
    """
    try:
        mapped = np.load(path, mmap_mode="r" if path.stat().st_size > _EMPTY else None)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {advice}") from None
    except _NO_ARRAY as error:
        if isinstance(error, OSError) and error.strerror:  # nothing is wrong with the file, such as too many open ones
            raise _unreadable(path, error, advice) from None
        raise DataError(f"{path}: expected an array ({str(error).partition(chr(10))[0]}); {advice}") from None
    if not isinstance(mapped, np.ndarray):
        raise DataError(f"{path}: expected an array, found {type(mapped).__name__}; {advice}")
    # A plain view: slicing the map itself costs microseconds a time.
    return np.asarray(mapped)


def _decoded(data: bytes, where: str, advice: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16):
            raise DataError(f"{where}: expected JSON or text in UTF-8, found UTF-16; save the file as UTF-8") from None
        raise DataError(
            f"{where}: expected JSON or text in UTF-8 ({error.reason} at byte {error.start}); {advice}"
        ) from None


def _unreadable(path: Path, error: Exception, advice: str, place: str = "", what: str = "gzip") -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path}: cannot be read ({error.strerror}); expected a readable file")
    return DataError(f"{path}{place}: broken {what} ({error}); {advice}")


def _kind(value: object) -> str:
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
