"""One product: from a record of the official catalogue to what the shop shows and the reward compares.

The invariant: for a record that the original accepts, every field equals the original's processed form
(``Product.processed`` lays it out under the original's names). A record that the original would crash on is repaired in
the narrowest way that keeps it shoppable, or refused with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

UNPRICED = 100.0
"""Price of a product whose record states none, in dollars (original: ``load_products``)."""
NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""Attributes of a product that the attribute file does not know."""
NO_RATING = "N.A."
LONGEST_ASIN = 10
"""Products with a longer id are left out by the original."""

_NOT_NUMERIC = re.compile(r"[^\d.]")


@dataclass(frozen=True, slots=True)
class Review:
    """A customer's review: stars as they are shown, title and body."""

    title: str
    score: str
    body: str


@dataclass(frozen=True, slots=True)
class HumanInstruction:
    """A crowd worker's instruction for a product, with what it asks for."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the attribute file says about a product.

    Attributes:
        attributes: attributes mined from its text.
        instruction: the synthetic instruction, or ``None`` if it has none.
        instruction_attributes: the attributes that the instruction asks for.
    """

    attributes: tuple[str, ...] = NO_ATTRIBUTES
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Product:
    """A cleaned product.

    Attributes:
        asin: its id.
        title: name as shown.
        description: long description.
        bullets: feature lines.
        pricing: one price, or the ends of a range, in dollars; empty means the record stated none that can be read.
        price_tag: price as shown, e.g. ``"$12.99"`` or ``"$10.0 to $19.5"``.
        options: option name -> values, in the record's order, lower-cased.
        option_images: option value -> image address or ``None``.
        category: one of the shop's top categories.
        query: the search by which the product was crawled; the goal's product type.
        product_category: path of categories, joined by ``›``.
        image: address of the main image.
        annotation: attributes and synthetic instruction.
        reviews: customer reviews.
        rating: average rating as shown.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    pricing: tuple[float, ...]
    price_tag: str
    options: Mapping[str, tuple[str, ...]]
    option_images: Mapping[str, str | None]
    category: str
    query: str
    product_category: str
    image: str
    annotation: Annotation = field(default_factory=Annotation)
    reviews: tuple[Review, ...] = ()
    rating: str = NO_RATING

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes mined from its text."""
        return self.annotation.attributes

    def contents(self) -> str:
        """The text under which the search engine finds the product, as the original's index builder lays it out."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        first_bullet = self.bullets[0] if self.bullets else ""
        return " ".join([self.title, self.description, first_bullet, options]).lower()


class BrokenProduct(ValueError):
    """A record that cannot be sold; the message says why."""


def clean_product(
    raw: object,
    annotation: Annotation | None = None,
    reviews: Sequence[Review] = (),
    rating: str = NO_RATING,
) -> Product:
    """Clean one record of ``items_shuffle*.json``.

    Args:
        raw: the record.
        annotation: what the attribute file says about it.
        reviews: its reviews, where a review file is loaded.
        rating: its average rating as text.

    Raises:
        BrokenProduct: the record is no object, or has no usable id.
    """
    if not isinstance(raw, dict):
        raise BrokenProduct(f"a product is an object, not {type(raw).__name__}")
    asin = raw.get("asin")
    if not isinstance(asin, str) or not asin or asin == "nan" or len(asin) > LONGEST_ASIN or "\0" in asin:
        raise BrokenProduct(f"asin {asin!r} is not an id of 1 to {LONGEST_ASIN} characters")
    bullets = raw.get("small_description")
    pricing, tag = read_pricing(raw.get("pricing"))
    options, option_images = _read_options(raw.get("customization_options"))
    images = raw.get("images")
    return Product(
        asin=asin,
        title=_text(raw.get("name")),
        description=_text(raw.get("full_description")),
        bullets=tuple(_text(b) for b in bullets) if isinstance(bullets, list) else (_text(bullets),),
        pricing=pricing,
        price_tag=tag,
        options=options,
        option_images=option_images,
        category=_text(raw.get("category")),
        query=_text(raw.get("query")).lower().strip(),
        product_category=_text(raw.get("product_category")),
        image=_text(images[0]) if isinstance(images, list) and images else "",
        annotation=annotation or Annotation(),
        reviews=tuple(reviews),
        rating=rating,
    )


def read_pricing(pricing: object) -> tuple[tuple[float, ...], str]:
    """Read a price text such as ``"$12.99"`` or ``"$10.00$19.50"``.

    Returns:
        One or two prices in dollars, and the price as shown. Text without a readable price counts as unpriced.
    """
    prices: list[float] = []
    if isinstance(pricing, str):
        for part in pricing.split("$")[1:]:
            number = _NOT_NUMERIC.sub("", part)
            if number.count(".") > 1 or not number.strip("."):
                return (UNPRICED,), f"${UNPRICED}"
            prices.append(float(Decimal(number)))
    if not prices:
        return (UNPRICED,), f"${UNPRICED}"
    if len(prices) == 1:
        return (prices[0],), f"${prices[0]}"
    return (prices[0], prices[1]), f"${prices[0]} to ${prices[1]}"


def read_annotation(entry: object) -> Annotation:
    """Read one entry of ``items_ins_v2*.json``; an absent or unreadable one gives the original's dummy attribute."""
    if not isinstance(entry, dict):
        return Annotation()
    instruction = entry.get("instruction")
    return Annotation(
        attributes=_texts(entry["attributes"]) if "attributes" in entry else NO_ATTRIBUTES,
        instruction=instruction if isinstance(instruction, str) else None,
        instruction_attributes=_texts(entry.get("instruction_attributes")),
    )


def read_human_instructions(entries: object) -> tuple[HumanInstruction, ...]:
    """Read one product's entry of ``items_human_ins*.json``; as originally, one without attributes is skipped."""
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("instruction"), str):
            attributes = _texts(entry.get("instruction_attributes"))
            if attributes:
                options = _texts(entry.get("instruction_options"))
                found.append(HumanInstruction(entry["instruction"], attributes, options))
    return tuple(found)


def read_reviews(entry: object) -> tuple[tuple[Review, ...], str]:
    """Read one entry of ``reviews*.json`` (``asin``, ``reviews``, ``average_rating``) into reviews and rating."""
    if not isinstance(entry, dict):
        return (), NO_RATING
    reviews = []
    for review in entry.get("reviews") or ():
        if isinstance(review, dict):
            score = review.get("score", review.get("stars"))
            reviews.append(Review(_text(review.get("title")), _text(score), _text(review.get("review"))))
    return tuple(reviews), _text(entry.get("average_rating", NO_RATING))


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _texts(values: object) -> tuple[str, ...]:
    return tuple(_text(value) for value in values) if isinstance(values, list) else ()


def _read_options(raw: object) -> tuple[dict[str, tuple[str, ...]], dict[str, str | None]]:
    options: dict[str, tuple[str, ...]] = {}
    images: dict[str, str | None] = {}
    for name, contents in raw.items() if isinstance(raw, dict) else ():
        if not isinstance(contents, list):
            continue
        values = []
        for content in contents:
            if not isinstance(content, dict) or not isinstance(content.get("value"), str):
                continue
            value = content["value"].strip().replace("/", " | ").lower()
            image = content.get("image")
            images[value] = image if isinstance(image, str) else None
            values.append(value)
        options[name.lower()] = tuple(values)
    return options, images
