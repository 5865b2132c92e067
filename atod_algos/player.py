"""Who plays a run's episodes: in this process, on a Ray cluster, or shared among the ranks of a distributed run.

The invariant: what an episode is follows from its ``EpisodeSpec`` and the weights alone, so every player gives the same trajectories
(up to rounding where other episodes shared a forward pass), in the order of the specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from agents.chat import ChatFormat
from agents.engines.base import Engine
from atod_algos.rollout import EpisodeSpec, Rollout, RolloutLimits
from atod_envs.trajectory import Group, Trajectory

if TYPE_CHECKING:
    import torch

OnFinish = Callable[[int], None]
"""Told the number of finished episodes."""


class Plays(Protocol):
    """Plays episodes of one split: ``Rollout``, or something that has others play."""

    def play(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Trajectory]:
        """Play all episodes; one trajectory each, in the order of ``specs``."""

    def play_groups(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Group]:
        """Play all episodes and collect them by group, in order of first appearance."""

    def close(self) -> None:
        """Close what was opened for it."""


class Players(Protocol):
    """Everything that plays with one set of weights."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Play with these weights from now on; ``version`` is recorded in the trajectories."""

    def on(self, split: str, temperature: float) -> Plays:
        """What plays a split at a sampling temperature."""

    def close(self) -> None:
        """End whatever plays."""


class LocalPlayers:
    """Plays in this process, with one engine.

    Args:
        engine: samples.
        chat: renders messages to ids.
        make_rollout: makes a rollout with the engine: split, temperature -> rollout.
    """

    def __init__(self, engine: Engine, chat: ChatFormat, make_rollout: Callable[[Engine, str, float], Rollout]) -> None:
        self.engine, self.chat = engine, chat
        self._make = make_rollout
        self._rollouts: dict[tuple[str, float], Rollout] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hand the weights to the engine."""
        self.engine.load_weights(weights)
        self.engine.version = version

    def on(self, split: str, temperature: float) -> Rollout:
        """The rollout of a split; its environments stay open."""
        key = (split, temperature)
        if key not in self._rollouts:
            self._rollouts[key] = self._make(self.engine, split, temperature)
        return self._rollouts[key]

    def close(self) -> None:
        """Close environments and engine."""
        for rollout in self._rollouts.values():
            rollout.close()
        self.engine.close()


def collect_groups(trajectories: Iterable[Trajectory]) -> list[Group]:
    """Trajectories by ``group_id``, in order of first appearance."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    return [Group(members[0].task_id, tuple(members)) for members in groups.values()]
