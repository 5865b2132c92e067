"""Finding a catalogue, and building its store once per node.

``open_store`` finds the data (argument, ``$WEBSHOP_DATA``, or the built-in catalogue), builds the store under the cache
folder if it is not there yet, and maps it. Of many processes that start together one builds and the others wait.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from atod_envs.caches import build_once, cache_folder
from atod_envs.files import as_path, file_stamp, stamp_of
from atod_envs.webshop.catalogue.build import build_store
from atod_envs.webshop.catalogue.files import DATA_VARIABLE, CatalogueFiles, find_files
from atod_envs.webshop.catalogue.store import STORE_VERSION, Store, digest
from atod_envs.webshop.generate import BUILT_IN, write_catalogue


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
        return _open(_cached(_named_folder(BUILT_IN.name), lambda folder: write_catalogue(BUILT_IN, folder)))
    path = as_path(data, "data")
    if (path / "store.json").is_file():
        return _open(path.resolve())
    files = find_files(path)
    return _open(_cached(store_folder(files), None, files))


def store_folder(files: CatalogueFiles) -> Path:
    """Where the store of official files is kept; it need not be built yet."""
    return _named_folder(digest([(str(path.resolve()), *file_stamp(path)) for path in files.present()]))


def _named_folder(name: str) -> Path:
    return cache_folder() / "webshop" / f"{name}-v{STORE_VERSION}"


def _open(folder: Path) -> Store:
    status = (folder / "store.json").stat()
    return _opened(folder, (*stamp_of(status), status.st_ino))


@functools.lru_cache(maxsize=8)
def _opened(folder: Path, stamp: tuple[int, ...]) -> Store:
    return Store(folder)


def _cached(folder: Path, write: Callable[[Path], object] | None, files: CatalogueFiles | None = None) -> Path:
    """The store's folder in the cache; built if it is not there."""

    def build(scratch: Path) -> None:
        source = files
        if write is not None:
            write(scratch / "source")
            source = find_files(scratch / "source")
        assert source is not None
        build_store(source, scratch)  # in place of the source

    return build_once(folder, build, "store.json")
