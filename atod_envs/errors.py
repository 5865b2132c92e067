"""Errors that a user can act on: each names the value, what was expected, and what to do.

The invariant: whatever goes wrong with data or names ends in one of these, with a message that fits in one line;
a traceback without advice is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
        options = list(allowed)
        spelt = {option.lower(): option for option in map(str, options[:20000])}
        near = [spelt[match] for match in difflib.get_close_matches(str(name).lower(), spelt, n=1)]
        if not advice and options:
            shown = ", ".join(options[:8])
            advice = f"expected one of: {shown}" + (f", ... ({len(options)} in all)" if len(options) > 8 else "")
        if near:
            advice = f"did you mean {near[0]!r}? " + advice
        self.message = f"unknown {kind} {name!r}; {advice}".rstrip("; ")
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class EpisodeError(AtodError, RuntimeError):
    """The environment was driven out of order: a step before reset, or after the end."""
