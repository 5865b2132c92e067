"""What travels: JSON in ASCII, so that any text survives, half a character (a lone surrogate) included.

Python's tuples become arrays, as they are the rule in ``info``; arrays that were lists are named in ``lists``, so that
a Python client gets back exactly what the environment returned, and everybody else sees plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def dumps(message: Mapping[str, Any]) -> bytes:
    """Encode a message.

    Raises:
        TypeError: it holds what JSON has no word for (bytes, objects, keys that are no strings).
    """
    lists: list[list[str | int]] = []
    plain = {name: _plain(value, [name], lists) for name, value in message.items()}
    if lists:
        plain["lists"] = lists
    return json.dumps(plain, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def loads(data: bytes | str) -> dict[str, Any]:
    """Decode a message; the inverse of :func:`dumps`.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError(f"expected a JSON object, got {type(message).__name__}")
        lists = {tuple(path) for path in message.pop("lists", [])}
        return {name: _restored(value, (name,), lists) for name, value in message.items()}
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except TypeError as error:
        raise ValueError("'lists' has to hold the paths of lists") from error


def _plain(value: Any, path: list[str | int], lists: list[list[str | int]]) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # of a StrEnum, its value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{path}: keys of a mapping must be strings to be sent")
        return {key: _plain(item, [*path, key], lists) for key, item in value.items()}
    if isinstance(value, tuple | list):
        if isinstance(value, list):
            lists.append(path)
        return [_plain(item, [*path, place], lists) for place, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return value.item()
    raise TypeError(f"{path}: a value of type {type(value).__name__} cannot be sent")


def _restored(value: Any, path: tuple[str | int, ...], lists: set[tuple[Any, ...]]) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item, (*path, key), lists) for key, item in value.items()}
    if isinstance(value, list):
        items = [_restored(item, (*path, place), lists) for place, item in enumerate(value)]
        return items if path in lists else tuple(items)
    return value
