"""The changeable state of one episode, as relations over the objects of its game.

Invariant: `rows` and `columns` are two views of the same relations, and only the predicates that some action changes
are copied from the game; the rest is shared by all its episodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atod_envs.alfworld.engine.game import Game


class World:
    """Facts of one moment.

    Attributes:
        game: what never changes.
        unary: per predicate, the set of objects for which it holds.
        rows: per predicate, object to the set of second arguments.
        columns: per predicate, object to the set of first arguments.
        names: the game's display names, by object.
        types: the game's sets of objects, by type.
    """

    __slots__ = ("columns", "game", "names", "rows", "types", "unary")

    def __init__(self, game: Game) -> None:
        self.game = game
        self.names = game.names
        self.types = game.types
        self.restart()

    def restart(self) -> None:
        """Go back to the initial state."""
        game = self.game
        self.unary = list(game.unary)
        self.rows = list(game.rows)
        self.columns = list(game.columns)
        for number in game.rules.changing:
            self.rows[number] = dict(self.rows[number])
            self.columns[number] = dict(self.columns[number])
