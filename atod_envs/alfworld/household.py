"""What every household knows: which things stand where, what may be done to them, which rooms exist.

The invariant: class names are ALFRED's CamelCase names (``CounterTop``), and the tables are constants: the same on
every machine and never changed at run time. ``assets/household.json`` holds two of them:

- ``contains``: which receptacle class can take which object classes (the ``canContain`` facts of the published worlds);
- ``seen_in``: for an object class, how often (per mille) a single receptacle of a class holds at least one such
  object in the published training worlds in which the object class occurs at all. The generator furnishes by it, and
  the scripted expert looks in likely places first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

PICK = "pick_and_place_simple"
LOOK = "look_at_obj_in_light"
CLEAN = "pick_clean_then_place_in_recep"
HEAT = "pick_heat_then_place_in_recep"
COOL = "pick_cool_then_place_in_recep"
TWO = "pick_two_obj_and_place"
TASK_TYPES = (PICK, LOOK, CLEAN, HEAT, COOL, TWO)
"""The six task types that the reference plays, by its numbers 1 to 6."""

LAMP = "DeskLamp"
"""The lamp of generated worlds; published worlds also know one other, which no published task needs."""
LAMPS = (LAMP, "FloorLamp")
OPENABLE = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})


@dataclass(frozen=True, slots=True)
class Process:
    """A task type that changes the object on the way.

    Attributes:
        verb: the command's first word.
        station: receptacle class at which it is done.
        able: predicate of the objects that allow it.
        done: predicate that it makes true.
    """

    verb: str
    station: str
    able: str
    done: str


PROCESSES: Mapping[str, Process] = MappingProxyType(
    {
        CLEAN: Process("clean", "SinkBasin", "cleanable", "isClean"),
        HEAT: Process("heat", "Microwave", "heatable", "isHot"),
        COOL: Process("cool", "Fridge", "coolable", "isCool"),
    }
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ABLE: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "cleanable": _names(
            "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug Pan Plate Pot Potato "
            "SoapBar Spatula Spoon Tomato"
        ),
        "heatable": _names("Apple Bread Cup Egg Mug Plate Potato Tomato"),
        "coolable": _names("Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle"),
        "toggleable": frozenset(LAMPS),
        "sliceable": _names("Apple Bread Egg Lettuce Potato Tomato"),
        "isReceptacleObject": _names("Bowl Box Cup Mug Pan Plate Pot"),
    }
)


@dataclass(frozen=True, slots=True)
class Tables:
    """The two tables of ``assets/household.json``; see the module's docstring."""

    contains: Mapping[str, frozenset[str]]
    seen_in: Mapping[str, Mapping[str, int]]


@cache
def tables() -> Tables:
    """Read the tables once."""
    raw = json.loads((resources.files(__package__) / "assets" / "household.json").read_text(encoding="utf-8"))
    return Tables(
        contains=MappingProxyType({kind: frozenset(names.split()) for kind, names in raw["contains"].items()}),
        seen_in=MappingProxyType({kind: MappingProxyType(places) for kind, places in raw["seen_in"].items()}),
    )


def takes(receptacle: str, thing: str) -> bool:
    """Whether a receptacle of that class can hold an object of that class."""
    return thing in tables().contains.get(receptacle, frozenset())


def spoken(kind: str) -> str:
    """A class name as people write it: ``CreditCard`` becomes ``credit card``, ``CD`` becomes ``CD``."""
    if kind.isupper():
        return kind
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind).split()
    text = " ".join(words)
    return {"t v stand": "TV stand", "glassbottle": "glass bottle"}.get(text, text)


@dataclass(frozen=True, slots=True)
class Room:
    """How rooms of one kind are furnished.

    Attributes:
        name: for people.
        first_scene: scene numbers start after this.
        receptacles: class -> fewest and most of it.
        things: object class -> fewest and most of it (the objects that a task is about come on top).
        count: fewest and most receptacles in all, by filling up from ``receptacles``.
        stocked: fewest and most movable objects in all.
        shared: probability that a receptacle shares its neighbour's location, where both are of a class in ``SHARING``.
        task_types: what can be asked for here.
    """

    name: str
    first_scene: int
    receptacles: Mapping[str, tuple[int, int]]
    things: Mapping[str, tuple[int, int]]
    count: tuple[int, int]
    stocked: tuple[int, int]
    shared: float
    task_types: tuple[str, ...]


SHARING = frozenset({"Cabinet", "Drawer", "Shelf", "StoveBurner"})


