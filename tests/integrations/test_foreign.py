"""Others' environments as ours: the contract on real libraries, each form of answer, and what is refused."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from atod_envs.checker import check_text_env
from atod_envs.errors import AtodError, EpisodeError, UnknownName
from atod_envs.integrations import register, wrap
from atod_envs.integrations.foreign import _version
from atod_envs.recording import RecordTurns
from atod_envs.trajectory import StopReason

LAKE = partial(gym.make, "FrozenLake-v1", is_slippery=False)
STEPS = {"left": 0, "down": 1, "right": 2, "up": 3}
WAY = ("down", "down", "right", "right", "down", "right")


def lake(**manner):
    return wrap(LAKE, key="lake", actions=STEPS, text=lambda place: f"row {place // 4}, column {place % 4}", **manner)


def play(env, *actions, task="train-0"):
    shown = [env.reset(seed=0, options={"task_id": task})]
    for action in actions:
        shown.append(env.step(action))
    return shown


# --- real libraries -----------------------------------------------------------------------------------------------


def test_a_gymnasium_environment_keeps_the_contract():
    env = lake(instruction="Cross the lake.")
    check_text_env(env)
    begun, *answers = play(env, *WAY)
    assert begun[0] == "row 0, column 0" and begun[1]["task"] == "Cross the lake."
    assert begun[1]["admissible"] == ("left", "down", "right", "up")
    assert [answer[1] for answer in answers] == [0, 0, 0, 0, 0, 1]
    assert answers[-1][2] and answers[-1][4]["success"] and answers[-1][4]["stop_reason"] is StopReason.SUCCESS
    drowned = play(env, "right", "down")[-1]
    assert drowned[2] and not drowned[4]["success"] and drowned[4]["score"] == 0


def test_what_is_no_action_is_answered_and_changes_nothing():
    env = lake()
    said = play(env, "fly")[-1]
    assert said[0] == "'fly' is no action here; expected one of: left, down, right, up."
    assert not said[4]["valid"] and said[4]["admissible"] == tuple(STEPS)
    assert env.step(" down ")[0] == "row 1, column 0"


def test_a_task_is_a_seed_and_splits_share_none():
    env = partial(wrap, partial(gym.make, "Blackjack-v1"), actions={"stick": 0, "hit": 1}, returns=(-1, 1))
    hands = {
        split: {play(env(split=split), task=f"{split}-{n}")[0][0] for n in range(40)} for split in ("train", "valid")
    }
    assert len(hands["train"]) > 20 and hands["train"] != hands["valid"]
    assert play(env(), task="train-7")[0][0] == play(env(), task="train-7")[0][0]
    with pytest.raises(UnknownName, match="task id"):
        env().reset(options={"task_id": "valid-7"})
    with pytest.raises(UnknownName, match="split"):
        env(split="dev")


class Steps(gym.Env):
    """A point a step for ten steps; it also has a method of a name that TextArena's games have."""

    observation_space = action_space = gym.spaces.Text(9)

    def __init__(self, size=1):
        self.size, self.done = size, 0

    def get_observation(self):
        return f"step {self.done}"

    def reset(self, *, seed=None, options=None):
        self.done = 0
        return self.get_observation(), {}

    def step(self, action):
        self.done += 1
        return self.get_observation(), 1.0, self.done == 10, False, {}


def test_the_turn_limit_pays_what_was_reached_and_solves_nothing():
    for turns, score in ((9, 0.9), (10, 1.0), (30, 1.0)):
        answers = play(wrap(Steps, returns=(0, 10), max_turns=turns), *["on"] * min(turns, 10))[1:]
        assert sum(answer[1] for answer in answers) == pytest.approx(score)
        *_, terminated, truncated, info = answers[-1]
        assert terminated == (turns >= 10) and truncated != terminated
        assert info["success"] == (turns >= 10) and info["score"] == pytest.approx(score)


def test_what_is_not_understood_at_the_limit_loses_nothing():
    env = wrap(partial(Steps), actions=["on"], returns=(0, 10), max_turns=3)
    assert [answer[1] for answer in play(env, "on", "on", "off")[1:]] == [0, 0, 0.2]
    assert play(env)[0][1]["score"] == 0, "the next episode begins with nothing"


def test_environments_that_play_differently_have_versions_of_their_own():
    def version(make, **manner):
        return wrap(make, **manner).data_version

    assert version(partial(Steps, 1)) == version(partial(Steps, 1)) != version(partial(Steps, 99))
    assert version(partial(Steps, size=1)) != version(partial(Steps, size=2))
    assert version(lambda: Steps(1)) != version(lambda: Steps(2), version="two")
    assert version(Steps).startswith("foreign/") and version(Steps, version="two").endswith("/two")


