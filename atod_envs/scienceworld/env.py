"""ScienceWorld: elementary-school science in a house with a garden and a workshop, on the published simulator.

Invariant: observations, scores and ends are the simulator's; what this module adds is the choice of the task, a score
in [0, 1], and the form of the list of actions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import ClassVar, Final

from atod_envs.errors import UnknownName
from atod_envs.snapshots import Snapshot
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv

from .simulator import SIMULATORS, UNKNOWN, Answer, Episode, gold_actions, jar_version

# fmt: off
TASKS: Final[Mapping[str, int]] = {
    "boil": 30, "change-the-state-of-matter-of": 30, "chemistry-mix": 32, "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36, "find-animal": 300, "find-living-thing": 300, "find-non-living-thing": 300,
    "find-plant": 300, "freeze": 30, "grow-fruit": 126, "grow-plant": 126, "identify-life-stages-1": 14,
    "identify-life-stages-2": 10, "inclined-plane-determine-angle": 168, "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162, "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125, "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436, "measure-melting-point-unknown-substance": 300, "melt": 30,
    "mendelian-genetics-known-plant": 120, "mendelian-genetics-unknown-plant": 480, "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20, "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600, "use-thermometer": 540,
}
# fmt: on
"""Task -> its number of variations; 7,207 in all."""
SPLITS: Final = ("train", "dev", "test")
SIMPLIFICATIONS: Final = (
    "easy",
    "noElectricalAction",
    "openContainers",
    "openDoors",
    "selfWateringFlowerPots",
    "teleportAction",
)
LISTS: Final = ("templates", "valid")
TEMPLATES: Final = (
    "activate <object>", "close <object>", "connect <object> to <object>", "deactivate <object>", "disconnect <object>",
    "dunk <object> in <object>", "eat <object>", "flush <object>", "focus on <object>", "go to <place>", "inventory", "look around",
    "look at <object>", "look in <object>", "mix <object>", "move <object> to <object>", "open <object>", "pick up <object>",
    "pour <object> in <object>", "pour <object> into <object>", "put down <object>", "read <object>", "task", "use <object> on <object>", "wait", "wait1",
)  # fmt: skip
"""Forms of action. The simulator has one more, ``reset task``, which forgets what was focused on."""
CHOICE: Final = re.compile(r"^(\d+):\t", re.MULTILINE)


class ScienceWorldEnv(TextEnv):
    """ScienceWorld.

    ``score`` is the simulator's, from 0 to 1, and 0 after a mistake that ends the task (the simulator's -100).
    ``reward`` is paid at the end of the episode, the turn limit included: the score at that moment. ``info`` has
    ``scienceworld/task_type`` (one of 30) and ``scienceworld/variation``.

    Args:
        data: None or ``"builtin"``: there is nothing but the package's own.
        split: ``train``, ``dev`` or ``test``: the simulator's own.
        tasks: play only these of the 30 tasks.
        simplifications: names of the simulator's, with commas; ``"easy"`` is all that suit a task.
        admissible: ``"templates"``, the forms of action; ``"valid"``, every action that the simulator accepts now,
            often thousands (they cost more than a step).
        simulators: Java processes of this process at most; by default one for each CPU core.
        max_turns: turn limit; the simulator's own default is 100.
        render_mode: None or ``"ansi"``.

    Raises:
        DataError: the package or Java is not installed.
        UnknownName: there is no such split, task or simplification.
        SimulatorError: a simulator ended in a step; the same step may be taken again.
    """

    env_key: ClassVar[str] = "scienceworld"
    default_max_turns: ClassVar[int] = 100
    label: ClassVar[str] = "task_type"
    about: ClassVar[str] = "ScienceWorld, a text world of science experiments"
    splits: tuple[str, str, str] = SPLITS
    blocking: bool = True

    def __init__(
        self,
        data: str | None = None,
        split: str = "train",
        *,
        tasks: Collection[str] | str | None = None,
        simplifications: str = "",
        admissible: str = "templates",
        simulators: int | None = None,
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if data not in (None, "builtin"):
            raise ValueError(f"data={data!r}; expected None or 'builtin': the simulator brings its own tasks")
        if admissible not in LISTS:
            raise ValueError(f"admissible={admissible!r}; expected one of: {', '.join(LISTS)}")
        if simulators is not None and simulators < 1:
            raise ValueError(f"simulators={simulators}; expected at least 1")
        if split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
        wanted = {tasks} if isinstance(tasks, str) else set(tasks or TASKS)
        if unknown := sorted(wanted - set(TASKS)):
            raise UnknownName("ScienceWorld task", unknown[0], TASKS)
        named = sorted({name.strip() for name in simplifications.split(",")} - {""})
        for name in named:
            if name not in SIMPLIFICATIONS:
                raise UnknownName("simplification", name, SIMPLIFICATIONS)
        ids = [f"{task}/{number}" for task in TASKS if task in wanted for number in variations(task, split)]
        super().__init__(TaskSet(split, ids), max_turns=max_turns, render_mode=render_mode)
        self.data_version = f"scienceworld/{jar_version()}/{'+'.join(named) or 'plain'}"
        self._simplifications = ",".join(named)
        self._list = admissible
        self._limit = simulators or os.cpu_count() or 1
        self._episode: Episode | None = None
        self._done: tuple[str, ...] = ()  # what was done when it was closed
        self._score = 0.0

    def gold_actions(self) -> tuple[str, ...]:
        """The simulator's own solution of the present task; worked out once and kept in ``$ATOD_CACHE``."""
        task, variation = self._place(self._task_id)
        return gold_actions(task, variation, self._simplifications, self._limit)

    def close(self) -> None:
        """Let the simulator go; it stays for other environments of this process."""
        self._done = self.save_state()
        SIMULATORS.release(self._episode)
        self._episode = None

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        SIMULATORS.release(self._episode)
        task, variation = self._place(task_id)
        self._episode = Episode(task, variation, self._simplifications, self._limit)
        self._score = 0.0
        answer = self._episode.step("look around")  # the package's own reset does so, too
        description = str(self._episode.ask("getTaskDescription")).strip()
        return description, self._frame_of(answer or Answer("", 0.0, False))

    def _act(self, action: str) -> Frame:
        if self._episode is None:  # closed, and played on
            self.load_state(self.snapshot())
        assert self._episode is not None
        answer = self._episode.step(action)
        if answer is None:
            answer = Answer(UNKNOWN, self._score, False)
        return self._frame_of(answer)

    def load_state(self, snapshot: Snapshot) -> None:
        """The actions of a snapshot are repeated when the next one is taken, and not before."""
        SIMULATORS.release(self._episode)
        task, variation = self._place(snapshot.task_id)
        self._episode = Episode(task, variation, self._simplifications, self._limit, ["look around"])
        self._score = snapshot.frame.score
        self._episode.actions += snapshot.state

    def save_state(self) -> tuple[str, ...]:
        """What was done, without what the simulator failed on."""
        return tuple(self._episode.actions[1:]) if self._episode else self._done

    def _frame_of(self, answer: Answer) -> Frame:
        over = answer.done or answer.score < 0
        self._score = max(0.0, min(1.0, round(answer.score, 2)))  # the package rounds to hundredths
        last = over or self._turn + 1 >= self.max_turns
        task, variation = self._place(self._task_id)
        return Frame(
            answer.observation,
            () if over else self._admissible(answer.observation),
            reward=self._score if last else 0.0,
            score=self._score,
            success=over and self._score == 1.0,
            terminated=over,
            valid=answer.observation != UNKNOWN and not answer.observation.startswith("Unknown action."),
            extra={"task_type": task, "variation": variation},
        )

    def _admissible(self, observation: str) -> tuple[str, ...]:
        if observation.startswith("Ambiguous request"):
            return tuple(CHOICE.findall(observation))
        if self._list == "templates" or self._episode is None:
            return TEMPLATES
        return tuple(self._episode.ask("getValidActionObjectCombinations"))

    @staticmethod
    def _place(task_id: str) -> tuple[str, int]:
        task, _, variation = task_id.partition("/")
        return task, int(variation)


def variations(task: str, split: str) -> range:
    """The variations of a task in a split, as the simulator shares them out: half, a quarter, and the rest."""
    quarter, every = TASKS[task] // 4, TASKS[task]
    return {"train": range(2 * quarter), "dev": range(2 * quarter, 3 * quarter), "test": range(3 * quarter, every)}[
        split
    ]
