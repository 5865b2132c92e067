"""What a player of ALFWorld can know: the task sentence, understood, and what has been seen so far.

The invariant: :class:`Beliefs` holds only what the observations and admissible commands have shown. The hand, the doors
and the things here are read from the admissible commands each time, so they are right after any agent's actions; what
lies elsewhere is remembered. Texts of both releases are understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from atod_envs.alfworld.household import CLEAN, COOL, HEAT, LOOK, OPENABLE, PICK, TWO

_TASKS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (task_type, re.compile(pattern))
    for task_type, pattern in (
        (LOOK, r"look at (?P<thing>\w+) under the (?P<lamp>\w+)"),
        (LOOK, r"examine the (?P<thing>\w+) with the (?P<lamp>\w+)"),
        (CLEAN, r"put a clean (?P<thing>\w+) in (?P<receptacle>\w+)"),
        (CLEAN, r"clean some (?P<thing>\w+) and put it in (?P<receptacle>\w+)"),
        (HEAT, r"put a hot (?P<thing>\w+) in (?P<receptacle>\w+)"),
        (HEAT, r"heat some (?P<thing>\w+) and put it in (?P<receptacle>\w+)"),
        (COOL, r"put a cool (?P<thing>\w+) in (?P<receptacle>\w+)"),
        (COOL, r"cool some (?P<thing>\w+) and put it in (?P<receptacle>\w+)"),
        (TWO, r"put two (?P<thing>\w+) in (?P<receptacle>\w+)"),
        (TWO, r"find two (?P<thing>\w+) and put them in (?P<receptacle>\w+)"),
        (PICK, r"put a (?P<thing>\w+) in (?P<receptacle>\w+)"),
        (PICK, r"put some (?P<thing>\w+) on (?P<receptacle>\w+)"),
    )
)

_NAME = r"[a-z]+ \d+"
_LISTED = re.compile(rf"\ban? ({_NAME})")
_CONTENTS = re.compile(rf"(?:On the ({_NAME})|The ({_NAME}) is open\. In it), you see ([^.]*)\.")
_CLOSED = re.compile(rf"The ({_NAME}) is closed\.")
_TAKEN = re.compile(rf"You pick up the ({_NAME}) from the ({_NAME})\.")
_PUT = re.compile(rf"You (?:move|put) the ({_NAME}) (?:to|in/on) the ({_NAME})\.")
_PROCESSED = re.compile(rf"You (clean|heat|cool) the ({_NAME}) using the {_NAME}\.")
_TAKE_COMMAND = re.compile(rf"take ({_NAME}) from ({_NAME})")

_OPENABLE = frozenset(kind.lower() for kind in OPENABLE)


@dataclass(frozen=True, slots=True)
class Task:
    """A task sentence, understood; class names as they stand in the sentence, empty where there is none."""

    task_type: str
    thing: str
    receptacle: str = ""
    lamp: str = ""


def understand(task: str) -> Task:
    """Read a task sentence of the published templates, with or without ``Your task is to:`` and what stands before it.

    Raises:
        ValueError: it is none of the templates.
    """
    sentence = task.rpartition("Your task is to:")[2].strip().rstrip(".").lower()
    for task_type, pattern in _TASKS:
        if match := pattern.fullmatch(sentence):
            parts = match.groupdict()
            return Task(task_type, parts["thing"], parts.get("receptacle") or "", parts.get("lamp") or "")
    raise ValueError(
        f"task sentence {sentence!r} follows none of the templates, such as 'put a clean mug in shelf'; "
        "the scripted expert does not read free sentences"
    )


def class_of(name: str) -> str:
    """The class of a display name: ``cabinet 12`` is a ``cabinet``."""
    return name.rpartition(" ")[0]


def number_of(name: str) -> int:
    """The number of a display name."""
    return int(name.rpartition(" ")[2])


@dataclass(slots=True)
class Beliefs:
    """What has been seen, by display name.

    Attributes:
        receptacles: all of them, as the first text lists them.
        here: those within reach.
        contents: what lies in those that have been looked into.
        closed: those that were last seen shut.
        opened: those that were last seen open, or that have no door.
        lamps: where each lamp stands.
        holding: what the hand holds.
        states: what has been done to an object: ``clean``, ``heat``, ``cool``.
        admissible: the commands that are allowed now.
    """

    receptacles: tuple[str, ...] = ()
    here: tuple[str, ...] = ()
    contents: dict[str, set[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    lamps: dict[str, str] = field(default_factory=dict)
    holding: str | None = None
    states: dict[str, set[str]] = field(default_factory=dict)
    admissible: frozenset[str] = frozenset()

    @classmethod
    def at_start(cls, observation: str, admissible: Sequence[str]) -> Beliefs:
        """What the first text and its admissible commands tell."""
        listed = _LISTED.findall(observation.partition("Your task is to:")[0])
        goes = [command.removeprefix("go to ") for command in admissible if command.startswith("go to ")]
        beliefs = cls(receptacles=tuple(dict.fromkeys(listed or goes)))
        beliefs.see("", admissible)
        return beliefs

    def see(self, observation: str, admissible: Sequence[str]) -> None:
        """Take in an answer of the game and, unless empty, the commands that are allowed after it."""
        if match := _TAKEN.search(observation):
            self.holding = match[1]
            self.contents.get(match[2], set()).discard(match[1])
        if match := _PUT.search(observation):
            self.holding = None
            self.contents.setdefault(match[2], set()).add(match[1])
        for match in _PROCESSED.finditer(observation):
            states = self.states.setdefault(match[2], set())
            states -= {"heat": {"cool"}, "cool": {"heat"}}.get(match[1], set())
            states.add(match[1])
        # Up to the last full stop, which every list needs: an endless list is not looked for an end at every start.
        for match in _CONTENTS.finditer(observation, 0, observation.rfind(".") + 1):
            place = match[1] or match[2]
            if place in self.receptacles:
                self._note(place, _LISTED.findall(match[3]))
        for match in _CLOSED.finditer(observation):
            self.closed.add(match[1])
            self.opened.discard(match[1])
        if admissible:
            self._look_around(admissible)

    def _note(self, place: str, names: Iterable[str]) -> None:
        self.contents[place] = set(names)
        for name in names:
            if name.rpartition(" ")[0].endswith("lamp"):
                self.lamps[name] = place

    def _look_around(self, admissible: Sequence[str]) -> None:
        """What the admissible commands say about the place and the hand."""
        self.admissible = frozenset(admissible)
        examinable = [command.removeprefix("examine ") for command in admissible if command.startswith("examine ")]
        known = set(self.receptacles)
        self.here = tuple(name for name in examinable if name in known)
        self.holding = next((name for name in examinable if name not in known), None)
        takeable: dict[str, set[str]] = {}
        for command in admissible:
            if match := _TAKE_COMMAND.fullmatch(command):
                takeable.setdefault(match[2], set()).add(match[1])
            elif command.startswith("use ") and self.here:
                self.lamps[command.removeprefix("use ")] = self.here[0]
        for place in self.here:
            if f"open {place}" in self.admissible:
                self.closed.add(place)
                self.opened.discard(place)
                continue
            self.closed.discard(place)
            self.opened.add(place)
            if self.holding is None:  # then everything that can be taken is on offer
                self.contents[place] = takeable.get(place, set())

    def is_shut(self, place: str) -> bool:
        """Whether a receptacle is shut, or likely so if it has not been seen."""
        return place in self.closed or (place not in self.opened and class_of(place) in _OPENABLE)

    def effort(self, place: str) -> int:
        """Commands before something can be done there: going, opening."""
        return (place not in self.here) + self.is_shut(place)
