"""Who plays: an agent in threads, a model behind a server, or a language model on an engine of our own, batched."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym

from atod_algos.evaluate import episode_seed, evaluate
from atod_algos.evaluate.play import EpisodeJournal, play_agents
from atod_algos.evaluate.settings import EvaluateConfig, Panel, Sampling, make_env
from atod_algos.rollout.episodes import EpisodeSpec
from atod_envs.errors import AtodError
from atod_envs.prompting import prompted
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory

if TYPE_CHECKING:
    from agents.base import Agent


class Player:
    """Plays a panel with whomever ``--agent`` names.

    Args:
        config: what was asked for.
        sampling: the resolved sampling.
        split: one whose data is there.
    """

    def __init__(self, config: EvaluateConfig, sampling: Sampling, split: str) -> None:
        self._config, self._sampling = config, sampling
        self._client: Any = None
        self._engine: Any = None
        self._chat: Any = None
        kind, _, name = config.agent.partition(":")
        if kind == "api":
            from agents.api import ApiOptions, ChatClient

            try:
                extra = json.loads(config.api_extra)
            except ValueError as error:
                raise AtodError(f"--api-extra is not JSON: {error}") from error
            options = ApiOptions(config.api_base, config.api_timeout, config.api_retries, extra)
            self._client = ChatClient(
                name,
                options,
                temperature=cast("float", sampling.temperature),
                max_tokens=cast("int", sampling.max_response),
            )
        elif config.agent not in ("random", "expert"):
            self._load(config.agent, split)

    def _load(self, agent: str, split: str) -> None:
        import torch

        from agents.chat import ChatFormat
        from agents.engines.transformers import TransformersEngine
        from agents.logits import longest_context
        from agents.models import load_model

        folder = Path(agent).expanduser()
        if (folder / "checkpoints").is_dir():
            raise AtodError(
                f"{agent} is a run's folder; give one of its checkpoints, e.g. {folder / 'checkpoints' / 'best'}"
            )
        kind, _, role = agent.partition(":")
        name = "builtin" if kind == "builtin" else agent
        device = self._config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise AtodError("--device cuda was asked for, but torch sees no GPU; use --device cpu")
        if name == "builtin" and device == "cpu":
            torch.set_num_threads(1)  # models this small only lose with more
        world = cast("TextEnv", make_env(self._config, self._sampling, split).unwrapped).env_key
        model = load_model(name, role or "student", world=world, device=device)
        limit = longest_context(model.model)
        self._engine = TransformersEngine(
            model.model, slots=self._config.concurrency, max_context=min(cast("int", self._sampling.max_context), limit)
        )
        self._chat = ChatFormat(model.tokenizer)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that a server has counted."""
        if self._client is None:
            return {}
        return {"prompt_tokens": self._client.prompt_tokens, "completion_tokens": self._client.completion_tokens}

    def play(self, panel: Panel, seed: int, journal: Path, on_finish: Callable[[int], None]) -> Sequence[Trajectory]:
        """Play every task of a panel once."""
        if self._engine is not None:
            from atod_algos.rollout.episodes import Rollout

            rollout = Rollout(
                self._engine,
                self._chat,
                lambda: make_env(self._config, self._sampling, panel.split),
                style=cast("str", self._sampling.style),
                max_tokens=cast("int", self._sampling.max_response),
                temperature=cast("float", self._sampling.temperature),
                concurrency=self._config.concurrency,
            )
            try:
                return evaluate(rollout, panel.tasks, seed=seed, on_finish=on_finish).trajectories
            finally:
                rollout.close()
        kept = EpisodeJournal(journal)
        before = {trajectory.task_id: trajectory for trajectory in kept.read()}
        specs = [EpisodeSpec(task, task, episode_seed(seed, task)) for task in panel.tasks if task not in before]
        counted = len(before)

        def finished(trajectory: Trajectory) -> None:
            nonlocal counted
            counted += 1
            kept.add(trajectory)
            on_finish(counted)

        probe = cast("TextEnv", make_env(self._config, self._sampling, panel.split).unwrapped)
        waits = self._client is not None or probe.blocking
        played = play_agents(
            self._agent,
            lambda: self._env(panel.split),
            specs,
            concurrency=self._config.concurrency if waits else 1,
            on_finish=finished,
        )
        found = before | {trajectory.task_id: trajectory for trajectory in played}
        return [found[task] for task in panel.tasks]

    def _env(self, split: str) -> gym.Env[str, str]:
        env = make_env(self._config, self._sampling, split)
        return env if self._client is None else prompted(env, cast("str", self._sampling.style))

    def _agent(self, env: gym.Env[str, str], seed: int) -> Agent:
        if self._client is not None:
            from agents.api import ApiAgent

            return ApiAgent(self._client, env.get_wrapper_attr("style").layout, seed)
        if self._config.agent == "expert":
            from agents.expert import expert_for

            return expert_for(env)
        from agents.random import RandomAgent

        return RandomAgent(seed)

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()
