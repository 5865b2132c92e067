"""A product as the two JSON records of a store: a small one for result pages, and the rest.

The invariant: ``unpack(*pack(product)) == product``.
"""

from __future__ import annotations

from typing import Any

from atod_envs.webshop.catalogue.product import Annotation, Product, Review


def pack(product: Product) -> tuple[list[Any], list[Any]]:
    """Lay a product out as the two records under which a store keeps it: for result pages, and the rest."""
    annotation = product.annotation
    return [product.asin, product.title, product.price_tag], [
        product.description,
        product.bullets,
        product.pricing,
        product.options,
        product.option_images,
        product.category,
        product.query,
        product.product_category,
        product.image,
        [annotation.attributes, annotation.instruction, annotation.instruction_attributes],
        [[r.title, r.score, r.body] for r in product.reviews],
        product.rating,
    ]


def unpack(card: list[Any], detail: list[Any]) -> Product:
    """Rebuild a product from its two records; the inverse of :func:`pack`."""
    description, bullets, pricing, options, images, category, query, path, image, annotation, reviews, rating = detail
    return Product(
        asin=card[0],
        title=card[1],
        description=description,
        bullets=tuple(bullets),
        pricing=tuple(pricing),
        price_tag=card[2],
        options={name: tuple(values) for name, values in options.items()},
        option_images=images,
        category=category,
        query=query,
        product_category=path,
        image=image,
        annotation=Annotation(tuple(annotation[0]), annotation[1], tuple(annotation[2])),
        reviews=tuple(Review(*review) for review in reviews),
        rating=rating,
    )
