"""A moment of an episode, kept and gone on from: equal to a replay, in every environment, process and wrapper."""

import copy
import pickle
import random
import subprocess
import sys
import time

import gymnasium as gym
import pytest
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from toy import ToyEnv

from atod_envs.errors import EpisodeError
from atod_envs.prompting import Prompted, prompted
from atod_envs.recording import RecordTurns
from atod_envs.snapshots import restore, snapshot
from atod_envs.styles import LONGEST_ACTION
from atod_envs.text_env import TextEnv

BRANCHES = 1000
ENVIRONMENTS = {
    "alfworld": ("atod/ALFWorld-v0", {"data": "builtin", "split": "valid_unseen"}),
    "webshop": ("atod/WebShop-v0", {"data": "builtin", "split": "dev", "nouns": "rules"}),
    "searchqa": ("atod/SearchQA-v0", {"data": "builtin", "split": "dev", "max_turns": 6}),
    "textcraft": ("atod/TextCraft-v0", {"data": "builtin", "split": "test"}),
}


def make(name, **options):
    if name == "toy":
        return ToyEnv(max_turns=6)
    env_id, arguments = ENVIRONMENTS[name]
    return gym.make(env_id, **{**arguments, **options})


def an_action(name, rng, info):
    words = info["task"].split()
    if name == "searchqa":
        query = " ".join(rng.sample(words, 2))
        return f"<answer>{query}</answer>" if rng.random() < 0.1 else f"<search>{query}</search>"
    if name == "webshop" and (rng.random() < 0.3 or len(info["admissible"]) < 2):
        return rng.choice([f"search[{' '.join(rng.sample(words, 3))}]", "search[<r>]"])
    if name == "textcraft":
        return rng.choice(info["admissible"]).replace("<number>", str(rng.randint(1, 9)))
    actions = [action for action in info["admissible"] if "<" not in action or action.startswith("click")]
    return rng.choice(actions) if actions and rng.random() < 0.9 else "dance"


def branch(env, name, rng, info):
    """Up to three steps from here, with everything that is returned."""
    actions, shown = [], []
    for _ in range(rng.randint(1, 3)):
        actions.append(an_action(name, rng, info))
        shown.append(env.step(actions[-1]))
        info = shown[-1][-1]
        if shown[-1][2] or shown[-1][3]:
            break
    return actions, shown


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "toy"])
def test_a_thousand_branches_equal_their_replays(name):
    rng = random.Random(name)
    env, other = make(name), make(name)
    played = 0
    while played < BRANCHES:
        seed = rng.randrange(1 << 30)
        shown, info = env.reset(seed=seed)
        done: list[str] = []
        ended = False
        while not ended and played < BRANCHES:
            state = env.unwrapped.snapshot()
            there = (shown, info)
            for _ in range(3):
                actions, outcomes = branch(env, name, rng, info)
                other.reset(seed=seed)
                for action in done:
                    other.step(action)
                assert outcomes == [other.step(action) for action in actions]
                assert env.np_random.bit_generator.state == other.np_random.bit_generator.state
                assert env.unwrapped.restore(pickle.loads(pickle.dumps(state))) == there
                played += 1
            done.append(an_action(name, rng, info))
            shown, _, terminated, truncated, info = env.step(done[-1])
            ended = terminated or truncated


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_snapshots_are_cheap(name):
    env, rng = make(name), random.Random(1)
    _, info = env.reset(seed=1)
    for _ in range(3):
        info = env.step(an_action(name, rng, info))[-1]
    started = time.perf_counter()
    for _ in range(200):
        env.unwrapped.restore(env.unwrapped.snapshot())
    assert (time.perf_counter() - started) / 200 < 0.005
    assert len(pickle.dumps(env.unwrapped.snapshot())) < 64_000


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_prompted_and_recorded_environments_take_part(name):
    def chain():
        return RecordTurns(prompted(make(name), style="compact"))

    env, other, rng = chain(), chain(), random.Random(2)
    _, info = env.reset(seed=4)

    def response(info):
        action = an_action(name, rng, info)
        return env.env.style.respond(action, "so")

    first = [next(said for said in iter(lambda: response(info), "") if "answer" not in said)]
    info = env.step(first[0])[-1]
    state = pickle.loads(pickle.dumps(env.snapshot()))
    for _ in range(20):
        tried = response(info)
        outcome = env.step(tried)
        other.reset(seed=4)
        other.step(first[0])
        expected = other.step(tried)
        for one in (outcome, expected):
            one[-1].pop("trajectory", None)
        assert outcome == expected
        for one, two in zip(env.trajectory.turns, other.trajectory.turns, strict=True):
            assert (one.observation, one.response, one.action) == (two.observation, two.response, two.action)
        shown, back = restore(env, state)
        assert back == info and shown == env.env.style.prompt(env.env.history)
        assert len(env.trajectory.turns) == 1


