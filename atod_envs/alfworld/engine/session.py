"""Playing a compiled game: `GameSession` holds what changes in one episode, `Step` is what a player is shown.

Invariant: for every sequence of commands, observation, admissible commands and their order, reward, done and won equal
those of the reference (alfworld 0.4.2 on textworld 1.7.0) on the same game file. One thing is deliberately not copied,
and occurs in no released game: where a text asks for a fact that only a conditional effect changes, the reference
prints as if the condition had held.
"""

from __future__ import annotations

from typing import NamedTuple

from atod_envs.alfworld.engine.facts import Facts, Moment
from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.rules import Schema

NOTHING = "Nothing happens."
"""The answer to everything that cannot be done."""


class Step(NamedTuple):
    """What a player is shown.

    Attributes:
        observation: the game's text.
        admissible: every command that would do something now, sorted.
        reward: 1.0 while the goal holds, else 0.0.
        done: the goal holds.
        won: the goal holds.
        understood: the last command was one that could be done.
        progress: the largest share of the goal's conditions (see `goals`) that was met at one time in this episode, so
        it never falls, and is 1.0 exactly if the goal has been reached.
    """

    observation: str
    admissible: tuple[str, ...]
    reward: float
    done: bool
    won: bool
    understood: bool
    progress: float


class GameSession:
    """One episode of a game; cheap, so that thousands can be live.

    Args:
        game: the compiled game; sessions share it.

    Attributes:
        facts: the facts of the moment; to be read, not written.
        progress: as in `Step`.
    """

    __slots__ = ("_menu", "_won", "facts", "game", "progress")

    def __init__(self, game: Game) -> None:
        self.game = game
        self.facts = Facts(game.start.static)
        self._begin()

    def reset(self) -> Step:
        """Begin the episode again, and show the introduction."""
        self.facts.restart()
        self._begin()
        return self._step(self.game.intro, True)

    def step(self, command: str) -> Step:
        """Carry out a command; any string is answered as the reference answers it."""
        found = self._menu.find(command.strip())
        if found is None:
            return self._step(NOTHING, False)
        schema, values = found
        self._apply(schema, values)
        return self._step(schema.feedback(self.facts, values), True)

    @property
    def won(self) -> bool:
        """The goal holds now."""
        return self._won

    @property
    def admissible(self) -> tuple[str, ...]:
        """Every command that would do something now, sorted."""
        return self._menu.commands

    def moment(self) -> tuple[Moment, float]:
        """A copy of everything that changes, for :meth:`return_to`."""
        return self.facts.moment(), self.progress

    def return_to(self, moment: tuple[Moment, float]) -> None:
        """Go back to a state of this game that :meth:`moment` gave."""
        facts, progress = moment
        self.facts.return_to(facts)
        self._menu = self.game.menu(self.facts)
        self.progress = progress
        self._check_goal()

    def _begin(self) -> None:
        self._menu = self.game.menu(self.facts)
        self._won = False
        self.progress = 0.0
        self._check_goal()

    def _step(self, observation: str, understood: bool) -> Step:
        won = self._won
        return Step(observation, self._menu.commands, 1.0 if won else 0.0, won, won, understood, self.progress)

    def _apply(self, schema: Schema, values: tuple[int, ...]) -> None:
        game, facts = self.game, self.facts
        schema.apply(facts.unary, facts.rows, facts.columns, game.types, game.constants, game.everything, values)
        if schema.touched & game.rules.reads:
            self._menu = game.menu(facts)
        if schema.touched & game.goal.reads:
            self._check_goal()

    def _check_goal(self) -> None:
        game, facts = self.game, self.facts
        state = (facts.unary, facts.rows, facts.columns, game.types, game.goal_constants, game.everything)
        self._won = game.goal.won(*state)
        met = sum(condition(*state) for condition in game.goal.conditions)
        self.progress = max(self.progress, met / game.goal_facts)


def put_as_move(command: str, admissible: tuple[str, ...]) -> str:
    """Reword the older release's `put X in/on Y` as `move X to Y`, if only that can be done now.

    The reference does not do this; it lets a policy that learned the older wording play games of the present release.
    """
    words = command.strip()
    if words.startswith("put ") and words not in admissible:
        thing, separator, place = words[4:].partition(" in/on ")
        move = f"move {thing} to {place}"
        if separator and move in admissible:
            return move
    return command
