"""Pools of rollout workers: this process, all ranks in shares, or the workers of a Ray cluster.

The invariant: what an episode is follows from its ``EpisodeSpec`` and the weights alone. So every pool gives the same
trajectories (up to rounding where other episodes share a forward pass), in the order of the specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from agents.chat import ChatFormat
from agents.engines import make_engine
from agents.engines.base import Engine
from agents.engines.weight_check import verify_weights
from agents.logits import limit_vocabulary, longest_context
from agents.models import computing_type, device_of, load_model
from agents.policy import Policy
from atod_algos.algorithm import RolloutLimits
from atod_algos.learner import distributed
from atod_algos.rollout.environments import make_env
from atod_algos.rollout.episodes import MoreEpisodes, OnFinish, Rollout
from atod_algos.rollout.groups import require_few_lost
from atod_algos.rollout.stage import Stage
from atod_algos.training.config import RunConfig
from atod_algos.turn_plans import EpisodeSpec
from atod_envs.styles import PromptStyle
from atod_envs.trajectory import Trajectory

Weights = Iterable[tuple[str, torch.Tensor]]
"""A model's tensors by its own names."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the episodes of one call have in common.

    Attributes:
        split: the split of the tasks; None is each environment's training split.
        temperature: of the sampling.
        tolerated: share of the episodes that may be lost to an environment that raises.
    """

    split: str | None
    temperature: float
    tolerated: float = 0.0


class RolloutPool(Protocol):
    """Rollout workers that play with one set of weights."""

    def load_weights(self, weights: Weights, version: int, truth: Any | None = None) -> None:
        """Play with these weights from now on.

        Args:
            weights: by the model's own names; must be gone through, for gathering them may take all ranks.
            version: recorded in the trajectories.
            truth: the model whose log-probs the engine is then checked against; by default the one that got the
                weights.
        """

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        under: Conditions,
        limits: RolloutLimits | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Trajectory]:
        """Play all episodes; one trajectory each, in the order of ``specs``.

        Args:
            specs: what to play.
            under: which split is played, and how.
            limits: an algorithm's limits.
            on_finish: called with the number of finished episodes.
        """

    def rest(self) -> None:
        """Give memory back until the next ``load_weights``."""

    def close(self) -> None:
        """End all workers."""


class LocalPool:
    """One rollout worker, in this process.

    Args:
        engine: samples.
        policy: the plain model that the engine was made from.
        make_rollout: gives a rollout with the engine under some conditions.
        guides: engines of the teachers that play turns.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Any,
        make_rollout: Callable[[Conditions], Rollout],
        guides: Sequence[Engine] = (),
    ) -> None:
        self.engine, self.policy, self.guides = engine, policy, guides
        self._make = make_rollout
        self._rollouts: dict[Conditions, Rollout] = {}

    def load_weights(self, weights: Weights, version: int, truth: Any | None = None) -> None:
        """Hand the weights to the engine, and check that it samples with them."""
        if truth is None:
            own = dict(self.policy.named_parameters())
            with torch.no_grad():
                for name, weight in weights:
                    if own[name] is not weight:
                        own[name].copy_(weight)
            weights, truth = self.policy.named_parameters(), self.policy
        for engine in (self.engine, *self.guides):
            engine.wake()
        self.engine.load_weights(weights)
        self.engine.version = version
        verify_weights(self.engine, truth)

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        under: Conditions,
        limits: RolloutLimits | None = None,
        on_finish: OnFinish | None = None,
        more: MoreEpisodes | None = None,
        whole: int | None = None,
    ) -> list[Trajectory]:
        """See :class:`RolloutPool`. The environments of a split stay open; ``more`` is asked for further episodes.

        ``whole`` is the number of all episodes where these are a part of them.
        """
        if under not in self._rollouts:
            self._rollouts[under] = self._make(under)
        return self._rollouts[under].play(specs, limits, on_finish, more, whole=whole)

    def rest(self) -> None:
        """Let the engines sleep."""
        for engine in (self.engine, *self.guides):
            engine.sleep()

    def close(self) -> None:
        """Close environments and engine."""
        for rollout in self._rollouts.values():
            rollout.close()
        for engine in (self.engine, *self.guides):
            engine.close()


