import re
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyEnv

import atod_envs
from atod_envs.checker import ContractError, check_text_env
from atod_envs.errors import AtodError, DataError, EpisodeError, UnknownName
from atod_envs.prompting import matches_admissible, prompted
from atod_envs.recording import RecordTurns
from atod_envs.spaces import UnicodeText
from atod_envs.styles import CompactStyle, parse_tagged
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import StopReason, read_jsonl, write_jsonl


def test_contract_holds_for_the_toy_world():
    check_text_env(ToyEnv())


def test_checker_finds_a_world_that_depends_on_hidden_state():
    class Drifting(ToyEnv):
        count = 0

        def _begin(self, task_id, seed):
            Drifting.count += 1
            task, frame = super()._begin(task_id, seed)
            return task, type(frame)(f"Visit {Drifting.count}.", frame.admissible)

    with pytest.raises(ContractError, match="two plays of the same episode differ"):
        check_text_env(Drifting())


def test_checker_finds_a_world_that_raises_on_odd_text():
    class Fragile(ToyEnv):
        def _act(self, action):
            action.encode("utf-8")  # a lone surrogate cannot be encoded
            return super()._act(action)

    with pytest.raises(ContractError, match="raised UnicodeEncodeError"):
        check_text_env(Fragile())


def test_checker_finds_a_constructor_that_commands_cannot_call():
    class Fixed(ToyEnv):
        def __init__(self, split="train"):
            super().__init__(split=split)

    with pytest.raises(ContractError, match=r"Fixed.__init__ does not take max_turns, which commands give by name"):
        check_text_env(Fixed())


class Counting(ToyEnv):
    """Its state is copied by what ``save`` and ``load`` do."""

    def __init__(self, split="train", max_turns=None, save=None, load=None):
        self.save, self.load = save or (lambda env: (env.word, list(env.said))), load or self.set_all
        super().__init__(max_turns, split)

    @staticmethod
    def set_all(env, state):
        env.word, env.said = state[0], list(state[1])

    def _begin(self, task_id, seed):
        self.said = []
        return super()._begin(task_id, seed)

    def _act(self, action):
        self.said.append(action)
        frame = super()._act(action)
        return replace(frame, observation=f"{frame.observation} {len(self.said)} tries at {self.word}.")

    def save_state(self):
        return self.save(self)

    def load_state(self, snapshot):
        self.load(self, snapshot.state)


def test_checker_goes_on_from_a_snapshot():
    check_text_env(Counting())
    with pytest.raises(ContractError, match="after the snapshot before it was restored, the answer is"):
        check_text_env(Counting(load=lambda env, state: None))
    with pytest.raises(ContractError, match=r"after the snapshot .* as a copy"):
        check_text_env(
            Counting(save=lambda env: (env.word, env.said), load=lambda env, state: setattr(env, "said", state[1]))
        )
    with pytest.raises(ContractError, match="a snapshot cannot be pickled"):
        check_text_env(Counting(save=lambda env: iter(lambda: env.word, "")))
    with pytest.raises(ContractError, match=r"restore\(\) of the snapshot before it raised"):
        check_text_env(Counting(load=lambda env, state: env.gone))
    with pytest.raises(ContractError, match=r"differ \(the second after a snapshot was restored"):
        check_text_env(Counting(load=lambda env, state: setattr(env, "said", list(state[1]))))  # not the word


def test_checker_reads_what_the_prompt_styles_phrase():
    class Loud(CompactStyle):
        def respond(self, action, thought):
            return super().respond(action.upper() + "!", thought)

    class Mute(CompactStyle):
        def prompt(self, history):
            raise KeyError("no page")

    class Styled(ToyEnv):
        styles = None

        def prompt_styles(self):
            return {"mine": self.styles} if self.styles else {}["atod"]

    with pytest.raises(ContractError, match=r"prompt_styles\(\) raised KeyError"):
        check_text_env(Styled())
    for style, words in ((Loud(), "for the action 'apple' is read as 'apple!'"), (Mute(), "raised KeyError")):
        env = Styled()
        env.styles = style
        with pytest.raises(ContractError, match=f"style 'mine'.*{words}"):
            check_text_env(env)
    shop = gym.make("atod/WebShop-v0", data="builtin", nouns="rules")
    check_text_env(shop, episodes=1)  # its compact style has short names


def test_seed_draws_the_task_and_option_overrides_it():
    env = ToyEnv()
    drawn = {env.reset(seed=s)[1]["task_id"] for s in range(40)}
    assert drawn == set(env.tasks)
    assert env.reset(seed=5)[1]["task_id"] == env.reset(seed=5)[1]["task_id"]
    _, info = env.reset(seed=5, options={"task_id": "say-fig-train"})
    assert info["task_id"] == "say-fig-train" and info["task"] == "say fig" and info["turn"] == 0


def test_turn_limit_truncates_and_says_so():
    env = ToyEnv(max_turns=2)
    env.reset(seed=0, options={"task_id": "say-fig-train"})
    _, _, terminated, truncated, info = env.step("pear")
    assert not terminated and not truncated and "stop_reason" not in info
    _, _reward, terminated, truncated, info = env.step("bogus")
    assert (terminated, truncated, info["stop_reason"], info["valid"]) == (False, True, StopReason.TURN_LIMIT, False)
    with pytest.raises(EpisodeError, match="after the end"):
        env.step("fig")


