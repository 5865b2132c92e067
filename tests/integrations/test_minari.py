"""Minari stores and loads the trajectories, and makes the environment again."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny

minari = pytest.importorskip("minari", reason="minari is not installed (extra 'minari')")
import gymnasium as gym

from atod_envs.integrations.minari import write_dataset
from atod_envs.trajectory import StopReason


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_minari_loads_what_was_written(env_id, options):
    episodes = [tiny.expert_trajectory(env_id, options, task=task, seed=7) for task in range(3)]
    cut = replace(episodes[2], turns=episodes[2].turns[:1], stop_reason="turn_limit", success=False, score=0.0)
    written = [*episodes[:2], cut]
    broken = replace(cut, stop_reason=StopReason.ABORTED)
    write_dataset(
        "test/expert-v0", [broken, *written], env=gym.make(env_id, **options), algorithm_name="expert", author="tests"
    )
    data = minari.load_dataset("test/expert-v0")
    assert len(data) == 3 and data.total_steps == sum(len(t.turns) for t in written)
    for trajectory, episode in zip(written, data, strict=True):
        assert list(episode.actions) == [turn.action for turn in trajectory.turns]
        assert list(episode.observations) == [
            *(turn.observation for turn in trajectory.turns),
            trajectory.final_observation,
        ]
        assert list(episode.rewards) == [turn.reward for turn in trajectory.turns]
        assert bool(episode.terminations[-1]) == trajectory.success != bool(episode.truncations[-1])
        assert all(text in data.observation_space for text in episode.observations)
        assert all(text in data.action_space for text in episode.actions)
        assert bool(episode.infos["success"][-1]) == trajectory.success
    env = data.recover_environment()
    first, _ = env.reset(seed=7, options={"task_id": episodes[0].task_id})
    assert first == episodes[0].turns[0].observation
    assert len(data.sample_episodes(1)[0].rewards) > 0


@pytest.mark.filterwarnings("ignore")
def test_the_data_set_loads_without_this_project(folder):
    episode = tiny.expert_trajectory("atod/ALFWorld-v0", {"data": "builtin"})
    write_dataset("plain/expert-v0", [episode], author="tests")
    code = (
        "import sys, minari; data = minari.load_dataset('plain/expert-v0'); "
        "assert 'atod_envs' not in sys.modules; print(next(iter(data)).actions[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.stdout.strip() == episode.turns[0].action, done.stderr


def test_mixed_or_empty_data_is_refused():
    with pytest.raises(ValueError, match="one environment"):
        write_dataset("x/y-v0", [])
    a = tiny.expert_trajectory("atod/ALFWorld-v0", {"data": "builtin"})
    with pytest.raises(ValueError, match="one environment"):
        write_dataset("x/y-v0", [a, replace(a, env_id="atod/WebShop-v0")])
