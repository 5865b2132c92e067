"""Many episodes at once: any subset, in process or across workers, with the same episodes either way."""

import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from toy import WORDS, ToyEnv

import atod_envs
from atod_envs.errors import EpisodeError, UnknownName
from atod_envs.recording import RecordTurns
from atod_envs.vector import Reset, TextVectorEnv, VectorTurn
from atod_envs.workers import WorkerError


def recorded():
    return RecordTurns(ToyEnv())


class SlowEnv(ToyEnv):
    """Waits until the file is there that the action names, dies on ``die``, fails on ``fail``."""

    def _act(self, action):
        if action == "die":
            os._exit(3)
        if action == "fail":
            raise RuntimeError("the world fell apart")
        while action.startswith("/") and not os.path.exists(action):
            time.sleep(0.02)
        return super()._act(action)


@pytest.fixture(params=[0, 1, 3], ids=["in-process", "one-worker", "three-workers"])
def workers(request):
    return request.param


def alive(process):
    return process.poll() is None


def test_subsets_move_alone(workers):
    with TextVectorEnv(ToyEnv, 5, workers=workers) as envs:
        begun = envs.reset_at([4, 1], seeds=[7, 8], task_ids=["say-plum-train", None])
        assert [type(episode) for episode in begun] == [Reset, Reset]
        assert begun[0].info["task_id"] == "say-plum-train"
        assert begun[0].observation == "Speak (7)." and begun[1].observation == "Speak (8)."
        (turn,) = envs.step_at([4], ["fig"])
        assert isinstance(turn, VectorTurn)
        assert (turn.reward, turn.terminated, turn.truncated, turn.info["turn"]) == (0.0, False, False, 1)
        (turn,) = envs.step_at([4], ["plum"])
        assert (turn.reward, turn.terminated, turn.info["turn"]) == (1.0, True, 2)
        assert str(turn.info["stop_reason"]) == "success"
        (other,) = envs.step_at([1], ["nonsense"])
        assert other.info["turn"] == 1 and not other.info["valid"]
        with pytest.raises(EpisodeError, match="after the end"):
            envs.step_at([4], ["plum"])
        with pytest.raises(EpisodeError, match="before reset"):
            envs.step_at([0], ["plum"])
        with pytest.raises(UnknownName, match="say-melon"):
            envs.reset_at([0], task_ids=["say-melon-train"])
        assert envs.step_at([1], ["fig"])[0].info["turn"] == 2  # the errors of others left it alone


def test_turn_limit_is_enforced(workers):
    with TextVectorEnv(ToyEnv, 3, workers=workers, max_turns=2) as envs:
        envs.reset(seed=0)
        envs.step_at([0], ["x"])
        (turn,) = envs.step_at([0], ["x"])
        assert turn.truncated and not turn.terminated and str(turn.info["stop_reason"]) == "turn_limit"
        envs.set_attr("max_turns", 1)
        envs.reset_at([0, 1])
        assert all(turn.truncated for turn in envs.step_at([0, 1], ["x", "x"]))
        assert envs.get_attr("max_turns") == (1, 1, 1)


def test_gymnasium_interface_equals_gymnasiums_own(workers):
    """Same seeds and actions through next-step autoreset: equal to SyncVectorEnv in every field."""
    number = 3
    reference = SyncVectorEnv([ToyEnv] * number)
    rng = np.random.default_rng(0)
    with TextVectorEnv(ToyEnv, number, workers=workers) as envs:
        assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        ours, our_infos = envs.reset(seed=5)
        theirs, their_infos = reference.reset(seed=5)
        assert ours == tuple(theirs)
        assert_same_infos(our_infos, their_infos)
        for _ in range(30):
            actions = tuple(str(word) for word in rng.choice([*WORDS, "hm"], size=number))
            assert envs.action_space.contains(actions)
            ours, *ours_rest = envs.step(actions)
            theirs, *theirs_rest = reference.step(actions)
            assert ours == tuple(theirs)
            assert envs.observation_space.contains(ours)
            for one, other in zip(ours_rest[:3], theirs_rest[:3], strict=True):
                assert one.dtype == other.dtype and one.tolist() == other.tolist()
            assert_same_infos(ours_rest[3], theirs_rest[3])


def assert_same_infos(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].tolist() == value.tolist(), key


