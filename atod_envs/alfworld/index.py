"""The list of playable games of one split, kept in a cache file.

Reading 3553 games takes seconds, looking whether their files have changed takes a fraction of one: so what was learned
about each trial folder is kept with the time stamps and sizes of its files, and only folders that changed are read
again. Invariant: the index equals what reading every file afresh would give, as long as a changed file has another time
or size; and it is never written into the data folder.

The filters are the reference loader's: no folder whose path holds `movable` or `Sliced`, one of the six task types, a
game file that says `solvable: true`. The reference also demands `traj_data.json`; where a folder has a game but not
that file (only the games were unpacked), the task type is taken from the folder's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

from atod_envs.alfworld.engine.game import TASK_TYPES, Game
from atod_envs.caches import cache_folder
from atod_envs.errors import DataError
from atod_envs.files import entries_below, read_object, stamp_of

logger = logging.getLogger(__name__)

GAME_FILE, TRAJECTORY_FILE = "game.tw-pddl", "traj_data.json"

FORMAT = 4
"""Changes whenever an older cache file would say other things than a fresh look: new fields, filters, engine rules."""

Stamp = tuple[int, int, int]
_NO_FILE: Stamp = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one trial folder.

    Attributes:
        task_id: the folder, relative to the data root, with `/` separators.
        game: stamp of the game file (``atod_envs.files.stamp_of``); zeros if there is none.
        trajectory: the same of `traj_data.json`.
        task_type: one of the six types; empty if the folder is not played.
        walkthrough: number of commands of the stored solution.
        digest: of the game file's content; empty if the folder is not played.
        excluded: why the reference's filters leave it out; empty if they do not.
        broken: what is wrong with its files; empty if nothing is.
        passing: they could not be read, which another time may be possible; never kept.
    """

    task_id: str
    game: Stamp
    trajectory: Stamp
    task_type: str = ""
    walkthrough: int = 0
    digest: str = ""
    excluded: str = ""
    broken: str = ""
    passing: bool = False

    @property
    def playable(self) -> bool:
        """Neither filtered out nor broken."""
        return not self.excluded and not self.broken


def open_index(root: Path, split: str) -> tuple[Entry, ...]:
    """Every trial folder of a split, sorted by task id.

    Args:
        root: the data root, which holds `json_2.1.1/<split>`.
        split: a folder of `json_2.1.1`.
    """
    cache = cache_file(root, split)
    known = _read(cache)
    entries: list[Entry] = []
    fresh = 0
    for task_id, game, trajectory in sorted(_folders(root, split)):
        entry = known.get(task_id)
        if entry is None or entry.game != game or entry.trajectory != trajectory:
            if fresh == 0 and len(known) == 0:
                logger.info("indexing the ALFWorld games of %s (once; the list is kept in %s)", root / split, cache)
            entry = examine(root, task_id, game, trajectory)
            fresh += 1
        entries.append(entry)
    if fresh or len(entries) != len(known):
        _write(cache, [entry for entry in entries if not entry.passing])
    return tuple(entries)


def cache_file(root: Path, split: str) -> Path:
    """Where the index of a split is kept: the folder `alfworld` among the caches."""
    digest = blake2b(f"{root.resolve()}\0{split}".encode(), digest_size=8).hexdigest()
    return cache_folder() / "alfworld" / f"index-{split}-{digest}.json"


def examine(root: Path, task_id: str, game: Stamp, trajectory: Stamp) -> Entry:
    """Read one trial folder and apply the filters."""
    folder = root / task_id

    def entry(
        task_type: str = "", walkthrough: int = 0, digest: str = "", excluded: str = "", broken: str = ""
    ) -> Entry:
        return Entry(task_id, game, trajectory, task_type, walkthrough, digest, excluded, broken)

    if "movable" in task_id or "Sliced" in task_id:
        return entry(excluded="movable receptacle or sliced object")
    try:
        task_type = _task_type(folder, task_id, trajectory)
        if task_type not in TASK_TYPES:
            return entry(excluded=f"task type {task_type!r}")
        if game == _NO_FILE:
            return entry(excluded="no game file")
        loaded = Game.load(folder / GAME_FILE)
    except DataError as error:
        return replace(entry(broken=str(error)), passing=isinstance(error.__context__, OSError))
    if loaded.solvable is not True:
        return entry(excluded="not marked as solvable")
    content = (folder / GAME_FILE).read_bytes()
    return entry(task_type, len(loaded.walkthrough), blake2b(content, digest_size=8).hexdigest())


def version_of(entries: Iterable[Entry]) -> str:
    """A digest of games' ids and contents: equal for equal games, wherever and whenever they were unpacked."""
    digest = blake2b(digest_size=6)
    for entry in sorted(entries, key=lambda entry: entry.task_id):
        digest.update(f"{entry.task_id}\0{entry.digest}\n".encode())
    return digest.hexdigest()


def read_trajectory(folder: Path) -> Mapping[str, object]:
    """Read a trial's `traj_data.json`.

    Raises:
        DataError: the file is missing or not a JSON object.
    """
    return read_object(folder / TRAJECTORY_FILE, "is the file truncated? Unpack the games again")


def _task_type(folder: Path, task_id: str, trajectory: Stamp) -> str:
    if trajectory == _NO_FILE:
        return task_id.split("/")[-2].partition("-")[0]
    task_type = read_trajectory(folder).get("task_type")
    if not isinstance(task_type, str):
        raise DataError(f"{folder / TRAJECTORY_FILE} lacks the text 'task_type'")
    return task_type


def _folders(root: Path, split: str) -> Iterator[tuple[str, Stamp, Stamp]]:
    """Folders that hold a game or a trajectory, with their files' stamps."""
    found: dict[str, dict[str, Stamp]] = {}
    for file in entries_below(root / "json_2.1.1" / split):
        if file.name in (GAME_FILE, TRAJECTORY_FILE):
            found.setdefault(os.path.dirname(file.path), {})[file.name] = stamp_of(file.stat())
    for folder, stamps in found.items():
        task_id = Path(folder).relative_to(root).as_posix()
        yield task_id, stamps.get(GAME_FILE, _NO_FILE), stamps.get(TRAJECTORY_FILE, _NO_FILE)


def _read(cache: Path) -> dict[str, Entry]:
    try:
        data = read_object(cache)
        if data["format"] != FORMAT or data["digest"] != _digest(data["entries"]):
            return {}
        rows = [Entry(row[0], tuple(row[1:4]), tuple(row[4:7]), *row[7:]) for row in data["entries"]]
    except (DataError, KeyError, TypeError, IndexError):
        return {}  # No cache, a damaged one, or not one of ours: look afresh.
    return {entry.task_id: entry for entry in rows}


def _digest(rows: list[list[object]]) -> str:
    return blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def _write(cache: Path, entries: list[Entry]) -> None:
    rows = []
    for entry in entries:
        values = asdict(entry)
        del values["passing"]
        rows.append([values.pop("task_id"), *values.pop("game"), *values.pop("trajectory"), *values.values()])
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"format": FORMAT, "digest": _digest(rows), "entries": rows}), encoding="utf-8")
        partial.replace(cache)  # In one move: another process never reads half a file.
    except OSError as error:
        logger.warning("the list of ALFWorld games cannot be kept in %s: %s", cache, error)
        with contextlib.suppress(OSError):
            partial.unlink()
