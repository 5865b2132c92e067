"""What a record of the official files may look like; anything else is refused before it is read.

``product`` reads what the original reads and leaves empty what is missing. Here a field that is there but is not of the
published form ends in a ``DataError`` with the file and the record's place, because whatever would be made of it is a
guess: a price that is a number would become 100 dollars, an option whose value is no text would vanish.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from atod_envs.errors import DataError

_TEXTS = ("name", "full_description", "category", "query", "product_category")
_NOT_NUMERIC = re.compile(r"[^\d.]")
_LARGEST_PRICE = 1e9


def check_item(raw: object, where: str) -> dict[str, Any]:
    """A record of ``items_shuffle*.json``.

    Raises:
        DataError: it is no object, or a field is not of the published form.
    """
    item = _object(raw, where)
    if not isinstance(item.get("asin"), str) or not item["asin"] or "\0" in item["asin"]:
        raise _refused(where, "asin", item.get("asin"), "a product id")
    for name in _TEXTS:
        if not isinstance(item.get(name), str | None):
            raise _refused(where, name, item[name], "text")
    bullets = item.get("small_description")
    if not isinstance(bullets, str | None):
        _texts(bullets, f"{where}: small_description")
    if item.get("images") is not None:
        _texts(item["images"], f"{where}: images")
    _check_pricing(item.get("pricing"), where)
    options = item.get("customization_options")
    if options is not None and not isinstance(options, str):  # an empty text stands for none in the official files
        for name, contents in _object(options, f"{where}: customization_options").items():
            for content in [] if contents is None else _list(contents, f"{where}: option {name!r}"):
                value = _object(content, f"{where}: option {name!r}").get("value")
                if not isinstance(value, str):
                    raise _refused(where, f"option {name!r}", value, "a 'value' that is text")
    elif options:
        raise _refused(where, "customization_options", options, "an object")
    return item


def check_annotation(raw: object, where: str) -> dict[str, Any]:
    """An entry of ``items_ins_v2*.json``.

    Raises:
        DataError: it is not of the published form.
    """
    entry = _object(raw, where)
    for name in ("attributes", "instruction_attributes"):
        if entry.get(name) is not None:
            _texts(entry[name], f"{where}: {name}")
    if not isinstance(entry.get("instruction"), str | None):
        raise _refused(where, "instruction", entry["instruction"], "text")
    return entry


def check_human(raw: object, where: str) -> list[Any]:
    """A product's entry of ``items_human_ins*.json``.

    Raises:
        DataError: it is not of the published form.
    """
    entries = _list(raw, where)
    for entry in entries:
        _object(entry, where)
        if not isinstance(entry.get("instruction"), str):
            raise _refused(where, "instruction", entry.get("instruction"), "text")
        for name in ("instruction_attributes", "instruction_options"):
            if entry.get(name) is not None:
                _texts(entry[name], f"{where}: {name}")
    return entries


def check_reviews(raw: object, where: str) -> dict[str, Any]:
    """An entry of ``reviews*.json``.

    Raises:
        DataError: it is not of the published form.
    """
    entry = _object(raw, where)
    if not isinstance(entry.get("asin"), str):
        raise _refused(where, "asin", entry.get("asin"), "a product id")
    for review in _list(entry.get("reviews") or [], f"{where}: reviews"):
        _object(review, f"{where}: reviews")
    return entry


def _check_pricing(pricing: object, where: str) -> None:
    if pricing is None or pricing == "":
        return  # the original takes such a product for 100 dollars
    wanted = 'a text such as "$12.99" or "$10.00$19.50"'
    if not isinstance(pricing, str) or "$" not in pricing:
        raise _refused(where, "pricing", pricing, wanted)
    for part in pricing.split("$")[1:]:
        number = _NOT_NUMERIC.sub("", part)
        if number.count(".") > 1 or not number.strip(".") or not Decimal(number) <= _LARGEST_PRICE:
            raise _refused(where, "pricing", pricing, wanted)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {value!r:.60}; is this the official file?")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list, found {value!r:.60}; is this the official file?")
    return value


def _texts(value: object, where: str) -> None:
    for item in _list(value, where):
        if not isinstance(item, str):
            raise DataError(f"{where}: expected texts, found {item!r:.60}; is this the official file?")


def _refused(where: str, name: str, value: object, wanted: str) -> DataError:
    return DataError(f"{where}: {name} is {value!r:.60}; expected {wanted}. Correct the record or remove it")
