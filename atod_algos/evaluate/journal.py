"""The journal of an evaluation: episodes are written down as they end.

The invariant: an agent that fails to answer ends the whole evaluation with its error; episodes that had ended are kept,
and nothing is counted that was not played.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from atod_algos.training.run_dir import replace_text
from atod_envs.errors import DataError
from atod_envs.files import append_line, parse_json
from atod_envs.trajectory import Trajectory, from_record, to_record


class EpisodeJournal:
    """Episodes written down as they end, so that a broken evaluation goes on where it stopped.

    Args:
        path: of the journal; one JSON record a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Trajectory]:
        """What was played before; a line that is broken, such as one that was cut off, is dropped and played again."""
        kept: list[Trajectory] = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(DataError):
                    kept.append(from_record(parse_json(line, str(self.path)), str(self.path)))
            replace_text(self.path, "".join(f"{_line(trajectory)}\n" for trajectory in kept))
        return kept

    def add(self, trajectory: Trajectory) -> None:
        """Append an episode."""
        append_line(self.path, _line(trajectory))

    def drop(self) -> None:
        """Delete the journal: its episodes are stored elsewhere."""
        self.path.unlink(missing_ok=True)


def _line(trajectory: Trajectory) -> str:
    record: dict[str, Any] = to_record(trajectory)
    return json.dumps(record, ensure_ascii=True, separators=(",", ":"))
