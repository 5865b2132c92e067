"""TorchRL rolls the environments out."""

import pytest
import tiny

pytest.importorskip("torchrl", reason="torchrl is not installed (extra 'torchrl')")
from torchrl.envs.utils import check_env_specs

from atod_envs.integrations.torchrl import torchrl_env


def test_torchrl_plays_the_experts_episode(env_id, options):
    episode = tiny.expert_trajectory(env_id, options)
    env = torchrl_env(env_id, **options)
    first = env.reset(task_id=episode.task_id, seed=episode.seed)
    assert first["observation"] == episode.turns[0].observation and first["task"] == episode.task
    assert tuple(first["admissible"]) == episode.turns[0].admissible
    actions = iter(episode.turns)
    played = env.rollout(
        100, policy=lambda td: td.set("action", next(actions).action), tensordict=first, auto_reset=False
    )
    assert played.shape[0] == len(episode.turns)
    assert list(played["observation"]) == [turn.observation for turn in episode.turns]
    assert played["next", "reward"].sum() == episode.reward == 1.0
    assert played["next", "terminated"][-1] and played["next", "success"][-1] and not played["next", "truncated"].any()
    assert played["next", "turn"].tolist() == list(range(1, len(episode.turns) + 1))


def test_specs_hold_for_raw_and_prompted_environments(env_id, options):
    check_env_specs(torchrl_env(env_id, **options | {"max_turns": 3}))
    check_env_specs(torchrl_env(env_id, style="atod", **options | {"max_turns": 3}))


def test_the_seed_draws_the_task():
    env = torchrl_env("atod/ALFWorld-v0", data="builtin")
    env.set_seed(5)
    first = env.reset()["task_id"]
    env.set_seed(5)
    assert env.reset()["task_id"] == first
