"""Whatever happens to a run: it says what, and the same command goes on to the undisturbed run's result.

Runs are killed with SIGKILL at places that are named and at moments that are not, and disks are really full (a limit on
the size of files makes the system refuse the write).
"""

import gzip
import json
import random
import shutil
import signal
import time

import gymnasium as gym
import pytest
import torch
from toyworld import TOY, learner_options, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from atod_algos.learner.optimizer import Updater
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.rollout.groups import require_few_lost
from atod_algos.training.checkpoint import latest_checkpoint, load_checkpoint, recover, save_checkpoint
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import StopReason, read_jsonl

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def options(models):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "2", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4", "--minibatches", "2",
        "--steps", str(STEPS), "--threads", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[0, 1], ids=["on-policy", "stale"])
def whole(request, runner, options, tmp_path_factory):
    """The arguments of a run, and the folder and seconds of one to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*options, "--staleness", str(request.param)]
    began = time.perf_counter()
    assert runner(arguments=[*arguments, "--run", str(folder / "r")], out=str(folder / "out"))["code"] == 0
    return arguments, folder / "r", time.perf_counter() - began


def contents(run):
    """Everything that a run computed, times left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in lines]
    turns = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted((run / "turns").iterdir())]
    said = [
        [[(turn.prompt_ids, turn.response_ids, turn.logprobs) for turn in t.turns] for t in read_jsonl(path)]
        for path in sorted((run / "trajectories").iterdir())
    ]
    result = json.loads((run / "result.json").read_text())
    return rows, turns, said, result


def require_equal(run, expected):
    assert contents(run) == contents(expected)
    for name in (f"step_{STEPS:06d}", f"step_{STEPS - 1:06d}", "best"):
        mine, other = (folder / "checkpoints" / name for folder in (run, expected))
        assert (mine / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        states = [torch.load(path / "trainer_state.pt", weights_only=True) for path in (mine, other)]
        flat = [dict(leaves(state)) for state in states]
        assert flat[0].keys() == flat[1].keys()
        for key, value in flat[0].items():
            same = torch.equal(value, flat[1][key]) if isinstance(value, torch.Tensor) else value == flat[1][key]
            assert same, (name, key)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (expected / "checkpoints").iterdir())


def leaves(value, name=""):
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value


