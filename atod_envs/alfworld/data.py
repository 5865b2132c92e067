"""Where games come from: the official files in a folder, or the built-in world.

Invariant: whatever the source, a task id names one game for good, `task_ids` is sorted, and a compiled game is shared
by all episodes that play it while it stays in the cache.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from atod_envs.alfworld.engine.game import TASK_TYPES, Game
from atod_envs.alfworld.index import GAME_FILE, Entry, open_index, read_trajectory, version_of
from atod_envs.errors import DataError, UnknownName
from atod_envs.files import as_path, file_stamp

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid_seen", "valid_unseen")
"""The official splits; a data folder may hold more."""

RELEASE = "json_2.1.1"
"""The folder in a data root that holds the splits."""

BUILTIN = "builtin"
"""Value of `data` that asks for the built-in world."""

DEFAULT_FOLDER = "~/.cache/alfworld"
"""Where `alfworld-download` puts the data."""

KEPT_GAMES = 256
"""Compiled games that a source keeps, so that a group of episodes of one task compiles it once."""


class GameSource(Protocol):
    """A split of games."""

    split: str
    data_version: str

    @property
    def task_ids(self) -> Sequence[str]:
        """Every task, sorted."""
        ...

    def game(self, task_id: str) -> Game:
        """The compiled game of a task."""
        ...

    def content(self, task_id: str) -> Mapping[str, object] | Path:
        """The game as the reference takes it: a file, or the content of one."""
        ...

    def trajectory(self, task_id: str) -> Mapping[str, object]:
        """The content of the task's `traj_data.json`."""
        ...

    def task_type(self, task_id: str) -> str:
        """The task's type."""
        ...


def find_data(data: str | os.PathLike[str] | None) -> Path | None:
    """Decide which data to use.

    Args:
        data: a folder; `"builtin"`; or None, which means `$ALFWORLD_DATA` if that is set, else `~/.cache/alfworld` if
        it holds games, else the built-in world.

    Returns:
        The data root, or None for the built-in world.

    Raises:
        DataError: the folder that was named holds no games.
    """
    if data is not None and str(data) == BUILTIN:
        return None
    if data is not None:
        return _root(as_path(data, "data"), "data")
    try:
        folder = Path(DEFAULT_FOLDER).expanduser()
    except RuntimeError:  # no home folder, so no data in it
        folder = Path(os.devnull)
    named = os.environ.get("ALFWORLD_DATA")
    # Importing the published package sets the variable to the default folder by itself: that names no data.
    if named and Path(named).expanduser() != folder:
        return _root(Path(named).expanduser(), "$ALFWORLD_DATA")
    return folder if (folder / RELEASE).is_dir() else None


def open_source(
    data: str | os.PathLike[str] | None, split: str, *, task_types: Collection[str] | None = None, strict: bool = True
) -> GameSource:
    """Open a split.

    Args:
        data: see `find_data`.
        split: `train`, `valid_seen`, `valid_unseen`, or another folder that the data holds.
        task_types: play only these; None plays all six.
        strict: refuse a split with broken files; otherwise they are left out, with a warning that counts them.

    Raises:
        DataError: no data, no playable game, or a broken file under `strict`.
        UnknownName: no such split or task type.
    """
    for task_type in task_types or ():
        if task_type not in TASK_TYPES:
            raise UnknownName("ALFWorld task type", task_type, TASK_TYPES)
    if task_types is not None and not task_types:
        raise ValueError("task_types is empty; expected some of " + ", ".join(TASK_TYPES))
    wanted = frozenset(TASK_TYPES if task_types is None else task_types)
    root = find_data(data)
    if root is None:
        return BuiltinSource(split, wanted)
    return FolderSource(root, split, wanted, strict=strict)


