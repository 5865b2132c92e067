"""Facts about the objects of a game: those that no action changes, and those of one moment of an episode.

Invariant: `rows` and `columns` are two views of the same relations, and only the predicates that some action changes
are copied from the game; the rest is shared by all its episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Relation: TypeAlias = dict[int, int]
"""Object to the bit set of the objects to which it is related."""

Moment: TypeAlias = tuple[list[int], list[Relation], list[Relation]]
"""What can change, in a form that can be kept and sent: the unary predicates, and rows and columns of what changes."""


@dataclass(frozen=True, slots=True, eq=False)
class StaticFacts:
    """What is the same in all episodes of a game.

    Attributes:
        objects: the ids, by number.
        names: the display names, by number.
        types: bit sets of objects, by type.
        unary: per predicate, the set of objects for which it holds at the start.
        rows: per predicate, object to the set of second arguments at the start.
        columns: per predicate, object to the set of first arguments at the start.
        changing: the two-place predicates that actions change.
        task_text: the task sentence of the game's file.
        memo: lists of things that have been put into words.
    """

    objects: tuple[str, ...]
    names: tuple[str, ...]
    types: Sequence[int]
    unary: Sequence[int]
    rows: Sequence[Relation]
    columns: Sequence[Relation]
    changing: tuple[int, ...]
    task_text: str
    memo: dict[tuple[object, ...], str] = field(default_factory=dict)


class Facts:
    """Facts of one moment.

    Attributes:
        static: what never changes.
        unary: per predicate, the set of objects for which it holds.
        rows: per predicate, object to the set of second arguments.
        columns: per predicate, object to the set of first arguments.
        names: the game's display names, by object.
        types: the game's sets of objects, by type.
    """

    __slots__ = ("columns", "names", "rows", "static", "types", "unary")

    def __init__(self, static: StaticFacts) -> None:
        self.static = static
        self.names = static.names
        self.types = static.types
        self.restart()

    def restart(self) -> None:
        """Go back to the initial state."""
        static = self.static
        self.unary = list(static.unary)
        self.rows = list(static.rows)
        self.columns = list(static.columns)
        for number in static.changing:
            self.rows[number] = dict(self.rows[number])
            self.columns[number] = dict(self.columns[number])

    def moment(self) -> Moment:
        """A copy of the present state, to come back to it with :meth:`return_to`."""
        changing = self.static.changing
        rows = [dict(self.rows[number]) for number in changing]
        return list(self.unary), rows, [dict(self.columns[number]) for number in changing]

    def return_to(self, moment: Moment) -> None:
        """Go back to a state that :meth:`moment` gave; it must be of the same game."""
        unary, rows, columns = moment
        self.unary = list(unary)
        for place, number in enumerate(self.static.changing):
            self.rows[number] = dict(rows[place])
            self.columns[number] = dict(columns[place])