def _several(names: str, fewest: int, most: int) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names.split(), (fewest, most))


KITCHEN = Room(
    "kitchen",
    0,
    {
        **_several("Fridge Microwave SinkBasin CoffeeMachine Toaster GarbageCan", 1, 1),
        **_several("StoveBurner", 4, 4),
        **_several("CounterTop", 2, 3),
        **_several("Cabinet", 12, 20),
        **_several("Drawer", 5, 9),
        **_several("DiningTable SideTable", 0, 1),
        **_several("Shelf", 0, 3),
    },
    {
        **_several(
            "Apple Egg Tomato Potato Bread Lettuce Mug Cup Plate Bowl Fork Spoon Knife ButterKnife Spatula", 1, 3
        ),
        **_several("PepperShaker SaltShaker DishSponge SoapBottle Pot Pan", 1, 3),
        **_several("Kettle Ladle WineBottle Glassbottle Vase CellPhone CreditCard Book Pencil Pen Statue", 0, 1),
    },
    (30, 40),
    (40, 52),
    0.12,
    (PICK, CLEAN, HEAT, COOL, TWO),
)

LIVING_ROOM = Room(
    "living room",
    200,
    {
        **_several("GarbageCan Sofa CoffeeTable", 1, 1),
        **_several("ArmChair DiningTable TVStand Dresser Desk", 0, 2),
        **_several("SideTable", 1, 3),
        **_several("Shelf Cabinet", 3, 9),
        **_several("Drawer", 8, 16),
        **_several("Ottoman Safe", 0, 1),
    },
    {
        **_several("CreditCard RemoteControl KeyChain Statue Vase Laptop Box Newspaper Watch", 2, 4),
        **_several("Pillow TissueBox Plate WateringCan Book CellPhone Pen Pencil Candle Bowl", 1, 3),
    },
    (30, 38),
    (40, 50),
    0.12,
    (PICK, LOOK, TWO),
)

BEDROOM = Room(
    "bedroom",
    300,
    {
        **_several("Bed", 1, 2),
        **_several("GarbageCan", 1, 1),
        **_several("Desk SideTable", 1, 2),
        **_several("Dresser ArmChair LaundryHamper Safe", 0, 1),
        **_several("Drawer", 9, 16),
        **_several("Shelf", 6, 12),
        **_several("Cabinet", 0, 4),
    },
    {
        **_several("Pen Pencil CD CellPhone KeyChain CreditCard Book AlarmClock Pillow Laptop", 2, 4),
        **_several("Mug Bowl Box Cloth TissueBox Watch Vase Statue RemoteControl", 0, 2),
        **_several("BaseballBat BasketBall TennisRacket TeddyBear", 0, 1),
    },
    (30, 38),
    (40, 48),
    0.12,
    (PICK, LOOK, TWO),
)

BATHROOM = Room(
    "bathroom",
    400,
    {
        **_several("Toilet GarbageCan ToiletPaperHanger CounterTop BathtubBasin", 1, 1),
        **_several("SinkBasin TowelHolder HandTowelHolder", 1, 2),
        **_several("Cart SideTable Dresser", 0, 1),
        **_several("Cabinet", 6, 12),
        **_several("Drawer", 5, 11),
        **_several("Shelf", 2, 6),
    },
    {
        **_several("ToiletPaper SoapBar Candle SprayBottle SoapBottle Cloth", 3, 8),
        **_several("DishSponge TissueBox HandTowel Towel", 1, 4),
    },
    (30, 36),
    (40, 46),
    0.12,
    (PICK, CLEAN, TWO),
)

FLAT = Room(
    "one-room flat",
    500,
    {
        **_several("Fridge Microwave SinkBasin GarbageCan", 1, 1),
        **_several("CounterTop", 1, 2),
        **_several("Cabinet Drawer", 1, 3),
        **_several("Desk SideTable Shelf DiningTable Bed Sofa", 0, 1),
    },
    {
        **_several("Apple Potato Tomato Egg Bread Lettuce Mug Cup Plate Bowl Fork Spoon Knife SoapBar Cloth", 0, 1),
        **_several("Book Pen KeyChain CreditCard CellPhone Pillow", 0, 1),
    },
    (8, 14),
    (8, 12),
    0.0,
    TASK_TYPES,
)

REAL_ROOMS = (KITCHEN, LIVING_ROOM, BEDROOM, BATHROOM)
SIZES: Mapping[str, tuple[Room, ...]] = MappingProxyType({"small": (FLAT,), "real": REAL_ROOMS})
