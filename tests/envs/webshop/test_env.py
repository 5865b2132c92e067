"""The environment: Gymnasium's contract, determinism, splits, prompts, and any text as an action."""

import random
import warnings

import gymnasium as gym
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import REPOSITORY, SUPPORT
from shops import item, options, write_shop

import atod_envs
from atod_envs.checker import check_text_env
from atod_envs.errors import UnknownName
from atod_envs.prompting import prompted
from atod_envs.recording import RecordTurns
from atod_envs.styles import phrase_response
from atod_envs.trajectory import StopReason
from atod_envs.webshop.catalogue.store import FOLDS, digest
from atod_envs.webshop.env import WebShopEnv

atod_envs.register()


@pytest.fixture(scope="module")
def env():
    return WebShopEnv("test")


def test_contract_built_in():
    check_text_env(gym.make("atod/WebShop-v0", split="dev"))


@pytest.mark.parametrize("mode", ["text", "text_rich"])
def test_contract_on_real_products(webshop_data, mode):
    check_text_env(gym.make("atod/WebShop-v0", split="train", data=webshop_data, observation_mode=mode, max_turns=6))


def test_a_purchase_ends_the_episode(tmp_path):
    asin = next(f"B{number}" for number in range(100) if int(digest(f"B{number}"), 16) % FOLDS >= 3)
    record = item(asin, "Plain thing", customization_options=options(size=["s", "m"]))
    env = WebShopEnv("train", data=write_shop(tmp_path / "shop", [record]))
    task = next(task for task in env.tasks if "size: s" in env.reset(options={"task_id": task})[1]["task"])
    observation, info = env.reset(options={"task_id": task})
    assert observation == f"WebShop [SEP] Instruction: [SEP] {info['task']} [SEP] Search"
    assert info["admissible"] == ("search[<your query>]",)
    assert info["webshop/page"]["clickables"] == ("search",) and info["webshop/page"]["has_search_bar"]
    for action in ("search[thing]", f"click[{asin.lower()}]"):
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info["valid"]) == (0.0, False, False, True)
    assert "click[s]" in info["admissible"] and "webshop/purchase" not in info
    env.step("click[s]")
    observation, reward, terminated, _, info = env.step("click[buy now]")
    assert (reward, info["score"], info["success"], terminated) == (1.0, 1.0, True, True)
    assert info["stop_reason"] is StopReason.SUCCESS and info["admissible"] == ()
    assert info["webshop/purchase"]["options"] == {"size": "s"} and "Your score" in observation


def test_the_default_turn_limit_is_fifteen(env):
    env.reset(seed=0)
    for turn in range(15):
        _, _, terminated, truncated, info = env.step("nothing")
        assert not info["valid"] and truncated == (turn == 14) and not terminated
    assert info["stop_reason"] is StopReason.TURN_LIMIT


def test_an_episode_is_a_function_of_task_and_seed():
    first, second = WebShopEnv("test"), WebShopEnv("test")
    for seed in range(5):
        a, b = first.reset(seed=seed), second.reset(seed=seed)
        assert a == b
        for action in ("search[<r>]", "click[next >]"):
            assert first.step(action) == second.step(action)


def test_search_pages_list_the_recorded_rankings(webshop_data, read_golden):
    """The recorded rankings through the environment: search, then page to the end."""
    env = WebShopEnv("train", data=webshop_data)
    env.reset(seed=0)
    asked = 0
    for row in read_golden("golden_lucene_search_1k.jsonl.gz"):
        # The environment lower-cases a query and reads one line; markers list by other rules.
        query = row["query"]
        if not query or "\n" in query or query.startswith("<"):
            continue
        found = env.shop.ranking(query)
        assert [env.shop.store.card(place).asin for place in found] == [docid for docid, _ in row["hits"]]
        asked += 1
        if query == query.lower() and asked % 7 == 0:
            env.session.act(f"search[{query}]")
            shown = []
            for _ in range(5):
                shown += [name.upper() for name in env.session.clickables if len(name) == 10 and name.startswith("b0")]
                env.session.act("click[next >]")
            assert shown == [docid for docid, _ in row["hits"] if docid.startswith("B0") and len(docid) == 10]
    assert asked > 550


