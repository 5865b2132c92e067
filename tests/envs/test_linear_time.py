"""Nothing that can be written down takes more than linear time to read."""

import random
import re
import time

import gymnasium as gym
import pytest

import atod_envs  # noqa: F401
from atod_envs.alfworld.beliefs import Beliefs
from atod_envs.alfworld.engine.grammar import parse_symbols
from atod_envs.prompting import prompted
from atod_envs.searchqa.actions import project
from atod_envs.searchqa.expert import SearchQAExpert
from atod_envs.searchqa.language import FACTS, read_facts
from atod_envs.searchqa.scoring import last_answer
from atod_envs.styles import LONGEST_ACTION
from atod_envs.webshop.prompts import unpadded
from atod_envs.webshop.shop import parse_action

SIZES = (64_000, 1_000_000)
SECONDS = 0.1
WORLDS = {
    "alfworld": ("atod/ALFWorld-v0", {"data": "builtin"}),
    "webshop": ("atod/WebShop-v0", {"data": "builtin", "nouns": "rules"}),
    "searchqa": ("atod/SearchQA-v0", {"data": "builtin", "max_turns": 1000}),
    "textcraft": ("atod/TextCraft-v0", {"data": "builtin"}),
}
SEEDS = (
    *("craft 1 a using 1 a, ", "get 1 a ", ", 1 "),
    *("[", "]", "<", ">", "(", ")", "{", '"', "'", "\\", "\n", "\t", " ", "#", "a", "a ", "é", "你"),
    *("<search>", "</search>", "<answer>", "</answer>", "<action>", "<think>", "</think>", "search[", "click[", "[]"),
    *(
        "search[a] ",
        "put a in ",
        "take a from ",
        "<search><answer>",
        "</answer><answer>",
        "Doc 1: ",
        "$1",
        ", and ",
        "a-",
    ),
)
FRAMES = (
    "{}",
    "craft {} using {}",
    "get 1 {}",
    "search[{}]",
    "search[{}",
    "click[{}]",
    "<search>{}</search>",
    "<search></answer>{}</search>",
    "<answer>{}</answer>",
)
"""What stands around the repeated text."""


def texts(size, frames):
    for frame in frames:
        for seed in SEEDS:
            yield (
                f"{frame} of {seed!r}",
                frame.replace("{}", (seed * (size // len(seed) + 1))[: size // frame.count("{}")]),
            )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["raw", "atod", "compact"])
@pytest.mark.parametrize("name", WORLDS)
def test_a_huge_action_is_answered_at_once(name, way, size):
    env_id, options = WORLDS[name]
    env = gym.make(env_id, **options)
    if way != "raw":
        env = prompted(env, way)
    env.reset(seed=1)
    slow = {}
    tags = "{}" if way == "raw" or name == "searchqa" else "<think>a</think><action>{}</action>"

    def seconds_of(text):
        found = []
        for _ in range(3):  # the shortest of three: the machine may be busy
            env.reset(seed=1)
            started = time.process_time()
            env.step(tags.format(text))
            found.append(time.process_time() - started)
            if found[-1] < SECONDS:
                break
        return min(found)

    frames = FRAMES if size == min(SIZES) else ("{}", "<search></answer>{}</search>")
    halves = dict(texts(size // 2, frames))
    for said, text in texts(size, frames):
        seconds = seconds_of(text)
        # A processor that many share takes longer for everything: then half the text must take half the time.
        if seconds >= SECONDS and seconds > min(5 * SECONDS, 3 * seconds_of(halves[said])):
            slow[said] = seconds
    assert not slow


def test_an_action_that_is_too_long_is_answered_with_a_sentence_and_does_nothing():
    for env_id, options in WORLDS.values():
        env = gym.make(env_id, **options)
        first, before = env.reset(seed=1)
        observation, reward, terminated, _, info = env.step("a" * (LONGEST_ACTION + 1))
        assert observation == "That action has 65537 characters; at most 65536 are read. Nothing was done." != first
        assert (reward, terminated, info["valid"], info["turn"]) == (0.0, False, False, 1)
        assert info["admissible"] == before["admissible"]
        assert env.step("a" * LONGEST_ACTION)[0] != observation


def test_actions_are_read_as_the_published_patterns_read_them():
    """The patterns that were replaced, on random texts of their own characters."""
    published = re.compile(r"(.+)\[(.+)\]")
    padded = re.compile(r"^(search|click)\[\s*(.*?)\s*\]$", re.DOTALL)
    search = re.compile(r"<search>(.*?)</search>", re.IGNORECASE | re.DOTALL)
    answers = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices(["[", "]", "a", " ", "\n", "search", "click"], k=rng.randint(1, 12)))
        found = published.match(text)
        assert parse_action(text) == (found.groups() if found else (text, None)), repr(text)
        if not text.endswith("\n"):  # a parsed action is stripped
            assert unpadded(text) == padded.sub(r"\1[\2]", text), repr(text)
        tags = ["<search>", "</search>", "<SEARCH>", "</Search>", "<answer>", "</answer>", "a", " ", "\n"]
        text = "".join(rng.choices(tags, k=rng.randint(1, 10)))
        blocks = answers.findall(text)
        assert last_answer(text) == (blocks[-1].strip() if blocks else ""), repr(text)
        trimmed = next((text.partition(t)[0] + t for t in ("</search>", "</answer>") if t in text), text)
        if (block := search.search(trimmed)) and "</answer>" not in block[1]:
            assert project(text).query == block[1].strip(), repr(text)


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_symbols("{#a" + "\t" * 64_000),
        lambda: parse_symbols("{a" + "\t" * 64_000 + "!"),
        lambda: parse_symbols("{a |" + " " * 64_000 + "!"),
        lambda: parse_symbols("#a" + "\t" * 64_000),
        lambda: [read_facts(kind, "a " * 32_000) for kind in FACTS],
        lambda: [read_facts(kind, "a was born in " * 5_000 + ".") for kind in FACTS],
        lambda: SearchQAExpert().reset("Where was the teacher of " * 3_000 + "?", "", ()),
        lambda: Beliefs(("shelf 1",)).see("On the shelf 1, you see " * 3_000, ()),
    ],
    ids=["rule", "expression", "query", "reference", "passage", "sentence", "question", "list"],
)
def test_data_that_are_hostile_are_read_in_linear_time(read):
    started = time.process_time()
    read()
    assert time.process_time() - started < 0.5
