"""Room layouts: which receptacles a scene has, how they are called, and where they stand.

The invariant: a layout is a pure function of its key, on every machine and Python version (dice are seeded by BLAKE2),
and every set of receptacles belongs to one side, seen or unseen, by its own digest: no unseen scene can ever have the
receptacles of a seen one, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from atod_envs.alfworld.household import LAMP, LOOK, SHARING, Room, tables
from atod_envs.dice import Dice

UNSEEN_SHARE = 3
"""One receptacle set in this many belongs to the unseen side."""


def digest(*parts: object) -> int:
    """A 128-bit hash of the parts' text that is the same everywhere."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def dice_of(*key: object) -> Dice:
    """Random choices that follow from a key."""
    return Dice(digest(*key))


@dataclass(frozen=True, slots=True)
class Spot:
    """A receptacle that stands somewhere.

    Attributes:
        kind: its class.
        ident: its id in the problem file.
        location: id of the place from which the agent reaches it; several receptacles may share one.
        at: coordinates in metres (x, y, z), for the ids of what lies in it.
    """

    kind: str
    ident: str
    location: str
    at: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class RoomLayout:
    """The receptacles of a scene and where the agent starts."""

    scene: int
    room: Room
    spots: tuple[Spot, ...]
    start: str

    @property
    def signature(self) -> str:
        """The set of receptacles with their numbers, as text."""
        return signature(spot.kind for spot in self.spots)


def signature(kinds: Iterable[str]) -> str:
    """A receptacle set as text, e.g. ``Cabinet*2 Fridge*1``."""
    return " ".join(f"{kind}*{number}" for kind, number in sorted(Counter(kinds).items()))


def is_unseen(receptacles: str) -> bool:
    """On which side a receptacle set stands; see the module's invariant."""
    return digest("side", receptacles) % UNSEEN_SHARE == 0


def draw_kinds(room: Room, dice: Dice) -> list[str]:
    """Draw the receptacle classes of one room within the room's limits."""
    fewest, most = room.count
    lamp_places = tables().seen_in[LAMP]
    while True:
        kinds: list[str] = []
        for kind, (low, high) in room.receptacles.items():
            kinds += [kind] * dice.between(low, high)
        lit = LOOK not in room.task_types or any(kind in lamp_places for kind in kinds)
        if lit and fewest <= len(kinds) <= most:
            return kinds


def make_layout(room: Room, scene: int, *, unseen: bool, key: object) -> RoomLayout:
    """Make the layout of a scene.

    Args:
        room: what kind of room.
        scene: its number.
        unseen: whether its receptacle set must be on the unseen side.
        key: what else the layout depends on (a seed, a name).
    """
    attempt = 0
    while True:
        dice = dice_of("layout", key, scene, unseen, attempt)
        kinds = draw_kinds(room, dice)
        if is_unseen(signature(kinds)) == unseen:
            return _arranged(room, scene, kinds, dice)
        attempt += 1


def _arranged(room: Room, scene: int, kinds: list[str], dice: Dice) -> RoomLayout:
    """Give the receptacles coordinates and ids, and the agent places to stand."""
    cells = dice.shuffled((x, z) for x in range(-8, 9) for z in range(-8, 9))
    spots: list[Spot] = []
    taken: set[str] = set()
    for kind in kinds:
        neighbour = spots[-1] if spots and spots[-1].kind == kind and kind in SHARING else None
        if neighbour is not None and dice.roll() < room.shared:
            location = neighbour.location
            x, y, z = neighbour.at
            at = (x, round(y + 0.31 * dice.between(1, 3), 2), z)
        else:
            grid_x, grid_z = cells.pop()
            location = (
                f"loc_bar_{signed(grid_x)}_bar_{signed(grid_z)}_bar_{dice.below(4)}_bar_{dice.pick((30, 45, 60))}"
            )
            at = (
                round(grid_x / 4 + dice.below(25) / 100, 2),
                round(dice.between(10, 150) / 100, 2),
                round(grid_z / 4 + dice.below(25) / 100, 2),
            )
        ident = identifier(kind, at, taken)
        spots.append(Spot(kind, ident, location, at))
    grid_x, grid_z = cells.pop()
    return RoomLayout(
        scene, room, tuple(spots), f"loc_bar_{signed(grid_x)}_bar_{signed(grid_z)}_bar_{dice.below(4)}_bar_30"
    )


def signed(number: int) -> str:
    """An integer as it stands in location ids."""
    return f"_minus_{-number}" if number < 0 else str(number)


def identifier(kind: str, at: tuple[float, float, float], taken: set[str]) -> str:
    """A free id for something at these coordinates; it is added to ``taken``.

    Basins are named as part of what they belong to, because that is how players of these files find their names.
    """
    x, y, z = at
    while True:
        place = "_bar_".join(_metres(value) for value in (x, y, z))
        ident = (
            f"{kind.removesuffix('Basin')}_bar_{place}_bar_{kind}" if kind.endswith("Basin") else f"{kind}_bar_{place}"
        )
        if ident not in taken:
            taken.add(ident)
            return ident
        x = round(x + 0.01, 2)


def _metres(value: float) -> str:
    sign = "_minus_" if value < 0 else "_plus_"
    return f"{sign}{abs(value):05.2f}".replace(".", "_dot_")
