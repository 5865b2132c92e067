"""Generated catalogues: official format, same bytes every time, natural enough, and the command."""

import hashlib
import json
from collections import Counter

import pytest

from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.generate import BUILT_IN, CatalogueSpec, generate, main, write_catalogue
from atod_envs.webshop.goals import Goals
from atod_envs.webshop.product_types import read_product_types

OFFICIAL_FIELDS = {
    *("name", "full_description", "pricing", "images", "product_category", "average_rating", "small_description"),
    *("customization_options", "asin", "category", "query", "page"),
}


def test_the_built_in_catalogue_has_what_it_promises():
    products = list(generate(BUILT_IN))
    assert len(products) >= 2000
    assert len({product.item["asin"] for product in products}) == len(products)
    categories = Counter(product.item["category"] for product in products)
    assert len(categories) == 5 and min(categories.values()) > 300
    assert sum(bool(product.item["customization_options"]) for product in products) > 1500
    assert sum(bool(product.reviews["reviews"]) for product in products) > 1000
    assert sum("$" in (product.item["pricing"] or "")[1:] for product in products) > 100  # price ranges
    assert len({product.item["name"] for product in products}) > 0.99 * len(products)
    assert all(len(product.item["name"].split()) <= 9 for product in products)
    instructions = {product.annotation["instruction"] for product in products}
    assert len(instructions) > 1000 and all(text.startswith("Find me ") for text in instructions)
    assert len({product.human["instruction"] for product in products}) > 1900


def test_fields_are_those_of_the_official_files(webshop_data):
    official = json.loads((webshop_data / "items_shuffle_1000.json").read_text())
    assert set.intersection(*(set(record) for record in official)) == OFFICIAL_FIELDS
    product = next(generate(BUILT_IN))
    assert set(product.item) == OFFICIAL_FIELDS
    human = json.loads((webshop_data / "items_human_ins_1000.json").read_text())
    assert set(product.human) == set(next(iter(human.values()))[0])


def test_the_same_specification_gives_the_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        write_catalogue(CatalogueSpec(300, seed=5), tmp_path / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())])
    assert digests[0] == digests[1] and len(digests[0]) == 4
    write_catalogue(CatalogueSpec(300, seed=6), tmp_path / "c")
    assert (tmp_path / "c" / "items_shuffle.json").read_bytes() != (tmp_path / "a" / "items_shuffle.json").read_bytes()


def test_the_built_in_catalogue_is_pinned():
    """Trained models and published numbers depend on it: a change must raise GENERATOR_VERSION."""
    digest = hashlib.sha256()
    for product in generate(BUILT_IN):
        digest.update(json.dumps([product.item, product.annotation, product.human, product.reviews]).encode())
    assert digest.hexdigest() == "88a1f660fa1d909073002ca61b83840549a720867ddc26017ece6ba2bcd6f27e"


def test_the_command_writes_a_catalogue_that_loads(tmp_path, capsys):
    main(["--products", "120", "--seed", "1", "--instructed", "0.5", "--out", str(tmp_path / "shop")])
    assert "120 products" in capsys.readouterr().out
    store = open_store(tmp_path / "shop")
    assert len(store) == 120 and 30 < store.has_instruction.sum() < 90 and len(Goals(store, "synthetic")) > 100
    with pytest.raises(SystemExit):
        main(["--products", "0", "--out", str(tmp_path)])


def test_large_catalogues_number_their_models():
    products = [product for product, _ in zip(generate(CatalogueSpec(100_000)), range(50), strict=False)]
    assert all(any(word[0].isalpha() and word[1:].isdigit() for word in p.item["name"].split()) for p in products)
    assert all(len(p.item["asin"]) == 6 for p in products)


def test_attributes_of_a_product_type_differ():
    for product_type in read_product_types():
        words = (*product_type.plain, *product_type.having, *product_type.purpose)
        assert (
            len(set(words)) == len(words)
            and len(product_type.path.split("›")) >= 3
            and product_type.low < product_type.high
        )
