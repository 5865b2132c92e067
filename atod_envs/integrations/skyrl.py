"""SkyRL: the environments as ``skyrl_gym`` classes, and trajectories as its trainer's ``GeneratorOutput``.

SkyRL keeps one growing conversation: the first prompt, then responses and what the environment says, each as a user
message. Any prompt style can be used that way (``as_conversation``); its message of each turn is what is appended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict, cast

import gymnasium as gym

import atod_envs
from atod_envs.errors import EpisodeError
from atod_envs.integrations.rows import finished, single_row, token_rows
from atod_envs.integrations.tools import require_episode
from atod_envs.prompting import Prompted
from atod_envs.styles import as_conversation
from atod_envs.trajectory import Group, StopReason

try:
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
    from skyrl_gym.envs.registration import register as _register
    from skyrl_gym.envs.registration import registry as _registry
except ImportError as error:
    raise ImportError("SkyRL's environments need skyrl-gym: pip install 'atod[skyrl]'") from error


class SkyRLTextEnv(BaseTextEnv):  # type: ignore[misc]
    """A text environment behind ``skyrl_gym``'s interface.

    Args:
        env_config: arguments of the environment (``split``, ``data``, ``max_turns``, ...), and ``style``, the prompt
            style (default ``"atod"``).
        extras: the row of the data set: ``task_id`` names the task, ``seed`` the episode, ``split`` the split if it is
            another one than that of the options; without a row the episode is drawn from the split. SkyRL adds its own
            ``max_turns``; the lower of the two limits holds.
        env_id: registered id of the environment.
        **options: what :func:`register` was given; ``env_config`` wins over it.

    Raises:
        AtodError: a row names neither task nor seed: attempts at it would be attempts at different tasks.
    """

    def __init__(
        self, env_config: Any = None, extras: dict[str, Any] | None = None, *, env_id: str, **options: Any
    ) -> None:
        super().__init__()
        options |= {str(key): value for key, value in dict(env_config or {}).items()}
        style = options.pop("style", "atod")
        self.extras = dict(extras or {})
        columns = [name for name in self.extras if name != "max_turns"]  # SkyRL's own
        require_episode(columns, self.extras.get("task_id"), self.extras.get("seed"))
        if self.extras.get("split") is not None:
            options["split"] = self.extras["split"]
        if self.extras.get("max_turns"):
            options["max_turns"] = min(int(self.extras["max_turns"]), int(options.get("max_turns", 1 << 30)))
        self.env = Prompted(gym.make(env_id, **options), style)
        self.env.style = as_conversation(self.env.style)
        self.max_turns = self.env.get_wrapper_attr("max_turns")
        self.info: dict[str, Any] = {}
        self.total = 0.0

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Begin the episode; messages of ``prompt`` with the role ``system`` stay in front."""
        task_id = self.extras.get("task_id")
        message, self.info = self.env.reset(
            seed=self.extras.get("seed"), options=None if task_id is None else {"task_id": task_id}
        )
        self.turns, self.total = 0, 0.0
        system = [entry for entry in prompt or () if entry["role"] == "system"]
        return [*system, {"role": "user", "content": message}], dict(self.info)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Answer a whole response of the model."""
        if not self.info:
            raise EpisodeError("step() was called before init(); call init() first")
        message, reward, terminated, truncated, self.info = self.env.step(action)
        self.turns += 1
        self.total += reward
        done = terminated or truncated
        return BaseTextEnvStepOutput(
            observations=[] if done else [{"role": "user", "content": message}],
            reward=reward,
            done=done,
            metadata=dict(self.info),
            postprocessed_action=None,
        )

    def get_metrics(self) -> dict[str, Any]:
        """Success, score, turns and reward of the episode so far."""
        return {
            "success": float(self.info.get("success", False)),
            "score": float(self.info.get("score", 0.0)),
            "turns": float(self.turns),
            "reward": self.total,
        }

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def register(**options: Any) -> tuple[str, ...]:
    """Register the environments with ``skyrl_gym`` and return their ids (``atod-alfworld``, ...).

    Args:
        **options: of every environment (``data``, ``split``, ``max_turns``, ``style``): SkyRL's own trainer passes an
            environment no options of its own. A second call replaces those of the first.
    """
    ids = []
    for env_id in atod_envs.ENVIRONMENTS:
        name = "atod-" + env_id.split("/")[1].split("-")[0].lower()
        _registry.pop(name, None)
        _register(name, "atod_envs.integrations.skyrl:SkyRLTextEnv", kwargs={"env_id": env_id, **options})
        ids.append(name)
    return tuple(ids)


class GeneratorOutput(TypedDict):
    """The keys of SkyRL's type of that name that a text rollout fills."""

    prompt_token_ids: list[list[int]]
    response_ids: list[list[int]]
    rewards: list[list[float]]
    loss_masks: list[list[int]]
    stop_reasons: list[str]
    rollout_metrics: dict[str, float]
    rollout_logprobs: list[list[float]]
    trajectory_ids: list[Any] | None
    is_last_step: list[bool] | None
    env_metrics: list[dict[str, Any]]