def test_winning_on_the_last_turn_terminates_and_does_not_truncate():
    env = ToyEnv(max_turns=np.int64(1))
    env.reset(seed=0, options={"task_id": "say-fig-train"})
    _, reward, terminated, truncated, info = env.step("fig")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["success"] and info["stop_reason"] is StopReason.SUCCESS


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda env: env.step("x"), EpisodeError, "reset"),
        (lambda env: env.reset(options={"task_id": "say-fog-train"}), UnknownName, "did you mean 'say-fig-train'"),
        (lambda env: env.reset(options={"game": 1}), ValueError, "task_id"),
        (lambda env: ToyEnv(max_turns=0), ValueError, "max_turns=0"),
        (lambda env: ToyEnv(max_turns="5"), ValueError, "max_turns='5'; expected a whole number from 1"),
        (lambda env: ToyEnv(max_turns=2.5), ValueError, "max_turns=2.5; expected a whole number from 1"),
        (lambda env: ToyEnv(max_turns=True), ValueError, "max_turns=True; expected a whole number from 1"),
        (lambda env: env.reset(options={"task_id": ["x"]}), TypeError, "expected a task's id"),
        (lambda env: env.reset(options={1: 2, "a": 3}), ValueError, "unknown reset option 'a'"),
        (lambda env: env.reset(options=["a"]), TypeError, "reset options are a list; expected a dict"),
        (lambda env: atod_envs.make("alfworld"), UnknownName, "did you mean 'atod/ALFWorld-v0'"),
        (
            lambda env: atod_envs.make("atod/TextCraft-v0", foo=1),
            UnknownName,
            "unknown option of atod/TextCraft-v0 'foo'",
        ),
        (
            lambda env: atod_envs.make("atod/ALFWorld-v0", data="builtin", strict="maybe"),
            AtodError,
            "atod/ALFWorld-v0: strict='maybe'; expected true or false",
        ),
    ],
)
def test_misuse_is_answered_with_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words):
        call(ToyEnv())


def test_a_task_that_is_not_there_costs_little_among_thousands():
    """All sessions of a server share the thread that looks for the nearest."""
    tasks = TaskSet(
        "s", [f"pick_and_place_simple-Mug-None-Shelf-{n}/trial_T2019{n * 7919:010d}" for n in range(20_000)]
    )
    near = tasks[12_345]
    assert f"did you mean {near!r}" in str(UnknownName("task", near[:-1], tasks))
    started = time.process_time()
    for slip in (near[:-1], near[::-1], near[:40] * 2, "x" * 1_000_000):
        with pytest.raises(UnknownName):
            tasks.require(slip)
    assert time.process_time() - started < 0.5


def test_panel_and_order_depend_on_ids_only():
    ids = [f"t{i}" for i in range(100)]
    tasks, shuffled = TaskSet("s", ids), TaskSet("s", ids[::-1])
    assert tasks.panel(30) == shuffled.panel(30) == tasks.panel(50)[:30]
    assert tasks.order(1) == shuffled.order(1) != tasks.order(2)
    assert sorted(tasks.order(1)) == sorted(ids)
    assert set(TaskSet("s", [*ids, "new"]).panel(101)) - set(tasks.panel(100)) == {"new"}
    with pytest.raises(ValueError, match="holds 100"):
        tasks.panel(101)
    with pytest.raises(ValueError, match="duplicate"):
        TaskSet("s", ["a", "a"])


def test_text_space_contains_any_string_and_samples_are_seeded():
    space = UnicodeText(seed=3)
    assert "" in space and "你好\ud800" in space and 3 not in space
    assert [UnicodeText(seed=3).sample() for _ in range(3)] == [UnicodeText(seed=3).sample() for _ in range(3)]
    assert "abcd" not in UnicodeText(max_length=3)
    assert UnicodeText() == UnicodeText() != UnicodeText(5)


@pytest.mark.parametrize(
    "response, action, ok",
    [
        ("<think>a</think><action>go to Desk 1</action>", "go to desk 1", True),
        ("<think>a</think><action> look </action> <action>x</action>", "look", True),
        ("<action>look</action>", "look", False),  # no thoughts
        ("go to desk 1", "go to desk 1", False),
        ("x" * 40, "x" * 30, False),
        ("<think>看</think><action>look</action>", "look", False),
        ("<think></think></action><action>look", "", True),  # as published: found both tags, in the wrong order
        ("", "", False),
    ],
)
def test_parsing_follows_the_published_rules(response, action, ok):
    parsed = parse_tagged(response, 30)
    assert (parsed.action, parsed.format_ok) == (action, ok)


def test_admissible_patterns():
    assert matches_admissible("search[red shoes]", ("search[<your query>]", "click[a]"))
    assert not matches_admissible("search[]", ("search[<your query>]",))
    assert not matches_admissible("click[b]", ("search[<your query>]", "click[a]"))


