"""A remote environment is an environment like any other, and says what the local one says, byte for byte."""

import json
import threading

import gymnasium as gym
import pytest
import tiny
from gymnasium.utils.env_checker import check_env
from servers import TOY_OFFERS, running
from wire import Scripted, reply

import atod_envs  # noqa: F401  (registers the environments)
from atod_envs import environment_class
from atod_envs.checker import NONSENSE, check_text_env
from atod_envs.errors import EpisodeError, UnknownName
from atod_envs.prompting import prompted
from atod_envs.recording import RecordTurns
from atod_envs.serve.client import RemoteEnv
from atod_envs.serve.codec import dumps, loads
from atod_envs.serve.sessions import Offer
from atod_envs.serve.transport import RemoteError
from atod_envs.vector import TextVectorEnv


@pytest.fixture(scope="module")
def server():
    offers = [Offer(env_id, environment_class(env_id).splits, options) for env_id, options in tiny.BUILTIN.items()]
    with running(offers) as (url, _):
        yield url


@pytest.fixture(params=tiny.BUILTIN, ids=lambda env_id: env_id.split("/")[1].split("-")[0])
def env_id(request):
    return request.param


@pytest.fixture
def remote(server, kind, env_id):
    env = RemoteEnv(server.replace("http", kind), env_id)
    yield env
    env.close()


def test_our_checker_passes(remote):
    check_text_env(remote)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasiums_checker_passes(remote):
    check_env(remote, skip_render_check=True)


def test_everything_equals_the_local_environment(remote, env_id):
    local = gym.make(env_id, **tiny.BUILTIN[env_id])
    assert remote.spec.id == local.spec.id and len(remote.tasks) == len(local.unwrapped.tasks)
    for name in ("env_key", "label", "splits", "max_turns", "data_version"):
        assert getattr(remote, name) == getattr(local.unwrapped, name)
    assert tuple(remote.tasks[:5]) == tuple(local.unwrapped.tasks[:5])
    one_simulator = "ScienceWorld" in env_id  # it goes back and forth between the two, playing all again
    for seed in range(1 if one_simulator else 3):
        ours, theirs = local.reset(seed=seed), remote.reset(seed=seed)
        assert theirs == ours and kinds(theirs[1]) == kinds(ours[1])
        nonsense = NONSENSE[-3:] if one_simulator else NONSENSE
        for action in (*ours[1]["admissible"][:2], *nonsense, "<answer>x</answer>"):
            a, b = local.step(action), remote.step(action)
            assert b == a and kinds(b[4]) == kinds(a[4])
            if a[2] or a[3]:
                break
    assert local.reset() == remote.reset()  # the drawn sequence goes on alike


def kinds(value):
    """The types in a nested value."""
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    return [type(value), *map(kinds, value)] if isinstance(value, tuple | list) else type(value)


def test_the_expert_plays_from_afar_and_is_recorded(server, kind, env_id):
    episode = tiny.expert_trajectory(env_id, tiny.BUILTIN[env_id], style="atod", seed=1)
    remote = RecordTurns(prompted(RemoteEnv(server.replace("http", kind), env_id), "atod"))
    remote.reset(seed=1, options={"task_id": episode.task_id})
    for turn in episode.turns:
        *_, info = remote.step(turn.response)
    played = info["trajectory"]
    fields = (
        "env_id",
        "task_id",
        "split",
        "task",
        "seed",
        "success",
        "score",
        "stop_reason",
        "labels",
        "final_observation",
    )
    assert all(getattr(played, name) == getattr(episode, name) for name in (*fields, "data_version"))
    assert [t.observation for t in played.turns] == [t.observation for t in episode.turns]
    remote.close()


def test_vector_environments_take_it(server):
    envs = TextVectorEnv(RemoteEnv, 3, workers=1, url=server, env_id="atod/ALFWorld-v0", split="valid_seen")
    observations, infos = envs.reset(seed=[5, 6, 7])
    local = [gym.make("atod/ALFWorld-v0", data="builtin", split="valid_seen").reset(seed=s)[0] for s in (5, 6, 7)]
    assert list(observations) == local and set(infos["split"]) == {"valid_seen"}
    envs.close()


def test_a_models_rollouts_take_it(server):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra 'train')")
    remotely = played_by_a_model(lambda: RemoteEnv(server, "atod/ALFWorld-v0", max_turns=3))
    locally = played_by_a_model(lambda: gym.make("atod/ALFWorld-v0", data="builtin", max_turns=3))
    assert remotely == locally


def played_by_a_model(make):
    from agents.chat import ChatFormat
    from agents.engines.transformers import TransformersEngine
    from atod_algos.rollout.episodes import EpisodeSpec, Rollout

    tokens = tiny.tokenizer()
    rollout = Rollout(
        TransformersEngine(tiny.model(tokens), slots=4), ChatFormat(tokens), make, style="compact", max_tokens=4
    )
    tasks = make().unwrapped.tasks[:4]
    played = rollout.play([EpisodeSpec(task, "g", i) for i, task in enumerate(tasks)])
    rollout.close()
    return [[(turn.observation, turn.response_ids) for turn in t.turns] for t in played]


