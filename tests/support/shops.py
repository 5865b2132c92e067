"""Tiny catalogues in WebShop's official format."""

import json


def item(asin, name="A thing", **fields):
    """A record of the items file."""
    return {
        "name": name,
        "full_description": "A description.",
        "pricing": "$10.00",
        "images": ["image.jpg"],
        "product_category": "Home › Things › Small",
        "small_description": ["First.", "Second."],
        "customization_options": "",
        "asin": asin,
        "category": "garden",
        "query": "things",
        **fields,
    }


def options(**groups):
    return {name: [{"value": value, "image": None} for value in values] for name, values in groups.items()}


def write_shop(folder, items, annotations=None, reviews=None):
    """Write a catalogue in the official format and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items_shuffle.json").write_text(items if isinstance(items, str) else json.dumps(items))
    if annotations is None:
        asins = [record["asin"] for record in items if isinstance(record, dict) and isinstance(record.get("asin"), str)]
        entry = {"attributes": ["easy clean"], "instruction": "Find me easy clean things"}
        annotations = {asin: {**entry, "instruction_attributes": ["easy clean"]} for asin in asins}
    (folder / "items_ins_v2.json").write_text(json.dumps(annotations))
    if reviews is not None:
        (folder / "reviews.json").write_text(json.dumps(reviews))
    return folder