@given(st.lists(st.sampled_from(["a", "b", "ab", "", "aa"]), min_size=2, max_size=5), st.text("ab\n", max_size=9))
def test_slots_take_what_a_regular_expression_takes(parts, action):
    pattern = "<x>".join(parts)
    expected = re.fullmatch(".+".join(map(re.escape, parts)), action, re.DOTALL) is not None
    assert matches_admissible(action, (pattern,)) == (expected or action == pattern)


def test_slots_take_linear_time():
    started = time.process_time()
    assert not matches_admissible("a" * 64_000, ("a<x>a<y>a<z>b", "move <x> to <y> now"))
    assert time.process_time() - started < 0.1


def test_prompted_reports_form_and_admissibility_apart():
    env = prompted(ToyEnv(), "compact")
    env.reset(seed=1, options={"task_id": "say-fig-train"})
    _, _, _, _, info = env.step("<action>bogus</action>")
    assert (info["format_ok"], info["action_admissible"], info["valid"], info["action"]) == (
        False,
        False,
        False,
        "bogus",
    )
    message, _, _, _, info = env.step("<think>t</think><action>pear</action>")
    assert (info["format_ok"], info["action_admissible"]) == (True, True)
    assert message == "say fig: You say pear." and info["observation"] == "You say pear."
    with pytest.raises(UnknownName, match="compact"):
        prompted(ToyEnv(), "compakt")


@pytest.mark.parametrize("outermost", [True, False])
def test_an_episode_that_gymnasiums_limit_ends_is_recorded(outermost):
    inner = gym.wrappers.TimeLimit(ToyEnv(max_turns=9), 2)
    env = gym.wrappers.RecordEpisodeStatistics(RecordTurns(inner)) if outermost else RecordTurns(inner)
    env.reset(seed=0)
    env.step("hm")
    *_, truncated, info = env.step("hm")
    assert truncated and info["trajectory"].stop_reason is StopReason.TURN_LIMIT
    assert len(info["trajectory"].turns) == 2


def test_a_recorded_seed_plays_the_episode_again():
    env = RecordTurns(ToyEnv())
    env.reset(seed=1)
    shown, _ = env.reset()  # goes on with the generator
    record = env.trajectory
    again, _ = ToyEnv().reset(seed=record.seed, options={"task_id": record.task_id})
    assert again == shown


def test_what_torch_and_numpy_hold_is_recorded_as_numbers(tmp_path):
    env = RecordTurns(ToyEnv())
    env.reset(seed=0)
    env.annotate(prompt_ids=np.arange(3), response_ids=np.arange(2), logprobs=np.float32([-1, -0.5]))
    env.step("hm")
    write_jsonl(tmp_path / "t.jsonl", [env.trajectory])
    (read,) = read_jsonl(tmp_path / "t.jsonl")
    assert read == env.trajectory and read.turns[0].logprobs == (-1.0, -0.5)


def test_recording_keeps_turns_and_tokens():
    env = RecordTurns(prompted(ToyEnv(), "compact"))
    env.group_id = "g"
    env.reset(seed=1, options={"task_id": "say-fig-train"})
    env.annotate(prompt_ids=[1, 2], response_ids=[3, 4], logprobs=[-0.5, -0.25])
    env.step("<think>t</think><action>pear</action>")
    assert env.trajectory.stop_reason is StopReason.ABORTED
    *_, info = env.step("<think>t</think><action>fig</action>")
    trajectory = info["trajectory"]
    first, second = trajectory.turns
    assert (first.prompt_ids, first.response_ids, first.logprobs) == ((1, 2), (3, 4), (-0.5, -0.25))
    assert second.response_ids == () and second.reward == 1.0 and second.action == "fig"
    assert first.observation.startswith("Speak") and second.observation == "You say pear."
    assert trajectory.success and trajectory.group_id == "g" and trajectory.labels == {"toy/kind": "fruit"}
    assert trajectory.final_observation == "You say fig." and trajectory.seed == 1


def test_importing_the_environments_is_light():
    heavy = ("torch", "transformers", "pyarrow", "alfworld", "scipy", "pandas")

    def seconds(modules):
        """Of CPU time: a busy machine takes longer, not more."""
        code = f"import sys, time, {modules}; print(time.process_time(), *(m for m in {heavy} if m in sys.modules))"
        command = [sys.executable, "-c", code]
        said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        assert all(len(line.split()) == 1 for line in said), said
        return min(map(float, said))

    assert seconds("atod_envs") - seconds("numpy, gymnasium") < 0.5


def test_registered_environments_are_listed_by_gymnasium():
    import atod_envs

    assert set(atod_envs.ENVIRONMENTS) <= set(gym.registry)


@pytest.mark.parametrize("env", ["atod/ALFWorld-v0", "atod/WebShop-v0", "atod/SearchQA-v0", "atod/TextCraft-v0"])
def test_data_is_a_path_as_a_shell_reads_it(env, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    for data in (3, ["here"], b"here"):
        with pytest.raises(DataError, match="data="):
            gym.make(env, data=data)
    for data in ("~/nowhere", "$PLACE/nowhere"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / "nowhere"))):
            gym.make(env, data=data)