def logged(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


NAMED = [
    ("rollout", 20, False), ("scoring", 1, False), ("update", 1, True), ("store", 1, False), ("log", 1, True),
    ("fsync", 12, False), ("rename", 1, True), ("rename", 3, True), ("update", 3, False), ("remove", 1, False),
]  # fmt: skip
"""Function (see faults_runner.py), at which call, and whether just after it. Each run goes on where the one before was
killed."""


def test_killed_at_named_places_and_resumed_equals_uninterrupted(whole, runner, tmp_path):
    arguments, expected, _ = whole
    run, deaths = tmp_path / "r", 0
    places = NAMED if "0" in arguments[-1:] else NAMED[2::3]
    for place, count, after in [*places, (None, 0, False)]:
        before = latest_checkpoint(run / "checkpoints") if run.exists() else None
        order = {"arguments": [*arguments, "--run", str(run)], "out": str(tmp_path / "out")}
        end = runner(**order, place=place, count=count, after=after)
        assert end["killed"] or end["code"] == 0, (tmp_path / "out").read_text()
        deaths += end["killed"]
        if end["killed"] and before is not None:
            recover(run / "checkpoints")
            # What was taken is kept; what was logged was kept but for the step in progress.
            assert latest_checkpoint(run / "checkpoints").name >= before.name
            assert int(latest_checkpoint(run / "checkpoints").name[-6:]) >= logged(run) - 1
        if not end["killed"]:
            break
    assert deaths >= len(places) - 1, "some places were not reached"
    require_equal(run, expected)


PHASES = [
    ("load", 1, True), ("load", 2, False), ("rollout", 9, False), ("scoring", 1, False), ("update", 1, False),
    ("store", 1, False), ("weights", 1, False), ("fsync", 9, True), ("rename", 2, False), ("evaluation", 1, False),
    ("log", 1, True), ("evaluation", 2, True), ("finish", 1, False),
]  # fmt: skip


@pytest.mark.parametrize("whole", [0], ids=["on-policy"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_any_phase_is_one_line_and_the_run_goes_on(whole, runner, number, tmp_path):
    arguments, expected, _ = whole
    run, out = tmp_path / "r", tmp_path / "out"
    for place, count, after in PHASES:
        order = {"arguments": [*arguments, "--run", str(run)], "out": str(out)}
        end = runner(**order, place=place, count=count, after=after, signal=number)
        said = out.read_text()
        assert end == {"killed": False, "code": 128 + number}, (place, count, end, said)
        assert "run the same command again to go on" in said and "Traceback" not in said, (place, said)
    assert runner(**order)["code"] == 0, out.read_text()
    require_equal(run, expected)


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(whole, runner, tmp_path):
    arguments, expected, seconds = whole
    run = tmp_path / "r"
    moments = random.Random(time.time_ns())
    for delay in [*(moments.uniform(0.2, 0.9) * seconds for _ in range(3)), None]:
        order = {"arguments": [*arguments, "--run", str(run)], "out": str(tmp_path / "out")}
        end = runner(**order, seconds=delay)
        assert end["killed"] or end["code"] == 0, (delay, (tmp_path / "out").read_text())
    require_equal(run, expected)


@pytest.mark.parametrize("whole", [0], ids=["on-policy"], indirect=True)
def test_killed_between_the_last_checkpoint_and_the_removal_of_an_old_one(whole, runner, tmp_path):
    arguments, expected, _ = whole
    run = tmp_path / "r"
    shutil.copytree(expected, run)
    shutil.copytree(run / "checkpoints" / f"step_{STEPS - 1:06d}", run / "checkpoints" / "step_000001")
    (run / "result.json").unlink()
    assert runner(arguments=[*arguments, "--run", str(run)], out=str(tmp_path / "out"))["code"] == 0
    require_equal(run, expected)


@pytest.mark.parametrize("whole", [0], ids=["on-policy"], indirect=True)
def test_a_full_disk_stops_with_one_line_and_loses_nothing(whole, runner, tmp_path):
    arguments, expected, _ = whole
    run, out = tmp_path / "r", tmp_path / "out"
    order = {"arguments": [*arguments, "--run", str(run)], "out": str(out)}
    # First the checkpoint's weights do not fit, then a log does not.
    assert runner(**order, file_bytes=1 << 14) == {"killed": False, "code": 1}
    said = out.read_text()
    assert "could not be written" in said and "Traceback" not in said, said
    assert runner(**order, place="log", count=2)["killed"]
    assert runner(**order, file_bytes=1 << 12)["code"] == 1 and "Traceback" not in out.read_text()
    assert runner(**order)["code"] == 0, out.read_text()
    require_equal(run, expected)


# --- checkpoints --------------------------------------------------------------------------------------------------


def saved(tokenizer, folder, name="step_000001", step=1):
    model = small_model(tokenizer, step)
    extra = {"step": step}
    return save_checkpoint(folder, name, model=model, tokenizer=tokenizer, state={"x": torch.ones(3)}, extra=extra)


def read(path, tokenizer):
    model = small_model(tokenizer, 2)
    return load_checkpoint(path, model, Updater(model.parameters(), learner_options()))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "config.json", "tokenizer.json"])
def test_one_changed_bit_is_noticed(name, tokenizer, tmp_path):
    path = saved(tokenizer, tmp_path)
    read(path, tokenizer)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"not a complete checkpoint.*{name} is not as it was written"):
        read(path, tokenizer)


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
TEXT = SMALL | {"num_key_value_heads": 1, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("qwen3", TEXT),
        ("qwen3_moe", TEXT | {"num_experts": 4, "moe_intermediate_size": 16}),
        ("mixtral", TEXT | {"num_local_experts": 4}),
        ("gemma3", {"text_config": TEXT, "vision_config": SMALL | {"image_size": 28}, "mm_tokens_per_image": 4}),
    ],
)
def test_weights_that_are_written_under_published_names_are_read(kind, own, tokenizer, tmp_path, capfd):
    """transformers writes mixtures of experts and models that see under other names than they have in memory."""
    own = {**own, "text_config": TEXT | {"vocab_size": 99}} if "text_config" in own else {**own, "vocab_size": 99}
    config = AutoConfig.for_model(kind, **own)

    def model(seed, config=config):
        torch.manual_seed(seed)
        sees = "vision_config" in own
        return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config).eval()

    written, other = model(0).bfloat16(), model(1).bfloat16()
    path = save_checkpoint(
        tmp_path, "step_000001", model=written, tokenizer=tokenizer, state={"x": torch.ones(1)}, extra={"step": 1}
    )
    capfd.readouterr()
    load_checkpoint(path, other, Updater(other.parameters(), learner_options()))
    assert capfd.readouterr().err == ""
    read = other.state_dict()
    assert all(torch.equal(weight, read[name]) for name, weight in written.state_dict().items())
    assert read.keys() == written.state_dict().keys()
    foreign = small_model(tokenizer, 2)
    with pytest.raises(DataError, match=r"holds another model|is not a complete checkpoint"):
        load_checkpoint(path, foreign, Updater(foreign.parameters(), learner_options()))


