"""TRL: its GRPO trainer on these environments, through ``rollout_func``.

TRL asks for the completions of a batch of prompts; the episodes behind them are played here, by the trainer's own model
on this project's engine. The invariant: what TRL trains on are the ids that were sampled, with the log-probs they were
sampled with, and everything that the environment said is masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import gymnasium as gym

from agents.chat import CHAT_DATE, ChatFormat, ThinkingMode
from agents.engines.transformers import TransformersEngine
from atod_algos.rollout.episodes import EpisodeSpec, Rollout, derive_seed
from atod_envs.integrations.rows import single_row
from atod_envs.styles import PromptStyle, as_conversation
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Trajectory

try:
    from trl.models import unwrap_model_for_generation
except ImportError as error:
    raise ImportError("this needs trl: pip install 'atod[trl]'") from error


class TRLRollout:
    """A ``rollout_func`` for ``trl.GRPOTrainer``.

    Each prompt of the data set names a task (:meth:`prompts` makes them); what the model sees is the prompt style's.
    TRL keeps one sequence an episode, so the style is used as one growing conversation. Every sampled response counts;
    ``env_mask`` leaves out what the environment said. The returned extras ``episode_reward``, ``episode_success``,
    ``episode_score`` and ``episode_turns`` reach every reward function; :func:`environment_reward` is the one that
    returns the environment's.

    Args:
        env_id: registered id of the environment.
        style: prompt style, by name or as an object.
        max_tokens: longest response of a turn. TRL's ``max_completion_length`` does not apply to a ``rollout_func``.
        max_context: longest episode in tokens; ``None`` takes the model's own limit.
        concurrency: episodes that run at the same time.
        thinking: what the chat template is asked for; one sequence an episode holds thoughts that stay, so 'off' or
            'keep'.
        chat_date: what templates that tell the date are told.
        **options: of the environment.

    Attributes:
        trajectories: the episodes of the last call, in the order of its prompts.
    """

    def __init__(
        self,
        env_id: str,
        *,
        style: str | PromptStyle,
        max_tokens: int,
        max_context: int | None = None,
        concurrency: int = 64,
        thinking: ThinkingMode = "off",
        chat_date: str = CHAT_DATE,
        **options: Any,
    ) -> None:
        if thinking == "on":
            raise ValueError(
                "thinking='on' drops thoughts that TRL's one sequence an episode must hold; give 'keep' or 'off'"
            )

        def make() -> gym.Env[str, str]:
            return gym.make(env_id, **options)

        self._make = make
        first = cast("TextEnv", make().unwrapped)
        self.tasks = first.tasks
        self.style = as_conversation(first.prompt_styles()[style] if isinstance(style, str) else style)
        self.max_tokens, self.max_context, self.concurrency = max_tokens, max_context, concurrency
        self.thinking, self.chat_date = thinking, chat_date
        self.trajectories: list[Trajectory] = []
        self._calls: Counter[tuple[bool, int]] = Counter()

    def prompts(self, tasks: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Rows for ``datasets.Dataset.from_list``: one a task, all of the split if none are given."""
        chosen = self.tasks if tasks is None else [self.tasks.require(task) for task in tasks]
        return [{"prompt": [{"role": "user", "content": task_id}]} for task_id in chosen]

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Play one episode for each prompt with the trainer's current weights.

        Raises:
            ValueError: the trainer's settings ask for what cannot be represented, or an episode does not fit one
                sequence.
        """
        self._check(trainer)
        task_ids = [self.tasks.require(_task_of(prompt)) for prompt in prompts]
        training, step = bool(trainer.model.training), int(trainer.state.global_step)
        call = self._calls[training, step]
        self._calls[training, step] += 1
        parts = (trainer.args.seed, "train" if training else "eval", step, call, trainer.accelerator.process_index)
        copies = max(1, trainer.num_generations if training else trainer.num_generations_eval)
        specs = [
            EpisodeSpec(task_id, f"{step}/{call}/{i // copies}", derive_seed(*parts, i))
            for i, task_id in enumerate(task_ids)
        ]
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        ) as model:
            tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
            chat = ChatFormat(tokenizer, model=model, thinking=self.thinking, date=self.chat_date)
            engine = TransformersEngine(model, slots=min(self.concurrency, len(specs)), max_context=self.max_context)
            engine.version = step
            rollout = Rollout(
                engine,
                chat,
                self._make,
                style=self.style,
                max_tokens=self.max_tokens,
                temperature=trainer.args.temperature,
                concurrency=self.concurrency,
            )
            try:
                self.trajectories = rollout.play(specs)
            finally:
                rollout.close()
                engine.close()  # at once: with CUDA graphs it is part of a circle
        return trl_rows(self.trajectories)

    @staticmethod
    def _check(trainer: Any) -> None:
        args = trainer.args
        cut = {"top_p": (1.0,), "top_k": (0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
        for name, neutral in cut.items():
            if getattr(args, name, neutral[0]) not in neutral:
                raise ValueError(
                    f"GRPOConfig({name}={getattr(args, name)!r}): episodes are sampled from the whole distribution, so that their "
                    f"log-probs are those that are trained on; leave it at {neutral[0]!r}"
                )
        if getattr(trainer, "is_fsdp_enabled", False):
            raise ValueError(
                "weights that FSDP has sharded cannot be sampled from in place; use DDP or DeepSpeed, or one device"
            )


def trl_rows(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """Episodes as what a ``rollout_func`` returns.

    Raises:
        ValueError: an episode does not fit one sequence.
    """
    rows = [single_row(trajectory, "TRL") for trajectory in trajectories]
    return {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [row.response_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "env_mask": [row.mask for row in rows],
        "episode_reward": [trajectory.reward for trajectory in trajectories],
        "episode_success": [trajectory.success for trajectory in trajectories],
        "episode_score": [trajectory.score for trajectory in trajectories],
        "episode_turns": [len(trajectory.turns) for trajectory in trajectories],
    }


def environment_reward(*, episode_reward: list[float], **_: Any) -> list[float]:
    """The environment's reward, as one of TRL's ``reward_funcs``."""
    return episode_reward


def _task_of(prompt: Any) -> str:
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])
