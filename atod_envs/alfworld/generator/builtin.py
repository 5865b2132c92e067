"""The built-in world: small one-room flats made on the fly, with no file and no download.

The invariant: a task id is all there is to a task. The same id gives the same game on every machine; ``valid_unseen``
plays in flats whose receptacle sets occur nowhere in ``train`` or ``valid_seen``; ``valid_seen`` shares the flats of
``train``, but a world's own digest says which of the two may have it, so they never share a world. Task types take
turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from atod_envs.alfworld.generator.rendering import game_data, trajectory_data
from atod_envs.alfworld.generator.rooms import RoomLayout, dice_of, make_layout
from atod_envs.alfworld.generator.scenes import Scene, SceneGoal, choose_goal, make_scene, possible_goals
from atod_envs.alfworld.household import FLAT, TASK_TYPES
from atod_envs.errors import UnknownName

SIZES: Mapping[str, int] = MappingProxyType({"train": 3000, "valid_seen": 300, "valid_unseen": 600})
"""Tasks in each split."""

ROOT = "builtin"
"""First part of every task id."""

VERSION = 1
"""A new number makes a new world; trajectories and checkpoints record it."""

_KEY = f"atod/builtin/{VERSION}"
_SEEN_FLATS, _UNSEEN_FLATS = 48, 24
_PATTERN = re.compile(rf"{ROOT}/(?P<split>[a-z_]+)/[^/]+/trial_T(?P<index>[0-9]{{8}})")


@cache
def task_ids(split: str) -> Sequence[str]:
    """The task ids of a split, in order.

    Raises:
        UnknownName: there is no such split.
    """
    if split not in SIZES:
        raise UnknownName("split of the built-in world", split, SIZES)
    return tuple(_task_id(split, index) for index in range(SIZES[split]))


def game(task_id: str) -> dict[str, object]:
    """The game of a task: the keys of ``game.tw-pddl``, and ``traj_data`` with the content of ``traj_data.json``.

    Raises:
        UnknownName: no built-in task has this id.
    """
    made = scene(task_id)
    data = game_data(made, dice_of(_KEY, "sentence", task_id))
    trial = task_id.rpartition("/")[2]
    plan = data["walkthrough"]
    assert isinstance(plan, list)
    return {**data, "traj_data": trajectory_data(made, trial, plan, dice_of(_KEY, "annotations", task_id))}


def scene(task_id: str) -> Scene:
    """The world of a task.

    Raises:
        UnknownName: no built-in task has this id.
    """
    match = _PATTERN.fullmatch(task_id)
    split = match["split"] if match else ""
    index = int(match["index"]) if match else -1
    if split not in SIZES or not 0 <= index < SIZES[split] or _task_id(split, index) != task_id:
        raise UnknownName(
            "task id of the built-in world",
            task_id,
            advice=f"ids look like {_task_id('valid_seen', 0)!r}; "
            f"atod_envs.alfworld.generator.builtin.task_ids(split) lists them for split in {', '.join(SIZES)}",
        )
    held_out = None if split == "valid_unseen" else split == "valid_seen"
    return make_scene(_layout(split, index), _goal(split, index), held_out=held_out, key=(_KEY, split, index))


@cache
def flats(unseen: bool) -> tuple[RoomLayout, ...]:
    """The fixed list of room layouts of one side, all with different receptacle sets."""
    number, offset = (_UNSEEN_FLATS, _SEEN_FLATS) if unseen else (_SEEN_FLATS, 0)
    layouts: dict[str, RoomLayout] = {}
    attempt = 0
    while len(layouts) < number:
        scene = FLAT.first_scene + 1 + offset + len(layouts)
        layout = make_layout(FLAT, scene, unseen=unseen, key=(_KEY, attempt))
        layouts.setdefault(layout.signature, layout)
        attempt += 1
    return tuple(layouts.values())


@cache
def _goals(unseen: bool, flat: int, task_type: str) -> Mapping[str, list[SceneGoal]]:
    return possible_goals(flats(unseen)[flat], task_type)


def _layout(split: str, index: int) -> RoomLayout:
    return flats(split == "valid_unseen")[_flat(split, index)]


def _flat(split: str, index: int) -> int:
    return index // len(TASK_TYPES) % (_UNSEEN_FLATS if split == "valid_unseen" else _SEEN_FLATS)


def _goal(split: str, index: int) -> SceneGoal:
    goals = _goals(split == "valid_unseen", _flat(split, index), TASK_TYPES[index % len(TASK_TYPES)])
    return choose_goal(goals, dice_of(_KEY, "goal", split, index))


def _task_id(split: str, index: int) -> str:
    return f"{ROOT}/{split}/{_goal(split, index).folder}-{_layout(split, index).scene}/trial_T{index:08d}"
