"""Settings that differ between a run's environments: read from the words of the command line.

A run has one or several environments. Each has a name, its class's ``env_key``, and settings of its own. What is given
plainly holds for all of them; ``NAME=VALUE`` is for the environment of that name alone:

    --env atod/ALFWorld-v0 atod/WebShop-v0=2    environments, and how often each is played (1 unless said)
    --env all                                   ALFWorld, WebShop and Search-QA
    --max-turns alfworld=20 webshop=6           a setting of each
    --option webshop/catalogue=1000             an argument of one
    --teacher builtin alfworld/LABEL=PATH       a teacher of one, or of the tasks of one that have a label

The invariant: a word that names no environment of the run is refused, never dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from atod_envs import environment_class
from atod_envs.errors import AtodError, UnknownName
from atod_envs.options import read_pair

ALL = ("atod/ALFWorld-v0", "atod/WebShop-v0", "atod/SearchQA-v0")
"""What ``--env all`` means: the worlds that one built-in student knows."""

PerWorld = str | tuple[str, ...]
"""What an option holds: a value for all environments, or words of which ``NAME=VALUE`` are for one."""

_NAMED = re.compile(r"([A-Za-z]\w*)(/[^=]*)?=")


def key_of(env: str) -> str:
    """An environment's name in a run.

    Args:
        env: its registered id.

    Raises:
        UnknownName: no environment of that id is registered.
    """
    return str(getattr(environment_class(env), "env_key", env))


def read_worlds(env: PerWorld) -> dict[str, float]:
    """The environments of a run, by registered id, with their weights.

    Raises:
        AtodError: a weight is not a number above 0, two environments have the same name, or there is none.
        UnknownName: of several, one is not registered.
    """
    found: dict[str, float] = {}
    words = (env,) if isinstance(env, str) else env
    words = ALL if words == ("all",) else words
    for word in words:
        name, equals, text = word.partition("=")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise AtodError(f"--env {word}: expected a weight above 0 after the =, such as {name}=2")
        found[name] = weight
    keys = [key_of(name) for name in found] if len(words) > 1 else []
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice or len(found) < len(words) or not found:
        raise AtodError(
            f"--env {' '.join(words)}: expected environments of different names, but {twice[0] if twice else 'one'} is named twice"
            if words
            else "--env: expected the id of an environment at least"
        )
    return found


def own_value(given: Any, name: str, names: Collection[str], option: str) -> Any:
    """One environment's value of a setting.

    Args:
        given: as it was given: a plain value, or words.
        name: the environment.
        names: all of the run.
        option: the setting, for messages.

    Returns:
        The value that names the environment, else the plain one, else ``None``; words stay text.

    Raises:
        UnknownName: a word is for an environment that is not in the run.
        AtodError: several plain values were given.
    """
    if not isinstance(given, str | tuple):
        return given
    plain, named = _split(given, names, option)
    own = [value for key, value in named if key == name]
    return own[-1] if own else plain


def own_labels(given: PerWorld, name: str, names: Collection[str], option: str) -> tuple[tuple[str, str], ...]:
    """The values for single labels of an environment's tasks: ``NAME/LABEL=VALUE`` words, as (label, value)."""
    _, named = _split(given, names, option)
    return tuple((key.partition("/")[2], value) for key, value in named if key.startswith(f"{name}/"))


def own_options(pairs: Sequence[str], name: str, names: Collection[str]) -> tuple[str, ...]:
    """The arguments of one environment: those without a name before them, and ``NAME/KEY=VALUE`` without the name.

    Raises:
        UnknownName: an argument is for an environment that is not in the run.
    """
    found = []
    for pair in pairs:
        key = pair.partition("=")[0]
        world, slash, _ = key.rpartition("/")
        if slash and world not in names:
            raise UnknownName("world in --option", pair, [f"{known}/NAME=VALUE" for known in names])
        if not slash or world == name:
            found.append(pair[len(world) + len(slash) :])
    return tuple(found)


def number(value: Any, kind: type[int] | type[float], option: str) -> Any:
    """A word as a number; a number, or ``None``, as it is.

    Raises:
        AtodError: it is no number of that kind.
    """
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        raise AtodError(f"{option} {value}: expected {'a whole number' if kind is int else 'a number'}") from None


def _split(given: PerWorld, names: Collection[str], option: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The plain value, and (name or name/label, value) of the others, in their order."""
    words = (given,) if isinstance(given, str) else given
    plain: str | None = None
    named: list[tuple[str, str]] = []
    for word in words:
        head = _NAMED.match(word)
        # A single value of a run with one environment may hold a "=" of its own, as a folder's name can.
        if head is None or (len(words) == len(names) == 1 and head[1] not in names):
            if plain is not None:
                raise AtodError(
                    f"{option} {' '.join(words)}: expected one value for all environments, or NAME=VALUE words"
                )
            plain = word
        else:
            _, value = read_pair(f"{head[1]}={word[head.end() :]}", names, option)
            named.append((head[1] + (head[2] or ""), value))
    return plain, named
