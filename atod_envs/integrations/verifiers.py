"""verifiers: the environments as a taskset, with the environment that plays it and a harness that needs no sandbox.

``vf-eval atod_verifiers --env.taskset.environment atod/ALFWorld-v0 ...`` evaluates any model that an OpenAI-compatible
server offers; the module ``atod_verifiers`` exists because verifiers finds plugins by the name of a top-level module.
The text environment plays the user: its first prompt opens the exchange, each answer is its next turn. The invariant:
the recorded reward is the episode's return, and an episode that the model could not finish is worth what it had earned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import gymnasium as gym

from atod_envs.prompting import Prompted
from atod_envs.styles import as_conversation
from atod_envs.text_env import TextEnv

try:
    import httpx
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire
except ImportError as error:
    raise ImportError(
        "this needs verifiers: pip install 'atod[verifiers]' (in another virtual environment than openenv: they pin different "
        "versions of mcp)"
    ) from error


class AtodTasksetConfig(vf.TasksetConfig):  # type: ignore[misc]
    """Which tasks, and how they are put; ``--env.taskset.*`` on the command line."""

    environment: str = "atod/ALFWorld-v0"
    """Registered id of the environment."""
    split: str | None = None
    """Split; none takes the environment's training split."""
    style: str = "atod"
    """Prompt style. Whatever its layout, the exchange is one growing conversation."""
    panel: int | None = None
    """Size of the fixed panel; none takes all tasks of the split."""
    seed: int = 0
    """Seed of the episodes."""
    options: dict[str, Any] = {}  # noqa: RUF012 (a pydantic field)
    """Other arguments of the environment (``data``, ``max_turns``, ...)."""

    def make(self) -> gym.Env[str, str]:
        """Make the environment."""
        options = self.options if self.split is None else {"split": self.split, **self.options}
        return gym.make(self.environment, **options)


class AtodTaskData(vf.TaskData):  # type: ignore[misc]
    """One task; the environment itself writes the prompts."""

    task_id: str
    """The environment's task id."""
    seed: int
    """Seed of the episode."""


class AtodTask(vf.Task[AtodTaskData, vf.State, vf.TaskConfig]):  # type: ignore[misc]
    """A task; its reward comes from the environment that plays it."""

    @property
    def key(self) -> str:
        """The task id: stable wherever the task stands in its split."""
        return str(self.data.task_id)


class AtodTaskset(vf.Taskset[AtodTask, AtodTasksetConfig]):  # type: ignore[misc]
    """The tasks of a split, or a fixed panel of them."""

    def load(self) -> Iterator[AtodTask]:
        """Yield the tasks."""
        env = self.config.make()
        tasks = cast("TextEnv", env.unwrapped).tasks
        chosen = tuple(tasks) if self.config.panel is None else tasks.panel(self.config.panel)
        env.close()
        for task_id in chosen:
            yield AtodTask(AtodTaskData(name=task_id, task_id=task_id, seed=self.config.seed), self.config.task)


class AtodHarnessConfig(vf.HarnessConfig):  # type: ignore[misc]
    """The harness's settings."""

    timeout: float = 600.0
    """Seconds that one answer of the model may take."""


class AtodHarness(vf.Harness[AtodHarnessConfig]):  # type: ignore[misc]
    """Asks the model for its next message, in this process: nothing is installed, no sandbox is started."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> vf.ProgramResult:
        """One message of the model, through verifiers' own endpoint (which samples and records it)."""
        system, prompt = self.resolve_prompt(data)
        messages = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else list(map(message_to_wire, prompt or ()))
        )
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        async with httpx.AsyncClient(timeout=self.config.timeout, trust_env=False) as client:
            response = await client.post(
                f"{endpoint.rstrip('/')}/chat/completions",
                headers={"Authorization": f"Bearer {secret}"},
                json={"model": ctx.model, "messages": messages},
            )
        failed = response.is_error
        return vf.ProgramResult(exit_code=int(failed), stdout="", stderr=response.text[-2000:] if failed else "")


class AtodEnvConfig(vf.EnvConfig):  # type: ignore[misc]
    """The environment's settings; ``--env.player.*`` sets who plays."""

    player: vf.AgentConfig = vf.AgentConfig(runtime={"type": "subprocess"})
    """Who plays: by default the evaluated model, asked by :class:`AtodHarness` (the harness that comes with this
    taskset)."""


class AtodEnv(vf.Env[AtodEnvConfig]):  # type: ignore[misc]
    """Plays tasks: the text environment is the user, the model answers."""

    async def run(self, task: Any, agents: Any) -> None:
        """One episode."""
        config = cast("AtodTasksetConfig", self.taskset.config)
        env = Prompted(config.make(), config.style)
        env.style = as_conversation(env.style)
        try:
            message, info = env.reset(seed=task.data.seed, options={"task_id": task.data.task_id})
            total, over = 0.0, False
            async with agents.player.interaction(task) as interaction:
                while not over:
                    segment = await interaction.turn(message)
                    if segment.terminated:
                        break
                    # The whole reply, not the stripped one that `last_reply` gives: parsing is the style's business.
                    message, reward, terminated, truncated, info = env.step(_text(segment))
                    total += reward
                    over = terminated or truncated
            trace = interaction.trace
            trace.record_reward("reward", total, 1.0)
            trace.record_metric("success", float(info["success"]))
            trace.record_metric("score", float(info["score"]))
            trace.record_metric("turns", float(info["turn"]))
            trace.info["stop_reason"] = str(info.get("stop_reason", "context_limit" if not over else ""))
        finally:
            env.close()


def _text(segment: Any) -> str:
    for message in reversed(segment.messages):
        if isinstance(message, vf.AssistantMessage):
            return str(message.content or "")
    return ""


__all__ = ["AtodEnv", "AtodHarness", "AtodTaskset"]
