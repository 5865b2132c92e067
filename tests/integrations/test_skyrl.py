"""skyrl_gym makes and plays the environments; SkyRL's trainer takes the trajectories."""

import pytest
import tiny

skyrl_gym = pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed (extra 'skyrl')")
from atod_envs.alfworld.env import ALFWorldEnv
from atod_envs.errors import AtodError, EpisodeError
from atod_envs.integrations.skyrl import generator_output, register


def test_skyrl_gym_plays_the_experts_episode(env_id, options):
    episode = tiny.expert_trajectory(env_id, options, style="atod", seed=3)
    name = "atod-" + env_id.split("/")[1].split("-")[0].lower()
    assert name in register()
    env = skyrl_gym.make(name, env_config={"style": "atod", **options}, extras={"task_id": episode.task_id, "seed": 3})
    system = {"role": "system", "content": "You are careful."}
    chat, info = env.init([system, {"role": "user", "content": "ignored"}])
    assert chat[0] == system and chat[1]["role"] == "user" and episode.task in chat[1]["content"]
    assert info["task_id"] == episode.task_id
    for turn in episode.turns:
        assert info["observation"] == turn.observation
        out = env.step(turn.response)
        info = out["metadata"]
        assert out["reward"] == turn.reward
        assert out["done"] == (turn is episode.turns[-1]) and bool(out["observations"]) != out["done"]
    assert env.get_metrics() == {"success": 1.0, "score": 1.0, "turns": float(len(episode.turns)), "reward": 1.0}
    assert env.aggregate_metrics([env.get_metrics()] * 2)["success"] == 1.0
    env.close()


def test_limits_and_misuse():
    register()
    env = skyrl_gym.make("atod-alfworld", env_config={"data": "builtin", "max_turns": 9}, extras={"max_turns": 2})
    with pytest.raises(EpisodeError):
        env.step("look")
    env.init([])
    assert not env.step("<action>look</action>")["done"] and env.step("<action>look</action>")["done"]


def test_options_come_with_the_registration_and_the_split_with_the_row():
    """SkyRL's own trainer passes an environment no options of its own."""
    register(data="builtin", max_turns=9)
    try:
        task = ALFWorldEnv("builtin", "valid_seen").tasks[0]
        env = skyrl_gym.make("atod-alfworld", extras={"task_id": task, "split": "valid_seen", "max_turns": 2})
        _, info = env.init([])
        assert info["task_id"] == task and info["split"] == "valid_seen" and env.max_turns == 2
        assert skyrl_gym.make("atod-alfworld", env_config={"max_turns": 3}).max_turns == 3
        with pytest.raises(AtodError, match="columns data_source, but neither task_id nor seed"):
            skyrl_gym.make("atod-alfworld", extras={"data_source": "x", "max_turns": 2})
    finally:
        register()


@pytest.fixture(scope="module")
def conversations():
    return tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 3})


def test_generator_output_of_conversations(conversations):
    output = generator_output([tiny.with_rewards(group, [1.0, 0.5]) for group in conversations])
    episodes = [t for group in conversations for t in group.trajectories]
    for k, trajectory in enumerate(episodes):
        last = trajectory.turns[-1]
        assert output["prompt_token_ids"][k] == list(trajectory.turns[0].prompt_ids)
        assert (*output["prompt_token_ids"][k], *output["response_ids"][k]) == last.prompt_ids + last.response_ids
        assert sum(output["loss_masks"][k]) == trajectory.n_tokens
    assert [sum(rewards) for rewards in output["rewards"]] == [1.0, 0.5, 1.0, 0.5]
    assert output["stop_reasons"] == ["stop"] * 4 and output["is_last_step"] is None
    assert output["rollout_metrics"]["environment/success"] == 0.5


def test_generator_output_step_by_step():
    windows = tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 3}, style="atod", tasks=1)
    windows = [tiny.with_rewards(windows[0], [1.0, 0.5])]
    with pytest.raises(ValueError, match="step_wise=True"):
        generator_output(windows)
    output = generator_output(windows, step_wise=True)
    assert output["is_last_step"] == [False, False, True] * 2
    assert [sum(r) for r in output["rewards"]] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.5]
    assert [name.repetition_id for name in output["trajectory_ids"]] == [0, 0, 0, 1, 1, 1]
    assert {name.instance_id for name in output["trajectory_ids"]} == {"g0"}


@pytest.mark.parametrize("step_wise", [False, True])
def test_skyrls_trainer_takes_the_output(conversations, step_wise):
    """The trainer's own validation passes, and its batch holds our ids."""
    pytest.importorskip("skyrl.train", reason="SkyRL's trainer is not installed (Python 3.12, pins its own torch)")
    from skyrl.train.generators.base import GeneratorOutput, TrajectoryID
    from skyrl.train.utils.trainer_utils import validate_generator_output

    style = "atod" if step_wise else "compact"
    groups = tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 3}, style=style)
    output = generator_output(groups, step_wise=step_wise)
    validate_generator_output(4, output, step_wise=step_wise)
    assert set(output) <= set(GeneratorOutput.__annotations__)
    if step_wise:
        assert all(isinstance(name, TrajectoryID) for name in output["trajectory_ids"])
