"""Generated catalogues in the official format, the built-in one among them.

    python -m atod_envs.webshop.generate --products 100000 --out shop/

writes ``items_shuffle.json``, ``items_ins_v2.json``, ``items_human_ins.json`` and ``reviews.json``, which every
loader of the official files reads. The invariant: a product is a function of the specification and of its number, so
the same command writes the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from atod_envs.dice import Dice
from atod_envs.errors import AtodError
from atod_envs.files import writing_into
from atod_envs.stopping import stoppable
from atod_envs.webshop.product_types import (
    MAKER_ENDS,
    MAKER_MIDDLES,
    MAKER_STARTS,
    REVIEW_BODIES,
    REVIEW_TITLES,
    ProductType,
    read_product_types,
)

GENERATOR_VERSION = 1
"""Raised whenever the same specification would give other products."""
MODEL_CODES_ABOVE = 20_000
"""Larger catalogues number their models, or titles would repeat."""


@dataclass(frozen=True, slots=True)
class CatalogueSpec:
    """What determines a generated catalogue.

    Attributes:
        products: number of products.
        seed: of everything in it.
        instructed: share of the products that have instructions.
    """

    products: int
    seed: int = 0
    instructed: float = 1.0

    @property
    def name(self) -> str:
        """A name that determines the content."""
        return f"generated-{GENERATOR_VERSION}-{self.products}-{self.seed}-{self.instructed}"


BUILT_IN = CatalogueSpec(products=2000)
"""The catalogue that is played where no data is given."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated product: its records in the four files."""

    item: dict[str, Any]
    annotation: dict[str, Any]
    human: dict[str, Any] | None
    reviews: dict[str, Any]


def generate(spec: CatalogueSpec) -> Iterator[Generated]:
    """The products of a catalogue, in order."""
    for number in range(spec.products):
        yield _generate_product(spec, number)


def _generate_product(spec: CatalogueSpec, number: int) -> Generated:
    dice = Dice(f"atod/webshop/{spec.seed}/{number}")
    product_types = read_product_types()
    product_type = product_types[(number + spec.seed) % len(product_types)]
    asin = _asin(spec, number)
    plain = dice.some(product_type.plain, 1 + dice.below(2))
    having = dice.some(product_type.having, 1)
    purpose = dice.some(product_type.purpose, 1)
    maker = dice.pick(MAKER_STARTS) + dice.pick(MAKER_MIDDLES) + dice.pick(MAKER_ENDS)
    model = f" {chr(65 + dice.below(26))}{10 + dice.below(90)}" if spec.products > MODEL_CODES_ABOVE else ""
    title = f"{maker}{model} {plain[0].title()} {product_type.noun}"
    if dice.chance(0.5):
        title += f" with {having[0].title()}" if dice.chance(0.5) else f" for {purpose[0].title()}"
    options = {
        name: dice.some(values, 2 + dice.below(3)) for name, values in product_type.options.items() if dice.chance(0.85)
    }
    attributes = [*plain, *having, *purpose]
    noun = product_type.noun.lower()
    bullets = [
        f"{' and '.join(plain).capitalize()} {noun}.",
        f"Made with {having[0]}.",
        f"A good choice for {purpose[0]}.",
    ]
    item = {
        "name": title,
        "full_description": f"The {maker} {noun} is {' and '.join(plain)}. It comes with {having[0]} for {purpose[0]}.",
        "pricing": _price(dice, product_type),
        "images": [f"https://example.invalid/{asin}.jpg"],
        "product_category": product_type.path,
        "average_rating": "",
        "small_description": bullets,
        "customization_options": {
            name: [{"value": value, "image": None} for value in values] for name, values in options.items()
        }
        or "",
        "asin": asin,
        "category": product_type.category,
        "query": product_type.query,
        "page": 1 + number % 400,
    }
    annotation: dict[str, Any] = {"attributes": attributes}
    human = None
    if dice.chance(spec.instructed):
        asked_plain = plain[: 1 + dice.below(len(plain))]
        asked_having = having if dice.chance(0.6) else []
        asked_purpose = purpose if dice.chance(0.4) else []
        asked = [*asked_plain, *asked_having, *asked_purpose]
        annotation["instruction"] = _instruction(product_type, asked_plain, asked_having, asked_purpose)
        annotation["instruction_attributes"] = asked
        human = _human(dice, asin, product_type, asked_plain, asked_having, asked_purpose, options)
    return Generated(item, annotation, human, _reviews(dice, asin, product_type, options))


def _asin(spec: CatalogueSpec, number: int) -> str:
    """A short id; numbers are scattered, so that an id says nothing about the kind of product."""
    width = max(4, len(str(spec.products - 1)))
    return f"B{(number * 7_368_787 + 4391 * (spec.seed + 1)) % 10**width:0{width}d}"


def _price(dice: Dice, product_type: ProductType) -> str | None:
    low = product_type.low + (product_type.high - product_type.low) * dice.below(1000) / 1000
    kind = dice.below(20)
    if kind == 0 and product_type.high > 100:
        return None
    cents = f"{int(low)}.{dice.pick((99, 49, 95, '00'))}"
    return f"${cents}${float(cents) * 1.2:.2f}" if kind < 4 else f"${cents}"


