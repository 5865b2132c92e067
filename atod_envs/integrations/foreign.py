"""Others' environments as ours: ``wrap`` makes a ``TextEnv`` of anything with ``reset`` and ``step``.

    env = wrap(lambda: gem.make("game:GuessTheNumber-v0"))
    register("cards/Blackjack-v0", partial(gym.make, "Blackjack-v1"), actions={"stick": 0, "hit": 1}, returns=(-1, 1))

Then it is played, recorded, prompted, evaluated and trained on like any other. Three kinds of answers are understood:

    Gymnasium, GEM    reset(seed=) -> (observation, info); step -> (observation, reward, terminated, truncated, info)
    OpenEnv           reset(seed=) and step -> an object with observation, reward and done
    TextArena         reset(num_players=1, seed=), get_observation, step -> (done, info), close -> (rewards, info)

A foreign environment has no tasks: here a task is the seed that it is reset with, ``train-17``, and each split has
seeds of its own. The invariant: the same task is the same episode. An environment that takes no seed cannot keep it and
is refused, unless it is said to be without chance.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self, cast

import gymnasium as gym
from gymnasium import spaces

from atod_envs.errors import AtodError
from atod_envs.snapshots import Snapshot
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv

SPLITS = {"train": 1000, "valid": 128, "test": 256}
"""Split -> how many seeds it has; those of the splits begin at 0, at a million and at two million."""

_OFFERED = ("admissible", "admissible_commands", "available_actions", "legal_actions", "valid_actions")
"""Names in ``info`` under which environments list their actions."""

_SOLVED = ("success", "won", "is_success")
"""Names in ``info`` that say whether the task is solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a foreign environment is put into words.

    Attributes:
        key: its name in a run (``env_key``), the prefix of what is particular to it.
        about: what it is, for the prompts.
        instruction: the task in words, or how it follows from the first observation.
        actions: what a response may say: texts (with the foreign actions they stand for, where these are no texts), or
            how any text becomes an action. By default texts are passed on as they are.
        text: puts an observation into words.
        returns: sums of an episode's rewards that count as score 0 and as score 1. The score is known at the end, its
            own or the turn limit's; the task is solved where it ended itself, with score 1 or where ``info`` says so.
        refuses: errors by which the environment says that it does not understand an action. Others are its bugs.
        chance: false for an environment that takes no seed because it always plays the same.
        tells_rules_first: the first observation holds what is needed all along.
        version: tells environments apart that play differently and are made by the same class, where neither Gymnasium
            nor a ``partial`` made them; a part of ``data_version``.
    """

    key: str = "foreign"
    about: str = "a text environment"
    instruction: str | Callable[[str], str] = "Reach the goal."
    actions: Mapping[str, Any] | Sequence[str] | Callable[[str], Any] | None = None
    text: Callable[[Any], str] = str
    returns: tuple[float, float] = (0.0, 1.0)
    refuses: tuple[type[Exception], ...] = (ValueError,)
    chance: bool = True
    tells_rules_first: bool = False
    version: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.returns[0] >= self.returns[1]:
            raise AtodError(
                f"returns={self.returns}: expected the sum of rewards of a failure, then a larger one of a success"
            )


_NO_TEXT = (spaces.Discrete, spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)
"""Action spaces that hold no text."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a foreign environment said, whichever form it has."""

    observation: Any
    reward: float = 0.0
    over: bool = False
    info: Mapping[str, Any] | None = None


