"""Episodes on a real Ray cluster: those of a single process, whichever worker plays them and whichever dies."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from paths import REPOSITORY, SUPPORT
from toy import ToyStyle
from toyworld import ECHO, TOY

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")

from agents.chat import ChatFormat
from agents.models import load_model
from atod_algos.algorithm import RolloutLimits
from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.rollout.episodes import EpisodeSpec, derive_seed
from atod_algos.rollout.groups import collect_groups
from atod_algos.rollout.pools import Conditions, local_pool, worker_pool
from atod_algos.rollout.ray_pool import RayPool, _Worker, start_ray
from atod_algos.rollout.work_queue import WorkQueue
from atod_algos.training.cli import main
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError
from atod_envs.styles import Layout

pytestmark = pytest.mark.slow

STYLE = ToyStyle(Layout.CONVERSATION)


def test_ray_does_not_take_this_processs_answer_to_sigterm(cluster):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_worker_takes_other_weights_of_the_same_version(monkeypatch):
    """The final table plays the untrained, the last and the best model, all of them after the last step."""
    loaded, work = [], SimpleNamespace(take=SimpleNamespace(remote=lambda *_: None))
    own = SimpleNamespace(
        load_weights=lambda weights, version: loaded.append((dict(weights), version)),
        play=lambda *_, more, whole: [loaded[-1], whole, more(1, 0)],
    )
    monkeypatch.setattr(ray, "get", lambda value: value)
    pool = RayPool.__new__(RayPool)
    pool._ray, pool._loads = SimpleNamespace(put=lambda value: value), 0
    one, played = _Worker(lambda: own), []
    for weight in (1.0, 2.0, 2.0):
        pool.load_weights([("w", torch.tensor(weight))], 7)
        for _ in range(2):
            played.append(one.play(None, ["a", "b"], None, [pool._weights], pool._version, pool._loads, work, 0)[1])
    assert [float(weights["w"]) for weights, _ in loaded] == [1, 2, 2], "once for each load, also of equal weights"
    assert [float(first[0]["w"]) for first, *_ in played] == [1, 1, 2, 2, 2, 2]
    assert {(first[1], whole, more) for first, whole, more in played} == {(7, 2, None)}


def worker(config):
    """Builds a worker's pool."""
    return partial(worker_pool, config, [STYLE])


def play(pool, specs, **options):
    return pool.play(specs, Conditions("train", 1.0), **options)


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine with room for more workers than it has cores."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "IMPATIENT": "1",
    }
    os.environ.setdefault("RAY_worker_niceness", "0")
    start_ray(ray, variables, num_cpus=8, logging_level="ERROR", object_store_memory=100 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def config(models):
    return resolve(
        TrainConfig(
            env=f"toyworld:{TOY}", student=str(models["student"]), teacher=str(models["teacher"]), style="compact", max_turns=3,
            max_response=8, max_context=128, slots=8,
        )
    )  # fmt: skip


def specs(config, groups=12, size=4):
    tasks = [f"say-{word}-train" for word in ("apple", "pear", "plum", "fig")]
    return [
        EpisodeSpec(tasks[group % 4], f"g{group}", derive_seed(0, group, member))
        for group in range(groups)
        for member in range(size)
    ]


@pytest.fixture(scope="module")
def pool(cluster, config):
    """Two workers with the student's weights; tests may kill them."""
    pool = RayPool(worker(config), workers=2, patience=600.0)
    student = load_model(config.student, "student", world="toy")
    pool.load_weights(student.model.named_parameters(), 7)
    yield pool
    pool.close()


def played(trajectories):
    return [
        (
            t.task_id,
            t.group_id,
            t.seed,
            t.success,
            t.policy_version,
            [(u.action, u.response_ids, u.prompt_ids) for u in t.turns],
        )
        for t in trajectories
    ]


@pytest.fixture(scope="module")
def expected(config):
    """What a single process plays."""
    student = load_model(config.student, "student", world="toy")
    pool = local_pool(config, [STYLE], student.model, ChatFormat(student.tokenizer))
    pool.load_weights(student.model.named_parameters(), 7)
    return play(pool, specs(config))


def test_workers_play_what_a_single_process_plays(pool, config, expected):
    seen = []
    got = play(pool, specs(config), on_finish=seen.append)
    assert played(got) == played(expected)
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert seen[-1] == len(expected) and seen == sorted(seen)
    groups = collect_groups(play(pool, specs(config, groups=2), limits=RolloutLimits(max_turns=1)))
    assert [len(g.trajectories) for g in groups] == [4, 4]
    assert all(len(t.turns) == 1 for g in groups for t in g.trajectories), "an algorithm's limits reach the workers"


def test_what_fails_on_a_worker_is_said_here(pool, config):
    broken = [EpisodeSpec("say-nothing-train", "g", 0)]
    with pytest.raises(AtodError, match="a rollout worker failed: UnknownName: unknown task id"):
        play(pool, broken)
    assert len(play(pool, specs(config, groups=1))) == 4, "the worker lives"


def test_a_killed_worker_is_replaced_and_its_groups_are_played_once(pool, config, expected, monkeypatch):
    victim, number = pool.pids[0], pool.calls

    class Deadly(WorkQueue):
        """Kills the victim when it takes groups for the second time: with groups in its hands."""

        taken = 0

        def take(self, call, room, running):
            groups = super().take(call, room, running)
            self.taken += call == number and bool(groups)
            if self.taken == 2:
                self.taken += 1
                os.kill(victim, signal.SIGKILL)
            return groups

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_work", ray.remote(num_cpus=0)(Deadly).remote())
        got = play(pool, specs(config))
    assert played(got) == played(expected)
    assert victim not in pool.pids and len(pool.pids) == 2
    assert played(play(pool, specs(config))) == played(expected), "the replacement has the weights"


def test_a_silent_worker_counts_as_lost(pool, config, expected, monkeypatch):
    stopped, silent = pool.pids[1], pool._silent

    def patient_with_the_slow(running, done):
        """Time is up once the other worker has played all: on a busy machine no clock can tell who is merely slow."""
        pool.patience = 1.0 if len(running) == 1 and stopped in pool.pids else 600.0
        return silent(running, done)

    monkeypatch.setattr(pool, "_silent", patient_with_the_slow)
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert played(play(pool, specs(config))) == played(expected)
        assert stopped not in pool.pids
    finally:
        pool.patience = 600.0
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)


