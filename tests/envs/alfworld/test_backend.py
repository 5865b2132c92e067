"""The published engine behind the same environment: same frames, clean ends, clear errors."""

import importlib.util
import random

import gymnasium as gym
import pytest

import atod_envs  # noqa: F401
from atod_envs.alfworld.textworld import backend as textworld_backend
from atod_envs.errors import DataError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("alfworld") is None, reason="alfworld is not installed"),
]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    made = []

    def make(**options):
        made.extend(gym.make("atod/ALFWorld-v0", backend=backend, **options) for backend in ("native", "textworld"))
        return made[-2:]

    yield make
    for env in made:
        env.close()


def play_both(native, textworld, seed, turns):
    ours, theirs = native.reset(seed=seed), textworld.reset(seed=seed)
    assert ours == theirs
    rng = random.Random(seed)
    for _ in range(turns):
        solution = native.unwrapped.game.walkthrough
        action = rng.choice([*ours[-1]["admissible"], *solution, "dance", " look ", "put a in/on b", "\ud800"])
        ours, theirs = native.step(action), textworld.step(action)
        assert ours == theirs, action
        if ours[2] or ours[3]:
            break


def test_both_engines_show_the_same_built_in_games(pair):
    native, textworld = pair(data="builtin", split="valid_unseen")
    for seed in range(2):
        play_both(native, textworld, seed, 25)


def test_both_engines_show_the_same_real_games_to_the_end(pair, realdata):
    native, textworld = pair(
        data=realdata / "alfworld" / "sample_12", split="valid_seen", task_types=["look_at_obj_in_light"]
    )
    play_both(native, textworld, 1, 10)
    ours, theirs = native.reset(), textworld.reset()
    for action in native.unwrapped.game.walkthrough:
        ours, theirs = native.step(action), textworld.step(action)
        assert ours == theirs, action
    assert ours[2] and ours[-1]["success"] and ours[-1]["score"] == 1.0


def test_the_worker_ends_with_the_environment_and_a_dead_one_is_replaced(pair):
    _, env = pair(data="builtin", split="train")
    first, _ = env.reset(seed=0)
    reference = env.unwrapped.reference
    process = reference.process
    assert process.poll() is None
    process.kill()
    process.wait()
    with pytest.raises(RuntimeError, match="ended unexpectedly"):
        env.step("look")
    assert env.reset(seed=0)[0] == first
    process = reference.process
    env.close()
    assert process.poll() is not None
    env.close()


def test_a_game_that_the_published_engine_refuses_is_named(pair):
    native, textworld = pair(data="builtin", split="train")
    _, info = native.reset(seed=0)
    game = native.unwrapped.game
    reference = textworld.unwrapped.reference
    broken = {**native.unwrapped.source.content(info["task_id"]), "pddl_problem": "(define (problem p))"}
    with pytest.raises(DataError, match=info["task_id"]):
        reference.open(broken, game).reset()
    assert textworld.reset(seed=0)[0] == native.reset(seed=0)[0], "the worker goes on"


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(textworld_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install alfworld"):
        gym.make("atod/ALFWorld-v0", data="builtin", backend="textworld")
