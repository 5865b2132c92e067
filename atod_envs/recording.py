"""``RecordTurns``: any text environment then yields its turn-annotated trajectory.

The wrapper sits outermost, over a raw or a prompted environment. A policy that works on tokens hands its ids and
log-probs to :meth:`RecordTurns.annotate` before each step; they are kept exactly as given.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from atod_envs import snapshots
from atod_envs.errors import EpisodeError
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import StopReason, Trajectory, Turn


class RecordTurns(gym.Wrapper[str, str, str, str], RecordConstructorArgs):
    """Records the turns of the current episode.

    At the end of an episode ``info["trajectory"]`` holds it. ``trajectory`` gives the episode so far at any time.

    Args:
        env: a :class:`TextEnv`, raw or prompted.
    """

    def __init__(self, env: gym.Env[str, str]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._turns: list[Turn] = []
        self._info: dict[str, Any] | None = None
        self._observation = ""
        self._seed = 0
        self._stop: StopReason | None = None
        self._note: dict[str, Any] = {}
        self._since = 0.0
        self._restores = self._base.restores
        self.group_id = ""
        self.policy_version = -1

    @property
    def _base(self) -> TextEnv:
        return cast("TextEnv", self.env.unwrapped)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode and its record."""
        shown, info = self.env.reset(seed=seed, options=options)
        self._turns, self._stop, self._note = [], None, {}
        self._seed = self._base.episode_seed if seed is None else int(seed)
        self._restores = self._base.restores
        self._info, self._observation = info, info.get("observation", shown)
        self._since = time.perf_counter()
        return shown, info

    def annotate(
        self,
        *,
        prompt_ids: Sequence[int] = (),
        response_ids: Sequence[int] = (),
        logprobs: Sequence[float] = (),
        seconds_policy: float | None = None,
    ) -> None:
        """Say how the coming action was made: prompt ids, sampled ids, their log-probs, and seconds it took."""
        self._note = {
            "prompt_ids": tuple(map(int, prompt_ids)),  # of NumPy or torch, too
            "response_ids": tuple(map(int, response_ids)),
            "logprobs": tuple(map(float, logprobs)),
            "seconds_policy": seconds_policy,
        }

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Execute an action or response and record the turn.

        Raises:
            EpisodeError: the environment was restored without this wrapper, whose turns are of another moment.
        """
        if self._info is None:
            raise EpisodeError("step() was called before reset(); call reset() first")
        if self._base.restores != self._restores:
            raise EpisodeError(
                "the environment under this record was restored by itself, and the turns are of another moment; "
                "use snapshot() and restore() of the recorded environment"
            )
        admissible = self._info["admissible"]
        started = time.perf_counter()
        shown, reward, terminated, truncated, info = self.env.step(action)
        ended = time.perf_counter()
        seconds = self._note.get("seconds_policy")
        self._turns.append(
            Turn(
                index=len(self._turns),
                observation=self._observation,
                admissible=tuple(admissible),
                prompt_ids=self._note.get("prompt_ids", ()),
                response_ids=self._note.get("response_ids", ()),
                logprobs=self._note.get("logprobs", ()),
                response=action,
                action=info.get("action", action),
                format_ok=info.get("format_ok", True),
                valid=info["valid"],
                reward=float(reward),
                seconds_policy=started - self._since if seconds is None else seconds,
                seconds_env=ended - started,
            )
        )
        self._note, self._since = {}, ended
        self._info, self._observation = info, info.get("observation", shown)
        if terminated or truncated:
            # A wrapper's own limit, such as Gymnasium's max_episode_steps, says no reason.
            self._stop = StopReason(info.get("stop_reason", StopReason.TURN_LIMIT))
            info = {**info, "trajectory": self.trajectory}
        return shown, float(reward), terminated, truncated, info

    def snapshot(self) -> tuple[Any, tuple[Any, ...]]:
        """The present moment with its record, for :meth:`restore`; see :mod:`atod_envs.snapshots`."""
        return snapshots.snapshot(self.env), (
            tuple(self._turns),
            self._info,
            self._observation,
            self._seed,
            self._stop,
            self.group_id,
            self.policy_version,
        )

    def restore(self, state: tuple[Any, tuple[Any, ...]]) -> tuple[str, dict[str, Any]]:
        """Go back to a moment that :meth:`snapshot` gave; the record goes on from there.

        Returns:
            What the environment shows in that moment, and ``info``.

        Raises:
            EpisodeError: the state is not of a recorded environment, or of other data.
        """
        if not (isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], tuple)):
            raise EpisodeError(
                "the state is not a snapshot of a recorded environment; take it with snapshot() of the same wrappers"
            )
        inner, record = state
        shown, info = snapshots.restore(self.env, inner)
        turns, self._info, self._observation, self._seed, self._stop, self.group_id, self.policy_version = record
        self._turns, self._note, self._since = list(turns), {}, time.perf_counter()
        self._restores = self._base.restores
        return shown, {**info, "trajectory": self.trajectory} if self._stop is not None else info

    def close_episode(self, reason: StopReason) -> Trajectory:
        """End the record from outside (context full, rollout stopped) and return the trajectory."""
        self._stop = reason
        return self.trajectory

    @property
    def trajectory(self) -> Trajectory:
        """The episode so far; ``stop_reason`` is ``ABORTED`` while it goes on.

        Raises:
            EpisodeError: no episode has begun.
        """
        info = self._info
        if info is None:
            raise EpisodeError("there is no trajectory before reset()")
        env = self._base
        label = f"{env.env_key}/{env.label}"
        return Trajectory(
            env_id=env.spec.id if env.spec is not None else type(env).__name__,
            task_id=info["task_id"],
            split=info["split"],
            task=info["task"],
            group_id=self.group_id,
            seed=self._seed,
            turns=tuple(self._turns),
            final_observation=self._observation,
            success=bool(info["success"]),
            score=float(info["score"]),
            stop_reason=self._stop or StopReason.ABORTED,
            policy_version=self.policy_version,
            labels={label: str(info[label])} if label in info else {},
            data_version=env.data_version,
        )
