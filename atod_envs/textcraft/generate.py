"""Fresh recipe worlds in Minecraft's form: parts of three tiers, made of 24 materials, and goods made of parts.

The invariant: the same seed gives the same files on every machine, and everything can be crafted.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from atod_envs.files import write_texts
from atod_envs.options import program
from atod_envs.stopping import stoppable

from .recipes import NAMESPACE

SEED: Final = 7
CLASSES: Final = {
    ("ore", "ingot"): ("copper", "tin", "cobalt", "silver"),
    ("log", "plank"): ("ash", "elm", "pine", "willow"),
    ("rubble", "brick"): ("marble", "slate", "basalt", "flint"),
    ("shard", "gem"): ("amber", "opal", "jade", "topaz"),
    ("fleece", "thread"): ("wool", "hemp", "silk", "flax"),
    ("clay", "tile"): ("ochre", "umber", "sienna", "kaolin"),
}
"""(what is fetched, what is first made of it) -> materials. A recipe may take the first product of any of a class."""
TIERS: Final = {"first": ("raw",), "rod": ("first",), "sheet": ("first",), "frame": ("rod", "sheet", "binder")}
"""Part -> what it is made of."""
BINDERS: Final = ("resin", "wax", "pitch", "glue")
# fmt: off
GOODS: Final = (
    "basket", "bell", "bench", "bracelet", "bridge", "cabinet", "cage", "candlestick", "cart", "crate", "crown",
    "desk", "doll", "drum", "fan", "flute", "goblet", "hammer", "harp", "kite", "ladle", "lantern", "loom", "mask",
    "medal", "mill", "mirror", "necklace", "oven", "paddle", "plough", "pulley", "saddle", "scale", "scepter",
    "shovel", "spindle", "stool", "table", "tray", "trophy", "vase", "wagon", "wheel",
)
# fmt: on


def make_recipes(seed: int) -> dict[str, dict[str, Any]]:
    """The recipe files of a world, by file name: 96 of parts, 1,056 of goods.

    Args:
        seed: another seed gives other recipes.
    """
    dice = random.Random(seed)
    plans = {
        part: ([(use, dice.randint(1, 4)) for use in uses], dice.choice((1, 2, 4))) for part, uses in TIERS.items()
    }
    for good in GOODS:
        uses = [(dice.choices(tuple(TIERS), (4, 3, 3, 4))[0], dice.randint(1, 6))]
        if dice.random() < 0.6:
            uses.append((dice.choice((*BINDERS, *(f"any {first}" for _, first in CLASSES))), dice.randint(1, 4)))
        plans[good] = (uses, dice.choice((1, 1, 1, 2, 3)))
    return {f"{made}.json": file for made, file in _files(plans, dice.choice(BINDERS))}


def _files(plans: dict[str, Any], binder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for (raw, first), materials in CLASSES.items():
        for material in materials:
            names = {"raw": f"{material}_{raw}", "first": f"{material}_{first}", "binder": binder}
            names |= {part: f"{material}_{part}" for part in plans if part != "first"}
            for made, (uses, count) in plans.items():
                listed = [used for use, number in uses for used in [_named(use, names)] * number]
                file: dict[str, Any] = {"type": "minecraft:crafting_shapeless", "ingredients": listed}
                if made == "first":
                    file["group"] = f"{first}s"
                yield names[made], {**file, "result": {"item": NAMESPACE + names[made], "count": count}}


def _named(use: str, names: dict[str, str]) -> dict[str, str]:
    kind = use.removeprefix("any ")
    if use != kind and not names["first"].endswith(kind):  # of its own class, a good takes its own material
        return {"tag": f"{NAMESPACE}{kind}s"}
    return {"item": NAMESPACE + names.get("first" if use != kind else use, use)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a world's recipes to a folder."""
    parser = argparse.ArgumentParser(program("atod_envs.textcraft.generate"), description="Write a world of recipes.")
    parser.add_argument("--out", required=True, type=Path, help="data folder; the files go to its folder 'recipes'")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s, the built-in world")
    given = parser.parse_args(arguments)
    folder, files = given.out / "recipes", make_recipes(given.seed)
    write_texts(folder, {name: json.dumps(file, indent=1) for name, file in files.items()}, "--out")
    print(f"{folder}: {len(files):,} recipes")


if __name__ == "__main__":
    with stoppable():
        main()
