"""`atod/ALFWorld-v0`: the household games as a Gymnasium environment.

Invariant: the raw observation and action are the game's own text, byte for byte those of the reference, whichever
engine plays; what this module adds is the choice of the game, the score, and the information in `info`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from atod_envs.alfworld.data import open_source
from atod_envs.alfworld.engine.game import TASK_LEAD, Game
from atod_envs.alfworld.engine.session import GameSession, Step, put_as_move
from atod_envs.errors import DataError
from atod_envs.snapshots import Snapshot
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv

if TYPE_CHECKING:
    from atod_envs.alfworld.textworld.backend import Reference
    from atod_envs.styles import PromptStyle

BACKENDS = ("native", "textworld")
"""Engines: ours, and the published `alfworld` package in a worker process."""


class EpisodeEngine(Protocol):
    """One episode on some engine."""

    def reset(self) -> Step:
        """Begin, and show the introduction."""
        ...

    def step(self, command: str) -> Step:
        """Carry out a command."""
        ...


class ALFWorldEnv(TextEnv):
    """ALFWorld, text only.

    `info` has, besides the keys of every environment, `alfworld/task_type`, `alfworld/walkthrough_length` (commands of
    the stored solution; 0 if the file has none) and `alfworld/gamefile`. `score` is the goal-condition progress (see
    `atod_envs.alfworld.engine.session.Step`), `reward` is 1.0 when the game is won.

    Args:
        data: the folder that holds `json_2.1.1`, or `"builtin"` for the generated world that needs no files. None: what
            `$ALFWORLD_DATA` names, else `~/.cache/alfworld` if it holds games, else `"builtin"`.
        split: `train`, `valid_seen` or `valid_unseen`.
        backend: `"native"`, or `"textworld"` for the published engine (some thousand times slower).
        max_turns: turn limit.
        task_types: play only these of the six task types.
        strict: refuse a split with broken files; otherwise they are left out, with a warning that counts them.
        human_goals: state the task in the words of one of the trial's annotators, drawn by the episode's seed.
        put_alias: where a game says `move X to Y`, understand `put X in/on Y` (the older release's words) too.
        render_mode: None or `"ansi"`.

    Raises:
        DataError: the data is missing or holds no playable game.
        UnknownName: there is no such split or task type.
    """

    env_key: ClassVar[str] = "alfworld"
    default_max_turns: ClassVar[int] = 50
    label: ClassVar[str] = "task_type"
    splits: tuple[str, str, str] = ("train", "valid_seen", "valid_unseen")

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        backend: str = "native",
        max_turns: int | None = None,
        task_types: Collection[str] | None = None,
        strict: bool = True,
        human_goals: bool = False,
        put_alias: bool = True,
        render_mode: str | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}; expected one of: {', '.join(BACKENDS)}")
        self.source = open_source(data, split, task_types=task_types, strict=strict)
        super().__init__(TaskSet(split, self.source.task_ids), max_turns=max_turns, render_mode=render_mode)
        self.data_version = self.source.data_version
        self._human_goals = human_goals
        self._put_alias = put_alias
        self.reference: Reference | None = None
        if backend == "textworld":
            from atod_envs.alfworld.textworld.backend import Reference

            self.reference = Reference()
        self._engine: EpisodeEngine | None = None
        self._admissible: tuple[str, ...] = ()
        self._extra: Mapping[str, object] = {}

    @property
    def game(self) -> Game:
        """The compiled game of the current episode's task."""
        return self.source.game(self._task_id)

    def close(self) -> None:
        """End the worker process, if there is one."""
        if self.reference is not None:
            self.reference.close()

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """The paper's prompt and a compact one."""
        from atod_envs.alfworld.prompts import STYLES

        return STYLES

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        game = self.source.game(task_id)
        self._engine = self.reference.open(self.source.content(task_id), game) if self.reference else GameSession(game)
        self._extra = {
            "task_type": self.source.task_type(task_id),
            "walkthrough_length": len(game.walkthrough),
            "gamefile": game.name,
        }
        step, task = self._engine.reset(), game.task
        if self._human_goals:
            task = human_goal(self.source.trajectory(task_id), task_id, seed)
            start, lead, _ = step.observation.rpartition(TASK_LEAD)
            step = step._replace(observation=start + lead + task)
        return task, self._frame_of(step)

    def _act(self, action: str) -> Frame:
        assert self._engine is not None
        if self._put_alias:
            action = put_as_move(action, self._admissible)
        return self._frame_of(self._engine.step(action))

    def save_state(self) -> Any:
        """The facts of the moment; nothing on the published engine, whose episodes are played again."""
        return self._engine.moment() if isinstance(self._engine, GameSession) else None

    def load_state(self, snapshot: Snapshot) -> None:
        """Go back to the facts of a snapshot, or play the episode again."""
        if snapshot.state is None or self.reference is not None:
            super().load_state(snapshot)
            return
        session = self._engine
        if not isinstance(session, GameSession) or session.game is not self.source.game(snapshot.task_id):
            session = self._engine = GameSession(self.source.game(snapshot.task_id))
        session.return_to(snapshot.state)
        self._admissible, self._extra = snapshot.frame.admissible, snapshot.frame.extra

    def _frame_of(self, step: Step) -> Frame:
        self._admissible = step.admissible
        return Frame(
            observation=step.observation,
            admissible=step.admissible,
            reward=step.reward,
            score=step.progress,
            success=step.won,
            terminated=step.done,
            valid=step.understood,
            extra=self._extra,
        )


def human_goal(trajectory: Mapping[str, object], task_id: str, seed: int) -> str:
    """One annotator's sentence for a task, with a full stop.

    Args:
        trajectory: the content of the task's `traj_data.json`.
        task_id: for the message.
        seed: which annotator.

    Raises:
        DataError: the trajectory has no such sentences.
    """
    annotations = trajectory.get("turk_annotations")
    listed = annotations.get("anns") if isinstance(annotations, Mapping) else None
    sentences: list[str] = [
        entry["task_desc"].strip().rstrip(".")
        for entry in listed or ()
        if isinstance(entry, Mapping) and isinstance(entry.get("task_desc"), str)
    ]
    if not sentences:
        raise DataError(
            f"traj_data.json of {task_id} has no human sentences; expected turk_annotations.anns[].task_desc"
        )
    return random.Random(seed).choice(sentences) + "."
