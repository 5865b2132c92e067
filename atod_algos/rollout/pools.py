"""Who plays a run's episodes: this process, all ranks in shares, or the workers of a cluster.

The invariant: what an episode is follows from its ``EpisodeSpec`` and the weights alone, so every player gives the same trajectories (up to
rounding where other episodes share a forward pass), in the order of the specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import gymnasium as gym
import torch

import atod_envs
from agents.chat import ChatFormat
from agents.engines import make_engine
from agents.engines.base import Engine
from agents.engines.weight_check import verify_weights
from agents.logits import limit_vocabulary, longest_context
from agents.models import load_model
from atod_algos.algorithm import RolloutLimits
from atod_algos.learner import distributed
from atod_algos.rollout.episodes import EpisodeSpec, OnFinish, Plays, Rollout, collect_groups
from atod_algos.rollout.layouts import choose_layout
from atod_algos.training.config import TrainConfig, given
from atod_envs.errors import AtodError
from atod_envs.options import read_options
from atod_envs.prompting import named_style
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Group, Trajectory


class Players(Protocol):
    """Everything that plays with one set of weights."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, truth: Any | None = None) -> None:
        """Play with these weights from now on.

        Args:
            weights: by the model's own names; must be gone through, for making them whole may take all ranks.
            version: recorded in the trajectories.
            truth: the model whose log-probs the engine is then checked against; by default the one that got the weights.
        """

    def on(self, split: str, temperature: float, tolerated: float = 0.0) -> Plays:
        """What plays a split.

        Args:
            split: the split.
            temperature: of the sampling.
            tolerated: share of the episodes that may be lost to an environment that raises.
        """

    def rest(self) -> None:
        """Give memory back until the next ``load_weights``."""

    def close(self) -> None:
        """End whatever plays."""


class LocalPlayers:
    """Plays in this process, with one engine.

    Args:
        engine: samples.
        policy: the plain model that the engine was made from.
        make_rollout: split, temperature, tolerated -> a rollout with the engine.
    """

    def __init__(self, engine: Engine, policy: Any, make_rollout: Callable[[str, float, float], Rollout]) -> None:
        self.engine, self.policy = engine, policy
        self._make = make_rollout
        self._rollouts: dict[tuple[str, float, float], Rollout] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, truth: Any | None = None) -> None:
        """Hand the weights to the engine, and check that it samples with them."""
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                if own[name] is not weight:
                    own[name].copy_(weight)
        self.engine.wake()
        self.engine.load_weights(self.policy.named_parameters())
        self.engine.version = version
        verify_weights(self.engine, self.policy if truth is None else truth)

    def on(self, split: str, temperature: float, tolerated: float = 0.0) -> Rollout:
        """The rollout of a split; its environments stay open."""
        key = (split, temperature, tolerated)
        if key not in self._rollouts:
            self._rollouts[key] = self._make(*key)
        return self._rollouts[key]

    def rest(self) -> None:
        """Let the engine sleep."""
        self.engine.sleep()

    def close(self) -> None:
        """Close environments and engine."""
        for rollout in self._rollouts.values():
            rollout.close()
        self.engine.close()


class SharedPlayers:
    """Plays on all ranks: each its share of the groups, or the first one everything; afterwards all have all trajectories.

    Args:
        own: this rank's players; None for a rank that only listens to the first.
        divided: every rank plays; otherwise the first one does (it speaks to a cluster).
    """

    def __init__(self, own: Players | None, *, divided: bool) -> None:
        self._own, self._divided = own, divided

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, truth: Any | None = None) -> None:
        """Load the weights where there is an engine; making them whole takes all ranks."""
        if self._own is not None:
            self._own.load_weights(weights, version, truth)
        else:
            for _ in weights:
                pass

    def on(self, split: str, temperature: float, tolerated: float = 0.0) -> Plays:
        """What plays a split."""
        own = None if self._own is None else self._own.on(split, temperature, tolerated)
        return _SharedRollout(own, self._divided)

    def rest(self) -> None:
        """Let this rank's engine sleep."""
        if self._own is not None:
            self._own.rest()

    def close(self) -> None:
        """Close this rank's players."""
        if self._own is not None:
            self._own.close()


class _SharedRollout:
    def __init__(self, own: Plays | None, divided: bool) -> None:
        self._own, self._divided = own, divided

    def play(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Trajectory]:
        """Play this rank's share; give and get the rest."""
        groups = {name: number for number, name in enumerate(dict.fromkeys(spec.group_id for spec in specs))}
        owner = [groups[spec.group_id] % distributed.size() if self._divided else 0 for spec in specs]
        mine = [place for place, rank in enumerate(owner) if rank == distributed.rank()]
        played = self._own.play([specs[place] for place in mine], limits, on_finish) if self._own and mine else []
        everything = [iter(part) for part in distributed.gather(played)]
        return [next(everything[rank]) for rank in owner]

    def play_groups(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Group]:
        """Play all episodes and collect them by group."""
        return collect_groups(self.play(specs, limits, on_finish))


# --- of a run ----------------------------------------------------------------------------------------------------


def make_env(config: TrainConfig, split: str | None = None) -> gym.Env[str, str]:
    """Make the raw environment of a run.

    Raises:
        UnknownName: no environment of that id is registered.
    """
    options = read_options(config.option, split) | {"data": config.data, "max_turns": config.max_turns}
    if split is not None:
        options["split"] = split
    return atod_envs.make(config.env, **options)


def local_players(config: TrainConfig, model: Any, tokenizer: Any) -> LocalPlayers:
    """Engine and environments of a run, in this process.

    Args:
        config: resolved settings.
        model: what the engine samples from.
        tokenizer: its tokenizer.
    """
    chat = ChatFormat(tokenizer)
    context = min(given(config, "max_context"), longest_context(model))
    engine = make_engine(config.engine, model, slots=config.slots, max_context=context, memory=config.engine_memory)
    probe = make_env(config)
    style, _ = choose_layout(config.layout, named_style(cast("TextEnv", probe.unwrapped), given(config, "style")), chat)
    probe.close()

    def rollout(split: str, temperature: float, tolerated: float) -> Rollout:
        return Rollout(
            engine,
            chat,
            lambda: make_env(config, split),
            style=style,
            max_tokens=given(config, "max_response"),
            temperature=temperature,
            concurrency=config.slots,
            tolerated=tolerated,
        )

    return LocalPlayers(engine, model, rollout)


def worker_players(config: TrainConfig, world: str, ids: Iterable[int] | None = None) -> LocalPlayers:
    """What a worker of a cluster plays with; its weights come from the learner, and it says these ids alone, if given."""
    device = device_of(config.device)
    if device == "cpu":
        torch.set_num_threads(1)
    loaded = load_model(config.student, "student", world=world, device=device, dtype=dtype_of(config, device))
    if ids is not None:
        limit_vocabulary(loaded.model, ids)
    return local_players(config, loaded.model, loaded.tokenizer)


def device_of(name: str) -> str:
    """The device that an option names.

    Raises:
        AtodError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise AtodError(
            "--device cuda was asked for, but torch sees no GPU; use --device cpu, or install a CUDA build of torch"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def dtype_of(config: TrainConfig, device: str) -> torch.dtype:
    """The type of the weights that compute."""
    name = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32
