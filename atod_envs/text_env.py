"""``TextEnv``: what all environments share, as a ``gymnasium.Env[str, str]``.

An environment supplies two things, how an episode begins and what an action does; everything that must be the same
everywhere is here: choice of the task, the turn limit, the keys of ``info``, and the errors for misuse. The invariant:
the same task id and seed give the same episode, byte for byte, and ``step`` never raises on anything a policy can
write.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Self

import gymnasium as gym

from atod_envs.errors import EpisodeError
from atod_envs.snapshots import Snapshot
from atod_envs.spaces import UnicodeText
from atod_envs.styles import LONGEST_ACTION, CompactStyle, GeneralStyle, PromptStyle
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import StopReason

INFO_KEYS = ("task_id", "task", "split", "turn", "admissible", "valid", "success", "score")
"""Keys of ``info`` after every reset and step; ``stop_reason`` is added at the end of an episode."""
_NOT_READ = "x" * (LONGEST_ACTION + 1)


@dataclass(frozen=True, slots=True)
class Frame:
    """What the world shows after a reset or an action.

    Attributes:
        observation: the environment's own text.
        admissible: actions that would have an effect now, or action patterns where the action is free text.
        reward: on the environment's own scale, in [0, 1].
        score: how much of the task is done, in [0, 1].
        success: the task is solved.
        terminated: the episode is over by the world's rules.
        valid: the environment understood the last action.
        extra: what is particular to one environment; published in ``info`` under ``"<env_key>/<name>"``.
    """

    observation: str
    admissible: tuple[str, ...]
    reward: float = 0.0
    score: float = 0.0
    success: bool = False
    terminated: bool = False
    valid: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)


class TextEnv(gym.Env[str, str]):
    """Base of the text environments.

    Args:
        tasks: the split that is played.
        max_turns: actions before an episode is truncated; ``None`` takes the environment's default.
        render_mode: ``"ansi"`` lets :meth:`render` return the current observation.

    Attributes:
        tasks: the split that is played.
        configured_max_turns: the turn limit that was asked for.
        max_turns: the turn limit in force; a curriculum may lower it between episodes.
        restores: how often :meth:`restore` was called, so that a wrapper notices.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 (gymnasium's declared type)
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    env_key: ClassVar[str]
    default_max_turns: ClassVar[int]
    label: ClassVar[str] = ""
    """Name in ``Frame.extra`` of what results are broken down by (task type, category, data set)."""
    about: ClassVar[str] = "a text environment"
    """What the environment is; ends the sentence "You are an expert agent operating in ..." of the default prompts."""
    tells_rules_first: ClassVar[bool] = False
    """The first observation holds what is needed all along; the default prompts then show it at every turn."""
    expert: ClassVar[str] = ""
    """Where the scripted expert is, ``"module:Class"``; see :class:`atod_envs.experts.Script`. None if empty."""
    splits: tuple[str, str, str] = ("train", "valid", "test")
    """Splits by purpose: to train on, to choose checkpoints on, to report on; an instance may differ with its data."""
    data_version: str = ""
    """What the tasks are made of, e.g. ``"builtin/1"`` or ``"json_2.1.1/5f2c..."``: equal versions hold the same tasks.
    Recorded in every trajectory and checkpoint."""
    blocking: bool = False
    """A step may wait on something outside the process; rollouts then run it in a thread."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        """Keep the arguments: with a snapshot, they are what a copy is made from."""
        env = super().__new__(cls)
        env._arguments = (arguments, keywords)
        return env

    def __init__(self, tasks: TaskSet, *, max_turns: int | None = None, render_mode: str | None = None) -> None:
        given: Any = max_turns  # NumPy's whole numbers are as good
        if given is not None and (isinstance(given, bool) or not isinstance(given, Integral) or int(given) < 1):
            raise ValueError(f"max_turns={max_turns!r}; expected a whole number from 1")
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode={render_mode!r}; expected None or 'ansi'")
        self.tasks = tasks
        self.configured_max_turns = self.default_max_turns if max_turns is None else max_turns
        self.max_turns = self.configured_max_turns
        self.render_mode = render_mode
        self.observation_space = UnicodeText()
        self.action_space = UnicodeText()
        self._task_id = ""
        self._task = ""
        self._turn = 0
        self._frame: Frame | None = None
        self._over = False
        self._seed = 0
        self._actions: list[str] = []
        self.restores = 0

    @abstractmethod
    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        """Start the episode of a task; return (instruction, first frame).

        ``seed`` fixes whatever the task leaves open; an environment without such freedom ignores it.
        """

    @abstractmethod
    def _act(self, action: str) -> Frame:
        """Carry out one action. Must not raise on any string."""

    @property
    def episode_seed(self) -> int:
        """Seed of the episode, given or drawn; with the task id it plays the same episode again."""
        return self._seed

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """The ways in which this environment can be put to a language model, by name.

        By default the styles for any environment: ``atod``, the form of the paper's prompts, and ``compact``, a short
        conversation for small models.
        """
        return {"atod": GeneralStyle(self.about, self.tells_rules_first), "compact": CompactStyle()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: seed of the episode. With only a seed, it also draws the task from the split; with neither, the
                environment's generator goes on.
            options: ``{"task_id": ...}`` plays that task.

        Returns:
            The first observation and ``info`` (see ``INFO_KEYS``).

        Raises:
            UnknownName: the task id is not in the split, or an option is not known.
        """
        super().reset(seed=seed)
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"reset options are a {type(options).__name__}; expected a dict such as {{'task_id': ...}}")
        unknown = set(options or ()) - {"task_id"}
        if unknown:
            raise ValueError(f"unknown reset option {min(map(repr, unknown))}; expected 'task_id'")
        chosen = (options or {}).get("task_id")
        if not isinstance(chosen, str | None):
            raise TypeError(f"task_id={chosen!r:.60}; expected a task's id, which is text")
        self._task_id = self.tasks.draw(self.np_random) if chosen is None else self.tasks.require(chosen)
        episode_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._task, self._frame = self._begin(self._task_id, episode_seed)
        self._turn = 0
        self._over = False
        self._seed, self._actions = episode_seed, []
        return self._frame.observation, self._info(self._frame)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one action.

        Args:
            action: any text; what the environment does not understand is answered as the original answers it.

        Returns:
            Observation, reward in [0, 1], terminated (by the world's rules), truncated (turn limit), info.

        Raises:
            EpisodeError: before the first reset, or after the end of the episode.
            TypeError: the action is not a string.
        """
        if self._frame is None:
            raise EpisodeError("step() was called before reset(); call reset() first")
        if self._over:
            raise EpisodeError("step() was called after the end of the episode; call reset() to begin another")
        if not isinstance(action, str):
            raise TypeError(f"an action is a str, not {type(action).__name__}")
        self._frame = frame = self._answer(action, self._frame)
        # Of an action that was not read, a snapshot repeats that alone; one text stands for all of them.
        self._actions.append(action if len(action) <= LONGEST_ACTION else _NOT_READ)
        self._turn += 1
        truncated = not frame.terminated and self._turn >= self.max_turns
        self._over = frame.terminated or truncated
        return frame.observation, float(frame.reward), frame.terminated, truncated, self._info(frame)

    def render(self) -> str | None:
        """Return the current observation (``render_mode="ansi"``)."""
        return self._frame.observation if self._frame is not None and self.render_mode == "ansi" else None

    def _info(self, frame: Frame) -> dict[str, Any]:
        info: dict[str, Any] = {
            "task_id": self._task_id,
            "task": self._task,
            "split": self.tasks.split,
            "turn": self._turn,
            "admissible": frame.admissible,
            "valid": frame.valid,
            "success": frame.success,
            "score": float(frame.score),
        }
        for name, value in frame.extra.items():
            info[f"{self.env_key}/{name}"] = dict(value) if isinstance(value, dict) else value  # the reader's own
        if frame.terminated:
            info["stop_reason"] = StopReason.SUCCESS if frame.success else StopReason.FAILURE
        elif self._over:
            info["stop_reason"] = StopReason.TURN_LIMIT
        return info

    def _answer(self, action: str, before: Frame) -> Frame:
        if len(action) <= LONGEST_ACTION:
            return self._act(action)
        text = f"That action has {len(action)} characters; at most {LONGEST_ACTION} are read. Nothing was done."
        return replace(before, observation=text, reward=0.0, valid=False)

    # --- snapshots ---

    def snapshot(self) -> Snapshot:
        """The present moment of the episode, for :meth:`restore`; picklable.

        Raises:
            EpisodeError: no episode has begun.
        """
        if self._frame is None:
            raise EpisodeError("snapshot() was called before reset(); call reset() first")
        return Snapshot(
            env_key=self.env_key,
            data_version=self.data_version,
            split=self.tasks.split,
            task_id=self._task_id,
            task=self._task,
            seed=self._seed,
            actions=tuple(self._actions),
            frame=self._frame,
            over=self._over,
            max_turns=self.max_turns,
            generator=self.np_random.bit_generator.state,
            state=self.save_state(),
        )

    def restore(self, state: Snapshot) -> tuple[str, dict[str, Any]]:
        """Go back to a moment that :meth:`snapshot` gave, here or in another environment over the same data.

        The turn limit and the random generator become those of that moment, too.

        Returns:
            The observation and ``info`` of that moment.

        Raises:
            EpisodeError: the state is not a snapshot of this kind of environment over these data.
        """
        if not isinstance(state, Snapshot):
            raise EpisodeError(f"restore() takes what snapshot() gave, not {type(state).__name__}")
        theirs, ours = (state.env_key, state.data_version), (self.env_key, self.data_version)
        if theirs != ours:
            raise EpisodeError(
                f"the snapshot is of {' '.join(theirs)}, this environment is {' '.join(ours)}; "
                "restore it where the same data are played"
            )
        if state.task_id not in self.tasks:
            raise EpisodeError(
                f"the snapshot's task {state.task_id!r} (split {state.split!r}) is not in split {self.tasks.split!r}; "
                "restore it in an environment of that split"
            )
        self._task_id, self._task, self._seed = state.task_id, state.task, state.seed
        self._actions, self._over, self.max_turns = list(state.actions), state.over, state.max_turns
        self.load_state(state)
        self._turn, self._frame = len(state.actions), state.frame
        self.np_random.bit_generator.state = state.generator
        self.restores += 1
        return state.frame.observation, self._info(state.frame)

    def save_state(self) -> Any:
        """What an episode of this environment consists of, besides what this class keeps; picklable, never changed.

        By default nothing: :meth:`load_state` then begins the episode again and repeats its actions. An environment
        that can copy its state overrides the two, so that a snapshot costs no replay.
        """
        return None

    def load_state(self, snapshot: Snapshot) -> None:
        """Bring the environment into the state of a snapshot, whose ``state`` is what :meth:`save_state` gave."""
        self._frame = self._begin(snapshot.task_id, snapshot.seed)[1]
        for self._turn, action in enumerate(snapshot.actions):
            self._frame = self._answer(action, self._frame)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is an environment made with the same arguments, in the same moment."""
        moment = None if self._frame is None else self.snapshot()
        return _made_again, (type(self), *self._arguments, self.spec, self.max_turns, moment, self.restores)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As :meth:`__reduce__`; the arguments are shared."""
        make, arguments = self.__reduce__()
        copy: Self = make(*arguments)
        memo[id(self)] = copy
        return copy


def _made_again(
    kind: type[TextEnv],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    spec: Any,
    max_turns: int,
    moment: Snapshot | None,
    restores: int,
) -> TextEnv:
    env = kind(*arguments, **keywords)
    env.spec, env.max_turns = spec, max_turns
    if moment is not None:
        env.restore(moment)
        env.restores = restores  # the wrappers' copies are of the same moment
    return env
