"""Finding a catalogue, and building its store once per node.

``open_store`` finds the data (argument, ``$WEBSHOP_DATA``, or the built-in catalogue), builds the store under the cache
folder if it is not there yet, and maps it. Of many processes that start together one builds and the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from atod_envs.errors import DataError
from atod_envs.webshop.catalogue.build import build_store
from atod_envs.webshop.catalogue.files import DATA_VARIABLE, CatalogueFiles, find_files
from atod_envs.webshop.catalogue.store import STORE_VERSION, Store, digest
from atod_envs.webshop.generate import BUILT_IN, write_catalogue

CACHE_VARIABLE = "ATOD_CACHE"

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$ATOD_CACHE``, else ``$XDG_CACHE_HOME/atod``, else ``~/.cache/atod``."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "atod"


def open_store(data: str | os.PathLike[str] | None = None) -> Store:
    """Open a catalogue, building its store on first use.

    Args:
        data: a folder with the official files, one items file, or a store folder; ``None`` takes ``$WEBSHOP_DATA``
            if it is set, else the built-in catalogue, as ``"builtin"`` does.

    Raises:
        DataError: the data is missing or broken.
    """
    data = data if data is not None else os.environ.get(DATA_VARIABLE) or None
    if data is None or str(data) == "builtin":
        return _opened(_cached(_named_folder(BUILT_IN.name), lambda folder: write_catalogue(BUILT_IN, folder)))
    if (Path(data) / "store.json").is_file():
        return _opened(Path(data).resolve())
    files = find_files(data)
    return _opened(_cached(store_folder(files), None, files))


def store_folder(files: CatalogueFiles) -> Path:
    """Where the store of official files is kept; it need not be built yet."""
    return _named_folder(digest([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files.present()]))


def _named_folder(name: str) -> Path:
    return cache_folder() / "webshop" / f"{name}-v{STORE_VERSION}"


@functools.lru_cache(maxsize=8)
def _opened(folder: Path) -> Store:
    return Store(folder)


def _cached(folder: Path, write: Callable[[Path], object] | None, files: CatalogueFiles | None = None) -> Path:
    """The store's folder in the cache; builds it under a lock if it is not there."""
    if (folder / "store.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder.parent}: cannot be created ({error.strerror}); set ${CACHE_VARIABLE}") from error
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "store.json").is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="source-") as scratch:
                if write is not None:
                    write(Path(scratch))
                    files = find_files(scratch)
                assert files is not None
                build_store(files, folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that of many workers that start together one builds and the others wait."""
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no such locks here: at worst the store is built twice
            _log.debug("no file lock on %s", path)
        yield
