"""Folders of things that are built once per machine: where they lie, and who builds them.

The invariant: of many processes that want the same folder one builds and the others wait, a folder appears under its
name only when complete, and what a killed builder left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from atod_envs.errors import DataError

VARIABLE = "ATOD_CACHE"
"""Environment variable that names the folder of caches."""

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
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


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
