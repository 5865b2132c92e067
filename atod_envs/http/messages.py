"""JSON as both sides read it, the refusal of a request, and the names that this machine goes by.

Only what RFC 8259 calls JSON is read: no ``NaN``, no ``Infinity``, no number that overflows to one, no field twice in
an object (which of the two is meant?). What cannot be read is a ``ValueError`` that says why, whatever its shape.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from typing import Any, NoReturn

from atod_envs.files import unique_fields

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]*)(:[0-9]{0,5})?", re.ASCII)
_LONG, _LONG_BYTES = re.compile(r"[0-9]{309}"), re.compile(rb"[0-9]{309}")
"""What no whole number that fits a float holds; a text may, so that a find is no verdict."""


class Refused(Exception):
    """A request that is not carried out.

    Args:
        status: the HTTP status that says why.
        message: what was wrong and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse(data: bytes | str) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        long = _LONG.search(data) if isinstance(data, str) else _LONG_BYTES.search(data)
        return json.loads(
            data,
            object_pairs_hook=unique_fields,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int if long else None,
        )
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 (byte {error.start})") from error


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Read the JSON object of a request.

    Raises:
        Refused: it is none (400).
    """
    try:
        message = parse(data)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise Refused(400, f"expected a JSON object, got {type(message).__name__}")
    return message


def is_local_name(host: str) -> bool:
    """Whether no stranger can own the name in a ``Host``: an address, ``localhost``, a name without a dot, or none."""
    parts = _HOST.fullmatch(host.lower())
    if parts is None:  # whatever it is, no browser and no client sends it
        return False
    name = parts[1].strip("[]").removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return not parts[1].startswith("[") and ("." not in name or name.endswith(".localhost"))
    return True


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _int(text: str) -> int:
    _float(text)
    return int(text)
