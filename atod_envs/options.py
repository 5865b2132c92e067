"""``--option NAME=VALUE``: any argument of an environment, said on a command line; every command reads it here.

The invariant: the same words mean the same in play, training, evaluation and serving.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from atod_envs.errors import AtodError, UnknownName

_WORDS = {"true": True, "false": False, "none": None}


def read_options(pairs: Iterable[str], split: str | None = None) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as an environment's arguments; of two with the same name the later one counts.

    Args:
        pairs: a value is a Python literal (a number, a string in quotes, a list), ``true``, ``false`` or ``none``, and
            text otherwise. ``SPLIT.NAME=VALUE`` is for that split alone.
        split: the split that the environment will play; by default ``train``, as the environments themselves have it.

    Raises:
        AtodError: a pair has no ``=``.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        where, dot, name = key.rpartition(".")
        if not equals or not name.isidentifier():
            raise AtodError(f"--option {pair!r}: expected NAME=VALUE, such as --option task_types=['look']")
        if not dot or where == (split or "train"):
            options[name] = _value(text)
    return options


def require_splits(pairs: Iterable[str], splits: Collection[str]) -> None:
    """Refuse an argument of a split that there is not: it would be an argument of none.

    Args:
        pairs: as :func:`read_options` reads them.
        splits: the splits that there are.

    Raises:
        UnknownName: names the pair.
    """
    for pair in pairs:
        where, dot, _ = pair.partition("=")[0].rpartition(".")
        if dot and where not in splits:
            raise UnknownName("split in --option", pair, [f"{known}.NAME=VALUE" for known in splits])


def refuse_settings(options: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Refuse an argument for which a command has a setting of its own, which would win without a word.

    Args:
        options: as :func:`read_options` gives them.
        settings: the setting to give instead, by argument.

    Raises:
        AtodError: names both.
    """
    for name, setting in settings.items():
        if name in options:
            raise AtodError(f"--option {name}={options[name]}: give {setting} instead, which counts everywhere")


def read_pair(pair: str, names: Collection[str], option: str, kind: str = "VALUE") -> tuple[str, str]:
    """``NAME=VALUE`` as name and value.

    Args:
        pair: what was given.
        names: the names that are known.
        option: the command-line option, for the message.
        kind: what the value is, for the message.

    Raises:
        UnknownName: the name is not known, or there is no value.
    """
    name, equals, value = pair.partition("=")
    if equals and name not in names:
        raise UnknownName(f"world in {option}", name, names)
    if not value:
        raise UnknownName(f"world in {option}", pair, [f"{known}={kind}" for known in names])
    return name, value


def put_before(first: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """Pairs of which those that were given win, whatever stands first; one that is in both stands once."""
    given = tuple(given)
    return (*(pair for pair in first if pair not in given), *given)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two where it is nested too deeply
        return text


def program(module: str) -> str:
    """How the user called a module, for its usage line: ``atod play`` or ``python -m agents.human``."""
    return sys.argv[0] if sys.argv[0].startswith("atod ") else f"python -m {module}"


@contextlib.contextmanager
def needed_imports(extra: str, module: str) -> Iterator[None]:
    """Around imports that need an extra: what is missing is said, by a command in one line.

    Args:
        extra: the extra's name.
        module: the importing module's ``__name__``.

    Raises:
        ModuleNotFoundError: something is missing; says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "a package").partition(".")[0]
        said = f"{missing} is not installed: pip install 'atod[{extra}]'"
        if module == "__main__":
            sys.exit(f"error: {said}")
        raise ModuleNotFoundError(said, name=error.name) from error
