"""Fresh worlds in the published on-disk format: ``python -m atod_envs.alfworld.generate --out DIR --games 9 --seed 1``.

The invariant: what is written is a function of (seed, size, split, index), byte for byte; every game is solvable, and
its walkthrough is a shortest plan, which has been replayed to a win. The folder is laid out like the published data, so
``ALFWORLD_DATA=DIR`` serves this project and the original ``alfworld`` package alike.

Splits are kept apart by construction for every seed: rooms of ``valid_unseen`` have receptacle sets that no room of the
other two has, and a world's digest decides between ``train`` and ``valid_seen``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.generator.rendering import domain, game_data, grammar, trajectory_data
from atod_envs.alfworld.generator.rooms import RoomLayout, dice_of, make_layout
from atod_envs.alfworld.generator.scenes import Scene, choose_goal, make_scene, possible_goals
from atod_envs.alfworld.household import SIZES, TASK_TYPES, Room
from atod_envs.errors import AtodError, DataError
from atod_envs.files import writing_into, written_aside
from atod_envs.options import program
from atod_envs.stopping import stoppable

SPLITS = ("train", "valid_seen", "valid_unseen")
DATA_FOLDER = "json_2.1.1"
_SEEN_SCENES, _UNSEEN_SCENES = 24, 6


@dataclass(frozen=True, slots=True)
class Made:
    """A generated game.

    Attributes:
        folder: where it belongs, relative to the data root.
        scene: what it holds.
        game: the content of ``game.tw-pddl``.
        trajectory: the content of ``traj_data.json``.
    """

    folder: str
    scene: Scene
    game: Mapping[str, object]
    trajectory: Mapping[str, object]


def generate(split: str, index: int, *, seed: int, size: str = "real") -> Made:
    """Make one game.

    Args:
        split: ``train``, ``valid_seen`` or ``valid_unseen``.
        index: number of the game within the split; task types take turns.
        seed: another seed furnishes other rooms.
        size: ``real`` (30 and more receptacles, 40 and more objects) or ``small`` (8 to 14, 8 to 13).

    Raises:
        ValueError: unknown split or size.
        DataError: the game's own walkthrough does not win, which would be a defect of the generator.
    """
    if split not in SPLITS or size not in SIZES:
        raise ValueError(f"split {split!r}, size {size!r}: expected one of {SPLITS} and one of {tuple(SIZES)}")
    unseen = split == "valid_unseen"
    key = (seed, size, split, index)
    task_type = TASK_TYPES[index % len(TASK_TYPES)]
    dice = dice_of("generate", *key)
    rooms = [number for number, room in enumerate(SIZES[size]) if task_type in room.task_types]
    layout = _layout(size, dice.pick(rooms), dice.below(_UNSEEN_SCENES if unseen else _SEEN_SCENES), unseen, seed)
    goal = choose_goal(possible_goals(layout, task_type), dice)
    scene = make_scene(layout, goal, held_out=None if unseen else split == "valid_seen", key=key)
    trial = f"trial_T{seed:08d}_{index:06d}"
    folder = f"{DATA_FOLDER}/{split}/{goal.folder}-{layout.scene}/{trial}"
    game = game_data(scene, dice)
    plan = game["walkthrough"]
    assert isinstance(plan, list)
    session = GameSession(Game.parse(game, name=folder))
    if [session.step(command).won for command in plan] != [False] * (len(plan) - 1) + [True]:
        raise DataError(f"generated game {folder}: its walkthrough {plan} does not win; please report seed and index")
    return Made(folder, scene, game, trajectory_data(scene, trial, plan, dice))


@cache
def _layout(size: str, room: int, scene: int, unseen: bool, seed: int) -> RoomLayout:
    kind: Room = SIZES[size][room]
    number = kind.first_scene + 1 + scene + (_SEEN_SCENES if unseen else 0)
    return make_layout(kind, number, unseen=unseen, key=("generate", seed, size))


def write(made: Made, root: Path) -> Path:
    """Write one game's three files under the data root, each whole, the game last; returns the trial folder."""
    folder = root / made.folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "initial_state.pddl": str(made.game["pddl_problem"]),
        "traj_data.json": json.dumps(made.trajectory, indent=1),
        "game.tw-pddl": json.dumps(made.game, indent=1),
    }
    for name, text in texts.items():
        with written_aside(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return folder


def write_split(root: Path, split: str, games: int, *, seed: int, size: str = "real") -> Iterator[Path]:
    """Write the first ``games`` games of a split, and the rules next to them; yields each trial folder."""
    logic = root / "logic"
    logic.mkdir(parents=True, exist_ok=True)
    (logic / "alfred.pddl").write_text(domain(), encoding="utf-8")
    (logic / "alfred.twl2").write_text(grammar(), encoding="utf-8")
    for index in range(games):
        yield write(generate(split, index, seed=seed, size=size), root)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("atod_envs.alfworld.generate"),
        description="Write fresh ALFWorld games in the published on-disk format.",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"data root; games go to OUT/{DATA_FOLDER}/SPLIT/...")
    parser.add_argument("--games", type=int, required=True, help="how many games")
    parser.add_argument("--seed", type=int, required=True, help="same seed, same files; 0 or more")
    parser.add_argument("--size", choices=tuple(SIZES), default="real", help="room size (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which split (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.games < 1 or options.seed < 0:
        parser.error(
            f"--games {options.games} --seed {options.seed}: expected at least 1 game and a seed of at least 0"
        )
    started = time.perf_counter()
    try:
        with writing_into(options.out, "--out"):
            for _ in write_split(options.out, options.split, options.games, seed=options.seed, size=options.size):
                pass
    except AtodError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(
        f"{options.games} {options.size} games ({options.split}) under {options.out / DATA_FOLDER / options.split} "
        f"in {time.perf_counter() - started:.1f} s\nuse them with ALFWORLD_DATA={options.out}\n"
    )
    return 0


if __name__ == "__main__":
    with stoppable():
        raise SystemExit(main())