class FolderSource:
    """The official files under a data root.

    Args:
        root: holds `json_2.1.1/<split>/<task>/<trial>/game.tw-pddl`.
        split: a folder of `json_2.1.1`.
        task_types: the types to play.
        strict: refuse broken files.
    """

    def __init__(self, root: Path, split: str, task_types: frozenset[str], *, strict: bool = True) -> None:
        self.root = root
        self.split = split
        folders = sorted(item.name for item in (root / RELEASE).iterdir() if item.is_dir())
        if split not in folders:
            held = ", ".join(folders) or "nothing"
            raise UnknownName("ALFWorld split", split, folders, f"{root / RELEASE} holds: {held}")
        entries = open_index(root, split)
        broken = [entry for entry in entries if entry.broken]
        if broken and strict:
            raise DataError(
                f"{len(broken)} of {len(entries)} trial folders are broken; the first: {broken[0].broken}; "
                "unpack the games again, or leave broken ones out with strict=False"
            )
        if broken:
            logger.warning("left out %d broken of %d trial folders: %s", len(broken), len(entries), broken[0].broken)
        self.skipped = len(broken)
        self._entries: dict[str, Entry] = {
            entry.task_id: entry for entry in entries if entry.playable and entry.task_type in task_types
        }
        if not self._entries:
            why = Counter(entry.excluded or "broken" if not entry.playable else "other task type" for entry in entries)
            reasons = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
            raise DataError(
                f"{root / RELEASE / split} holds no playable game ({len(entries)} trial folders: {reasons or 'none'}); "
                f"expected folders with {GAME_FILE}, see alfworld-download"
            )
        self.task_ids = tuple(self._entries)
        self.data_version = f"{RELEASE}/{split}/{version_of(entry for entry in entries if entry.playable)}"
        self._games = GameCache(self._load)

    def game(self, task_id: str) -> Game:
        """The compiled game of a task."""
        return self._games.get(task_id)

    def content(self, task_id: str) -> Path:
        """The game's file.

        Raises:
            DataError: it is not the file that was indexed.
        """
        path = self.root / task_id / GAME_FILE
        try:
            stamp = file_stamp(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); it was there when the games were listed"
            ) from None
        if stamp != self._entries[task_id].game:
            raise DataError(f"{path} has changed since the games were listed; make the environment again")
        return path

    def _load(self, task_id: str) -> Game:
        return Game.load(self.content(task_id))

    def trajectory(self, task_id: str) -> Mapping[str, object]:
        """The content of the task's `traj_data.json`."""
        return read_trajectory(self.root / task_id)

    def task_type(self, task_id: str) -> str:
        """The task's type."""
        return self._entries[task_id].task_type


class BuiltinSource:
    """The world that the project generates itself; needs no files.

    Args:
        split: `train`, `valid_seen` or `valid_unseen`.
        task_types: the types to play.
    """

    def __init__(self, split: str, task_types: frozenset[str]) -> None:
        from atod_envs.alfworld.generator import builtin

        self.split = split
        self.data_version = f"{BUILTIN}/{builtin.VERSION}"
        self.skipped = 0
        ids = builtin.task_ids(split)
        self.task_ids = tuple(sorted(task_id for task_id in ids if self.task_type(task_id) in task_types))

    def game(self, task_id: str) -> Game:
        """The compiled game of a task."""
        return _BUILTIN_GAMES.get(task_id)

    def content(self, task_id: str) -> Mapping[str, object]:
        """The content of the game's file."""
        from atod_envs.alfworld.generator import builtin

        return builtin.game(task_id)

    def trajectory(self, task_id: str) -> Mapping[str, object]:
        """The content of the task's `traj_data.json`."""
        trajectory = self.content(task_id)["traj_data"]
        assert isinstance(trajectory, Mapping)
        return trajectory

    def task_type(self, task_id: str) -> str:
        """The task's type, which the id's folder names."""
        return task_id.split("/")[-2].partition("-")[0]


class GameCache:
    """The games compiled last.

    Args:
        compile_game: makes the game of a task.
    """

    def __init__(self, compile_game: Callable[[str], Game]) -> None:
        self._compile = compile_game
        self._games: OrderedDict[str, Game] = OrderedDict()

    def get(self, task_id: str) -> Game:
        """The game of a task, compiled now or before."""
        # Taken out and put back at the end: each is one operation, so threads may share the cache.
        game = self._games.pop(task_id, None) or self._compile(task_id)
        self._games[task_id] = game
        if len(self._games) > KEPT_GAMES:
            self._games.popitem(last=False)
        return game


def _builtin_game(task_id: str) -> Game:
    from atod_envs.alfworld.generator import builtin

    return Game.parse(builtin.game(task_id), name=task_id)


_BUILTIN_GAMES = GameCache(_builtin_game)
"""Shared by all environments of the process: the attempts of a group play one game, which nothing can change."""


def _root(folder: Path, said: str) -> Path:
    if (folder / RELEASE).is_dir():
        return folder
    if not folder.is_dir():
        advice = "no such folder"
    elif folder.name == RELEASE or folder.parent.name == RELEASE:
        advice = f"give the folder that holds {RELEASE}, not a folder inside it"
    else:
        advice = f"it has no folder {RELEASE}; `alfworld-download` makes one"
    raise DataError(f"{said}={str(folder)!r} is not an ALFWorld data root: {advice}; data='builtin' needs no files")