def test_same_step_and_disabled_autoreset(workers):
    with TextVectorEnv(ToyEnv, 2, workers=workers and 2, autoreset_mode="SameStep") as envs:
        _, infos = envs.reset(seed=1, options={"task_ids": ["say-fig-train", "say-pear-train"]})
        assert list(infos["task"]) == ["say fig", "say pear"]
        observations, _, terminations, _, infos = envs.step(("fig", "hm"))
        assert terminations.tolist() == [True, False]
        assert infos["final_obs"][0] == "You say fig." and infos["_final_obs"].tolist() == [True, False]
        assert infos["final_info"]["success"].tolist() == [True, False]
        assert observations[0].startswith("Speak") and infos["turn"].tolist() == [0, 1]
    with TextVectorEnv(ToyEnv, 2, workers=workers and 2, autoreset_mode=AutoresetMode.DISABLED) as envs:
        envs.reset(options={"task_id": "say-fig-train"})
        envs.step(("fig", "hm"))
        with pytest.raises(EpisodeError, match="after the end"):
            envs.step(("fig", "hm"))
        observations, infos = envs.reset(options={"reset_mask": np.array([True, False])})
        assert observations[1] == "Nothing happens."
        assert infos["_turn"].tolist() == [True, False]


def test_workers_play_the_same_episodes_of_a_real_environment():
    def episodes(**options):
        with gym.make_vec(
            "atod/ALFWorld-v0", num_envs=4, data="builtin", split="train", max_turns=6, **options
        ) as envs:
            shown = [envs.reset(seed=[3, 1, 4, 1])[0]]
            rng = np.random.default_rng(0)
            for _ in range(15):
                actions = [
                    str(rng.choice(["look", "go to cabinet 1", "go to fridge 1", "open fridge 1"])) for _ in "1234"
                ]
                observations, rewards, _, truncations, infos = envs.step(actions)
                shown.append((observations, rewards.tolist(), truncations.tolist(), infos["task_id"].tolist()))
            return shown

    alone = episodes()
    assert alone == episodes(workers=2) == episodes(workers=4)
    assert alone[0][1] == alone[0][3]  # same seed, same episode
    assert any(True in step[2] for step in alone[1:])


def test_nobody_waits_for_the_slowest(tmp_path):
    with TextVectorEnv(SlowEnv, 2, workers=2) as envs:
        envs.reset(seed=0, options={"task_id": "say-fig-train"})
        envs.submit_step([0, 1], [str(tmp_path / "go"), "pear"])
        assert list(envs.collect()) == [1]
        (turn,) = envs.step_at([1], ["plum"])
        assert turn.observation == "You say plum."
        assert envs.collect(timeout=0.01) == {}
        with pytest.raises(EpisodeError, match="environment 0 has a request"):
            envs.submit_step([0], ["fig"])
        (tmp_path / "go").touch()
        late = envs.collect()
        assert list(late) == [0] and late[0].observation == "Nothing happens."
        assert envs.collect() == {}


def test_an_error_of_one_environment_is_raised_and_leaves_the_others(workers):
    with TextVectorEnv(SlowEnv, 3, workers=workers) as envs:
        envs.reset(seed=0)
        with pytest.raises(RuntimeError, match="the world fell apart") as caught:
            envs.step_at([0, 1], ["fail", "hm"])
        if workers:
            assert "In the worker process" in caught.value.__notes__[0]
        assert envs.step_at([1], ["hm"])[0].info["turn"] == 2
        envs.submit_step([0, 2], ["fail", "hm"])
        outcomes = {}
        with pytest.raises(RuntimeError, match="the world fell apart"):
            while True:
                outcomes.update(envs.collect())
        assert set(outcomes) <= {2}


def test_a_dead_worker_is_reported_at_once():
    with TextVectorEnv(SlowEnv, 4, workers=2) as envs:
        envs.reset(seed=0)
        with pytest.raises(WorkerError, match=r"worker process 1 \(environments 1, 3\) ended with exit code 3"):
            envs.step_at([1], ["die"])
    with TextVectorEnv(SlowEnv, 2, workers=2) as envs:
        envs.reset(seed=0)
        os.kill(envs.pool.processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="was killed by signal 9"):
            for _ in range(3):
                envs.step_at([0], ["fig"])


def test_closing_ends_the_workers(monkeypatch):
    monkeypatch.setattr("atod_envs.workers._GOODBYE_SECONDS", 120.0)  # by themselves, however busy the machine is
    envs = TextVectorEnv(ToyEnv, 4, workers=2)
    processes = list(envs.pool.processes)
    assert all(map(alive, processes))
    envs.reset(seed=0)
    envs.submit_step([0, 1, 2, 3], ["fig"] * 4)  # outcomes that are not collected are no obstacle
    envs.close()
    assert not any(map(alive, processes))
    assert [process.returncode for process in processes] == [0, 0]
    with pytest.raises(EpisodeError, match="closed"):
        envs.step_at([0], ["fig"])
    envs.close()


