"""Folders of things that are built once per machine: where they lie, and who builds them.

The invariant: of many processes that want the same folder one builds and the others wait, a folder appears under its
name only when complete, and what a killed builder left behind is removed by the next one. A folder is described by a
file that holds size and checksum of each of its files and a checksum of itself; what is opened is what was built.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atod_envs.errors import FULL, DataError
from atod_envs.files import as_path, file_stamp

VARIABLE = "ATOD_CACHE"
"""Environment variable that names the folder of caches."""

SMALL = 1 << 28
"""Bytes of a folder up to which every file is compared with its checksum whenever it is opened."""

_CHECKED = "checked.json"
"""Next to the files of a larger folder: their sizes and times when they were last compared."""
_PART = ".part-"
_log = logging.getLogger(__name__)


def home_cache() -> Path:
    """``~/.cache``.

    Raises:
        DataError: there is no home folder.
    """
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise DataError(f"there is no home folder to keep caches in; set ${VARIABLE} to a folder") from None


def cache_folder() -> Path:
    """``$ATOD_CACHE``, else ``$XDG_CACHE_HOME/atod``, else ``~/.cache/atod``.

    Raises:
        DataError: there is no such home folder.
    """
    if named := os.environ.get(VARIABLE):
        return as_path(named, f"${VARIABLE}")
    base = os.environ.get("XDG_CACHE_HOME")
    return (as_path(base, "$XDG_CACHE_HOME") if base else home_cache()) / "atod"


def build_once(folder: Path, build: Callable[[Path], object], complete: str = "") -> Path:
    """Build a folder unless it is there.

    Args:
        folder: where it shall appear.
        build: fills the scratch folder that it is given, which lies next to ``folder``.
        complete: a file that a complete folder has; by default, being there suffices.

    Returns:
        The folder.

    Raises:
        DataError: nothing can be written next to it.
    """
    if (folder / complete).exists():
        return folder
    with _advised(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f"{folder.name}.lock", "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    with lock:
        _hold(lock.fileno(), folder)
        if (folder / complete).exists():
            return folder
        with _advised(folder):
            for left in folder.parent.glob(f"{folder.name}{_PART}*"):
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PART}", dir=folder.parent))
        try:
            build(scratch)
            scratch.chmod(0o755)  # temporary folders are private, a cache is for everybody on the machine
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
            Path(lock.name).unlink(missing_ok=True)  # the next in line finds the folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DataError(
                f"{folder}: cannot be written ({error.strerror}); make room, or set ${VARIABLE} to a folder that has some"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Work in a folder while no other process does; it waits for one that does. The lock goes with the process.

    Args:
        folder: is there.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _hold(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _advised(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}); set ${VARIABLE} to a folder that can"
        ) from error


def _hold(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):  # no such locks here: at worst it is built twice
        _log.debug("no file lock for %s on process %d", folder, os.getpid())


def sealed(folder: Path, about: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The description of a finished folder: what it says, size and checksum of each file, a checksum of itself.

    Args:
        folder: where the files are, all of them written.
        about: what the description says.
        names: the files, relative to the folder.
    """
    files = {name: [(folder / name).stat().st_size, file_checksum(folder / name)] for name in sorted(names)}
    _remember(folder, {name: _times(folder / name) for name in files})
    about = {**about, "files": files}
    return {**about, "checksum": _own_checksum(about)}


def check_sealed(folder: Path, about: Mapping[str, Any], source: Path, advice: str, *, whole: bool = False) -> None:
    """Compare a folder with its description.

    Of a folder above ``SMALL`` bytes the files are read only if size, time of change or time of status differ from
    those at the last comparison: bytes cannot be written in place without moving the latter.

    Args:
        folder: where the files are.
        about: the description that :func:`sealed` made.
        source: the file that it was read from.
        advice: what to do if something differs.
        whole: read every file in any case.

    Raises:
        DataError: a file is missing, or it or the description is not what was built.
    """
    if about.get("checksum") != _own_checksum({name: value for name, value in about.items() if name != "checksum"}):
        raise DataError(f"{source} is damaged: it is not what was written; {advice}")
    files: dict[str, list[Any]] = about["files"]
    try:
        found = {name: _times(folder / name) for name in files}
        for name, (size, _) in files.items():
            if found[name][0] != size:
                raise DataError(f"{folder / name} is damaged: {found[name][0]:,} bytes, built were {size:,}; {advice}")
        if not whole and sum(size for size, _ in files.values()) > SMALL and _remembered(folder) == found:
            return
        for name, (_, checksum) in files.items():
            if file_checksum(folder / name) != checksum:
                raise DataError(f"{folder / name} is damaged: it is not what was built; {advice}")
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing; {advice}") from None
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); {advice}") from None
    _remember(folder, found)


def file_checksum(path: Path) -> str:
    """BLAKE2b of a file, sixteen hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _own_checksum(about: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def _times(path: Path) -> list[int]:
    return list(file_stamp(path))


def _remember(folder: Path, times: Mapping[str, list[int]]) -> None:
    """Write down what was just compared, where the folder is large and can be written."""
    if sum(size for size, _, _ in times.values()) <= SMALL:
        return
    part = folder / f"{_CHECKED}.{os.getpid()}{_PART}"
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(times), encoding="utf-8")
        part.replace(folder / _CHECKED)


def _remembered(folder: Path) -> object:
    try:
        return json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
