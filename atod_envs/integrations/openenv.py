"""OpenEnv: a server and a client for each environment.

    uvicorn --factory atod_envs.integrations.openenv:alfworld          # or another of atod_envs.ROOMS

One WebSocket is one session is one environment. The invariant: observations are the environment's own, and nothing but
an action, a task id and a seed comes from the client.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym

from atod_envs import ROOMS
from atod_envs.prompting import Prompted
from atod_envs.styles import whole_characters

try:
    from openenv.core import EnvClient
    from openenv.core.client_types import StepResult
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    from openenv.core.env_server.types import ConcurrencyConfig, EnvironmentMetadata
except ImportError as error:
    raise ImportError(
        "this needs openenv-core: pip install 'atod[openenv]' (in another virtual environment than verifiers: they pin different "
        "versions of mcp)"
    ) from error

SESSIONS = 256
"""Sessions that a server holds at the same time."""
IDLE_SECONDS = 900.0
"""Seconds without a message after which a session is closed."""


class TextAction(Action):  # type: ignore[misc]
    """What the agent does: an action, or a whole response where the server shows prompts."""

    text: str


class TextObservation(Observation):  # type: ignore[misc]
    """What the environment shows; ``metadata`` holds the rest of ``info``."""

    text: str
    task_id: str
    task: str
    split: str
    turn: int
    admissible: list[str]
    valid: bool
    success: bool
    score: float
    stop_reason: str | None = None


class TextState(State):  # type: ignore[misc]
    """Where the episode is."""

    task_id: str = ""
    split: str = ""
    score: float = 0.0
    success: bool = False


class TextEnvironment(Environment):  # type: ignore[misc]
    """A text environment behind OpenEnv's interface.

    Args:
        env_id: registered id of the environment.
        style: prompt style; ``None`` shows the environment's own text and takes its actions.
        **options: of the environment.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, env_id: str, style: str | None = None, **options: Any) -> None:
        super().__init__()
        raw: gym.Env[str, str] = gym.make(env_id, **options)
        self._env = raw if style is None else Prompted(raw, style)
        self._env_id = env_id
        self._state = TextState()

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, task_id: str | None = None, **_: Any
    ) -> TextObservation:
        """Begin an episode.

        Args:
            seed: of the episode; alone, it also draws the task.
            episode_id: the client's name for it.
            task_id: plays that task.
        """
        text, info = self._env.reset(seed=seed, options=None if task_id is None else {"task_id": task_id})
        self._state = TextState(episode_id=episode_id)
        return self._observed(text, info, None, done=False)

    def step(self, action: TextAction, timeout_s: float | None = None, **_: Any) -> TextObservation:
        """Carry out one action."""
        text, reward, terminated, truncated, info = self._env.step(action.text)
        return self._observed(text, info, float(reward), done=terminated or truncated)

    @property
    def state(self) -> TextState:
        """Where the episode is."""
        return self._state

    def get_metadata(self) -> EnvironmentMetadata:
        """Name and description."""
        about = (type(self._env.unwrapped).__doc__ or "").strip().splitlines()
        return EnvironmentMetadata(name=self._env_id, description=about[0] if about else self._env_id)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _observed(self, text: str, info: dict[str, Any], reward: float | None, done: bool) -> TextObservation:
        own = ("task_id", "task", "split", "turn", "valid", "success", "score")
        values = {name: info[name] for name in own}
        self._state.step_count = info["turn"]
        for name in ("task_id", "split", "score", "success"):
            setattr(self._state, name, info[name])
        rest = {name: value for name, value in info.items() if name not in (*own, "admissible", "stop_reason")}
        reason = info.get("stop_reason")
        return TextObservation(
            text=whole_characters(text),  # half a character cannot be sent
            admissible=list(info["admissible"]),
            stop_reason=None if reason is None else str(reason),
            reward=reward,
            done=done,
            metadata=rest,
            **values,
        )


class TextEnvClient(EnvClient):  # type: ignore[misc]
    """OpenEnv's client for these servers; ``client.sync()`` for code without ``async``."""

    def _step_payload(self, action: TextAction | str) -> dict[str, Any]:
        return {"text": action if isinstance(action, str) else action.text}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        done, reward = bool(payload.get("done", False)), payload.get("reward")
        said = payload["observation"]
        # The server's framework takes the metadata out of the observation and puts it next to it.
        metadata = said.get("metadata") or payload.get("metadata") or {}
        observation = TextObservation(**{**said, "metadata": metadata, "done": done, "reward": reward})
        return StepResult(observation=observation, reward=reward, done=done)

    def _parse_state(self, payload: dict[str, Any]) -> TextState:
        return TextState(**payload)


def make_app(env_id: str, *, style: str | None = None, sessions: int = SESSIONS, **options: Any) -> Any:
    """The server's FastAPI application.

    Args:
        env_id: registered id of the environment.
        style: prompt style; ``None`` for the environment's own text.
        sessions: sessions at the same time.
        **options: of the environment.

    Raises:
        AtodError: the environment cannot be made; said before the first client comes.
    """
    TextEnvironment(env_id, style, **options).close()

    def make() -> TextEnvironment:
        return TextEnvironment(env_id, style, **options)

    concurrency = ConcurrencyConfig(max_concurrent_envs=sessions, session_timeout=IDLE_SECONDS)
    return create_fastapi_app(make, TextAction, TextObservation, concurrency_config=concurrency)


def __getattr__(name: str) -> Any:
    """``alfworld`` and so on: a server for ``uvicorn --factory``, one for each environment of this project."""
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; environments: {', '.join(ROOMS)}")
    return functools.partial(make_app, ROOMS[name])
