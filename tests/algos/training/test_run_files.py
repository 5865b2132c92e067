"""A run's files when they are broken, missing, strange, old, or another program's; and what ends a command."""

import errno
import io
import json
import logging
import random

import pytest

from atod_algos.guard import fail, guarded
from atod_algos.training import checkpoint
from atod_algos.training.config import TrainConfig
from atod_algos.training.run_dir import Busy, RunFolder, held, read_metrics, read_settings
from atod_envs.errors import AtodError, DataError

SETTINGS = {"rules": "paper", "horizon": None, "train": vars(TrainConfig()), "algorithm": {"name": "opd"}}


def begun(path, steps=3):
    """A folder with some logged steps."""
    run = RunFolder(path, SETTINGS)
    for step in range(1, steps + 1):
        run.log(step, {"x": float("nan") if step == 1 else 1 / step})
    run.close()
    return path


def result(path, **changes):
    (path / "result.json").write_text(json.dumps({"step": 3, "panel": "p", "table": {}, **changes}))


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '"x"',
        "[" * 100_000,
        '{"settings": 3}',
        '{"settings": {"train": []}}',
        "9" * 5000,
        "\udcff",
    ],
)
def test_broken_settings_name_the_file(tmp_path, text):
    begun(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"config\.json.*restore the file") as caught:
        RunFolder(tmp_path, SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "1"}', "[" * 100_000])
def test_a_broken_line_of_the_log_is_named_and_a_last_one_is_left_out(tmp_path, line):
    begun(tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([rows[0], line, rows[2]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows[:2], line]))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("change", [{"step": "3"}, {"step": None}, {"table": []}, {"panel": 1}])
def test_a_broken_result_is_named(tmp_path, change):
    run = RunFolder(begun(tmp_path), SETTINGS)
    result(tmp_path)
    assert run.result()["step"] == 3
    result(tmp_path, **change)
    with pytest.raises(DataError, match=r"result\.json: expected an entry"):
        run.result()


@pytest.mark.slow
def test_random_damage_is_one_error_or_none(tmp_path):
    begun(tmp_path, 6)
    result(tmp_path)
    rng = random.Random(0)
    whole = {name: (tmp_path / name).read_bytes() for name in ("config.json", "metrics.jsonl", "result.json")}
    refused = 0
    for _ in range(150):
        name = rng.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / name).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            run = RunFolder(tmp_path, SETTINGS)
            run.begin(6)
            run.result()
            run.close()
        except AtodError as error:
            refused += name in str(error) or "holds a run with" in str(error)
        for other, old in whole.items():
            (tmp_path / other).write_bytes(old)
    assert refused > 50