def generator_output(groups: Iterable[Group], *, step_wise: bool = False) -> GeneratorOutput:
    """Lay groups out as SkyRL's trainer reads them.

    Rewards are given per token: each at the last token of its turn. Step by step, the whole return stands at the end of
    the last step instead, because the trainer makes its advantage from the last step alone. ``stop_reasons`` are the
    trainer's words: ``"length"`` where the context was full, else ``"stop"``.

    Args:
        groups: groups of trajectories that carry token ids; aborted ones are left out.
        step_wise: one sample a row of the trajectory (with ``trajectory_ids`` and ``is_last_step``); needed where each
            turn's prompt stands alone. Otherwise one sample an episode.

    Raises:
        ValueError: a trajectory does not fit one sample and ``step_wise`` is off, or has no token ids.
    """
    groups = list(groups)
    repetition: dict[int, tuple[str, int]] = {}
    for group in groups:
        for number, trajectory in enumerate(group.trajectories):
            repetition[id(trajectory)] = (trajectory.group_id or group.task_id, number)
    output: dict[str, list[Any]] = {
        name: []
        for name in ("prompt_token_ids", "response_ids", "rewards", "loss_masks", "stop_reasons", "rollout_logprobs")
    }
    owners: list[Any] = []
    last: list[bool] = []
    metrics: list[dict[str, Any]] = []
    kept = finished(groups)
    for trajectory in kept:
        wanted = "SkyRL's episode-wise GeneratorOutput (step_wise=True has no such limit)"
        rows = token_rows(trajectory) if step_wise else [single_row(trajectory, wanted)]
        stop = "length" if trajectory.stop_reason is StopReason.CONTEXT_LIMIT else "stop"
        for position, row in enumerate(rows):
            rewards = row.rewards
            if step_wise:
                rewards = [0.0] * len(row.rewards)
                rewards[-1] = trajectory.reward if position == len(rows) - 1 else 0.0
            values = (row.prompt_ids, row.response_ids, rewards, row.mask, stop, row.logprobs)
            for name, value in zip(output, values, strict=True):
                output[name].append(value)
            owners.append(_trajectory_id(*repetition[id(trajectory)]))
            last.append(position == len(rows) - 1)
            metrics.append({"success": float(trajectory.success), "score": trajectory.score})
    count = max(1, len(kept))
    return cast(
        "GeneratorOutput",
        {
            **output,
            "rollout_metrics": {
                "environment/success": sum(t.success for t in kept) / count,
                "environment/score": sum(t.score for t in kept) / count,
                "environment/turns": sum(len(t.turns) for t in kept) / count,
            },
            "trajectory_ids": owners if step_wise else None,
            "is_last_step": last if step_wise else None,
            "env_metrics": metrics,
        },
    )


def _trajectory_id(instance: str, repetition: int) -> Any:
    """SkyRL's own type where its trainer is installed, else an equal plain one."""
    try:
        from skyrl.train.generators.base import TrajectoryID
    except ImportError:
        return TrajectoryName(instance, repetition)
    return TrajectoryID(instance, repetition)


class TrajectoryName(NamedTuple):
    """Instance and repetition, with the attributes of SkyRL's ``TrajectoryID``."""

    instance_id: str
    repetition_id: int

    def to_string(self) -> str:
        """Both in one string."""
        return f"{self[0]}_{self[1]}"