class RankPool:
    """The ranks of a ``torchrun``: each plays its share of the groups, and all have all trajectories afterwards.

    Args:
        own: this rank's pool; None for a rank that only listens to the first.
        divided: every rank plays; otherwise the first one does (it speaks to a cluster).
    """

    def __init__(self, own: RolloutPool | None, *, divided: bool) -> None:
        self._own, self._divided = own, divided

    def load_weights(self, weights: Weights, version: int, truth: Any | None = None) -> None:
        """Load the weights where there is a pool; gathering them takes all ranks."""
        if self._own is not None:
            self._own.load_weights(weights, version, truth)
        else:
            for _ in weights:
                pass

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        under: Conditions,
        limits: RolloutLimits | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Trajectory]:
        """See :class:`RolloutPool`."""
        groups = {name: number for number, name in enumerate(dict.fromkeys(spec.group_id for spec in specs))}
        owner = [groups[spec.group_id] % distributed.size() if self._divided else 0 for spec in specs]
        mine = [spec for spec, rank in zip(specs, owner, strict=True) if rank == distributed.rank()]
        played: list[Trajectory] = []
        if self._own is not None and mine:
            if isinstance(self._own, LocalPool):
                played = self._own.play(mine, under, limits, on_finish, whole=len(specs))
            else:
                played = self._own.play(mine, under, limits, on_finish)
        everything = [iter(part) for part in distributed.gather(played)]
        found = [next(everything[rank]) for rank in owner]
        require_few_lost(found, under.tolerated)
        return found

    def rest(self) -> None:
        """Let this rank's pool rest."""
        if self._own is not None:
            self._own.rest()

    def close(self) -> None:
        """Close this rank's pool."""
        if self._own is not None:
            self._own.close()


def local_pool(
    config: RunConfig, styles: Sequence[PromptStyle], model: Any, chat: ChatFormat, teachers: Sequence[Any] = ()
) -> LocalPool:
    """Engine and environments of a run, in this process.

    Args:
        config: resolved settings.
        styles: the prompt style of each environment, in the run's layout.
        model: what the engine samples from.
        chat: renders messages to ids.
        teachers: the teacher's model in each environment, where it plays turns.
    """
    context = min(max(world.max_context for world in config.worlds), longest_context(model))
    engine = make_engine(
        config.engine, model, slots=config.engine_slots, max_context=context, memory=config.engine_memory
    )

    guides = {
        model: make_engine("transformers", model, slots=config.engine_slots, max_context=context, memory=0.0)
        for model in teachers
    }

    def teacher(place: int, under: Conditions) -> Policy | None:
        if not teachers:
            return None
        world = config.worlds[place]
        return Policy(guides[teachers[place]], chat, world.max_response, under.temperature, world.max_context)

    def rollout(under: Conditions) -> Rollout:
        further = [
            Stage(
                partial(make_env, world, under.split),
                style,
                Policy(engine, chat, world.max_response, under.temperature, world.max_context),
                teacher(place, under),
            )
            for place, (world, style) in enumerate(zip(config.others, styles[1:], strict=True), 1)
        ]
        return Rollout(
            engine,
            chat,
            partial(make_env, config, under.split),
            style=styles[0],
            max_tokens=config.max_response,
            temperature=under.temperature,
            max_context=config.max_context,
            concurrency=config.engine_slots,
            tolerated=under.tolerated,
            others=further,
            teacher=teacher(0, under),
        )

    return LocalPool(engine, model, rollout, list(guides.values()))


def worker_pool(config: RunConfig, styles: Sequence[PromptStyle], ids: Iterable[int] | None = None) -> LocalPool:
    """What a cluster's worker plays with; the learner sends its weights; it says these ids alone, if given."""
    device = device_of(config.device)
    if device == "cpu":
        torch.set_num_threads(1)
    loaded = load_model(config.student, "student", world=config.models, device=device, dtype=dtype_of(config, device))
    if ids is not None:
        limit_vocabulary(loaded.model, ids)
    return local_pool(config, styles, loaded.model, loaded.chat(config.thinking, config.chat_date))


def dtype_of(config: RunConfig, device: str) -> torch.dtype:
    """The type of the weights that compute on a device, such as ``"cpu"`` or ``"cuda:1"``."""
    if config.dtype == "auto":
        return computing_type(device)
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
