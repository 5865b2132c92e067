"""`atod/ALFWorld-v0`: the contract, information, options."""

import random

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import atod_envs  # noqa: F401
from atod_envs.alfworld.engine.game import TASK_TYPES, Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.env import human_goal
from atod_envs.checker import check_text_env
from atod_envs.errors import DataError, UnknownName


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def make(**options):
    return gym.make("atod/ALFWorld-v0", **{"data": "builtin", **options})


@pytest.fixture
def sample(realdata):
    return realdata / "alfworld" / "sample_12"


def test_the_contract_on_the_built_in_world():
    env = make(split="valid_seen")
    check_env(env.unwrapped, skip_render_check=True)
    check_text_env(env)


@pytest.mark.parametrize("split", ["valid_seen", "valid_unseen"])
def test_the_contract_on_real_games(sample, split):
    env = make(data=sample, split=split)
    assert len(env.unwrapped.tasks) == 6
    assert {task_id.split("/")[-2].partition("-")[0] for task_id in env.unwrapped.tasks} == set(TASK_TYPES)
    check_text_env(env)


def test_the_raw_frames_are_the_sessions(sample):
    env = make(data=sample, split="valid_seen")
    for task_id in env.unwrapped.tasks:
        observation, info = env.reset(options={"task_id": task_id})
        session = GameSession(Game.load(sample / task_id / "game.tw-pddl"))
        step = session.reset()
        assert (observation, info["admissible"]) == (step.observation, step.admissible)
        for number, command in enumerate(session.game.walkthrough, 1):
            observation, reward, terminated, truncated, info = env.step(command)
            step = session.step(command)
            assert (observation, reward, terminated, truncated) == (step.observation, step.reward, step.done, False)
            assert (info["turn"], info["success"], info["score"]) == (number, step.won, step.progress)
        assert terminated and info["success"] and info["score"] == 1.0 and reward == 1.0


def test_information(sample):
    env = make(data=sample, split="valid_seen")
    task_id = "json_2.1.1/valid_seen/" + next(i for i in env.unwrapped.tasks if "look_at" in i).split("/", 2)[2]
    observation, info = env.reset(options={"task_id": task_id})
    assert info["alfworld/task_type"] == "look_at_obj_in_light"
    assert info["alfworld/walkthrough_length"] == len(env.unwrapped.game.walkthrough) > 0
    assert info["alfworld/gamefile"] == str(sample / task_id / "game.tw-pddl")
    assert observation.endswith("Your task is to: " + info["task"]) and info["task"].endswith(".")
    *_, info = env.step("dance")
    assert not info["valid"]
    *_, info = env.step("look")
    assert info["valid"]


def test_a_seed_is_an_episode():
    one, two = make(), make()
    assert one.reset(seed=5) == two.reset(seed=5)
    drawn = {one.reset(seed=seed)[1]["task_id"] for seed in range(12)}
    assert len(drawn) > 6


def test_the_turn_limit():
    env = make(max_turns=3)
    env.reset(seed=0)
    assert [env.step("look")[3] for _ in range(3)] == [False, False, True]
    assert make().unwrapped.max_turns == 50


def test_task_types_and_unknown_names():
    env = make(task_types=["pick_two_obj_and_place"])
    assert {env.reset(seed=seed)[1]["alfworld/task_type"] for seed in range(5)} == {"pick_two_obj_and_place"}
    with pytest.raises(UnknownName, match="pick_heat"):
        make(task_types=["pick_heat"])
    with pytest.raises(UnknownName, match="valid_unseen"):
        make(split="valid_unsen")
    with pytest.raises(UnknownName, match="task id"):
        env.reset(options={"task_id": "nothing"})
    with pytest.raises(ValueError, match="native, textworld"):
        make(backend="unity")


def test_human_goals_are_the_annotators_words(sample):
    env = make(data=sample, split="valid_unseen", human_goals=True)
    task_id = env.unwrapped.tasks[0]
    said = set()
    for seed in range(8):
        observation, info = env.reset(seed=seed, options={"task_id": task_id})
        assert observation.endswith("\n\nYour task is to: " + info["task"])
        assert info["task"].endswith(".") and not info["task"].endswith("..")
        assert env.reset(seed=seed, options={"task_id": task_id})[0] == observation
        said.add(info["task"])
    assert len(said) > 1
    templated = make(data=sample, split="valid_unseen").reset(options={"task_id": task_id})
    assert templated[1]["task"] not in said
    assert observation.partition("Your task")[0] == templated[0].partition("Your task")[0]
    with pytest.raises(DataError, match="turk_annotations"):
        human_goal({"task_type": "x"}, task_id, 0)


def test_the_older_wording_is_an_alias():
    rng = random.Random(0)
    for put_alias in (True, False):
        env = make(put_alias=put_alias)
        _, info = env.reset(seed=3)
        for _ in range(45):
            moves = [action for action in info["admissible"] if action.startswith("move ")]
            if moves:
                break
            takes = [action for action in info["admissible"] if action.startswith("take ")]
            *_, info = env.step(rng.choice(takes or info["admissible"]))
        assert moves
        assert not any(action.startswith("put ") for action in info["admissible"])
        thing, _, place = moves[0].removeprefix("move ").partition(" to ")
        observation, *_, info = env.step(f"put {thing} in/on {place}")
        expected = f"You move the {thing} to the {place}." if put_alias else "Nothing happens."
        assert observation == expected and info["valid"] is put_alias