class ForeignEnv(TextEnv):
    """A foreign environment as one of ours; see :func:`wrap`.

    Args:
        make: makes the environment, or is one.
        manner: how it is put into words.
        split: train, valid or test.
        max_turns: turn limit.
        render_mode: ``"ansi"`` or None.

    Raises:
        AtodError: it takes no seed.
    """

    env_key: ClassVar[str] = "foreign"
    default_max_turns: ClassVar[int] = 30

    def __init__(
        self,
        make: Any,
        manner: Manner,
        *,
        split: str = "train",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        ids = {f"{name}-{n}": name for name, count in SPLITS.items() for n in range(count)}
        super().__init__(TaskSet.of_split(split, ids), max_turns=max_turns, render_mode=render_mode)
        makes = isinstance(make, type) or (callable(make) and not hasattr(make, "step"))
        self._make = make if makes else None
        self._foreign = make if self._make is None else self._make()
        self._manner, self._return = manner, 0.0
        kind = type(self._foreign)
        # What belongs to the environment's class is the instance's here.
        own = {"env_key": manner.key, "about": manner.about, "tells_rules_first": manner.tells_rules_first}
        version = getattr(self._foreign, "data_version", _version(self._foreign, make))
        versions = (manner.key, version, manner.version)
        for name, value in {**own, "data_version": "/".join(filter(None, versions))}.items():
            setattr(self, name, value)
        # TextArena's games are for several.
        self._players = hasattr(self._foreign, "get_observation") and not isinstance(self._foreign, gym.Env)
        space = getattr(self._foreign, "action_space", None)
        if manner.actions is None and isinstance(space, _NO_TEXT):
            raise AtodError(
                f"{kind.__name__} takes {space}, not text; give actions={{'word': action, ...}}, or a function of the text"
            )
        self._seeded = _takes_seed(self._foreign.reset)
        if not self._seeded and manner.chance:
            raise AtodError(
                f"{kind.__name__}.reset takes no seed, so the same task would not be the same episode; give it one, or say chance=False "
                "if it always plays the same"
            )
        if self._players and self._make is None:
            raise AtodError("a TextArena game begins anew only when it is made anew; give a function that makes it")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As any environment's; one that was given as an object is copied, too, for its copy plays on by itself."""
        if self._make is None:
            make, (kind, arguments, keywords, *rest) = self.__reduce__()
            given, own = self._foreign, copy.deepcopy(self._foreign, memo)
            arguments = tuple(own if value is given else value for value in arguments)
            keywords = {name: own if value is given else value for name, value in keywords.items()}
            memo[id(self)] = made = make(kind, arguments, keywords, *rest)
            return cast("Self", made)
        return super().__deepcopy__(memo)

    def close(self) -> None:
        """Close the foreign environment, where it can be closed."""
        if not self._players and hasattr(self._foreign, "close"):
            self._foreign.close()

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        split, _, number = task_id.rpartition("-")
        place = list(SPLITS).index(split) * 1_000_000 + int(number)
        if self._players and self._make is not None:
            self._foreign = self._make()  # its wrappers keep what an unfinished episode said
        seeded = {"seed": place} if self._seeded else {}
        players = {"num_players": 1} if self._players else {}
        self._return = 0.0
        frame = self._frame_of(self._read(self._foreign.reset(**seeded, **players), begun=True), begun=True)
        said = self._manner.instruction
        return said(frame.observation) if callable(said) else said, frame

    def _act(self, action: str) -> Frame:
        actions, wanted = self._manner.actions, action.strip()
        if not callable(actions) and actions is not None and wanted not in actions:
            return self._not_understood(f"{action!r} is no action here; expected one of: {', '.join(actions)}.")
        try:
            meant = (
                actions(action) if callable(actions) else actions[wanted] if isinstance(actions, Mapping) else wanted
            )
            answer = self._foreign.step(meant)
        except self._manner.refuses as error:
            return self._not_understood(f"{action!r} was not understood: {error}")
        return self._frame_of(self._read(answer, begun=False))  # whatever is wrong with it is no fault of the action

    def _not_understood(self, said: str) -> Frame:
        assert self._frame is not None
        score = self._reached() if self._last() else 0.0
        return Frame(said, self._frame.admissible, score, score, valid=False)

    def _read(self, answer: Any, *, begun: bool) -> _Answer:
        """An answer in one of the known forms."""
        if self._players:  # the reward comes at the end
            done = answer[0] if isinstance(answer, tuple | list) and answer else None
            if begun or not self._flag(done, "done"):
                return _Answer(self._foreign.get_observation()[1])
            rewards, infos = self._foreign.close()
            return _Answer(infos.get(0, {}).get("reason", "The game is over."), self._number(rewards[0]), over=True)
        if hasattr(answer, "observation") and hasattr(answer, "done"):
            reward = 0.0 if begun or getattr(answer, "reward", None) is None else self._number(answer.reward)
            return _Answer(answer.observation, reward, self._flag(answer.done, "done"))
        match answer:
            case observation, dict() as info if begun:
                return _Answer(observation, info=info)
            case observation, reward, terminated, truncated, dict() as info if not begun:
                over = [self._flag(terminated, "terminated"), self._flag(truncated, "truncated")]
                return _Answer(observation, self._number(reward), any(over), info)
        raise AtodError(
            f"{type(self._foreign).__name__}.{'reset' if begun else 'step'} answered {str(answer)[:80]!r}; expected the form of "
            "Gymnasium, OpenEnv or TextArena"
        )

    def _number(self, reward: Any) -> float:
        number = math.nan
        if not isinstance(reward, str | bytes):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = float(reward)
        if not math.isfinite(number):
            raise AtodError(f"{type(self._foreign).__name__} gave the reward {reward!r:.60}; expected a finite number")
        return number

    def _flag(self, value: Any, name: str) -> bool:
        """A yes or no; text such as 'False' counts as true everywhere else."""
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not isinstance(value, str | bytes) and float(value) in (0.0, 1.0):
                return bool(value)
        raise AtodError(f"{type(self._foreign).__name__} gave {name} {value!r:.60}; expected true or false")

    def _listed(self, offered: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(offered, str | bytes):
            with contextlib.suppress(TypeError):
                return tuple(offered)
        raise AtodError(f"{type(self._foreign).__name__} gave {name} {offered!r:.60}; expected a list of actions")

    def _worded(self, offered: tuple[Any, ...]) -> tuple[Any, ...]:
        """Offered actions by the words that ``step`` understands."""
        actions = self._manner.actions
        if isinstance(actions, Mapping):
            return tuple(word for word, meant in actions.items() if word in offered or meant in offered)
        return offered if actions is None or callable(actions) else tuple(word for word in actions if word in offered)

    def _last(self) -> bool:
        """Whether the action that is carried out is the last that the turn limit allows."""
        return self._turn + 1 >= self.max_turns

    def _reached(self) -> float:
        failed, solved = self._manner.returns
        return min(1.0, max(0.0, (self._return - failed) / (solved - failed)))

    def _frame_of(self, answer: _Answer, *, begun: bool = False) -> Frame:
        if self._manner.text is str and isinstance(answer.observation, bytes | None):
            raise AtodError(
                f"{type(self._foreign).__name__} gave the observation {answer.observation!r:.60}; expected text, or what `text` turns "
                "into it"
            )
        info = answer.info or {}
        self._return += answer.reward
        score = self._reached() if answer.over or (not begun and self._last()) else 0.0
        told = next((self._flag(info[name], name) for name in _SOLVED if info.get(name) is not None), score >= 1.0)
        given = (self._worded(self._listed(info[name], name)) for name in _OFFERED if info.get(name) is not None)
        offered: Any = next((actions for actions in given if actions), self._manner.actions)
        listed = ("<any text>",) if not offered or callable(offered) else tuple(str(one) for one in offered)
        text = self._manner.text(answer.observation)
        if not isinstance(text, str):
            raise AtodError(
                f"text=... gave {text!r:.60} for an observation of {type(self._foreign).__name__}; expected text"
            )
        return Frame(
            text,
            () if answer.over else listed,
            score,
            score,
            success=answer.over and told,
            terminated=answer.over,
        )


def wrap(
    make: Any, *, split: str = "train", max_turns: int | None = None, render_mode: str | None = None, **manner: Any
) -> ForeignEnv:
    """A foreign environment as one of ours.

    Args:
        make: makes the environment; or an environment, for a single episode at a time.
        split: train, valid or test.
        max_turns: turn limit; 30 by default. It ends an episode unsolved, with the score reached; so does a limit of
            its own.
        render_mode: ``"ansi"`` or None.
        manner: how it is put into words, by the names of :class:`Manner`.

    Raises:
        AtodError: it takes no seed.
    """
    return ForeignEnv(make, Manner(**manner), split=split, max_turns=max_turns, render_mode=render_mode)


def register(env_id: str, make: Callable[[], Any], **manner: Any) -> None:
    """Register a wrapped environment with Gymnasium, so that every command can play it and train on it.

    Args:
        env_id: such as ``"cards/Blackjack-v0"``. A command finds it behind the module that registers it:
            ``--env my_module:cards/Blackjack-v0``.
        make: makes the foreign environment.
        manner: how it is put into words, by the names of :class:`Manner`; its ``key`` is by default the id's name.
    """
    name = env_id.rpartition("/")[2].partition("-")[0].lower()
    chosen = Manner(**{"key": name, **manner})

    class Registered(ForeignEnv):
        env_key = chosen.key

        def __init__(self, data: str | None = None, **options: Any) -> None:
            if data is not None:
                raise AtodError(f"data={data!r}: {env_id} has no data folder; its data belong to what makes it")
            super().__init__(make, chosen, **options)

        def __reduce__(self) -> tuple[Any, ...]:
            """The class is made here, so a copy is made through its registered id."""
            moment = None if self._frame is None else self.snapshot()
            options = self._arguments[1]
            return _made_by_id, (env_id, options, self.max_turns, moment, self.restores)

    gym.register(env_id, entry_point=Registered, disable_env_checker=True)


def _made_by_id(
    env_id: str, options: Mapping[str, Any], max_turns: int, moment: Snapshot | None, restores: int
) -> TextEnv:
    env = cast("TextEnv", gym.make(env_id, **options).unwrapped)
    env.max_turns = max_turns
    if moment is not None:
        env.restore(moment)
        env.restores = restores
    return env


def _version(foreign: Any, make: Any) -> str:
    """Which environment it is: its class inside of all wrappers, and how Gymnasium or a ``partial`` made it."""
    kind = type(getattr(foreign, "unwrapped", foreign))
    name = f"{kind.__module__}.{kind.__qualname__}"
    spec = getattr(foreign, "spec", None)
    if isinstance(spec, gym.envs.registration.EnvSpec):
        how: list[Any] = [spec.id, spec.kwargs]
    elif isinstance(make, partial):
        how = [getattr(make.func, "__qualname__", ""), make.args, make.keywords]
    else:
        return name
    # An object's own text may hold its address, which another process does not repeat.
    made = json.dumps(how, sort_keys=True, default=lambda value: type(value).__qualname__)
    return f"{name}/{hashlib.blake2b(made.encode(), digest_size=4).hexdigest()}"


def _takes_seed(reset: Any) -> bool:
    """Whether a seed can be passed; wrappers that pass any keyword on are taken to."""
    found = inspect.signature(reset).parameters
    return "seed" in found or any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())