def test_errors_are_those_of_the_local_environment(server, kind):
    env = RemoteEnv(server.replace("http", kind), "atod/ALFWorld-v0")
    with pytest.raises(EpisodeError, match="before reset"):
        env.step("look")
    with pytest.raises(UnknownName, match=r"unknown task id \(split 'train'\) 'builtin/nowhere'"):
        env.reset(options={"task_id": "builtin/nowhere"})
    with pytest.raises(ValueError, match="unknown reset option 'data'"):
        env.reset(options={"data": "/etc"})
    env.reset(seed=0)
    with pytest.raises(TypeError, match="an action is a str"):
        env.step(3)
    with pytest.raises(UnknownName, match="unknown split"):
        RemoteEnv(server.replace("http", kind), "atod/ALFWorld-v0", split="../../etc")
    with pytest.raises(UnknownName, match="unknown environment"):
        RemoteEnv(server.replace("http", kind), "/etc/passwd")
    env.close()


def test_many_clients_at_once_get_their_own_episodes(kind):
    """64 clients in threads; each sees what its own seed leads to."""
    wrong, barrier = [], threading.Barrier(64)
    with running([Offer("atod/ALFWorld-v0", ("train",), {"data": "builtin"})]) as (url, sessions):
        env = gym.make("atod/ALFWorld-v0", data="builtin")
        expected = {}
        for seed in range(64):
            observation, info = env.reset(seed=seed)
            expected[seed] = [observation, *(env.step(info["admissible"][k])[0] for k in range(3))]

        def play(seed):
            try:
                remote = RemoteEnv(url.replace("http", kind), timeout=200)
                barrier.wait(200)
                observation, info = remote.reset(seed=seed)
                seen = [observation, *(remote.step(info["admissible"][k])[0] for k in range(3))]
                if seen != expected[seed]:
                    wrong.append((seed, seen))
                barrier.wait(200)
                if seed == 0 and len(sessions) != 64:
                    wrong.append(("sessions", len(sessions)))
                barrier.wait(200)
                remote.close()
            except Exception as error:
                wrong.append((seed, repr(error)))
                barrier.abort()

        threads = [threading.Thread(target=play, args=(seed,)) for seed in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(250)
        assert not wrong and len(sessions) == 0


@pytest.mark.parametrize(
    "value",
    ["\ud800", "𝔘 🦊\x00\x07\u2028", (1, [2, (3,)], {"a": [()]}), {"lists": [1]}, 1e-320, 2**80, None, True, ((), [])],
    ids=repr,
)
def test_what_travels_arrives_as_it_was(value):
    arrived = loads(dumps({"x": value}))["x"]
    assert arrived == value and kinds(arrived) == kinds(value)


def test_the_toys_odd_values_arrive(toy_server, kind):
    env = RemoteEnv(toy_server.replace("http", kind))
    local = TOY_OFFERS[0].make("train")
    assert env.reset(seed=1) == local.reset(seed=1)
    assert env.step("pear") == local.step("pear")
    env.close()


INFO = {"task_id": "t", "task": "x", "turn": 0, "admissible": ["a"]}
ANSWERS = {
    "open": {"session": "s", "env": "odd/Odd-v0", "split": "train", "splits": ["train"], "env_key": "odd", "label": None,
             "max_turns": 5, "data_version": "v", "tasks": 2},
    "reset": {"observation": "o", "info": INFO},
    "step": {"observation": "o", "reward": 0.5, "terminated": False, "truncated": False, "info": INFO},
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "changed"),
    [
        *[(call, {name: ...}) for call, answer in ANSWERS.items() for name in answer if name != "label"],
        *[(call, {"info": INFO | {name: 5.5}}) for call in ("reset", "step") for name in INFO],
        ("open", {"env": ["a"]}),
        ("open", {"max_turns": 0}),
        ("step", {"reward": True}),
        ("step", {"reward": float("nan")}),
        ("step", {"terminated": 1}),
        ("step", {"info": INFO | {"stop_reason": "boredom"}}),
    ],
)
def test_answers_of_another_shape_are_one_error(call, changed):
    answers = {**ANSWERS, call: {n: v for n, v in {**ANSWERS[call], **changed}.items() if v is not ...}}
    script = [reply(json.dumps(answer).encode()) for answer in answers.values()]
    said = "is it a server of environments|answered the stop reason"
    with Scripted(*script, close=False) as server, pytest.raises(RemoteError, match=said):
        env = RemoteEnv(server.url, retries=0)
        env.reset(seed=0)
        env.step("a")


@pytest.mark.parametrize(
    "changed",
    [{"env": "odd/Blocking-v0"}, {"env_key": "blocking"}, {"split": "valid"}, {"data_version": "w"}, {"tasks": 3}],
    ids=str,
)
def test_a_server_that_came_back_with_other_tasks_is_not_played(changed):
    gone = reply(b"{}", "410 Gone")
    opened, again = (reply(json.dumps(answer).encode()) for answer in (ANSWERS["open"], ANSWERS["open"] | changed))
    ((name, now),) = changed.items()
    with Scripted(opened, gone, again, reply(), gone, again, reply(), close=False) as server:
        env = RemoteEnv(server.url, retries=0)
        for _ in range(2):  # the second time, too: nothing is played in the session that was opened
            with pytest.raises(RemoteError, match=f"now serves {name} {now!r}, not .* as before"):
                env.reset(seed=0)
        called = [request.split()[1].rpartition("/")[2] for request in server.requests]
        assert called == ["open", *["reset", "open", "close"] * 2]


@pytest.mark.parametrize("tasks", [["a", "a"], ["a", 5], "ab", None, ["a", "b", "c"]])
def test_tasks_of_another_number_are_refused(tasks):
    script = [reply(json.dumps(answer).encode()) for answer in (ANSWERS["open"], {"tasks": tasks})]
    with Scripted(*script, close=False) as server, pytest.raises(RemoteError, match="the server named"):
        list(RemoteEnv(server.url, retries=0).tasks)