def test_too_many_losses_end_the_run_with_advice(pool, config, monkeypatch):
    monkeypatch.setattr("atod_algos.rollout.ray_pool._LOSSES", 0)
    os.kill(pool.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(AtodError, match=r"1 rollout workers were lost in one step.*goes on from the last checkpoint"):
        play(pool, specs(config))


def test_a_cluster_that_is_too_small_is_refused(cluster, config):
    with pytest.raises(AtodError, match="9 rollout workers of 1 CPU each do not fit: the cluster has 8 CPUs"):
        RayPool(worker(config), workers=9)
    with pytest.raises(AtodError, match="of 1 GPU each do not fit"):
        RayPool(worker(config), workers=1, gpus=1.0)


def test_a_model_that_is_missing_on_the_workers_is_said(cluster, config):
    with pytest.raises(AtodError, match=r"a rollout worker could not start: .*nowhere"):
        RayPool(worker(dataclasses.replace(config, student="./nowhere")), workers=1)


def rows(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in lines]


def test_training_on_a_cluster_is_training(cluster, config, models, tmp_path):
    options = [
        "--env", f"toyworld:{TOY}", f"toyworld:{ECHO}", "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "echo=2", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4", "--minibatches", "2", "--threads", "1",
        "--steps", "2",
    ]  # fmt: skip
    main(ATOD, [*options, "--run", str(tmp_path / "one")])
    main(ATOD, [*options, "--run", str(tmp_path / "ray"), "--cluster", "ray", "--workers", "2"])

    for one, many in zip(rows(tmp_path / "one"), rows(tmp_path / "ray"), strict=True):
        assert one == pytest.approx(many, rel=1e-3, abs=1e-4)
        assert {"toy/episode/success", "echo/episode/success"} <= one.keys()


@contextlib.contextmanager
def retriever(port, *last):
    """A retriever in a process of its own; its process and its address."""
    command = [sys.executable, str(SUPPORT / "impatient.py"), str(port), *map(str, last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_retriever_that_is_lost_ends_the_run_which_goes_on_when_it_is_back(cluster, tmp_path, capfd):
    options = [
        "--env", "impatient:atod/SearchQA-v0", "--data", "builtin", "--style", "compact", "--max-turns", "4", "--max-response", "24",
        "--max-context", "1024", "--lr", "5e-4", "--tasks-per-step", "2", "--group-size", "4", "--eval-every", "2", "--eval-tasks", "1",
        "--report-tasks", "1", "--threads", "1", "--steps", "2",
    ]  # fmt: skip
    main(GRPO, [*options, "--run", str(tmp_path / "one"), "--option", "topk=1"])
    run = tmp_path / "ray"
    with retriever(0, run / "checkpoints" / "step_000001") as (process, address):
        options += [
            "--run",
            str(run),
            "--cluster",
            "ray",
            "--workers",
            "1",
            "--option",
            "topk=1",
            f"retriever={address}",
        ]
        with pytest.raises(SystemExit):
            main(GRPO, options)
        assert process.wait(60) == 9
    said = capfd.readouterr().err
    assert f"a rollout worker failed: RetrievalError: {address} did not answer" in said and "3 attempts" in said
    assert len(rows(run)) == 1, "the first step was logged, the second one not"
    with retriever(address.rpartition(":")[2]):
        main(GRPO, options)
    for one, other in zip(rows(tmp_path / "one"), rows(run), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_work_is_shared_in_whole_groups_and_given_back_once():
    wanted = [f"g{i // 3}" for i in range(30)]
    work = WorkQueue()
    work.begin(wanted, workers=3, first=1)
    first = work.take(1, 128, 0)
    assert len(first) == 9, "its share of 10, in whole groups"
    second = work.take(2, 6, 0)
    assert len(second) == 6, "as much as it has room for"
    assert work.take(1, 128, 9) == [], "no more than its share at a time"
    assert len(work.take(1, 128, 4)) == 6 and work.finished() == 5
    work.give_back(1)
    third = [part for _ in range(9) for part in work.take(3, 128, 0) or []]
    assert sorted([*second, *third]) == list(range(30))
    assert work.take(3, 128, 0) is None
    work.begin(wanted, workers=40, first=4)
    assert len(work.take(4, 128, 0)) == 3, "one group at least"
    assert work.take(3, 128, 0) is None, "who still plays an earlier step gets nothing of this one"
    work.give_back(4)
    assert work.take(4, 128, 0) is None, "nor who was given up"
    assert work.take(5, 128, 0) == [0, 1, 2]
