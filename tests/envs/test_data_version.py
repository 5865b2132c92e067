"""Every trajectory says what its tasks were made of; equal data give equal versions wherever they lie."""

import hashlib
import json
import shutil

import gymnasium as gym
import pytest
import tiny

import atod_envs  # noqa: F401 (registers the environments)
from atod_envs.alfworld.generate import main as generate_games
from atod_envs.alfworld.generator import builtin
from atod_envs.recording import RecordTurns
from atod_envs.searchqa.builtin import make_encyclopedia, write_encyclopedia
from atod_envs.webshop.generate import main as generate_catalogue


def version(env_id, **options):
    env = gym.make(env_id, **options)
    try:
        return env.unwrapped.data_version
    finally:
        env.close()


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    generate_games(["--out", str(folder), "--games", "3", "--seed", "1", "--size", "small", "--split", "train"])
    return folder


def test_alfworld_version_follows_content_not_place(games, tmp_path):
    before = version("atod/ALFWorld-v0", data=games)
    moved = tmp_path / "elsewhere"
    shutil.copytree(games, moved)
    assert version("atod/ALFWorld-v0", data=moved) == before
    game = next(moved.glob("json_2.1.1/train/*/*/game.tw-pddl"))
    content = json.loads(game.read_text())
    content["walkthrough"] = content["walkthrough"][:-1]
    game.write_text(json.dumps(content))
    assert version("atod/ALFWorld-v0", data=moved) != before


def test_webshop_version_follows_content_and_goals(tmp_path):
    for seed in ("1", "2"):
        generate_catalogue(["--out", str(tmp_path / seed), "--products", "20", "--seed", seed])
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    first = version("atod/WebShop-v0", data=tmp_path / "1")
    assert version("atod/WebShop-v0", data=tmp_path / "copy") == first
    assert version("atod/WebShop-v0", data=tmp_path / "2") != first
    assert version("atod/WebShop-v0", data=tmp_path / "1", goal_seed=1) != first


def test_searchqa_version_follows_questions_and_corpus(tmp_path):
    write_encyclopedia(make_encyclopedia(scale=0.05), tmp_path / "a")
    write_encyclopedia(make_encyclopedia(scale=0.05), tmp_path / "b")
    first = version("atod/SearchQA-v0", data=tmp_path / "a")
    assert version("atod/SearchQA-v0", data=tmp_path / "b") == first
    with (tmp_path / "b" / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"id": "new", "contents": '"One"\nmore passage'}) + "\n")
    changed = version("atod/SearchQA-v0", data=tmp_path / "b")
    assert changed != first and changed.split("/")[1] == first.split("/")[1], "the questions are the same"


@pytest.mark.parametrize("env_id", tiny.BUILTIN)
def test_trajectory_carries_the_version(env_id):
    env = RecordTurns(gym.make(env_id, **{**tiny.BUILTIN[env_id], "data": "builtin"}))
    env.reset(seed=0)
    env.step("nonsense")
    assert env.trajectory.data_version == env.unwrapped.data_version != ""


def test_builtin_games_still_are_what_their_version_says():
    """A change of the built-in world raises ``builtin.VERSION`` and then this digest."""
    digest = hashlib.blake2b(digest_size=8)
    for split in builtin.SIZES:
        for task_id in builtin.task_ids(split)[:8]:
            digest.update(json.dumps(builtin.game(task_id), sort_keys=True).encode())
    assert (builtin.VERSION, digest.hexdigest()) == (1, "334586e0d3bf9e6e")
