"""``RemoteEnv``: an environment on a server, as a ``gymnasium.Env[str, str]`` like any other.

It needs nothing beyond this package over HTTP, and ``websockets`` over WebSocket. The invariant: what it returns equals
what the environment would return here; a call whose answer was lost is sent again and never carried out twice.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from atod_envs.errors import EpisodeError, UnknownName
from atod_envs.serve.transport import RemoteError, SessionLost, connect
from atod_envs.snapshots import Snapshot
from atod_envs.styles import LONGEST_ACTION
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv
from atod_envs.trajectory import StopReason

if TYPE_CHECKING:
    from atod_envs.styles import PromptStyle

TOKEN_VARIABLE = "ATOD_TOKEN"
"""Environment variable that holds the token where none is given."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_text, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_OPENED: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("session", "env", "split", "env_key", "data_version"), _is_text),
    **{"splits": _are_texts, "label": lambda label: label is None or _is_text(label)},
    **{"tasks": _is_count, "max_turns": lambda turns: _is_count(turns) and turns > 0},
}
_ANSWER: Mapping[str, Callable[[Any], bool]] = {"observation": _is_text, "info": lambda info: isinstance(info, dict)}
_STEP: Mapping[str, Callable[[Any], bool]] = {
    **{"terminated": _is_flag, "truncated": _is_flag},
    "reward": lambda reward: type(reward) in (int, float) and math.isfinite(reward),
}
_INFO: Mapping[str, Callable[[Any], bool]] = {
    **{"task_id": _is_text, "task": _is_text, "turn": _is_count, "admissible": _are_texts},
}
"""What the answers of a server must have, and whether it is that."""
_PLAYED = ("env", "env_key", "split", "data_version", "tasks")
"""What a session that is opened again must have in common with the first; recordings name it."""


class RemoteTasks(TaskSet):
    """The task ids of a split on the server; they are fetched when they are looked at, their number is known before."""

    def __init__(self, env: RemoteEnv, split: str, count: int) -> None:
        self.split = split
        self._env = env
        self._count = count

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _ids(self) -> tuple[str, ...]:  # type: ignore[override]
        ids: list[str] = []
        while len(ids) < self._count:
            page = self._env.call("tasks", start=len(ids)).get("tasks")
            if not page or not _are_texts(page):
                raise RemoteError(f"the server named {len(ids)} of its {self._count} tasks")
            ids.extend(page)
        if len(set(ids)) != self._count:
            raise RemoteError(f"the server named {len(set(ids))} different tasks, but has {self._count}")
        return tuple(ids)

    @cached_property
    def _members(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)