def test_a_snapshot_is_gone_on_from_in_another_process(tmp_path):
    env = make("alfworld")
    _, info = env.reset(seed=3)
    action = info["admissible"][2]
    (tmp_path / "state").write_bytes(pickle.dumps(env.unwrapped.snapshot()))
    code = (
        "import pickle, sys, gymnasium as gym, atod_envs.snapshots\n"
        "env = gym.make('atod/ALFWorld-v0', data='builtin', split='valid_unseen')\n"
        "atod_envs.snapshots.restore(env, pickle.load(open(sys.argv[1], 'rb')))\n"
        "pickle.dump(env.step(sys.argv[2]), sys.stdout.buffer)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), action], capture_output=True, check=True
    )
    assert pickle.loads(done.stdout) == env.step(action)


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "toy"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_live_environment_goes_on_by_itself(name, way):
    env = make(name)
    fresh = way(env.unwrapped)
    _, info = env.reset(seed=5)
    assert fresh.reset(seed=5)[1] == info
    actions = [an_action(name, random.Random(n), info) for n in range(3)]
    env.step(actions[0])
    env.unwrapped.max_turns = 5
    copied = way(env)
    assert copied.unwrapped.max_turns == 5
    outcome = env.step(actions[1])
    assert copied.step(actions[1]) == outcome
    copied.step(actions[2])
    assert env.unwrapped.snapshot().actions == tuple(actions[:2]), "the copy's steps are its own"


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_wrapped_environment_goes_on_by_itself(name, way):
    """Prompt, history and record belong to the moment that the copy is in."""
    env = RecordTurns(prompted(make(name), "compact"))
    _, info = env.reset(seed=5)
    actions = [f"<action>{an_action(name, random.Random(n), info)}</action>" for n in range(3)]
    env.step(actions[0])
    copied = way(env)
    outcome = env.step(actions[1])
    assert without_times(copied.step(actions[1])) == without_times(outcome)
    assert [turn.response for turn in copied.trajectory.turns] == actions[:2]


def without_times(outcome):
    return outcome[:4], {name: value for name, value in outcome[4].items() if name != "trajectory"}


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "toy"])
def test_a_record_notices_a_restore_beneath_it(name):
    env = RecordTurns(make(name))
    env.reset(seed=2)
    actions = ["dance", "sing"]  # end no episode
    env.step(actions[0])
    here, whole = env.unwrapped.snapshot(), snapshot(env)
    env.unwrapped.restore(here)
    with pytest.raises(EpisodeError, match="the turns are of another moment"):
        env.step(actions[1])
    restore(env, whole)
    env.step(actions[1])
    assert [turn.action for turn in env.trajectory.turns] == actions


def test_what_a_reader_does_to_info_changes_no_snapshot():
    env = make("webshop")
    env.reset(seed=1)
    state = env.unwrapped.snapshot()
    _, info = env.unwrapped.restore(state)
    url = info["webshop/page"]["url"]
    info["webshop/page"]["url"] = "elsewhere"
    assert env.unwrapped.restore(state)[1]["webshop/page"]["url"] == url != "elsewhere"


def test_a_published_engine_is_restored_by_playing_again():
    pytest.importorskip("alfworld")
    env, other = make("alfworld", backend="textworld"), make("alfworld")
    _, info = env.reset(seed=6)
    other.reset(seed=6)
    first, second = info["admissible"][0], info["admissible"][1]
    env.step(first)
    state = env.unwrapped.snapshot()
    other.step(first)
    expected = other.step(second)
    assert env.step(second) == expected
    env.unwrapped.restore(state)
    assert env.step(second) == expected
    env.close()


def test_what_cannot_be_restored_is_refused_with_what_to_do():
    env = make("alfworld")
    with pytest.raises(EpisodeError, match=r"before reset\(\)"):
        env.unwrapped.snapshot()
    env.reset(seed=1)
    state = env.unwrapped.snapshot()
    with pytest.raises(EpisodeError, match="restore it where the same data"):
        ToyEnv().restore(state)
    with pytest.raises(EpisodeError, match="not in split 'train'"):
        make("alfworld", split="train").unwrapped.restore(state)
    with pytest.raises(EpisodeError, match=r"takes what snapshot\(\) gave, not dict"):
        env.unwrapped.restore({})
    shop = make("webshop")
    shop.reset(seed=1)
    with pytest.raises(EpisodeError, match=r"this environment is webshop .*synthetic-1"):
        make("webshop", goal_seed=1).unwrapped.restore(shop.unwrapped.snapshot())
    with pytest.raises(EpisodeError, match="of a prompted environment"):
        prompted(make("alfworld")).restore(state)
    with pytest.raises(EpisodeError, match="TimeLimit has no snapshot"):
        snapshot(TimeLimit(env, 3))


def test_a_wrapper_notices_a_restore_beneath_it():
    env = prompted(ToyEnv())
    env.reset(seed=1)
    state = env.unwrapped.snapshot()
    env.unwrapped.restore(state)
    with pytest.raises(EpisodeError, match="restored by itself"):
        env.step("<action>fig</action>")
    env.reset(seed=1)
    env.step("<action>fig</action>")


def test_a_fresh_environment_behind_gymnasiums_order_check_takes_a_snapshot():
    env, fresh = ToyEnv(), Prompted(OrderEnforcing(ToyEnv()))
    first = prompted(env)
    first.reset(seed=1, options={"task_id": "say-fig-train"})
    restore(fresh, snapshot(first))
    assert fresh.step("<action>fig</action>")[2]


def test_the_hooks_are_optional_for_an_environment_of_your_own():
    assert ToyEnv.save_state is TextEnv.save_state


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "toy"])
def test_actions_that_are_too_long_are_kept_as_one_text_and_never_carried_out(name):
    rng = random.Random(1)
    env, other = make(name).unwrapped, make(name).unwrapped
    _, info = env.reset(seed=1)
    for number in range(1, 4):
        env.step("x" * (LONGEST_ACTION + number))
    shown, *_, info = env.step(an_action(name, rng, info))
    state = pickle.loads(pickle.dumps(env.snapshot()))
    assert len(pickle.dumps(state.actions)) < 2 * LONGEST_ACTION
    assert other.restore(state) == (shown, info) and info["turn"] == 4
    if "stop_reason" not in info:
        action = an_action(name, rng, info)
        assert other.step(action) == env.step(action)
