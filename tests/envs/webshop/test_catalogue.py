"""Files to products: equality with the recorded catalogue, and what is done with broken input."""

import json
import logging
import multiprocessing
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shops import item, options, write_shop

from atod_envs.errors import DataError
from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.catalogue.files import find_files, stream_array, stream_object
from atod_envs.webshop.catalogue.product import BrokenProduct, clean_product, read_pricing
from atod_envs.webshop.catalogue.records import pack, unpack
from atod_envs.webshop.catalogue.store import Store


def processed(product):
    """The fields that the original adds or changes, under its names."""
    return {
        "asin": product.asin,
        "Title": product.title,
        "Description": product.description,
        "BulletPoints": list(product.bullets),
        "pricing": list(product.pricing),
        "Price": product.price_tag,
        "options": {name: list(values) for name, values in product.options.items()},
        "option_to_image": dict(product.option_images),
        "Attributes": list(product.annotation.attributes),
        "category": product.category,
        "query": product.query,
        "product_category": product.product_category,
        "MainImage": product.image,
        "Rating": product.rating,
        "Reviews": [{"title": r.title, "score": r.score, "body": r.body} for r in product.reviews],
    }


def test_every_product_equals_the_recorded_one(real_store, read_golden):
    recorded = {row["id"]: row for row in read_golden("documents_1k.jsonl.gz")}
    assert len(real_store) == len(recorded) == 1000
    different = []
    for row in range(len(real_store)):
        product = real_store.product(row)
        expected = recorded.pop(product.asin)
        if product.contents() != expected["contents"]:
            different.append((product.asin, "contents"))
        for name, value in processed(product).items():
            if expected["product"][name] != value:
                different.append((product.asin, name))
    assert different == [] and not recorded


@pytest.mark.parametrize(
    ("text", "prices", "tag"),
    [
        ("$12.99", (12.99,), "$12.99"),
        ("$1,299.00", (1299.0,), "$1299.0"),
        ("$10.00$19.50", (10.0, 19.5), "$10.0 to $19.5"),
        ("$10.00 - $19.50", (10.0, 19.5), "$10.0 to $19.5"),
        ("$3$2$1", (3.0, 2.0), "$3.0 to $2.0"),
        ("", (100.0,), "$100.0"),
        (None, (100.0,), "$100.0"),
        # The original fails on these; they count as unpriced.
        ("free", (100.0,), "$100.0"),
        ("$", (100.0,), "$100.0"),
        ("$1.2.3", (100.0,), "$100.0"),
        (12.5, (100.0,), "$100.0"),
    ],
)
def test_prices_are_read_as_the_original_reads_them(text, prices, tag):
    assert read_pricing(text) == (prices, tag)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_any_price_text_gives_one_or_two_prices(text):
    prices, tag = read_pricing(text)
    assert 1 <= len(prices) <= 2 and all(price >= 0 for price in prices) and tag.startswith("$")


def test_options_are_cleaned():
    raw = item("B1", customization_options={"Color": [{"value": " Red/Blue "}, {"value": "RED"}], "Size": None})
    product = clean_product(raw)
    assert dict(product.options) == {"color": ("red | blue", "red")}
    assert product.contents() == "a thing a description. first. color: red | blue, red"


def test_missing_fields_are_empty_and_junk_is_passed_over():
    product = clean_product({"asin": "B1", "customization_options": {"size": [{"value": 3}, "x", {"image": 1}]}})
    assert (product.title, product.description, product.bullets, product.image) == ("", "", ("",), "")
    assert product.attributes == ("DUMMY_ATTR",) and dict(product.options) == {"size": ()}


