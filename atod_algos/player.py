"""Who plays a run's episodes: this process, all ranks in shares, or the workers of a cluster.

The invariant: what an episode is follows from its ``EpisodeSpec`` and the weights alone, so every player gives the same trajectories (up to
rounding where other episodes share a forward pass), in the order of the specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from agents.engines.base import Engine
from agents.engines.sync import verify_weights
from atod_algos import ranks
from atod_algos.rollout import EpisodeSpec, OnFinish, Plays, Rollout, RolloutLimits, collect_groups
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
        owner = [groups[spec.group_id] % ranks.size() if self._divided else 0 for spec in specs]
        mine = [place for place, rank in enumerate(owner) if rank == ranks.rank()]
        played = self._own.play([specs[place] for place in mine], limits, on_finish) if self._own and mine else []
        everything = [iter(part) for part in ranks.gather(played)]
        return [next(everything[rank]) for rank in owner]

    def play_groups(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Group]:
        """Play all episodes and collect them by group."""
        return collect_groups(self.play(specs, limits, on_finish))
