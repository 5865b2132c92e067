"""Which pool a run plays on: this process, the ranks in shares, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from agents.chat import ChatFormat
from agents.logits import usable_ids
from atod_algos.learner import distributed
from atod_algos.rollout.pools import RankPool, RolloutPool, local_pool, worker_pool
from atod_algos.training.config import RunConfig, worker_resources
from atod_envs.styles import PromptStyle


def make_pool(
    config: RunConfig, styles: Sequence[PromptStyle], model: Any, chat: ChatFormat, teachers: Sequence[Any] = ()
) -> RolloutPool:
    """The pool that a run's settings ask for.

    Args:
        config: resolved settings.
        styles: the prompt style of each environment, in the run's layout.
        model: what a local engine samples from.
        chat: renders messages to ids.
        teachers: the teacher's model in each environment, where it plays turns (in this process alone).
    """
    if config.cluster == "none":
        own: RolloutPool | None = local_pool(config, styles, model, chat, teachers)
    elif distributed.rank() == 0:
        from atod_algos.rollout.ray_pool import RayPool

        cpus, gpus = worker_resources(config)
        own = RayPool(
            partial(worker_pool, config, styles, usable_ids(model).tolist()),
            workers=config.workers,
            cpus=cpus,
            gpus=gpus,
        )
    else:
        own = None
    return own if own and distributed.size() == 1 else RankPool(own, divided=config.cluster == "none")
