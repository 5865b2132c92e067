"""Errors that a user can act on: each names the value, what was expected, and what to do.

The invariant: whatever goes wrong with data or names ends in one of these, with a message that fits in one line;
a traceback without advice is a bug.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

_CLOSE = 60.0
"""Per cent of two names' letters that agree, in order, where one may be a slip for the other."""
_COMPARED, _LONGEST_SLIP = 20_000, 500
"""Names that a name is compared with, and its characters that are: a server's client may send a megabyte."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a file."""


class AtodError(Exception):
    """Base of every error that this project raises on purpose; commands print it as one line."""


class DataError(AtodError, ValueError):
    """Data that is missing or broken: names the file, what was expected, and what to do."""


class UnknownName(AtodError, KeyError):
    """A name (task id, split, style, algorithm, ...) that does not exist.

    Args:
        kind: what the name should have been, e.g. ``"split"``.
        name: the value that was given.
        allowed: every valid value, or some of them.
        advice: what to do about it; by default the valid values are listed.
    """

    def __init__(self, kind: str, name: object, allowed: Iterable[str] = (), advice: str = "") -> None:
        # Only here: it is slow to load. The standard library's difflib takes a second for thousands of names.
        from rapidfuzz import fuzz, process

        options = list(allowed)
        spelt = [str(option).lower() for option in options[:_COMPARED]]
        slip = str(name)[:_LONGEST_SLIP].lower()
        near = process.extractOne(slip, spelt, scorer=fuzz.ratio, score_cutoff=_CLOSE)
        if not advice and options:
            shown = ", ".join(options[:8])
            advice = f"expected one of: {shown}" + (f", ... ({len(options)} in all)" if len(options) > 8 else "")
        if near is not None:
            advice = f"did you mean {str(options[near[2]])!r}? " + advice
        self.message = f"unknown {kind} {name!r}; {advice}".rstrip("; ")
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


def file_trouble(error: OSError) -> str | None:
    """What the system would not do with a file, in a line; None for an error that names no file."""
    if error.errno in FULL:
        return f"{error.filename or 'the output'} could not be written: {error.strerror}; make room and run the same command again"
    return f"{error.filename}: {error.strerror}; give another path, or change this one" if error.filename else None


class EpisodeError(AtodError, RuntimeError):
    """The environment was driven out of order: a step before reset, or after the end."""
