"""JSON as both sides read it, the refusal of a request, and the names that this machine goes by.

Only what RFC 8259 calls JSON is read: no ``NaN``, no ``Infinity``, no number that overflows to one. What cannot be read
is a ``ValueError`` that says why, whatever its shape.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from typing import Any, NoReturn

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
        return json.loads(data, parse_constant=_constant, parse_float=_float, parse_int=_int if long else None)
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
    """Whether no stranger can own a name: an address, ``localhost``, a name without a dot, or none (HTTP/1.0)."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.removesuffix(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(".localhost")
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