class RemoteEnv(TextEnv):
    """A text environment on a server (``python -m atod_envs.serve``).

    Everything that takes an environment takes it: ``prompted``, ``RecordTurns``, ``TextVectorEnv``, rollouts (which
    step it in threads, so that episodes do not wait for each other's network).

    Args:
        url: the server: ``http://host:port`` or ``https://...``; ``ws://...`` or ``wss://...`` for one WebSocket
            instead.
        env_id: registered id of the environment; ``None`` takes the server's first.
        split: one that the server offers; ``None`` takes its first.
        max_turns: turn limit; ``None`` takes the server's.
        token: what the server asks for; ``None`` takes ``$ATOD_TOKEN``.
        timeout: seconds to wait for an answer.
        retries: further attempts where the server does not answer.
        render_mode: ``"ansi"`` or ``None``.

    Raises:
        RemoteError: the server does not answer, or refuses; says why.
        UnknownName: it does not offer that environment or split.
    """

    env_key: ClassVar[str] = "remote"
    default_max_turns: ClassVar[int] = 1
    blocking = True

    def __init__(
        self,
        url: str,
        env_id: str | None = None,
        *,
        split: str | None = None,
        max_turns: int | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        render_mode: str | None = None,
    ) -> None:
        self._url = url
        self._link = connect(
            url, os.environ.get(TOKEN_VARIABLE, "") if token is None else token, timeout=timeout, retries=retries
        )
        self._wanted = {name: value for name, value in (("env", env_id), ("split", split)) if value is not None}
        self.session, self._number = "", 0
        self._played: dict[str, Any] = {}
        opened = self._open()
        super().__init__(
            RemoteTasks(self, opened["split"], opened["tasks"]),
            max_turns=opened["max_turns"] if max_turns is None else max_turns,
            render_mode=render_mode,
        )
        self.remote_id = str(opened["env"])
        # What belongs to the environment's class is the instance's here.
        about = {"env_key": opened["env_key"], "label": opened["label"], "splits": tuple(opened["splits"])}
        for name, value in {**about, "data_version": opened["data_version"]}.items():
            setattr(self, name, value)
        arguments = {
            "url": url,
            "env_id": self.remote_id,
            "split": opened["split"],
            "max_turns": self.configured_max_turns,
        }
        self.spec = EnvSpec(
            id=self.remote_id,
            entry_point="atod_envs.serve.client:RemoteEnv",
            disable_env_checker=True,
            kwargs={**arguments, "timeout": timeout, "retries": retries, "render_mode": render_mode},
        )  # the token is left out: specs are written into files

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode, in a new session if the old one has expired; see :meth:`TextEnv.reset`.

        Raises:
            RemoteError: as for every call; or the new session plays other tasks than the old one.
        """
        gym.Env.reset(self, seed=seed)
        unknown = set(options or ()) - {"task_id"}
        if unknown:
            raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}; expected 'task_id'")
        begin = {"seed": None if seed is None else int(seed), "max_turns": self.max_turns}
        begin["task_id"] = (options or {}).get("task_id")
        try:
            answer = self._in_turn("reset", begin)
        except SessionLost:
            self._open()
            answer = self._in_turn("reset", begin)
        info = self._checked(answer)
        self._note(answer["observation"], info, over=False)
        return answer["observation"], info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one action; see :meth:`TextEnv.step`.

        Raises:
            SessionLost: the session expired or the server was started anew; the episode is lost, ``reset()`` begins
                another.
        """
        if self._frame is None:
            raise EpisodeError("step() was called before reset(); call reset() first")
        if not isinstance(action, str):
            raise TypeError(f"an action is a str, not {type(action).__name__}")
        # Of an action that is too long to be read its length alone counts, and fewer bytes say it.
        text = action if len(action) <= LONGEST_ACTION else "x" * len(action)
        answer = self._in_turn("step", {"action": text})
        info = self._checked(answer, _STEP)
        terminated, truncated = answer["terminated"], answer["truncated"]
        self._note(answer["observation"], info, over=terminated or truncated)
        return answer["observation"], float(answer["reward"]), terminated, truncated, info

    def snapshot(self) -> Snapshot:
        """Not possible: the episode lives on the server.

        Raises:
            EpisodeError: always.
        """
        raise EpisodeError(
            "an episode on a server has no snapshot here; make the environment in this process, or reset with the same "
            "task and seed and repeat the actions"
        )

    @property
    def episode_seed(self) -> int:
        """-1: what the server drew is not told."""
        return -1

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """The styles of the environment's class, which is installed here, too; prompts are written on this side."""
        if self.remote_id not in gym.registry:
            return MappingProxyType({})
        creator = gym.registry[self.remote_id].entry_point
        kind = gym.envs.registration.load_env_creator(creator) if isinstance(creator, str) else creator
        return cast("type[TextEnv]", kind).prompt_styles(self)

    def close(self) -> None:
        """End the session."""
        if self.session:
            with contextlib.suppress(RemoteError):  # it expires by itself
                self._link.call("close", {"session": self.session}, retry=False)
            self.session = ""
        self._link.close()

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """One call for this session, as the protocol has it."""
        return self._link.call(name, {"session": self.session, **arguments})

    def _open(self) -> dict[str, Any]:
        self.session, self._number = "", 0
        opened = self._link.call("open", self._wanted)
        self._require(opened, _OPENED)
        self.session = str(opened["session"])
        played = {name: opened[name] for name in _PLAYED}
        self._played = self._played or played
        for name, before in self._played.items():
            if played[name] != before:
                self.close()  # nothing is played in it, now or later
                raise RemoteError(
                    f"{self._url} now serves {name} {played[name]!r}, not {before!r} as before; make another environment"
                )
        return opened

    def _checked(self, answer: dict[str, Any], further: Mapping[str, Callable[[Any], bool]] | None = None) -> Any:
        """The ``info`` of an answer that has what it must have."""
        self._require(answer, {**_ANSWER, **(further or {})})
        info = answer["info"]
        self._require(info, _INFO)
        if "stop_reason" in info:
            if info["stop_reason"] not in list(StopReason):
                raise RemoteError(f"{self._url} answered the stop reason {info['stop_reason']!r:.60}")
            info["stop_reason"] = StopReason(info["stop_reason"])
        return info

    def _require(self, answer: Mapping[str, Any], what: Mapping[str, Callable[[Any], bool]]) -> None:
        for name, fits in what.items():
            if not fits(answer.get(name)):
                raise RemoteError(
                    f"{self._url} answered {name!r} {answer.get(name)!r:.60}, which is none; is it a server of environments?"
                )

    def _in_turn(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer = self.call(name, number=self._number + 1, **arguments)
        self._number += 1
        return answer

    def _note(self, observation: str, info: dict[str, Any], over: bool) -> None:
        self._task_id, self._task, self._turn, self._over = info["task_id"], info["task"], info["turn"], over
        self._frame = Frame(observation, info["admissible"])

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        raise NotImplementedError("episodes begin on the server")

    def _act(self, action: str) -> Frame:
        raise NotImplementedError("actions are carried out on the server")


__all__ = ["RemoteEnv", "RemoteError", "SessionLost", "UnknownName"]
