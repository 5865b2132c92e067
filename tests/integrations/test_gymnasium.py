"""Gymnasium's own vector environments, wrappers and checker run the environments."""

import gymnasium as gym
import numpy as np
import pytest
import tiny
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import (
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    TimeLimit,
    TransformAction,
    TransformObservation,
    TransformReward,
)

from atod_envs.prompting import prompted
from atod_envs.recording import RecordTurns
from atod_envs.spaces import UnicodeText


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasiums_checker_passes_raw_and_prompted(env_id, options):
    check_env(gym.make(env_id, **options).unwrapped, skip_render_check=True)
    check_env(prompted(gym.make(env_id, **options)), skip_render_check=True)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_gymnasiums_vector_environments_play_the_experts_episodes(kind):
    """Its own SyncVectorEnv and AsyncVectorEnv, next to our vector entry point."""
    world = ("atod/ALFWorld-v0", {"data": "builtin"})
    episodes = [tiny.expert_trajectory(*world, task=task) for task in range(2)]
    makers = [lambda: gym.make(f"atod_envs:{world[0]}", **world[1])] * 2  # the form that also works in a fresh process
    envs = SyncVectorEnv(makers) if kind == "sync" else AsyncVectorEnv(makers, shared_memory=False)
    try:
        for column in range(2):  # one task for all: Gymnasium hands the same options to each
            task = episodes[column].task_id
            observations, infos = envs.reset(seed=0, options={"task_id": task})
            assert list(observations) == [episodes[column].turns[0].observation] * 2
            assert list(infos["task_id"]) == [task] * 2
            for turn in episodes[column].turns:
                observations, rewards, terminated, truncated, infos = envs.step((turn.action, turn.action))
            assert rewards.tolist() == [1.0, 1.0] and terminated.all() and not truncated.any()
            assert infos["success"].all() and list(infos["stop_reason"]) == ["success"] * 2
            observations, *_ = envs.step(("look", "look"))  # the next step begins another episode
            assert all(isinstance(text, str) for text in observations)
    finally:
        envs.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_make_vec_with_gymnasiums_modes(mode):
    envs = gym.make_vec(
        "atod/ALFWorld-v0",
        num_envs=2,
        vectorization_mode=mode,
        data="builtin",
        vector_kwargs={} if mode == "sync" else {"shared_memory": False},
    )
    try:
        observations, _ = envs.reset(seed=[1, 2])
        alone = [gym.make("atod/ALFWorld-v0", data="builtin").reset(seed=seed)[0] for seed in (1, 2)]
        assert list(observations) == alone
    finally:
        envs.close()


def test_wrappers_compose(env_id, options):
    episode = tiny.expert_trajectory(env_id, options)
    env = gym.make(env_id, **options)
    env = PassiveEnvChecker(env)
    env = OrderEnforcing(env)
    env = TransformAction(env, lambda action: action.removeprefix("> "), UnicodeText())
    env = TransformReward(env, lambda reward: 10.0 * reward)
    env = TransformObservation(env, str.upper, UnicodeText())
    env = RecordEpisodeStatistics(env)
    first, _ = env.reset(seed=0, options={"task_id": episode.task_id})
    assert first == episode.turns[0].observation.upper()
    for turn in episode.turns:
        _, _, terminated, _, info = env.step("> " + turn.action)
    assert terminated and info["episode"]["r"] == 10.0 and info["episode"]["l"] == len(episode.turns)


def test_recording_works_over_wrappers():
    env = RecordTurns(prompted(TimeLimit(gym.make("atod/ALFWorld-v0", data="builtin"), 100), "compact"))
    env.reset(seed=0)
    env.step("<action>look</action>")
    assert env.trajectory.turns[0].action == "look"


def test_spaces_batch_and_sample():
    batched = gym.vector.utils.batch_space(UnicodeText(seed=1), 3)
    sample = batched.sample()
    assert len(sample) == 3 and all(isinstance(text, str) for text in sample) and batched.contains(sample)
    assert np.array([UnicodeText().contains(text) for text in sample]).all()