@pytest.mark.parametrize(
    "raw", [None, [], "text", {}, {"asin": None}, {"asin": "nan"}, {"asin": "B" * 11}, {"asin": ""}]
)
def test_what_cannot_be_sold_is_refused(raw):
    with pytest.raises(BrokenProduct):
        clean_product(raw)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            ["name", "full_description", "pricing", "images", "small_description", "customization_options"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_no_field_can_break_a_product(fields):
    product = clean_product({**item("B1"), **fields})
    assert isinstance(product.contents(), str)
    assert unpack(*json.loads(json.dumps(pack(product)))) == product


def test_duplicates_and_long_ids_are_left_out_as_in_the_original(tmp_path, caplog):
    records = [item("B1", "First"), item("B1", "Again"), item("B" * 11), item("nan"), item("B2")]
    with caplog.at_level(logging.WARNING):
        store = open_store(write_shop(tmp_path / "shop", records))
    assert [store.card(row).title for row in range(len(store))] == ["First", "A thing"]
    assert "duplicate id" in caplog.text


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "expected an object, found None"),
        ({"asin": 3}, "asin is 3; expected a product id"),
        ({**item("B1"), "pricing": 12.5}, r"pricing is 12\.5; expected a text such as"),
        ({**item("B1"), "pricing": "12.50"}, r"pricing is '12\.50'; expected a text such as"),
        ({**item("B1"), "pricing": "$1.2.3"}, "pricing is"),
        ({**item("B1"), "pricing": "$" + "9" * 400}, "pricing is"),
        ({**item("B1"), "name": ["a"]}, "name is"),
        ({**item("B1"), "customization_options": {"size": [{"value": 3}]}}, "option 'size' is 3"),
        ({**item("B1"), "customization_options": [1]}, "expected an object"),
        ({**item("B1"), "small_description": [1]}, "small_description: expected texts, found 1"),
    ],
)
def test_a_record_that_is_not_of_the_published_form_is_refused_with_its_place(tmp_path, record, said):
    with pytest.raises(DataError, match=rf"items_shuffle\.json, record 2.*{said}"):
        open_store(write_shop(tmp_path / "shop", [item("B2"), record]))


def test_text_survives_the_store(tmp_path):
    title = 'Ünïcode <b>bold</b> &amp; "quotes" \x07 \ud800 🦊'
    store = open_store(write_shop(tmp_path / "shop", [item("B1", title), item("Bäö", "two")]))
    assert store.product(0).title == title
    assert store.rows(["Bäö", "missing", "B1"]) == [1, 0]


@pytest.mark.parametrize("text", ['[{"asin": "B1"', '[{"asin": "B1"} {', "{}", "", "[1, nonsense]", "[1 2]", "[[[[1,"])
def test_a_broken_file_is_named(tmp_path, text):
    with pytest.raises(DataError, match=r"items_shuffle\.json"):
        open_store(write_shop(tmp_path / "shop", text, annotations={}))


def test_files_are_streamed_at_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("atod_envs.webshop.catalogue.files._CHUNK", 3)
    values = [1234567, -0.5e3, "text, with ] and }", {"a": [1, {"b": None}]}, [], True]
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values, indent=1))
    assert list(stream_array(path)) == values
    path.write_text(json.dumps({str(i): value for i, value in enumerate(values)}))
    assert list(stream_object(path)) == [(str(i), value) for i, value in enumerate(values)]


def test_missing_and_ambiguous_data_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no items_shuffle\*\.json"):
        open_store(tmp_path)
    for ending in ("", "_1000"):
        (tmp_path / f"items_shuffle{ending}.json").write_text("[]")
        (tmp_path / f"items_ins_v2{ending}.json").write_text("{}")
    with pytest.raises(DataError, match="several catalogues"):
        open_store(tmp_path)
    found = find_files(tmp_path / "items_shuffle_1000.json")
    assert found.attributes == tmp_path / "items_ins_v2_1000.json" and found.human is None
    with pytest.raises(DataError, match="no usable product"):
        open_store(tmp_path / "items_shuffle_1000.json")


def test_data_variable_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSHOP_DATA", str(write_shop(tmp_path / "shop", [item("B1")])))
    assert len(open_store()) == 1


def test_a_changed_file_gives_another_store(tmp_path):
    folder = write_shop(tmp_path / "shop", [item("B1")])
    assert len(open_store(folder)) == 1
    write_shop(folder, [item("B1"), item("B2")])
    assert len(open_store(folder)) == 2


def test_a_damaged_store_is_named(tmp_path):
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(DataError, match="store version None"):
        Store(tmp_path)


def _open_in_child(folder, queue):
    queue.put((os.getpid(), open_store(folder).folder))


def test_workers_that_start_together_build_one_store(tmp_path):
    folder = write_shop(
        tmp_path / "shop", [item(f"B{i}", customization_options=options(size=["s"])) for i in range(50)]
    )
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_open_in_child, args=(folder, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=200) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert len({pid for pid, _ in answers}) == 3 and len({built for _, built in answers}) == 1
    assert not [path for path in answers[0][1].parent.iterdir() if ".part-" in path.name]