def test_looking_at_a_run_leaves_what_it_says_of_itself(tmp_path):
    """Steps and stores may change, and versions do: they are those of the last step that was trained."""
    begun(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    changed = {**SETTINGS, "train": {**SETTINGS["train"], "steps": 1}}
    run = RunFolder(tmp_path, changed)
    assert (tmp_path / "config.json").read_bytes() == before
    run.begin(3)
    run.close()
    assert read_settings(tmp_path)["train"]["steps"] == 1


def test_a_folder_of_an_evaluation_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {"panels": []}}')
    with pytest.raises(AtodError, match="holds an evaluation; choose another folder with --run"):
        RunFolder(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --- gaps and strays --------------------------------------------------------------------------------------------------


def test_missing_rows_of_the_log_are_said(tmp_path, caplog):
    run = RunFolder(begun(tmp_path), SETTINGS)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.WARNING):
        run.begin(3)
    run.close()
    assert not caplog.records and (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "metrics.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        run.begin(3)
    run.close()
    assert "lacks 3 of the 3 steps" in caplog.text and len(caplog.records) == 1


def test_strays_are_no_checkpoints_and_are_never_deleted(tmp_path):
    for name in ("step_000001", "step_000002", "step_000003", "step_1000000", "best", "step_x", "notes"):
        (tmp_path / name).mkdir()
        if name.startswith("step_") and name != "step_x":
            (tmp_path / name / "complete.json").write_text("{}")
    (tmp_path / "step_000001" / "complete.json").unlink()  # a deletion that was cut short
    assert checkpoint.strays(tmp_path) == ["notes", "step_000001", "step_x"]
    assert checkpoint.latest_checkpoint(tmp_path).name == "step_1000000"
    checkpoint.prune(tmp_path, 2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["best", "notes", "step_000003", "step_1000000", "step_x"]
    checkpoint.prune(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 5


# --- runs of the last version -----------------------------------------------------------------------------------------


def old_settings(**train):
    known = {name: value for name, value in vars(TrainConfig()).items() if name not in ("store",)}
    known |= {"keep_trajectories": 1, "keep_tokens": True, "worker_cpus": 1.0, "worker_gpus": 0.0}
    known |= {"importance_cap": 2.0, "base": None, **train}
    return {**SETTINGS, "train": known}


def test_a_run_of_the_last_version_resumes(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": old_settings()}))
    run = RunFolder(tmp_path, SETTINGS)
    run.begin(3)
    run.close()
    assert "keep_tokens" not in read_settings(tmp_path)["train"]


def test_an_option_that_an_algorithm_got_later_stands_at_its_default(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": {**SETTINGS, "algorithm": {"name": "opd"}}}))
    RunFolder(tmp_path, {**SETTINGS, "algorithm": {"name": "opd", "baseline": "none"}})
    (tmp_path / "config.json").write_text(json.dumps({"settings": {**SETTINGS, "algorithm": {"name": "opd"}}}))
    with pytest.raises(AtodError, match=r"algorithm\.baseline='none', but now it is 'kl'"):
        RunFolder(tmp_path, {**SETTINGS, "algorithm": {"name": "opd", "baseline": "kl"}})
    with pytest.raises(AtodError, match="holds a run of opd, not of sod; choose another folder with --run"):
        RunFolder(tmp_path, {**SETTINGS, "algorithm": {"name": "sod"}})


def test_one_with_a_setting_that_went_is_refused_by_its_name(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": old_settings(importance_cap=3.0)}))
    with pytest.raises(AtodError, match=r"holds a run with train\.importance_cap=3\.0"):
        RunFolder(tmp_path, SETTINGS)


def test_the_third_model_of_an_old_run_is_compared(tmp_path):
    begun(tmp_path)
    old = old_settings(base="a") | {"algorithm": {"name": "gopd"}}
    (tmp_path / "config.json").write_text(json.dumps({"settings": old}))
    with pytest.raises(AtodError, match=r"algorithm\.base='a', but now it is 'b'"):
        RunFolder(tmp_path, {**SETTINGS, "algorithm": {"name": "gopd", "base": "b"}})
    RunFolder(tmp_path, {**SETTINGS, "algorithm": {"name": "gopd", "base": "a"}})


# --- two processes, signals, streams ----------------------------------------------------------------------------------


def test_a_folder_has_one_process(tmp_path):
    with held(tmp_path), pytest.raises(Busy, match="in use by another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(AtodError, match="cannot be made"), held(tmp_path / "file"):
        pass


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error, code, words",
    [
        (AtodError("this is wrong"), 1, "this is wrong"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "make room"),
        (OSError(errno.EFBIG, "File too large"), 1, "make room"),
        (MemoryError(), 1, "--token-budget"),
        (ImportError("comparing needs scipy"), 1, "needs scipy"),
    ],
)
def test_what_a_user_can_fix_is_one_line(error, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        guarded(raising(error))
    said = capsys.readouterr().err
    assert stop.value.code == code and words in said and said.count("\n") == 1


def test_what_an_output_has_no_character_for_ends_nothing(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    guarded(lambda: print("grüße \ud800 done", flush=True))
    assert shown.buffer.getvalue() == b"gr??e ? done\n"


def test_bugs_are_no_messages():
    for error in (RuntimeError("size mismatch"), OSError(errno.EIO, "I/O"), KeyError("x")):
        with pytest.raises(type(error)):
            guarded(raising(error))
    with pytest.raises(SystemExit):
        fail("over")
