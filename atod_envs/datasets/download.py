"""Downloading: resumed where it broke off, checked, and moved into place whole.

The invariant: a file under its final name is complete, its checksum is in ``atod-data.json`` next to it, and where the
publisher's server or an earlier record names a checksum, it has that one.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_envs.caches import one_at_a_time
from atod_envs.datasets.sources import Source
from atod_envs.errors import DataError
from atod_envs.files import read_object

RECORD = "atod-data.json"
"""Name of the record of a data folder: path -> url, sha256, bytes."""

_CHUNK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT = 60.0
_ANEW = "delete it and run `atod data get` again"
_log = logging.getLogger(__name__)

Report = Callable[[str, int, int | None], None]
"""Told (path, bytes so far, bytes in all if known)."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What the record says of one file.

    Attributes:
        url: where it came from.
        sha256: its checksum.
        size: its bytes.
        files: what an archive held: path -> sha256; empty for a plain file.
    """

    url: str
    sha256: str
    size: int
    files: Mapping[str, str]


def read_record(folder: Path) -> dict[str, Downloaded]:
    """The record of a data folder; empty if nothing was downloaded into it.

    Raises:
        DataError: the record is broken.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        found = {name: Downloaded(**row) for name, row in read_object(path, _ANEW).items()}
        if not all(
            isinstance(one.url, str)
            and isinstance(one.sha256, str)
            and type(one.size) is int
            and isinstance(one.files, dict)
            for one in found.values()
        ):
            raise TypeError("a field is of another kind")
        return found
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a record of downloads ({error}); delete it and run `atod data get` again"
        ) from None