def test_workers_end_with_their_caller():
    code = (
        "import sys, os; sys.path[:0] = " + repr(sys.path) + "\n"
        "from toy import ToyEnv\n"
        "from atod_envs.vector import TextVectorEnv\n"
        "envs = TextVectorEnv(ToyEnv, 2, workers=2)\n"
        "print(*[process.pid for process in envs.pool.processes], flush=True)\n"
        "os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") and running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their caller"
        time.sleep(0.05)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_list_of_values_has_one_for_each(workers):
    with TextVectorEnv(ToyEnv, 3, workers=workers) as envs:
        envs.set_attr("max_turns", [1, 2, 3])
        assert envs.get_attr("max_turns") == (1, 2, 3)
        envs.set_attr("max_turns", 4)
        assert envs.get_attr("max_turns") == (4, 4, 4)
        with pytest.raises(ValueError, match="values has 2 entries for 3 environments"):
            envs.set_attr("max_turns", (1, 2))
        assert envs.call("max_turns") == (4, 4, 4), "Gymnasium's own answer so, too"


def test_a_step_that_failed_can_be_tried_again_while_another_begins_anew(workers):
    with TextVectorEnv(SlowEnv, 3, workers=workers) as envs:
        envs.set_attr("max_turns", [1, 9, 9])
        envs.reset(seed=0)
        envs.step(["hm"] * 3)
        with pytest.raises(RuntimeError, match="the world fell apart"):
            envs.step(["ignored", "fail", "hm"])
        observations, _, terminations, truncations, infos = envs.step(["hm"] * 3)
        assert len(observations) == 3 and infos["turn"].tolist() == [1, 2, 3]
        assert (terminations | truncations).tolist() == [True, False, False]


def test_an_attribute_of_a_wrapper_is_set_where_it_is(workers):
    with TextVectorEnv(recorded, 3, workers=workers) as envs:
        envs.set_attr("group_id", "g")
        assert envs.get_attr("group_id") == ("g", "g", "g")
        envs.set_attr("max_turns", 2)
        assert envs.get_attr("max_turns") == (2, 2, 2)


def test_a_step_that_failed_can_be_followed_by_a_reset(workers):
    """One fails while another begins anew: its outcome is not taken for the next one's."""
    with TextVectorEnv(SlowEnv, 3, workers=workers) as envs:
        envs.set_attr("max_turns", [1, 9, 9])
        envs.reset(seed=0)
        _, _, terminations, truncations, _ = envs.step(["hm"] * 3)
        assert (terminations | truncations).tolist() == [True, False, False]
        with pytest.raises(RuntimeError, match="the world fell apart"):
            envs.step(["ignored", "fail", "hm"])
        observations, infos = envs.reset(seed=0)
        assert len(observations) == 3 and infos["turn"].tolist() == [0, 0, 0]


def test_ctrl_c_in_a_step_leaves_an_environment_that_can_be_reset():
    class Stopped(ToyEnv):
        def _act(self, action):
            if action == "stop":
                raise KeyboardInterrupt
            return super()._act(action)

    with TextVectorEnv(Stopped, 3) as envs:
        first = envs.reset(seed=0)[0]
        with pytest.raises(KeyboardInterrupt):
            envs.step(["hm", "stop", "hm"])
        assert envs.reset(seed=0)[0] == first


def test_misuse_is_refused_with_advice(workers):
    with pytest.raises(ValueError, match="num_envs=0"):
        TextVectorEnv(ToyEnv, 0)
    with pytest.raises(ValueError, match=r"workers=9; expected 0 .* to num_envs=2"):
        TextVectorEnv(ToyEnv, 2, workers=9)
    with pytest.raises(WorkerError, match="environment id or a function at the top level"):
        TextVectorEnv(lambda: ToyEnv(), 2, workers=1)
    with pytest.raises(ValueError, match="max_turns=0"):
        TextVectorEnv(ToyEnv, 3, workers=workers, max_turns=0)
    with TextVectorEnv(ToyEnv, 3, workers=workers) as envs:
        with pytest.raises(ValueError, match="actions has 1 entries for 3 environments"):
            envs.step(["fig"])
        with pytest.raises(ValueError, match="actions is a str; expected a list of 3 strings"):
            envs.step("fig")
        with pytest.raises(IndexError, match="environment 3; expected 0 to 2"):
            envs.reset_at([3])
        with pytest.raises(ValueError, match="unknown reset option 'tasks'"):
            envs.reset(options={"tasks": []})
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": np.array([False] * 3)})
        with pytest.raises(EpisodeError, match="environment 1 has a request"):
            envs.reset_at([1, 1])


@pytest.mark.parametrize("room", [env_id[5:-3] for env_id in atod_envs.ENVIRONMENTS])
def test_every_environment_has_a_vector_entry_point(room):
    spec = gym.spec(f"atod/{room}-v0")
    module, _, name = spec.vector_entry_point.partition(":")
    __import__(module)
    assert callable(getattr(sys.modules[module], name))