def test_verl_agent_style_plays_each_workers_goals(webshop_data):
    with pytest.warns(UserWarning, match="leak"):
        env = WebShopEnv("test", data=webshop_data, split_style="verl-agent")
    tasks = {env.reset(options={"task_id": f"synthetic/{worker}/0"})[1]["task"] for worker in range(1000, 1010)}
    assert len(tasks) == 10
    assert env.reset(options={"task_id": "synthetic/1000/7"})[1]["webshop/page"]["url"].endswith(":3000/7")


def test_bad_arguments_say_what_is_allowed():
    for keywords in ({"split": "valid"}, {"goals": "robot"}, {"observation_mode": "html"}, {"search": "google"}):
        with pytest.raises(UnknownName, match="expected one of"):
            WebShopEnv(**keywords)
    with pytest.raises(UnknownName, match="noun finder"):
        WebShopEnv(nouns="nltk")
    with pytest.raises(UnknownName, match="task id"):
        WebShopEnv("test").reset(options={"task_id": "synthetic/999999999"})


def test_environments_of_a_process_share_the_shop():
    a, b, c = WebShopEnv("test"), WebShopEnv("train"), WebShopEnv("test", show_attributes=True)
    assert a.shop is b.shop and a.shop is not c.shop and a.shop.store is c.shop.store


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["search[", "click[", "]", "<r>", "b0"])), max_size=6))
def test_any_text_is_an_action(env, texts):
    env.reset(seed=1)
    env.step("search[" + "".join(texts) + "]")
    env.step("".join(texts))
    env.step("click[" + "".join(texts) + "]")


def test_recorded_turns_hold_the_category(env):
    recorded = RecordTurns(env)
    recorded.reset(seed=3)
    for _ in range(15):
        *_, info = recorded.step("search[soap]")
    trajectory = info["trajectory"]
    assert set(trajectory.labels) == {"webshop/category"} and len(trajectory.turns) == 15


# --- prompts -------------------------------------------------------------------------------------------------------


def test_the_papers_first_prompt(env):
    prompt, info = prompted(env).reset(options={"task_id": env.tasks[0]})
    task = info["task"]
    assert prompt.startswith(
        "\nYou are an expert autonomous agent operating in the WebShop e\u2011commerce environment. \n"
        f"Your task is to: {task}.\nYour current observation is: 'Search'.\n"
        "Your admissible actions of the current situation are: \n[\n'search[<your query>]',\n'click[search]',\n].\n\nNow it's"
    )
    assert prompt.endswith("present it within <action> </action> tags.\n") and "</think> tags. \nOnce" in prompt


def test_the_papers_later_prompts(env):
    agent = prompted(env)
    agent.reset(options={"task_id": env.tasks[0]})
    say = agent.style.respond
    agent.step(say("search[soap]", "look"))
    agent.step(say("click[next >]", "more"))
    prompt, *_, info = agent.step("no tags but a long answer about soap")
    assert not info["format_ok"] and info["action"] == " long answer about soap"[-20:]
    assert "environment.\nYour task is to:" in prompt
    assert "you have already taken 3 step(s). Below are the most recent 2 observations" in prompt
    page = " [SEP] ".join(f"'{part}'" for part in info["observation"].split(" [SEP] ")[2:])
    assert f"You are now at step 4 and your current observation is: {page}.\n" in prompt
    assert (
        "[Observation 2: ''Back to Search' [SEP] 'Page 1" in prompt
        and "', Action 2: 'click[next >]']\n[Observation 3:" in prompt
    )
    assert (
        "actions of the current situation are:\n[\n'click[back to search]',\n'click[< prev]',\n'click[next >]',"
        in prompt
    )
    assert "'search[" not in prompt.partition("situation are:")[2]


