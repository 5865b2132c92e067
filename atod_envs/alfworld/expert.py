"""A scripted expert that knows no more than what it has been shown.

The invariant: decisions depend on the task sentence, the observations and the admissible commands alone, never on the
state of a game. Beliefs are rebuilt from what is seen, not from what was intended, so the expert can take over after
any actions of another agent (as imitation learning with corrections needs): it sees what the hand holds, what is open
and what lies here from the admissible commands, and remembers the rest.

Search is the greedy rule that is optimal for hiding places with independent odds: go where (chance of finding) /
(commands that looking costs) is highest. The chances are those of :mod:`atod_envs.alfworld.household`.

Example:
    >>> expert = ALFWorldExpert()
    >>> expert.reset(task, observation, admissible)
    >>> move = expert.act(observation, admissible)   # Move(action="go to fridge 1", thought="find egg")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from atod_envs.alfworld.beliefs import Beliefs, Task, class_of, number_of, understand
from atod_envs.alfworld.generator.rooms import dice_of
from atod_envs.alfworld.household import LOOK, PICK, PROCESSES, TWO, tables
from atod_envs.experts import Move

_RARE, _NEVER = 10.0, 0.5
"""Chances (per mille) where a thing was never seen: in a receptacle that can take it, and in one that cannot."""


class ALFWorldExpert:
    """Plays ALFWorld games of both releases; see the module's docstring.

    Args:
        seed: ``None`` searches in the best order; a number varies the order of search, the same way for the same seed
            and episode, so that demonstrations differ.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._episodes = 0
        self._task = Task(PICK, "")
        self._beliefs = Beliefs()
        self._refused: set[tuple[str, str]] = set()
        self._whim: dict[str, float] = {}

    @property
    def task(self) -> Task:
        """The task of the present episode."""
        return self._task

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode.

        Args:
            task: the task sentence.
            observation: the game's first text, which lists the receptacles.
            admissible: the commands that are allowed now.

        Raises:
            ValueError: the sentence follows none of the templates.
        """
        self._task = understand(task)
        self._beliefs = Beliefs.at_start(observation, admissible)
        self._refused = set()
        self._whim = {}
        if self._seed is not None:
            dice = dice_of("expert", self._seed, self._episodes)
            self._whim = {place: math.exp(2 * dice.roll() - 1) for place in self._beliefs.receptacles}
        self._episodes += 1

    def observe(self, action: str, observation: str, admissible: Sequence[str] = ()) -> None:
        """Take note of an action of any agent, and of the answer to it.

        Args:
            action: what was done; failed actions are fine.
            observation: the game's answer.
            admissible: the commands allowed after it; without them only the text counts.
        """
        del action  # the game's answer tells what happened, whatever was meant
        self._beliefs.see(observation, admissible)

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """Decide what to do next.

        Args:
            observation: the game's latest text.
            admissible: the commands that are allowed now.

        Returns:
            One of the admissible commands (``look`` if there is nothing better), and the sub-goal it serves.
        """
        self._beliefs.see(observation, admissible)
        move = self._decide()
        if move.action in self._beliefs.admissible:
            return move
        return Move("look" if "look" in self._beliefs.admissible or not admissible else admissible[0], move.thought)

    # ---- deciding ----

    def _decide(self) -> Move:
        task, holding = self._task, self._beliefs.holding
        if holding is not None and self._useful(holding):
            process = PROCESSES.get(task.task_type)
            if task.task_type == LOOK:
                return self._to_the_lamp()
            if process is not None and process.verb not in self._beliefs.states.get(holding, set()):
                return self._processed(holding, process.verb, process.station.lower())
            return self._put_away(holding)
        source = self._where_to_take()
        if source is None:
            if holding is not None and (dropped := self._drop_here(holding)):
                return dropped
            return self._search(task.thing, f"find {task.thing}")
        name, place = source
        if holding is not None:
            return self._drop(holding)
        return self._at(place, f"take {name} from {place}", f"take {task.thing}")

    def _useful(self, name: str) -> bool:
        return class_of(name) == self._task.thing and (name, "") not in self._refused

    def _at(self, place: str, command: str, thought: str) -> Move:
        """Do something at a receptacle: go there first, open it first."""
        if place not in self._beliefs.here:
            return Move(f"go to {place}", thought)
        if f"open {place}" in self._beliefs.admissible:
            return Move(f"open {place}", thought)
        return Move(command, thought)

    def _to_the_lamp(self) -> Move:
        lamp_class = self._task.lamp
        for command in sorted(self._beliefs.admissible):
            if command.startswith(f"use {lamp_class} "):
                return Move(command, f"use {lamp_class}")
        for lamp, place in self._beliefs.lamps.items():
            if class_of(lamp) == lamp_class and place not in self._beliefs.here:
                return Move(f"go to {place}", f"use {lamp_class}")
        return self._search(lamp_class, f"find {lamp_class}")

    def _processed(self, holding: str, verb: str, station: str) -> Move:
        beliefs = self._beliefs
        stations = self._nearest(place for place in beliefs.receptacles if class_of(place) == station)
        for place in stations:
            if place in beliefs.here:
                command = f"{verb} {holding} with {place}"
                if command in self._beliefs.admissible:
                    return Move(command, f"{verb} {self._task.thing}")
                self._refused.add((holding, ""))  # this one cannot be processed: another one will have to do
                return self._drop(holding)
        if not stations:
            return self._search(station, f"{verb} {self._task.thing}")
        return Move(f"go to {stations[0]}", f"{verb} {self._task.thing}")

    def _put_away(self, holding: str) -> Move:
        place = self._target()
        thought = f"put {self._task.thing}"
        while place is not None:
            command = self._put_command(holding, place)
            shut = f"open {place}" in self._beliefs.admissible
            if place not in self._beliefs.here or shut or command:
                return self._at(place, command, thought)
            self._refused.add((holding, place))
            place = self._target()
        return self._drop(holding)

    def _target(self) -> str | None:
        """The receptacle to fill: the one with most of what belongs there, else the handiest."""
        beliefs, task = self._beliefs, self._task
        places = [
            place
            for place in beliefs.receptacles
            if class_of(place) == task.receptacle and (beliefs.holding or "", place) not in self._refused
        ]
        if not places:
            return None
        counts = {place: self._stored(place) if task.task_type == TWO else 0 for place in places}
        nearest = self._nearest(places)
        return max(nearest, key=lambda place: (counts[place], -nearest.index(place)))

    def _stored(self, place: str) -> int:
        return sum(class_of(name) == self._task.thing for name in self._beliefs.contents.get(place, ()))

    def _nearest(self, places: Iterable[str]) -> list[str]:
        """Handiest first: here, then open, then unknown, then shut; then by number."""
        beliefs = self._beliefs

        return sorted(places, key=lambda place: (beliefs.effort(place), number_of(place)))

    def _where_to_take(self) -> tuple[str, str] | None:
        """A known goal object that is not where it belongs, and its place."""
        beliefs, task = self._beliefs, self._task
        found = {
            place: [name for name in sorted(names) if self._useful(name)] for place, names in beliefs.contents.items()
        }
        keep = self._target() if task.task_type == TWO else None
        if keep is not None and not self._stored(keep):
            keep = None
        process = PROCESSES.get(task.task_type)
        options = [(name, place) for place, names in found.items() if place != keep for name in names]
        if not options:
            return None
        order = {place: rank for rank, place in enumerate(self._nearest(found))}

        def effort(option: tuple[str, str]) -> tuple[bool, int, str]:
            name, place = option
            ready = process is not None and process.verb in beliefs.states.get(name, set())
            return (not ready, order[place], name)

        return min(options, key=effort)

    def _put_command(self, holding: str, place: str) -> str:
        """The admissible way to put something there, of either release; empty if there is none."""
        for command in (f"move {holding} to {place}", f"put {holding} in/on {place}"):
            if command in self._beliefs.admissible:
                return command
        return ""

    def _drop_here(self, holding: str) -> Move | None:
        """Put something useless down right here, if anything here takes it."""
        for place in sorted(self._beliefs.here, key=lambda name: (class_of(name) == self._task.receptacle, name)):
            if command := self._put_command(holding, place):
                return Move(command, f"drop {class_of(holding)}")
        return None

    def _drop(self, holding: str) -> Move:
        """Get rid of what the hand holds."""
        if here := self._drop_here(holding):
            return here
        thought = f"drop {class_of(holding)}"
        places = [place for place in self._beliefs.receptacles if (holding, place) not in self._refused]
        for place in places:
            if place in self._beliefs.here and f"open {place}" not in self._beliefs.admissible:
                self._refused.add((holding, place))
        places = [place for place in places if (holding, place) not in self._refused]
        for place in self._nearest(place for place in places if _fits(class_of(holding), class_of(place))):
            return self._at(place, "look", thought)
        for place in self._nearest(places):
            return self._at(place, "look", thought)
        return Move("look", thought)

    # ---- searching ----

    def _search(self, wanted: str, thought: str) -> Move:
        """Look into the most promising receptacle that has not been looked into."""
        beliefs = self._beliefs
        hidden = [place for place in beliefs.receptacles if place not in beliefs.contents]
        if not hidden:  # everything was seen and it was nowhere: something moved, so begin again
            beliefs.contents.clear()
            self._refused.clear()
            hidden = [place for place in beliefs.receptacles if place not in beliefs.here] or list(beliefs.receptacles)
        place = max(hidden, key=lambda name: (self._promise(wanted, name), -number_of(name)))
        return self._at(place, f"examine {place}", thought)

    def _promise(self, wanted: str, place: str) -> float:
        """Chance of finding something useful there, for each command that looking costs."""
        beliefs, task = self._beliefs, self._task
        chance = _chance(wanted, class_of(place))
        if (
            task.task_type == LOOK
            and wanted == task.thing
            and not any(class_of(lamp) == task.lamp for lamp in beliefs.lamps)
        ):
            chance += 0.5 * _chance(task.lamp, class_of(place))
        return chance * self._whim.get(place, 1.0) / max(beliefs.effort(place), 1)


@cache
def _rates() -> tuple[Mapping[tuple[str, str], float], frozenset[tuple[str, str]]]:
    """The household's tables by lower-case (thing, receptacle): how often seen there, and whether it fits."""
    seen = {
        (thing.lower(), place.lower()): float(rate)
        for thing, rates in tables().seen_in.items()
        for place, rate in rates.items()
    }
    fits = frozenset((thing.lower(), place.lower()) for place, things in tables().contains.items() for thing in things)
    return seen, fits


def _chance(thing: str, place: str) -> float:
    """How likely (per mille) a receptacle of that class holds a thing of that class."""
    seen, fits = _rates()
    return seen.get((thing, place), _RARE if (thing, place) in fits else _NEVER)


def _fits(thing: str, place: str) -> bool:
    return (thing, place) in _rates()[1]