def test_snapshots_and_recording_work():
    env = RecordTurns(lake())
    play(env, *WAY[:3])
    here = env.unwrapped.snapshot()
    for action in WAY[3:]:
        env.step(action)
    assert env.trajectory.success and env.trajectory.data_version.startswith("lake/")
    assert [turn.action for turn in env.trajectory.turns] == list(WAY)
    assert env.unwrapped.restore(here)[0] == "row 2, column 1"


def test_a_copy_of_one_that_was_given_as_an_object_is_another_object():
    class Counter:
        count = 0

        def reset(self, seed=None):
            self.count = 0
            return "0", {}

        def step(self, action):
            self.count += 1
            return str(self.count), 0.0, False, False, {}

    env = wrap(Counter(), key="counter")
    play(env, "a", "b")
    copied = copy.deepcopy(env)
    assert copied.step("c")[0] == "3" and env.step("c")[0] == "3"
    assert copied.step("d")[0] == "4"


@pytest.mark.slow
def test_a_gem_game():
    gem = pytest.importorskip("gem", reason="GEM is not installed (pip install gem-llm)")
    made = partial(gem.make, "game:GuessTheNumber-v0-easy")
    env = wrap(made, key="guess", actions={str(n): f"\\boxed{{{n}}}" for n in range(1, 11)}, tells_rules_first=True)
    check_text_env(env)
    solved = [play(env, str(n))[-1][4]["success"] for n in range(1, 11)]
    assert solved.count(True) == 1


@pytest.mark.slow
def test_a_textarena_game():
    textarena = pytest.importorskip("textarena", reason="TextArena is not installed (pip install textarena)")
    made = partial(textarena.make, "GuessTheNumber-v0")
    env = wrap(made, key="guess", actions=lambda text: f"[{text.strip()}]", tells_rules_first=True)
    check_text_env(env)
    answers = [play(env, str(n))[-1] for n in range(1, 21)]
    (won,) = [answer for answer in answers if answer[4]["success"]]
    assert won[2] and won[1] == 1.0 and won[4]["stop_reason"] is StopReason.SUCCESS
    with pytest.raises(AtodError, match="give a function that makes it"):
        wrap(made())


# --- forms --------------------------------------------------------------------------------------------------------


class Door:
    """Opens on the second knock; answers as OpenEnv's clients do."""

    def reset(self, seed=None):
        self.knocks = 0
        return SimpleNamespace(observation=SimpleNamespace(message="A door."), reward=None, done=False)

    def step(self, action):
        if action.text == "break":
            raise ValueError("it is made of iron")
        self.knocks += 1
        done = self.knocks == 2
        return SimpleNamespace(observation=SimpleNamespace(message="Knock."), reward=float(done), done=done)


def door(**manner):
    return wrap(Door(), actions=lambda text: SimpleNamespace(text=text), text=lambda said: said.message, **manner)


def test_the_form_of_openenv_and_an_error_that_is_an_answer():
    begun, refused, first, second = play(door(), "break", "knock", "knock")
    assert begun[0] == "A door." and begun[1]["admissible"] == ("<any text>",)
    assert refused[0] == "'break' was not understood: it is made of iron" and not refused[4]["valid"]
    assert not first[2] and second[2] and second[4]["success"]
    with pytest.raises(ValueError, match="iron"):
        play(door(refuses=()), "break")


class Told(Door):
    """Says by itself whether it was solved, and which actions there are."""

    def reset(self, seed):
        return "A room.", {"admissible_commands": ["go", "stay"]}

    def step(self, action):
        return "On.", -3.0, False, action == "go", {"won": action == "go"}


def test_what_info_says_counts():
    begun, stayed, gone = play(wrap(Told(), returns=(-9, 0)), "stay", "go")
    assert begun[1]["admissible"] == ("go", "stay") and stayed[4]["score"] == 0
    assert gone[4]["success"] and gone[4]["score"] == pytest.approx((-6 + 9) / 9)


def test_what_cannot_be_one_of_ours_is_refused_in_a_line():
    class Chance:
        def reset(self):
            return "x", {}

        def step(self, action):
            return "x", True

    with pytest.raises(AtodError, match=r"Chance\.reset takes no seed.*chance=False"):
        wrap(Chance)
    with pytest.raises(AtodError, match=r"Chance\.step answered.*expected the form of Gymnasium, OpenEnv or TextArena"):
        play(wrap(Chance, chance=False), "go")
    with pytest.raises(AtodError, match="expected the sum of rewards of a failure"):
        wrap(Told(), returns=(1, 1))
    with pytest.raises(TypeError, match="colour"):
        wrap(Told(), colour="red")