def _instruction(product_type: ProductType, plain: list[str], having: list[str], purpose: list[str]) -> str:
    text = f"Find me {', '.join(plain)} {product_type.query}"
    text += f" with {', '.join(having)}" if having else ""
    return text + (f" for {', '.join(purpose)}" if purpose else "")


def _human(
    dice: Dice,
    asin: str,
    product_type: ProductType,
    plain: list[str],
    having: list[str],
    purpose: list[str],
    options: dict[str, list[str]],
) -> dict[str, Any]:
    """An instruction as a person might phrase it."""
    chosen = {name: dice.pick(values) for name, values in options.items() if dice.chance(0.8)}
    opening = dice.pick(("i am looking for", "i need", "show me", "can you find me", "i want to buy", "please get me"))
    text = f"{opening} {dice.pick(('a', 'some', 'the'))} {' and '.join(plain)} {product_type.noun.lower()}"
    text += f" {dice.pick(('that comes with', 'with', 'that has'))} {having[0]}" if having else ""
    text += f" {dice.pick(('for', 'that suits', 'good for'))} {purpose[0]}" if purpose else ""
    for name, value in chosen.items():
        if name == "size":
            text += f" {dice.pick((', size', ' in size', ' and i want'))} {value}".replace(" ,", ",")
        else:
            text += f", {dice.pick((f'{name} should be', 'preferably in', f'the {name} i want is'))} {value}"
    return {
        "asin": asin,
        "instruction": text.replace("  ", " "),
        "attributes": [*plain, *having, *purpose],
        "options": [f"{name}: {value}" for name, value in chosen.items()],
        "instruction_attributes": [*plain, *having, *purpose],
        "instruction_options": list(chosen.values()),
    }


def _reviews(dice: Dice, asin: str, product_type: ProductType, options: dict[str, list[str]]) -> dict[str, Any]:
    reviews, stars = [], []
    value = next((values[0] for values in options.values()), "new")
    for _ in range(dice.below(4)):
        given = dice.pick((5, 5, 5, 4, 4, 3, 2, 1))
        body = dice.pick(REVIEW_BODIES[given]).format(noun=product_type.noun.lower(), option=value)
        reviews.append({"title": dice.pick(REVIEW_TITLES[given]), "stars": given, "review": body})
        stars.append(given)
    mean = sum(stars) / len(stars) if stars else None
    return {"asin": asin, "reviews": reviews, "average_rating": "N.A." if mean is None else f"{mean:.1f}"}


# --- writing -------------------------------------------------------------------------------------------------------


class _JsonList:
    """A JSON array or object that is written one element at a time."""

    def __init__(self, file: TextIO, opening: str) -> None:
        self._file = file
        self._closing = {"[": "]", "{": "}"}[opening]
        self._before = opening
        self.empty = True

    def add(self, value: Any, key: str | None = None) -> None:
        name = "" if key is None else f"{json.dumps(key)}: "
        self._file.write(f"{self._before}\n{name}{json.dumps(value)}")
        self._before = ","

    def close(self) -> None:
        self._file.write(f"{'' if self._before == ',' else self._before}\n{self._closing}\n")


def write_catalogue(spec: CatalogueSpec, folder: str | Path) -> None:
    """Write a catalogue's four files; existing ones of the same names are replaced.

    Args:
        spec: what to generate.
        folder: where; created if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"items_shuffle": "[", "items_ins_v2": "{", "items_human_ins": "{", "reviews": "["}
    with ExitStack() as stack:
        items, annotations, human, reviews = (
            _JsonList(stack.enter_context(open(folder / f"{name}.json", "w", encoding="utf-8")), opening)
            for name, opening in names.items()
        )
        for product in generate(spec):
            asin = product.item["asin"]
            items.add(product.item)
            annotations.add(product.annotation, asin)
            if product.human is not None:
                human.add([product.human], asin)
            reviews.add(product.reviews)
        for written in (items, annotations, human, reviews):
            written.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m atod_envs.webshop.generate``; returns its exit status."""
    parser = argparse.ArgumentParser(description="Write a generated WebShop catalogue in the official format.")
    parser.add_argument("--products", type=int, default=BUILT_IN.products, help="number of products (%(default)s)")
    parser.add_argument("--seed", type=int, default=BUILT_IN.seed, help="seed of the catalogue (%(default)s)")
    parser.add_argument(
        "--instructed",
        type=float,
        default=BUILT_IN.instructed,
        help="share of products with instructions (%(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    given = parser.parse_args(arguments)
    if given.products < 1:
        parser.error(f"--products {given.products}: at least 1")
    if not 0 <= given.instructed <= 1:
        parser.error(f"--instructed {given.instructed}: a share between 0 and 1")
    try:
        with writing_into(given.out, "--out"):
            write_catalogue(CatalogueSpec(given.products, given.seed, given.instructed), given.out)
    except AtodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given.products} products in {given.out}")
    return 0


if __name__ == "__main__":
    with stoppable():
        sys.exit(main())
