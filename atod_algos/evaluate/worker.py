"""The rollout worker of an evaluation: a scripted agent, a model behind a server, or a language model on an engine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium as gym

from agents.api import ApiAgent, ApiOptions, ChatClient
from agents.base import Agent
from agents.chat import ThinkingMode
from agents.expert import expert_for
from agents.random import RandomAgent
from atod_algos.evaluate import episode_seed, evaluate
from atod_algos.evaluate.journal import EpisodeJournal
from atod_algos.evaluate.settings import EvaluateConfig, Panel, Sampling, make_env
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.rollout.layouts import choose_layout
from atod_envs.errors import AtodError, UnknownName
from atod_envs.files import parse_json
from atod_envs.prompting import named_style
from atod_envs.styles import PromptStyle
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory


class EvaluationWorker:
    """Plays panels with the agent that ``--agent`` names.

    Args:
        config: what was asked for.
        sampling: the resolved sampling.
        env_key: the environment's key.
        episodes: most episodes of a panel; an engine holds memory for no more of them at once.
    """

    def __init__(self, config: EvaluateConfig, sampling: Sampling, env_key: str, episodes: int) -> None:
        self._config, self._sampling = config, sampling
        self._at_once = min(config.concurrency, episodes)
        self._client: Any = None
        self._engine: Any = None
        self._chat: Any = None
        kind, _, name = config.agent.partition(":")
        if kind == "api":
            extra = parse_json(config.api_extra, "--api-extra", "give a JSON object")
            if not isinstance(extra, dict):
                raise AtodError(f"--api-extra {config.api_extra}: expected a JSON object, such as '{{\"top_k\": 1}}'")
            options = ApiOptions(config.api_base, config.api_timeout, config.api_retries, extra)
            self._client = ChatClient(
                name,
                options,
                temperature=cast("float", sampling.temperature),
                max_tokens=cast("int", sampling.max_response),
            )
        elif config.agent not in ("random", "expert"):
            self._load(config.agent, env_key)

    def _load(self, agent: str, env_key: str) -> None:
        import torch

        from agents.engines.transformers import TransformersEngine
        from agents.logits import longest_context
        from agents.models import computing_type, device_of, load_model

        folder = Path(agent).expanduser()
        if (folder / "checkpoints").is_dir():
            raise AtodError(
                f"{agent} is a run's folder; give one of its checkpoints, e.g. {shlex.quote(str(folder / 'checkpoints' / 'best'))}"
            )
        kind, _, role = agent.partition(":")
        name = "builtin" if kind == "builtin" else agent
        if kind == "builtin" and role not in ("", "student", "teacher"):
            raise UnknownName("agent", agent, ("builtin", "builtin:teacher"))
        device = device_of(self._config.device)
        if name == "builtin" and device == "cpu":
            torch.set_num_threads(1)  # models this small only lose with more
        model = load_model(
            name, role or "student", world=env_key, device=device, dtype=computing_type(device), option="--agent"
        )
        limit = longest_context(model.model)
        self._engine = TransformersEngine(
            model.model, slots=self._at_once, max_context=min(cast("int", self._sampling.max_context), limit)
        )
        sampling = self._sampling
        self._chat = model.chat(cast(ThinkingMode, sampling.thinking), cast("str", sampling.chat_date))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that a server has counted."""
        if self._client is None:
            return {}
        return {"prompt_tokens": self._client.prompt_tokens, "completion_tokens": self._client.completion_tokens}

    def play(self, panel: Panel, seed: int, journal: Path, on_finish: Callable[[int], None]) -> Sequence[Trajectory]:
        """Play every task of a panel once.

        Args:
            panel: the panel.
            seed: of episodes and sampling.
            journal: where the episodes of a slow or costly agent are written down as they end; they are not played
                again.
            on_finish: called with the number of finished episodes.
        """
        config, sampling = self._config, self._sampling
        rollout = Rollout(
            self._engine,
            self._chat,
            lambda: make_env(config, sampling, panel.split),
            style=self._style(panel.split),
            max_tokens=1 if sampling.max_response is None else sampling.max_response,
            temperature=1.0 if sampling.temperature is None else sampling.temperature,
            concurrency=self._at_once,
            agent=None if self._engine is not None else self._agent,
            agent_waits=self._client is not None,
        )
        try:
            if self._engine is not None:
                return evaluate(rollout.play, panel.tasks, seed=seed, on_finish=on_finish).trajectories
            kept = EpisodeJournal(journal)
            found = {trajectory.task_id: trajectory for trajectory in kept.read()}

            def finished(trajectory: Trajectory) -> None:
                found[trajectory.task_id] = trajectory
                kept.add(trajectory)
                on_finish(len(found))

            specs = [EpisodeSpec(task, task, episode_seed(seed, task)) for task in panel.tasks if task not in found]
            rollout.play(specs, on_trajectory=finished)
            return [found[task] for task in panel.tasks]
        finally:
            rollout.close()

    def _style(self, split: str) -> str | PromptStyle | None:
        """The prompt style, laid out as asked; None leaves the environment raw."""
        name, layout = self._sampling.style, self._sampling.layout
        if name is None or layout in (None, "auto"):
            return name
        env = make_env(self._config, self._sampling, split)
        style, _ = choose_layout(layout, named_style(cast("TextEnv", env.unwrapped), name), self._chat)
        env.close()
        return style

    def _agent(self, env: gym.Env[str, str], seed: int) -> Agent:
        if self._client is not None:
            return ApiAgent(self._client, env.get_wrapper_attr("style").layout, seed)
        if self._config.agent == "expert":
            return expert_for(env)
        return RandomAgent(seed)

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()
