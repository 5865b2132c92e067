"""Shortest plans, with the whole state known.

The invariant: :func:`shortest_plan` returns a plan of the least possible number of commands, or says that there is
none.

Method. The six task types need few changes of the world, and every change has a command of its own. Only objects of
the goal's class and lamps matter: the agent has one hand, receptacles never fill up, and closing, looking and slicing
help nothing. A winning plan therefore holds, in this order, a fixed chain of *subgoals* (take it here, wash it there,
put it down there), and between them only what the rules force: ``go to`` when the next subgoal is at another location,
and one ``open`` for a closed receptacle. For given choices (which object, which station, which lamp, which target)
that chain is as short as any plan with these choices can be, so trying all choices is exact. If the hand holds
something useless, one subgoal more puts it down, again trying every place. Enumeration takes well under a millisecond
for most games.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from atod_envs.alfworld.household import LOOK, PROCESSES, TWO

MOVE = "move {thing} to {receptacle}"
"""How the present release puts things down."""
PUT = "put {thing} in/on {receptacle}"
"""How the older release does."""


@dataclass(frozen=True, slots=True)
class Situation:
    """A moment of a game, by display names (``cabinet 1``): all that decides which plan is shortest.

    Attributes:
        task_type: one of the six.
        here: the agent's location.
        reach: receptacle -> the location that it is reached from.
        closed: receptacles that are shut.
        things: objects of the goal's class -> receptacles that hold them. Published games have things in two at once (a
            mug in a coffee machine on a counter); taking it from one leaves it in the other, even while it is held.
        loose: those of the things that can be taken.
        able: those of the things that the task's process can be done to; all, if it has none.
        done: those of the things that are already clean, hot or cool as the goal asks, and lamps that are switched on.
        targets: receptacles of the goal's class, if such receptacles take such things.
        stations: receptacles at which the task's process is done.
        lamps: lamps of the goal's class -> receptacles that hold them.
        holding: the object in the hand, if any.
        droppable: receptacles that take what the hand holds.
        put: how to put something down.
    """

    task_type: str
    here: str
    reach: Mapping[str, str]
    closed: frozenset[str]
    things: Mapping[str, tuple[str, ...]]
    loose: frozenset[str]
    able: frozenset[str]
    done: frozenset[str]
    targets: tuple[str, ...] = ()
    stations: tuple[str, ...] = ()
    lamps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    holding: str | None = None
    droppable: tuple[str, ...] = ()
    put: str = MOVE


@dataclass(frozen=True, slots=True)
class Subgoal:
    """One necessary command: where it happens, whether the door must be open, and its words (none: just be there)."""

    receptacle: str
    needs_open: bool
    command: str = ""


@dataclass(slots=True)
class _Plan:
    here: str
    opened: set[str] = field(default_factory=set)
    commands: list[str] = field(default_factory=list)


class Unsolvable(ValueError):
    """No sequence of commands reaches the goal."""


def shortest_plan(situation: Situation) -> tuple[str, ...]:
    """The shortest sequence of commands that reaches the goal; empty if it is reached already.

    Raises:
        Unsolvable: there is none.
    """
    if reached(situation):
        return ()
    best: list[str] | None = None
    for subgoals in _chains(situation):
        plan = _carried_out(situation, subgoals, None if best is None else len(best))
        if plan is not None:
            best = plan
    if best is None:
        raise Unsolvable(
            f"no plan for this {situation.task_type} task: something that it needs is missing or out of reach"
        )
    return tuple(best)


def reached(situation: Situation) -> bool:
    """Whether the goal holds in this state."""
    if situation.task_type == LOOK:
        return situation.holding in situation.things and any(
            situation.reach[place] == situation.here
            for lamp, places in situation.lamps.items()
            if lamp in situation.done
            for place in places
        )
    members = list(situation.things)
    if situation.task_type in PROCESSES:
        members = [name for name in members if name in situation.done and name in situation.able]
    needed = 2 if situation.task_type == TWO else 1
    return any(sum(target in situation.things[name] for name in members) >= needed for target in situation.targets)


def _chains(situation: Situation) -> Iterator[list[Subgoal]]:
    """Every chain of subgoals that could be the skeleton of a shortest plan."""
    held = situation.holding
    if held is None:
        yield from _from_empty_hand(situation, situation.things)
        return
    if held in situation.things:
        yield from _from_hand(situation, held, [], situation.things)
    for place in situation.droppable:
        after = dict(situation.things)
        if held in after:
            after[held] = (*after[held], place)
        for chain in _from_empty_hand(situation, after):
            yield [_put(situation, held, place), *chain]


def _from_empty_hand(situation: Situation, things: Mapping[str, tuple[str, ...]]) -> Iterator[list[Subgoal]]:
    for name, places in things.items():
        if name in situation.loose:
            for place in places:
                left = {**things, name: tuple(other for other in places if other != place)}
                yield from _from_hand(situation, name, [_take(name, place)], left)


def _from_hand(
    situation: Situation, name: str, begin: list[Subgoal], things: Mapping[str, tuple[str, ...]]
) -> Iterator[list[Subgoal]]:
    """Chains that bring a thing, which is in the hand after ``begin``, to where the task wants it."""
    process = PROCESSES.get(situation.task_type)
    if situation.task_type == LOOK:
        for lamp, places in situation.lamps.items():
            for place in places:
                yield [*begin, Subgoal(place, False, "" if lamp in situation.done else f"use {lamp}")]
    elif situation.task_type == TWO:
        yield from _second(situation, name, begin, things)
    elif process is None or (name in situation.able and name in situation.done):
        for target in situation.targets:
            yield [*begin, _put(situation, name, target)]
    elif name in situation.able:
        for station in situation.stations:
            changed = [*begin, Subgoal(station, False, f"{process.verb} {name} with {station}")]
            if any(target in things[name] for target in situation.targets):
                yield changed  # by the facts it has never left one of its places
            for target in situation.targets:
                yield [*changed, _put(situation, name, target)]


def _second(
    situation: Situation, name: str, begin: list[Subgoal], things: Mapping[str, tuple[str, ...]]
) -> Iterator[list[Subgoal]]:
    """Chains that put a thing from the hand to another of its class, which is there or follows it."""
    for target in situation.targets:
        first = [*begin, _put(situation, name, target)]
        for other, places in things.items():
            if other == name:
                continue
            if target in places:
                yield first
            elif other in situation.loose:
                for place in places:
                    yield [*first, _take(other, place), _put(situation, other, target)]


def _carried_out(situation: Situation, subgoals: list[Subgoal], bound: int | None) -> list[str] | None:
    """The commands of a chain with the walking and opening it needs; ``None`` unless shorter than ``bound``."""
    plan = _Plan(situation.here)
    for subgoal in subgoals:
        place = subgoal.receptacle
        location = situation.reach[place]
        if location != plan.here:
            plan.commands.append(f"go to {place}")
            plan.here = location
        if subgoal.needs_open and place in situation.closed and place not in plan.opened:
            plan.commands.append(f"open {place}")
            plan.opened.add(place)
        if subgoal.command:
            plan.commands.append(subgoal.command)
        if bound is not None and len(plan.commands) >= bound:
            return None
    return plan.commands


def _take(name: str, place: str) -> Subgoal:
    return Subgoal(place, True, f"take {name} from {place}")


def _put(situation: Situation, name: str, place: str) -> Subgoal:
    return Subgoal(place, True, situation.put.format(thing=name, receptacle=place))