def fetch(
    source: Source,
    folder: Path,
    *,
    report: Report | None = None,
    expected: str | None = None,
    pause: float = 1.0,
) -> Downloaded:
    """Download one file into a data folder, unless it is there.

    Args:
        source: the file.
        folder: the data folder; made if it does not exist.
        report: told how far it is.
        expected: SHA-256 that the download must have (of the archive, for one).
        pause: seconds before the second attempt; doubled for each further one.

    Returns:
        What was recorded.

    Raises:
        DataError: the server refuses, the content is not what it should be, or the disk is full; says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder):  # two that go on with one part would write it twice
            return _fetch(source, folder, report, expected, pause)
    except OSError as error:
        raise DataError(
            f"{source.url} cannot be stored in {folder}: {error.strerror or error}; nothing that was there is changed"
        ) from error


def _fetch(source: Source, folder: Path, report: Report | None, expected: str | None, pause: float) -> Downloaded:
    known = read_record(folder).get(source.path)
    if known is not None and _present(folder, source, known):
        if expected is not None and known.sha256 != expected:
            raise DataError(
                f"{folder / source.path} has checksum {known.sha256}, but {expected} is expected; delete it to download it again"
            )
        return known
    part = folder / f"{source.path}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    announced = _transfer(source, part, report, pause)
    sha256 = file_sha256(part)
    for wanted, who in ((announced, "its publisher's server says"), (expected, "the record to follow says")):
        if wanted is not None and wanted != sha256:
            _drop(part)
            raise DataError(
                f"{source.url} has checksum {sha256}, but {who} {wanted}; the download was deleted, run the command again"
            )
    size = part.stat().st_size
    files: dict[str, str] = {}
    if source.unpack:
        files = _unpack(part, folder, source.url)
    else:
        os.replace(part, folder / source.path)
    _drop(part)
    done = Downloaded(source.url, sha256, size, files)
    _record(folder, source.path, done)
    return done


def verify(folder: Path) -> list[str]:
    """Read every recorded file again; return what is wrong with them, a line each."""
    problems: list[str] = []
    for name, known in read_record(folder).items():
        for path, sha256 in (known.files or {name: known.sha256}).items():
            file = folder / path
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif file_sha256(file) != sha256:
                problems.append(f"{file} was changed since it was downloaded")
    return problems


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _present(folder: Path, source: Source, known: Downloaded) -> bool:
    if source.unpack:
        return all((folder / path).is_file() for path in known.files)
    file = folder / source.path
    return file.is_file() and file.stat().st_size == known.size


def _record(folder: Path, name: str, done: Downloaded) -> None:
    rows: dict[str, Any] = {
        path: {"url": d.url, "sha256": d.sha256, "size": d.size, "files": dict(d.files)}
        for path, d in (read_record(folder) | {name: done}).items()
    }
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / RECORD)


def _transfer(source: Source, part: Path, report: Report | None, pause: float) -> str | None:
    """Fill ``part``, going on where an earlier attempt broke off; returns the checksum that the server announced."""
    for attempt in range(_ATTEMPTS):
        try:
            return _attempt(source, part, report)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing comes after what we hold: it is whole, or the file on the server is another
                if error.headers.get("Content-Range", "") == f"bytes */{_held(source, part).size}":
                    return None
                _drop(part)
            elif error.code < 500 and error.code != 429:
                raise DataError(
                    f"{source.url} answered {error.code} ({error.reason}); the publisher may have moved it: download it by hand "
                    f"to {part.with_suffix('')}, or give --mirror"
                ) from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        _log.warning("%s: %s (attempt %d of %d)", source.url, reason, attempt + 1, _ATTEMPTS)
        if attempt + 1 < _ATTEMPTS:
            time.sleep(pause * 2**attempt)
    raise DataError(
        f"{source.url} cannot be reached ({reason}) in {_ATTEMPTS} attempts; run the command again to go on where it broke off"
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """The part of a file that an earlier attempt fetched, and what the server said of the whole."""

    size: int = 0
    stamp: str = ""
    total: int | None = None


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def _held(source: Source, part: Path) -> _Held:
    """What can be gone on with: nothing, if it came from another address."""
    try:
        notes = read_object(_notes(part))
    except DataError:
        notes = {}
    if not part.is_file() or notes.get("url") != source.url:
        return _Held()
    total = notes.get("total")
    return _Held(part.stat().st_size, str(notes.get("stamp") or ""), total if isinstance(total, int) else None)


def _attempt(source: Source, part: Path, report: Report | None) -> str | None:
    before = _held(source, part)
    held = before.size
    headers = {"User-Agent": "atod-data", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
        if before.stamp:  # a file that has changed comes whole
            headers["If-Range"] = before.stamp
    seen: dict[str, str] = {}
    opener = urllib.request.build_opener(_Announced(seen))
    with opener.open(urllib.request.Request(source.url, headers=headers), timeout=_TIMEOUT) as answer:
        seen.update(_checksums(answer.headers))
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise DataError(
                f"{source.url} answered with a web page instead of the file (a quota or a log-in); open it in a browser and save "
                f"the file as {part.with_suffix('')}, or give --mirror"
            )
        if answer.status != 206:  # no range was served: from the start
            held = 0
        length = answer.headers.get("Content-Length")
        total = held + int(length) if length else None
        begins = answer.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        if held and (not begins or (before.total and total and total != before.total)):
            _drop(part)
            raise ConnectionError("the file has changed since the first part of it was fetched")
        strong = answer.headers.get("ETag", "")
        stamp = strong if strong and not strong.startswith("W/") else answer.headers.get("Last-Modified", "")
        _notes(part).write_text(json.dumps({"url": source.url, "stamp": stamp, "total": total}), encoding="utf-8")
        needed = (total or 0) - held
        free = shutil.disk_usage(part.parent).free
        if needed > free:
            raise DataError(
                f"{source.url} needs {needed / 1e6:,.0f} MB more, but {part.parent} has {free / 1e6:,.0f} MB free; make room or "
                "give another folder with --to"
            )
        with part.open("ab" if held else "wb") as file:
            while block := answer.read(_CHUNK):
                file.write(block)
                held += len(block)
                if report is not None:
                    report(source.path, held, total)
        if total is not None and held != total:
            raise ConnectionError(f"the connection broke off after {held:,} of {total:,} bytes")
    return seen.get("sha256")


class _Announced(urllib.request.HTTPRedirectHandler):
    """Notes the checksum that a server gives with the redirect to its storage."""

    def __init__(self, seen: dict[str, str]) -> None:
        self._seen = seen

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self._seen.update(_checksums(headers))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checksums(headers: Any) -> dict[str, str]:
    """The SHA-256 in a header: large files of the model hub have it as their entity tag."""
    tag = (headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"')
    return {"sha256": tag} if len(tag) == 64 and set(tag) <= set("0123456789abcdef") else {}


def _unpack(archive: Path, folder: Path, url: str) -> dict[str, str]:
    """Unpack a zip archive next to its place, once all of it has been checked, and move into place what it held.

    Returns:
        Path -> sha256 of the files.
    """
    files: dict[str, str] = {}
    scratch = archive.with_name(f"{archive.name}.unpacked")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    try:
        with zipfile.ZipFile(archive) as packed:
            broken = packed.testzip()
            if broken is not None:
                raise DataError(f"{url}: {broken} in the archive is damaged; run the command again")
            for item in packed.infolist():
                _check_member(item, folder, url)
            size, free = sum(item.file_size for item in packed.infolist()), shutil.disk_usage(folder).free
            if size > free:
                raise DataError(f"{url}: the archive unpacks to {size:,} bytes, and {folder} has {free:,}; make room")
            for item in packed.infolist():
                packed.extract(item, scratch)
                if not item.is_dir():
                    files[item.filename] = file_sha256(scratch / item.filename)
        _merge(scratch, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        archive.unlink(missing_ok=True)
        raise DataError(f"{url} is not a zip archive ({error}); it was deleted, run the command again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return files


def _merge(source: Path, target: Path) -> None:
    """Move what a folder holds into another one; a folder that is not there yet comes as a whole."""
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        else:
            os.replace(entry, place)


def _check_member(item: zipfile.ZipInfo, folder: Path, url: str) -> None:
    outside = not (folder / item.filename).resolve().is_relative_to(folder.resolve())
    if outside or ".." in Path(item.filename).parts:
        raise DataError(f"{url}: the archive would write outside the data folder ({item.filename}); it is not used")
    if stat.S_ISLNK(item.external_attr >> 16):
        raise DataError(
            f"{url}: the archive holds a link ({item.filename}); expected files and folders, it is not used"
        )
