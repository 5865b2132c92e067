"""Plays the same commands on our ALFWorld engine and on the published one, and reports every difference.

Commands are drawn so that rare situations come up: first a verb, then one of its commands; in between, commands that
were possible a moment ago, misspelt ones and nonsense, and sometimes the stored solution. Episodes go on after the goal
is reached.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alfworld_reference import Reference, Shown, content

from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession, Step

NONSENSE = (
    "",
    " ",
    "dance",
    "examine",
    "go to nowhere 1",
    "take apple 99 from fridge 1",
    "put x in y",
    "LOOK",
    "{r}",
    "#",
    "\n",
)

EPISODES = 3
"""Episodes of a game: loading one takes the published engine longer than a hundred steps."""

WEIGHTS = {"look": 0.6, "inventory": 0.4, "help": 0.2, "examine": 1.5, "go": 5.0, "close": 1.5}
"""How likely each verb is where it is possible, relative to 4.0 for the others."""


@dataclass(slots=True)
class Report:
    """What a run has compared."""

    steps: int = 0
    resets: int = 0
    wins: int = 0
    verbs: Counter[str] = field(default_factory=Counter)
    games: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def compare(
    games: Iterable[tuple[str, str | Path | Mapping[str, Any]]],
    reference: Reference,
    steps: int,
    length: int,
    seed: int,
) -> Report:
    """Play games in turn until enough steps have been compared.

    Args:
        games: (kind, file or content); the kind is only counted.
        reference: the published engine.
        steps: how many steps to compare in all.
        length: steps of an episode.
        seed: of the commands.
    """
    report = Report()
    for number, (kind, source) in enumerate(games):
        if report.steps >= steps or len(report.differences) >= 20:
            break
        data = content(source)
        name = str(source) if not isinstance(source, Mapping) else f"{kind} {number}"
        try:
            reference.load(data if isinstance(source, Mapping) else str(source))
        except (Exception, SystemExit) as error:
            report.refused.append(f"{name}: {type(error).__name__}: {error}")
            continue
        report.games[kind] += 1
        session = GameSession(Game.parse(data, name=name))
        for episode in range(EPISODES):
            rng = random.Random(f"{seed}/{name}/{number}/{episode}")
            _play(name, session, reference, report, rng, min(length, steps - report.steps))
    return report


def _play(
    name: str, session: GameSession, reference: Reference, report: Report, rng: random.Random, length: int
) -> None:
    if length <= 0:
        return
    ours, theirs = session.reset(), reference.reset()
    report.resets += 1
    _check(f"{name}, reset", ours, theirs, report)
    solution = list(session.game.walkthrough) if rng.random() < 0.4 else []
    before = list(ours.admissible)
    won = False
    for turn in range(length):
        follow = solution and rng.random() < 0.8
        command = solution.pop(0) if follow else draw(rng, ours.admissible, before)
        before = list(ours.admissible)
        ours, theirs = session.step(command), reference.step(command)
        report.steps += 1
        report.verbs[command.split(" ")[0] if ours.understood else "(refused)"] += 1
        _check(f"{name}, step {turn} {command!r}", ours, theirs, report)
        won = won or ours.won
        if (ours.progress == 1.0) != won:
            report.differences.append(f"{name}, step {turn}: progress {ours.progress} although won is {won}")
        if len(report.differences) >= 20:
            break
    report.wins += won


def draw(rng: random.Random, admissible: tuple[str, ...], before: list[str]) -> str:
    """A command: mostly one that can be done, with every verb equally likely."""
    luck = rng.random()
    if luck < 0.06 and before:
        return rng.choice(before)
    if luck < 0.09:
        return rng.choice(NONSENSE)
    verbs: dict[str, list[str]] = {}
    for command in admissible:
        verbs.setdefault(command.split(" ")[0], []).append(command)
    if not verbs:
        return "look"
    names = sorted(verbs)
    (verb,) = rng.choices(names, [WEIGHTS.get(name, 4.0) for name in names])
    command = rng.choice(verbs[verb])
    if luck < 0.11:
        place = rng.randrange(len(command))
        return command[:place] + command[place + 1 :]
    return f"  {command} " if luck < 0.12 else command


def _check(where: str, ours: Step, theirs: Shown, report: Report) -> None:
    for label in Shown._fields:
        mine, other = getattr(ours, label), getattr(theirs, label)
        if mine != other:
            report.differences.append(f"{where}: {label}: ours {mine!r}, the reference {other!r}")
