"""An omniscient planner: shortest plans for compiled games, from the start or from any moment of an episode.

The invariant: a plan's length is the least number of commands that wins, and every command of it is admissible when its
turn comes. What makes plans short is :mod:`atod_envs.alfworld.planner.shortest_plan`; here a game's facts are read off
for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from atod_envs.alfworld.engine.facts import Facts
from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.household import LOOK, PICK, PROCESSES, TWO
from atod_envs.alfworld.planner.shortest_plan import MOVE, PUT, Situation, Unsolvable, shortest_plan

__all__ = ["Unsolvable", "plan", "read_situation"]

_TOGGLED = "istoggled"


def plan(game: Game, facts: Facts | None = None) -> tuple[str, ...]:
    """A shortest plan.

    Args:
        game: the compiled game.
        facts: a moment of an episode of it; ``None`` is the start.

    Returns:
        Commands; none if the goal holds already.

    Raises:
        Unsolvable: no plan wins.
    """
    return shortest_plan(read_situation(game, facts))


def read_situation(game: Game, facts: Facts | None = None) -> Situation:
    """What decides which plan is shortest, read off a game's facts.

    The goal's shape tells the task type, so that files without ``traj_data.json`` do.
    """
    return _Reader(game, game.start if facts is None else facts).situation()


def _wording(game: Game) -> str:
    """How the game's release puts things down, seen from its own commands."""
    for command in game.walkthrough:
        if command.startswith(("move ", "put ")):
            return MOVE if command.startswith("move ") else PUT
    session = GameSession(game)
    for place in [command for command in session.admissible if command.startswith("go to ")]:
        session.reset()
        session.step(place)
        session.step(place.replace("go to", "open", 1))
        for take in [command for command in session.admissible if command.startswith("take ")]:
            session.step(take)
            if any(command.startswith("move ") for command in session.admissible):
                return MOVE
            if any(command.startswith("put ") for command in session.admissible):
                return PUT
            break
    return MOVE


class _Reader:
    def __init__(self, game: Game, facts: Facts) -> None:
        self._game, self._facts = game, facts
        self._number = game.rules.names.predicates

    def situation(self) -> Situation:
        game, names = self._game, self._game.names
        task_type = self._task_type()
        process = PROCESSES.get(task_type)
        wanted, lamps, targets = self._classes()
        things = set(self._members("objecttype", wanted))
        lit = set(self._members("objecttype", lamps))
        takes = self._row("cancontain", targets)
        held = next(iter(self._members_of_row("holds")), None)
        held_classes = 0 if held is None else self._row("objecttype", held)
        able = things & set(self._bits(self._unary(process.able))) if process else things
        done = set(self._bits(self._unary(process.done))) if process else set()
        return Situation(
            task_type=task_type,
            here=names[next(self._members_of_row("atlocation"))],
            reach={
                names[place]: names[location]
                for place, row in self._facts.rows[self._number["receptacleatlocation"]].items()
                for location in self._bits(row)
            },
            closed=frozenset(names[place] for place in self._bits(self._unary("openable") & ~self._unary("opened"))),
            things={names[thing]: self._places(thing) for thing in sorted(things)},
            loose=frozenset(names[thing] for thing in things & set(self._bits(self._unary("pickupable")))),
            able=frozenset(names[thing] for thing in able),
            done=frozenset(names[thing] for thing in done | set(self._bits(self._unary(_TOGGLED)))),
            targets=tuple(names[place] for place in self._members("receptacletype", targets))
            if wanted is not None and takes >> wanted & 1
            else (),
            stations=self._of_class(process.station) if process else (),
            lamps={
                names[lamp]: self._places(lamp) for lamp in sorted(lit & set(self._bits(self._unary("toggleable"))))
            },
            holding=None if held is None else names[held],
            droppable=tuple(
                names[place]
                for place, row in self._facts.rows[self._number["receptacletype"]].items()
                if any(self._row("cancontain", kind) & held_classes for kind in self._bits(row))
            )
            if held_classes
            else (),
            put=_wording(game),
        )

    def _task_type(self) -> str:
        mentioned = {name for name, number in self._number.items() if self._game.goal.reads >> number & 1}
        if _TOGGLED in mentioned:
            return LOOK
        for task_type, process in PROCESSES.items():
            if process.done.lower() in mentioned:
                return task_type
        return TWO if self._game.goal_facts == 2 else PICK

    def _classes(self) -> tuple[int | None, int | None, int | None]:
        """The goal's classes, as object numbers: of the thing, the lamp, the receptacle."""
        wanted = lamp = target = None
        receptacle_classes = {
            kind for row in self._facts.rows[self._number["receptacletype"]].values() for kind in self._bits(row)
        }
        for constant in self._game.goal_constants:
            name = self._game.objects[constant] if constant < len(self._game.objects) else ""
            if name.endswith("lamptype") and self._task_type() == LOOK:
                lamp = constant
            elif constant in receptacle_classes:
                target = constant
            else:
                wanted = constant
        return wanted, lamp, target

    def _of_class(self, kind: str) -> tuple[str, ...]:
        constant = self._game.index.get(f"{kind.lower()}type")
        return tuple(self._game.names[place] for place in self._members("receptacletype", constant))

    def _places(self, thing: int) -> tuple[str, ...]:
        return tuple(self._game.names[place] for place in self._bits(self._row("inreceptacle", thing)))

    def _members(self, relation: str, constant: int | None) -> Iterator[int]:
        """The objects that a relation ties to a class."""
        columns = self._facts.columns[self._number[relation]]
        return self._bits(0 if constant is None else columns.get(constant, 0))

    def _members_of_row(self, relation: str) -> Iterator[int]:
        """What a relation ties to the agent."""
        for row in self._facts.rows[self._number[relation]].values():
            yield from self._bits(row)

    def _row(self, relation: str, first: int | None) -> int:
        return 0 if first is None else self._facts.rows[self._number[relation]].get(first, 0)

    def _unary(self, predicate: str) -> int:
        return self._facts.unary[self._number[predicate.lower()]]

    @staticmethod
    def _bits(row: int) -> Iterator[int]:
        while row:
            low = row & -row
            yield low.bit_length() - 1
            row ^= low
