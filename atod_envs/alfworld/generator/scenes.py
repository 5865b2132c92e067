"""Worlds: a furnished layout and one task in it.

The invariant: a world is a pure function of its layout, goal and dice; its goal is reachable and not yet reached,
since a goal object always starts outside the goal's receptacle class (or unclean, not hot, not cool) and everything
that its task needs stands in the room. Names (``cabinet 1``) follow the published rule: within a class, ids sorted
descending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atod_envs.alfworld.generator.rooms import RoomLayout, dice_of, digest, identifier
from atod_envs.alfworld.household import ABLE, LAMP, LOOK, PROCESSES, TWO, Room, tables, takes
from atod_envs.dice import Dice

INSTANCE_SIDES = 4
"""One world in this many is kept for ``valid_seen``; the others are for ``train``."""

CROWD = 4
"""However many receptacles of one class a room has, together they draw no more things than this many would."""

UNLIKELY = 2
"""Weight (per mille) of a place that can take a thing but was never seen to hold it."""


@dataclass(frozen=True, slots=True)
class SceneGoal:
    """What is asked for, in class names; an empty string where the task type has no such part."""

    task_type: str
    thing: str
    receptacle: str = ""
    lamp: str = ""

    @property
    def folder(self) -> str:
        """The first part of the published folder name, without the scene."""
        return f"{self.task_type}-{self.thing}-None-{self.receptacle or self.lamp}"


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: its class, its id in the problem file, and the index of the spot that holds it."""

    kind: str
    ident: str
    spot: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A layout, the objects in it, and a goal."""

    layout: RoomLayout
    things: tuple[Thing, ...]
    goal: SceneGoal

    @property
    def fingerprint(self) -> int:
        """A hash of everything that a player can tell apart: receptacles, contents, goal."""
        return digest(
            self.layout.signature,
            *(f"{spot.ident}@{spot.location}" for spot in self.layout.spots),
            *sorted(f"{thing.ident}<{self.layout.spots[thing.spot].ident}" for thing in self.things),
            self.goal.folder,
        )

    @property
    def held_out(self) -> bool:
        """Whether this world is kept for ``valid_seen``."""
        return self.fingerprint % INSTANCE_SIDES == 0


def display_names(idents: Sequence[str]) -> dict[str, str]:
    """Names as the game shows them, by id: class and number, counted down in the order of the lower-cased ids."""
    classes: dict[str, list[str]] = {}
    for ident in sorted(idents, key=str.lower):
        name = ident.split("_bar_", 1)[0].lower()
        if "basin" in ident.lower():
            name += "basin"
        classes.setdefault(name, []).append(ident)
    return {
        ident: f"{name} {number}"
        for name, members in classes.items()
        for ident, number in zip(members, range(len(members), 0, -1), strict=True)
    }


def possible_goals(layout: RoomLayout, task_type: str) -> dict[str, list[SceneGoal]]:
    """The goals of one task type that make sense in a layout, by object class.

    Raises:
        ValueError: rooms of this kind have no such task.
    """
    room = layout.room
    if task_type not in room.task_types:
        raise ValueError(f"a {room.name} has no task {task_type!r}; it has {', '.join(room.task_types)}")
    kinds = list(dict.fromkeys(spot.kind for spot in layout.spots))
    process = PROCESSES.get(task_type)
    goals: dict[str, list[SceneGoal]] = {}
    for thing in room.things:
        if process is not None and thing not in ABLE[process.able]:
            continue
        if task_type == LOOK:
            if _places(thing, kinds):
                goals[thing] = [SceneGoal(task_type, thing, lamp=LAMP)]
            continue
        for target in kinds:
            if not takes(target, thing) or target == "SinkBasin" or (process is not None and target == process.station):
                continue
            if any(kind != target for kind in _places(thing, kinds)):
                goals.setdefault(thing, []).append(SceneGoal(task_type, thing, receptacle=target))
    return goals


def choose_goal(goals: Mapping[str, Sequence[SceneGoal]], dice: Dice) -> SceneGoal:
    """Draw one of the :func:`possible_goals`: first the object class, then where it shall go."""
    return dice.pick(goals[dice.pick(list(goals))])


def furnish(layout: RoomLayout, goal: SceneGoal, dice: Dice) -> Scene:
    """Put objects into a layout so that the goal can be reached and is not reached yet."""
    room = layout.room
    wanted = dice.between(2, 3) if goal.task_type == TWO else dice.between(1, 2)
    kinds = [goal.thing] * wanted + _company(room, goal, wanted, dice)
    spot_kinds = [spot.kind for spot in layout.spots]
    lamps = [LAMP] if _places(LAMP, spot_kinds) else []
    taken = {spot.ident for spot in layout.spots}
    things: list[Thing] = []
    load = [0] * len(layout.spots)
    crowd = Counter(spot_kinds)
    for kind in lamps + kinds:
        weights = [
            _likely(kind, spot_kind) * min(1, CROWD / crowd[spot_kind]) / (1 + used)
            for spot_kind, used in zip(spot_kinds, load, strict=True)
        ]
        if kind == goal.thing and goal.receptacle:
            weights = [
                0.0 if spot_kind == goal.receptacle else weight
                for spot_kind, weight in zip(spot_kinds, weights, strict=True)
            ]
        if not any(weights):
            continue  # nothing in this room takes it
        index = dice.weighted(range(len(load)), weights)
        load[index] += 1
        x, y, z = layout.spots[index].at
        at = (
            round(x + dice.between(-20, 20) / 100, 2),
            round(y + 0.1, 2),
            round(z + dice.between(-20, 20) / 100, 2),
        )
        things.append(Thing(kind, identifier(kind, at, taken), index))
    return Scene(layout, tuple(things), goal)


def make_scene(layout: RoomLayout, goal: SceneGoal, *, held_out: bool | None, key: object) -> Scene:
    """Furnish a layout for a goal.

    Args:
        layout: the room.
        goal: what is asked for; must be possible there.
        held_out: on which side of the split by instances the world must stand; ``None`` does not care.
        key: what else the world depends on (a seed, a split, an index).
    """
    attempt = 0
    while True:
        world = furnish(layout, goal, dice_of("world", key, attempt))
        if held_out is None or world.held_out == held_out:
            return world
        attempt += 1


def _company(room: Room, goal: SceneGoal, wanted: int, dice: Dice) -> list[str]:
    """Draw the classes of the other objects."""
    total = dice.between(*room.stocked)
    others: Mapping[str, tuple[int, int]] = {kind: span for kind, span in room.things.items() if kind != goal.thing}
    drawn: list[str] = []
    for kind, (fewest, most) in others.items():
        drawn += [kind] * dice.between(fewest, most)
    drawn = dice.shuffled(drawn)[: max(0, total - wanted)]
    spare = [kind for kind, (_, most) in others.items() for _ in range(max(0, most - drawn.count(kind)))]
    return drawn + dice.shuffled(spare)[: max(0, total - wanted - len(drawn))]


def _likely(thing: str, receptacle: str) -> int:
    """How likely a thing stands in a receptacle of that class; 0 where it cannot."""
    seen = tables().seen_in.get(thing, {}).get(receptacle, 0)
    if thing == LAMP:
        return seen
    return max(seen, UNLIKELY) if takes(receptacle, thing) else 0


def _places(thing: str, receptacles: Sequence[str]) -> list[str]:
    """The receptacle classes in which a thing may start."""
    return [kind for kind in receptacles if _likely(thing, kind)]