def test_a_registered_one_is_found_by_its_id():
    if "cards/Blackjack-v0" not in gym.registry:
        register(
            "cards/Blackjack-v0", partial(gym.make, "Blackjack-v1"), actions={"stick": 0, "hit": 1}, returns=(-1, 1)
        )
    env = gym.make("cards/Blackjack-v0", split="valid", max_turns=3)
    check_text_env(env)
    assert env.unwrapped.env_key == "blackjack" and env.unwrapped.max_turns == 3
    with pytest.raises(AtodError, match="cards/Blackjack-v0 has no data folder"):
        gym.make("cards/Blackjack-v0", data="somewhere")
    begun = env.reset(seed=3)
    again = pickle.loads(pickle.dumps(env.unwrapped))
    assert type(again) is type(env.unwrapped) and again.max_turns == 3
    assert again.reset(seed=3)[0] == begun[0] and again.snapshot() == env.unwrapped.snapshot()
    env.step("hit")
    assert copy.deepcopy(env.unwrapped).snapshot() == env.unwrapped.snapshot()


def test_other_worlds_are_other_data():
    """Of one class, in one wrapper: a snapshot or a checkpoint of the one is none of the other."""
    maps = [
        wrap(partial(gym.make, "FrozenLake-v1", map_name=name), key="lake", actions=STEPS) for name in ("4x4", "8x8")
    ]
    small, large = (env.data_version for env in maps)
    assert small != large and "FrozenLakeEnv" in small and "FrozenLakeEnv" in large
    assert small == wrap(partial(gym.make, "FrozenLake-v1", map_name="4x4"), key="lake", actions=STEPS).data_version
    odd = [wrap(partial(gym.make, "FrozenLake-v1", map_name="4x4"), key="lake", actions=STEPS) for _ in range(2)]
    for env in odd:
        env._foreign.spec.kwargs["reward"] = object()
    assert len({_version(env._foreign, env._make) for env in odd}) == 1, "no address is part of it"
    maps[1].reset(seed=0)
    with pytest.raises(EpisodeError):
        maps[0].restore(maps[1].snapshot())


def test_what_is_offered_is_what_step_understands():
    class Legal:
        def reset(self, seed=None):
            return "begin", {"legal_actions": [1, 2]}

        def step(self, action):
            return f"did {action}", 0.0, False, False, {"legal_actions": ["hit", 7]}

    env = wrap(Legal(), actions={"stick": 0, "hit": 1, "double": 2})
    info = env.reset(seed=0)[1]
    assert info["admissible"] == ("hit", "double")
    seen, *_, info = env.step("double")
    assert seen == "did 2" and info["admissible"] == ("hit",)
    few = wrap(Legal(), actions=("hit", "stick"))
    few.reset(seed=0)
    assert few.step("stick")[4]["admissible"] == ("hit",)


def test_a_world_that_takes_no_text_needs_actions():
    with pytest.raises(AtodError, match=r"takes Discrete\(4\), not text; give actions="):
        wrap(LAKE)


@pytest.mark.parametrize(
    ("observation", "reward", "words"),
    [
        *((("here", reward, "expected a finite number")) for reward in (float("nan"), float("inf"), None, "1", [1])),
        *((seen, 0.0, "expected text, or what `text` turns into it") for seen in (None, b"here")),
    ],
)
def test_answers_that_are_no_text_and_no_number_are_refused(observation, reward, words):
    class Odd:
        def reset(self, seed=None, options=None):
            return "here", {}

        def step(self, action):
            return observation, reward, False, False, {}

    with pytest.raises(AtodError, match=words):
        play(wrap(Odd), "go")
    if observation == b"here":
        assert (
            play(wrap(Odd, text=lambda seen: seen if isinstance(seen, str) else seen.decode()), "go")[-1][0] == "here"
        )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (("x", 0.0, "False", False, {}), "gave terminated 'False'; expected true or false"),
        (("x", 0.0, False, np.array([True, False]), {}), "gave truncated array.*expected true or false"),
        (("x", 0.0, True, False, {"won": "False"}), "gave won 'False'; expected true or false"),
        (("x", 0.0, False, False, {"legal_actions": "go"}), "gave legal_actions 'go'; expected a list of actions"),
        (("x", np.array([1.0, 2.0]), False, False, {}), "gave the reward array.*expected a finite number"),
        (SimpleNamespace(observation="x", reward=1.0, done="no"), "gave done 'no'; expected true or false"),
    ],
)
def test_an_answer_that_could_mean_anything_is_an_error_and_not_a_bad_action(answer, words):
    class Odd:
        def reset(self, seed=None):
            return "here", {"legal_actions": np.array(["go", "stay"])}

        def step(self, action):
            return answer

    env = wrap(Odd)
    assert env.reset(seed=0)[1]["admissible"] == ("go", "stay")
    with pytest.raises(AtodError, match=words):
        env.step("go")


def test_an_error_in_reading_an_answer_is_not_blamed_on_the_action():
    """The step was carried out, so it must not be answered as if it was not."""

    def broken(seen):
        return str(int(seen)) if seen != "here" else seen

    class Odd:
        def reset(self, seed=None):
            return "here", {}

        def step(self, action):
            return "seven", 0.0, False, False, {}

    with pytest.raises(ValueError, match="invalid literal"):
        play(wrap(Odd, text=broken), "go")