def test_a_prompt_that_is_too_long_drops_its_history(webshop_data):
    agent = prompted(WebShopEnv("train", data=webshop_data))
    agent.reset(seed=0)
    # Result pages of real products hold long titles; three of them pass the limit when a page is long enough.
    lengths = []
    rng = random.Random(0)
    for _ in range(14):
        prompt, *_ = agent.step(
            agent.style.respond(f"search[{rng.choice(['women dress', 'shirt', 'phone case'])}]", "x")
        )
        lengths.append((len(prompt), "Prior to this step" in prompt))
    assert all(length <= 13_000 or not history for length, history in lengths)
    assert any(history for _, history in lengths)


def test_compact_style_is_short_and_reads_back(env):
    agent = prompted(env, "compact")
    prompt, info = agent.reset(options={"task_id": env.tasks[0]})
    assert prompt == info["task"]
    prompt, *_, info = agent.step(agent.style.respond("search[soap]", "look"))
    lines = prompt.split("\n")
    assert lines[0].startswith("page 1 (total results: ") and len(lines) == 11 and len(prompt) < 900
    assert all(line.startswith("- ") and line.endswith(f" #{place}") for place, line in enumerate(lines[1:], 1))
    third = [name for name in info["admissible"] if name.startswith("click[b") and "back" not in name][2]
    assert lines[3] == f"- {title_and_price(info['observation'], third)} #3"
    prompt, *_, info = agent.step(phrase_response(agent.style, third, "open", agent.history))
    assert info["action"] == third and info["action_admissible"] and info["format_ok"]
    assert prompt.startswith("- ") and prompt.endswith("\n- description | features | reviews | buy now")
    assert info["task"] not in prompt and prompt == prompt.lower()
    assert agent.step("<think></think><action>click[ #3 ]</action>")[0] == "same page"  # no list here, no numbers
    assert agent.step("<think></think><action>click[ < prev ]</action>")[0].split("\n") == lines
    *_, info = agent.step(f"<think></think><action>{third}</action>")  # ids are understood, too
    assert info["valid"] and info["webshop/page"]["url"].split("/")[5].lower() == third[len("click[") : -1]


def title_and_price(observation, action):
    parts = observation.split(" [SEP] ")
    place = parts.index(action[len("click[") : -1].upper())
    return " ".join(parts[place + 1 : place + 3]).lower()


def test_compact_style_lists_options_by_name(tmp_path):
    record = item("B1", "Plain Thing", customization_options=options(color=["Red", "blue"], size=["s"]))
    agent = prompted(WebShopEnv("train", data=write_shop(tmp_path / "shop", [record])), "compact")
    agent.reset(seed=0)
    agent.step(agent.style.respond("search[thing]", ""))
    prompt, *_ = agent.step(agent.style.respond("click[#1]", ""))
    assert prompt.split("\n") == [
        "- color: red, blue", "- size: s", "- plain thing", "- price: $10.0 rating: n.a.",
        "- description | features | reviews | buy now",
    ]  # fmt: skip
    prompt, *_ = agent.step(agent.style.respond("click[features]", ""))
    assert prompt == "- first.\n- second."


@pytest.mark.parametrize("style", ["atod", "compact"])
def test_responses_read_back(env, style):
    chosen = env.prompt_styles()[style]
    parsed = chosen.parse(chosen.respond("click[buy now]", "it fits"))
    assert parsed.action == "click[buy now]" and parsed.format_ok


def test_lucene_itself_gives_the_same_pages(webshop_data, tmp_path):
    """In a process of its own: Java in this one would forbid forking."""
    import os
    import subprocess
    import sys

    from atod_envs.errors import DataError
    from atod_envs.retrieval.lucene import find_jar, find_java

    pytest.importorskip("jnius_config", reason="pyjnius is not installed")
    try:
        find_jar(), find_java()
    except DataError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "lucene_pages.py"), str(webshop_data)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "ATOD_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("0 of 60 pages differ")


def test_no_warning_by_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WebShopEnv("test")
