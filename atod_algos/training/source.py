"""Which source a run was made with: the commit of the clone that this package lies in."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str:
    """The commit, with ``+changes`` where files of it were changed; ``unknown`` where this is no clone."""
    try:
        if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed into some other project
            return "unknown"
        head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git
        return "unknown"
    if head is None or changes is None:
        return "unknown"
    return head.strip() + ("+changes" if changes.strip() else "")


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout
