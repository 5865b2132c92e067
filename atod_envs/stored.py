"""Stored episodes: which files a run or an evaluation has them in, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from atod_envs.errors import AtodError
from atod_envs.trajectory import Trajectory, read_jsonl, read_parquet


def episode_files(path: str | Path, option: str, others: str = "") -> list[Path]:
    """The files of episodes at a place.

    Args:
        path: a file (``.jsonl``, ``.jsonl.gz``, ``.parquet``); or the folder of a run or an evaluation, whose
            ``trajectories/`` and ``episodes/`` are taken; or a folder of such files, all of which are taken.
        option: the command-line option that names the place.
        others: what else the option takes, for the error.

    Raises:
        AtodError: nothing is there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    # A run's own folder holds other lines, too, such as its metrics.
    for names in (("trajectories/*.jsonl.gz", "episodes/*.jsonl.gz"), ("*.jsonl.gz", "*.jsonl", "*.parquet")):
        if files := sorted(file for name in names for file in path.glob(name)):
            return files
    raise AtodError(
        f"{option} {path}: expected {others}a file of episodes (.jsonl, .jsonl.gz, .parquet), a folder of such files, or the folder of "
        "a run or an evaluation"
    )


def read_episodes(path: Path) -> Iterable[Trajectory]:
    """The episodes of a file, one by one.

    Raises:
        DataError: the file is broken; names the place.
    """
    return read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)