def test_a_checkpoint_between_two_names_is_put_back(tokenizer, tmp_path):
    path = saved(tokenizer, tmp_path, "best", 1)
    path.rename(tmp_path / ".best.old")
    (tmp_path / ".best.part").mkdir()
    recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert read(path, tokenizer)[1] == {"step": 1}


# --- environments -------------------------------------------------------------------------------------------------


def play(tokenizer, tolerated, word="fig", whole=None):
    engine = TransformersEngine(small_model(tokenizer, 5), slots=8)

    def make():
        env = gym.make(TOY)
        raw = env.unwrapped
        honest = raw._act

        def act(action):
            if raw.word == word:
                raise ConnectionError("the kitchen is closed")
            return honest(action)

        raw._act = act
        return env

    rollout = Rollout(
        engine, ChatFormat(tokenizer), make, style="compact", max_tokens=8, concurrency=4, tolerated=tolerated
    )
    words = ("apple", "pear", "plum", "fig")
    specs = [EpisodeSpec(f"say-{words[i % 4]}-train", f"g{i % 4}", i) for i in range(16)]
    try:
        return rollout.play(specs, whole=whole)
    finally:
        rollout.close()


def test_episodes_of_an_environment_that_raises_are_left_out_up_to_a_share(tokenizer, caplog):
    trajectories = play(tokenizer, 0.25)
    broken = [t.task_id for t in trajectories if t.stop_reason is StopReason.ABORTED]
    assert broken == ["say-fig-train"] * 4 and len(trajectories) == 16
    assert "raised ConnectionError: the kitchen is closed at turn 0 of task 'say-fig-train'" in caplog.text
    assert all(t.turns for t in trajectories if t.stop_reason is not StopReason.ABORTED)


def test_a_worker_with_a_part_of_the_episodes_bears_what_one_process_would(tokenizer, caplog):
    trajectories = play(tokenizer, 0.125, whole=32)
    assert len([t for t in trajectories if t.stop_reason is StopReason.ABORTED]) == 4
    require_few_lost([*trajectories, *trajectories[:3], *trajectories[4:7]], 0.25)
    with pytest.raises(
        AtodError, match=r"of 4 of 16 episodes raised, one at turn \d of task 'say-fig-train' \(seed 3\)"
    ):
        require_few_lost(trajectories, 0.2)
    require_few_lost([], 0.0)


def test_an_environment_that_raises_too_often_stops_the_run(tokenizer):
    with pytest.raises(
        AtodError, match=r"kitchen is closed at turn 0 of task 'say-fig-train' \(seed 3\).*same command"
    ):
        play(tokenizer, 0.0)
