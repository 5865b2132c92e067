"""The report: what it reads from runs, the page in a real browser, the figures, and following a run."""

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from reports import options_of, unpack
from rich.console import Console
from toyworld import TOY

from atod_algos.grpo import GRPO
from atod_algos.metrics import MOST_TURNS
from atod_algos.report.command import CONNECTIONS, ReportConfig, main, report, watch
from atod_algos.report.data import Run, by_method, method_of, read_run
from atod_algos.report.page import chosen_steps, page_data
from atod_algos.report.tokens import Scorer
from atod_algos.report.weights import BINS, by_turn_index, weight_distribution
from atod_algos.training.cli import main as train
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import StopReason, Trajectory, write_jsonl

pytestmark = pytest.mark.slow

# --- what is read -----------------------------------------------------------------------------------------------------


def test_training_ends_with_the_page(models, tmp_path, capsys):
    train(GRPO, options_of(models, tmp_path / "r", "--steps", "2"))
    out = capsys.readouterr().out
    assert f"every turn and why it was weighted: {tmp_path / 'r' / 'report.html'}" in out.replace("\n", "")
    data = unpack(tmp_path / "r" / "report.html")
    assert data["runs"][0]["table"]["before"]["n"] == 4 and data["title"] == f"GRPO, seed 0 on {TOY}"
    assert {(e["k"], e["s"]) for e in data["episodes"]} == {("valid", 0), ("valid", 2), ("train", 1), ("train", 2)}


def test_turns_carry_the_numbers_they_were_trained_with(folders):
    run = read_run(folders / "atod")
    data = page_data([run], scorers={run.path: Scorer(run)})
    table = run.turn_table(3)
    shown = [e for e in data["episodes"] if (e["k"], e["s"]) == ("train", 3)]
    turns = [turn for e in shown for turn in e["turns"]]
    n = np.array(table["n"])
    assert [t["w"] for t in turns] == pytest.approx(table["weight"], abs=1e-4)
    assert [t["h"] for t in turns] == pytest.approx(np.array(table["sum_surprise"]) / n, abs=2e-4)
    assert [t["d"] for t in turns] == pytest.approx(np.array(table["sum_abs_gap"]) / n, abs=2e-4)
    gaps = [teacher - student for t in turns for _, student, teacher in t["x"]]
    assert sum(gaps) == pytest.approx(sum(table["sum_gap"]), abs=1e-3 * len(gaps))
    texts = ["".join(text for text, _, _ in t["x"]) for t in turns]
    assert all(t["p"] in text for t, text in zip(turns, texts, strict=True))
    group = shown[0]
    assert group["n"] == [sum(e["ok"] for e in shown[:4]), 4] and group["q"] == pytest.approx([0.96625, 1.0375])


def test_kept_tokens_are_used_and_equal_what_is_computed(folders, monkeypatch):
    computed, kept = read_run(folders / "atod"), read_run(folders / "kept")
    episodes = computed.episodes("train", 2)
    again = Scorer(computed).scores("train", 2, episodes)
    monkeypatch.setattr(Scorer, "load", lambda self, name: pytest.fail("the teacher was loaded"))
    stored = Scorer(kept).scores("train", 2, kept.episodes("train", 2))
    assert again.keys() == stored.keys()
    for place, score in again.items():
        assert score.teacher == pytest.approx(stored[place].teacher, abs=1e-4)


def test_turns_keep_their_disagreement_where_no_token_is_scored(folders, tmp_path):
    shutil.copytree(folders / "atod", tmp_path / "r", ignore=shutil.ignore_patterns("scores"))
    run = read_run(tmp_path / "r")
    scores = Scorer(run, compute=False).scores("train", 3, run.episodes("train", 3))
    table = run.turn_table(3)
    wanted = np.array(table["sum_abs_gap"]) / np.array(table["n"])
    assert [s.d for s in scores.values()] == pytest.approx(wanted) and all(s.teacher is None for s in scores.values())


def test_scores_are_kept(folders, monkeypatch):
    run = read_run(folders / "atod")
    episodes = run.episodes("valid", 4)
    first = Scorer(run).scores("valid", 4, episodes)
    monkeypatch.setattr(Scorer, "load", lambda self, name: pytest.fail("the teacher was loaded"))
    assert Scorer(run, compute=False).scores("valid", 4, episodes) == first
    one = [first[0, k] for k in range(len(episodes[0].turns))]
    d, h = np.array([t.d for t in one]), np.array([t.h for t in one])
    d, h = (np.full(len(x), 0.5) if np.ptp(x) < 1e-8 else (x - x.min()) / np.ptp(x) for x in (d, h))
    weights = 1 - (1 - d) * (1 - h)
    assert [t.w for t in one] == pytest.approx(weights)


def test_scores_of_a_teacher_that_was_replaced_are_made_again(folders, tmp_path):
    run = read_run(shutil.copytree(folders / "atod", tmp_path / "run"))
    teacher = shutil.copytree(run.settings["train"]["teacher"], tmp_path / "teacher")
    episodes = run.episodes("valid", 4)

    def scores(compute=True):
        found = Scorer(run, str(teacher), compute=compute).scores("valid", 4, episodes)
        return [found[0, k].teacher for k in range(len(episodes[0].turns))]

    first = scores()
    assert scores(compute=False) == first
    weights = (teacher / "model.safetensors").read_bytes()
    student = Path(run.settings["train"]["student"])
    (teacher / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes())
    assert scores(compute=False) == [None] * len(first)
    assert scores() != first
    (teacher / "model.safetensors").write_bytes(weights)
    assert scores() == first
    shutil.rmtree(teacher)
    assert scores() == first, "what was scored is shown where the teacher is gone"


def test_scores_of_a_step_that_was_played_again_are_made_again(folders, tmp_path):
    """A step after a kill is played again, on a GPU with other samples."""
    run = read_run(shutil.copytree(folders / "atod", tmp_path / "run"))
    episodes = run.episodes("valid", 4)

    def teacher(episodes, compute=True):
        found = Scorer(run, compute=compute).scores("valid", 4, episodes)
        return [found[0, turn.index].teacher for turn in episodes[0].turns]

    first = teacher(episodes)
    turn = episodes[0].turns[0]
    said = dataclasses.replace(turn, response_ids=turn.response_ids[::-1])
    again = [dataclasses.replace(episodes[0], turns=(said, *episodes[0].turns[1:])), *episodes[1:]]
    assert teacher(again, compute=False) == [None] * len(first)
    assert teacher(again) != first
    assert teacher(episodes) == first


def test_a_run_without_a_teacher_shows_what_the_student_thought(folders):
    run = read_run(folders / "grpo")
    scores = Scorer(run, compute=False).scores("train", 1, run.episodes("train", 1))
    assert all(s.teacher is None and s.d is None and s.w is None and s.h > 0 for s in scores.values())
    asked = Scorer(run, teacher=str(read_run(folders / "atod").settings["train"]["teacher"]))
    assert all(s.d is not None for s in asked.scores("train", 1, run.episodes("train", 1)).values())


def test_another_teacher_than_the_runs_own_is_shown_with_its_own_disagreement(folders):
    """Nothing was trained with it, so turns of the training have no weight under it."""
    run = read_run(folders / "atod")
    episodes = run.episodes("train", 1)
    own = Scorer(run).scores("train", 1, episodes)
    other = Scorer(run, teacher=str(run.settings["train"]["student"])).scores("train", 1, episodes)
    assert all(s.w is not None for s in own.values())
    for scores in other.values():
        assert scores.w is None
        assert scores.d == pytest.approx(float(np.mean(np.abs(np.subtract(scores.teacher, scores.student)))))


def test_a_page_holds_whole_groups_up_to_its_limit(folders):
    run = read_run(folders / "atod")
    everything = page_data([run], scorers={})
    assert everything["left_out"] == "1 stored steps left out"  # the validation in the middle
    small = page_data([run], scorers={}, turns=60)
    assert sum(len(e["turns"]) for e in small["episodes"]) <= 60 + 4 * 3 * 4
    assert "left out" in small["left_out"]
    steps, _ = chosen_steps(run, 60)
    assert ("train", 1) in steps and ("train", 4) in steps and ("valid", 0) in steps
    for step in {e["s"] for e in small["episodes"] if e["k"] == "train"}:
        assert sum(e["k"] == "train" and e["s"] == step for e in small["episodes"]) % 4 == 0


def test_what_is_being_written_is_left_alone(folders, tmp_path):
    shutil.copytree(folders / "atod", tmp_path / "r")
    for name in ("trajectories/.step_000005.jsonl.gz.part", "turns/.step_000005.json.gz.part"):
        (tmp_path / "r" / name).write_bytes(b"half")
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "epis')
    run = read_run(tmp_path / "r")
    assert len(run.metrics) == 4 and run.steps("train")[-1] == 4
    page_data([run], scorers={run.path: Scorer(run, compute=False)})
    for name in ("validation/step_000000.jsonl.gz", "trajectories/step_000004.jsonl.gz", "turns/step_000004.json.gz"):
        path = tmp_path / "r" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:200])  # whole files are put into place, so this one was damaged, be it the newest
        with pytest.raises(DataError, match=f"{path.name}.*; restore or delete it"):
            page_data([run], scorers={run.path: Scorer(run, compute=False)})
        path.write_bytes(whole)
    with pytest.raises(DataError, match="is not a run's folder, nor an evaluation's"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", {"train": None}),
        ("config.json", {"train": {}}),
        ("config.json", {"algorithm": []}),
        ("config.json", {"algorithm": {"name": "atod", "weighting": "turn"}}),
        ("result.json", {"table": None}),
        ("result.json", {"table": {"last (step 1)": 1}}),
        ("result.json", {"table": {"last (step 1)": {"success": "high"}}}),
    ],
)
def test_settings_and_results_of_another_kind_are_named(folders, tmp_path, name, change):
    for file in ("config.json", "result.json", "metrics.jsonl"):
        shutil.copy(folders / "atod" / file, tmp_path / file)
    assert read_run(tmp_path).table
    whole = json.loads((tmp_path / name).read_text())
    (whole["settings"] if name == "config.json" else whole).update(change)
    (tmp_path / name).write_text(json.dumps(whole))
    with pytest.raises(DataError, match=rf"{name}: expected .*restore"):
        read_run(tmp_path)


def test_an_evaluation_is_shown_too(folders, tmp_path):
    from atod_algos.evaluate.command import run as evaluate
    from atod_algos.evaluate.settings import EvaluateConfig

    best = folders / "atod" / "checkpoints" / "best"
    evaluate(EvaluateConfig(env=TOY, agent=str(best), seeds=(0, 1), out=tmp_path / "model"), show=False)
    evaluate(EvaluateConfig(env=TOY, agent="random", seeds=(0, 1), out=tmp_path / "random"), show=False)
    page = report([tmp_path / "model", tmp_path / "random"], figures=False)
    data = unpack(page)
    assert data["title"] == f"{best} and random on {TOY}" and set(data["runs"][1]["table"]) == {"valid/4", "test/4"}
    assert {e["z"] for e in data["episodes"]} == {
        f"{split}/4, seed {seed}" for split in ("valid", "test") for seed in (0, 1)
    }
    assert len(data["episodes"]) == 32 and data["left_out"] == ""
    model, other = (next(e for e in data["episodes"] if e["r"] == r) for r in (0, 1))
    assert model["turns"][0]["x"] and model["turns"][0]["h"] > 0 and model["turns"][0]["d"] is None
    assert other["turns"][0]["x"] == [] and model["t"] == other["t"]
    teacher = read_run(folders / "atod").settings["train"]["teacher"]
    taught = unpack(report([tmp_path / "model"], teacher=teacher, figures=False))
    assert taught["episodes"][0]["turns"][0]["d"] > 0 and 0 <= taught["episodes"][0]["turns"][0]["w"] <= 1


def test_each_of_several_environments_has_its_curves(tmp_path):
    settings = {"train": {"seed": 0}, "worlds": {"toy": {"env": TOY}, "echo": {"env": "a.module:toy/Echo-v0"}}}
    row = {"step": 2, "echo/atod/teacher_student_gap_mean": -3.0, "atod/teacher_student_gap_mean": -2.0}
    row |= {"val/success_rate": 0.5, "toy/val/success_rate": 0.25, "echo/val/success_rate": 0.75}
    run = Run(tmp_path, settings, {}, [row], None)
    before = [
        Trajectory(env, "t", "valid", "", "g", 0, (), "", success, 0.0, StopReason.FAILURE)
        for env, success in ((TOY, True), (TOY, True), ("toy/Echo-v0", False))
    ]
    (tmp_path / "validation").mkdir()
    write_jsonl(tmp_path / "validation" / "step_000000.jsonl.gz", before)
    assert run.worlds == ("toy", "echo")
    assert run.series("/teacher_student_gap_mean") == ([2], [-2.0])  # that of both together, whatever comes first
    assert run.series("/teacher_student_gap_mean", "echo") == ([2], [-3.0])
    assert run.validations() == ([0.0, 2], [0.5, 0.5])  # a mean over environments, not over episodes
    assert run.validations("toy") == ([0.0, 2], [1.0, 0.25]) and run.validations("echo") == ([0.0, 2], [0.0, 0.75])


def test_ablations_have_names_of_their_own():
    base = {"name": "atod", "weighting": "turn", "coef_anneal_steps": 80}
    names = [
        method_of(base | change)
        for change in ({}, {"weighting": "none"}, {"weighting": "token"}, {"coef_anneal_steps": 0})
    ]
    assert names == ["ATOD", "ATOD w/o T-DUR", "ATOD token-level", "ATOD w/o annealing"]
    both = base | {"weighting": "none", "coef_anneal_steps": 0}
    assert method_of(both) == "ATOD w/o T-DUR, w/o annealing"
    assert method_of(base | {"rho_init": 0.0, "rho_max": 0.0}) == "OPD by turn"


def test_a_line_is_of_runs_that_differ_in_their_seed_alone(folders):
    run = read_run(folders / "atod")
    settings = run.settings

    def other(seed, label="", **options):
        train = settings["train"] | {"seed": seed, "threads": 7} | {k: v for k, v in options.items() if k == "lr"}
        algorithm = settings["algorithm"] | {k: v for k, v in options.items() if k != "lr"}
        changed = {**settings, "train": train, "algorithm": algorithm}
        return dataclasses.replace(run, settings=changed, label=label)

    seeds = [other(0), other(1)]
    assert by_method(seeds) == {"ATOD": seeds}
    level = [other(seed, tdur_mean_preserve=True) for seed in (0, 1)]
    found = {"ATOD, tdur_mean_preserve False": seeds, "ATOD, tdur_mean_preserve True": level}
    assert by_method([*seeds, *level]) == found
    unweighted = other(0, weighting="none")
    assert list(by_method([*seeds, unweighted])) == ["ATOD", "ATOD w/o T-DUR"]
    many = other(0, kappa_init=2.0, rho_init=0.5, lr=1.0)
    assert list(by_method([seeds[0], many])) == ["ATOD, atod", f"ATOD, atod, {run.path}"]
    labelled = [other(seed, "mine", kappa_init=1.0 + seed) for seed in (0, 1)]  # who calls them so knows why
    assert by_method(labelled) == {"mine": labelled}


# --- figures ----------------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_as_png_and_svg(folders, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    main([str(folders / "atod"), str(folders / "kept"), str(folders / "grpo"), "--out", str(tmp_path)])
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"figure{n}.{kind}" for n in (2, 4, 5, 6, 13, 14) for kind in ("png", "svg")}
    assert (tmp_path / "figures" / "figure5.png").read_bytes()[:4] == b"\x89PNG"
    svg = (tmp_path / "figures" / "figure5.svg").read_text()
    assert "ATOD (2 seeds)" in svg and "GRPO" in svg  # text stays text
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.svg")}
    main([str(folders / "atod"), str(folders / "kept"), str(folders / "grpo"), "--out", str(tmp_path)])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.svg")}


def test_figure_13_counts_turns_and_weighs_tokens(folders):
    run = read_run(folders / "atod")
    episodes = run.episodes("train", 4)
    turns, means, counts = by_turn_index(Scorer(run).scores("train", 4, episodes), "h")
    row = run.metrics[3]
    for turn, mean, count in zip(turns, means, counts, strict=True):
        assert turn <= MOST_TURNS and count == row[f"sod_turn/count/turn_{turn - 1}"]
        assert mean == pytest.approx(row[f"sod_turn/student_entropy/turn_{turn - 1}"], abs=1e-4)


def test_the_page_holds_the_distribution_of_weights(folders):
    run = read_run(folders / "atod")
    found = weight_distribution(run)
    assert found["steps"] == [1, 2, 3, 4] and found["top"] == 1.0
    for step, shares, mean in zip(found["steps"], found["shares"], found["means"], strict=True):
        weights = np.array(run.turn_table(step)["weight"])
        classes = np.minimum((weights * BINS).astype(int), BINS - 1)  # the last holds 1 as well
        assert shares == pytest.approx(np.bincount(classes, minlength=BINS) / len(weights), abs=1e-4)
        assert mean == pytest.approx(weights.mean(), abs=1e-4)
    assert weight_distribution(read_run(folders / "grpo")) is None
    table = page_data([run], scorers={run.path: Scorer(run)})["runs"][0]["by_turn"]
    assert table["names"] == ["before", "after step 4"]
    turns, means, counts = table["w"][1]
    again = by_turn_index(Scorer(run).scores("valid", 4, run.episodes("valid", 4)), "w")
    assert (turns, counts) == (again[0], again[2]) and means == pytest.approx(again[1], abs=1e-4)


def test_the_page_is_one_file(folders, tmp_path):
    page = report([folders / "grpo"], out=tmp_path, figures=False, compute=False).read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z]+@|<link|\bsrc=|https?://(?!www\.w3\.org/2000/svg)", page) == []


def test_without_matplotlib_the_page_is_still_written(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report([folders / "atod"], out=tmp_path, figures=False)
    assert (tmp_path / "report.html").exists()
    with pytest.raises(SystemExit):
        main([str(folders / "atod"), "--out", str(tmp_path)])
    assert "pip install 'atod[report]'" in capsys.readouterr().err


# --- following a run --------------------------------------------------------------------------------------------------


def test_watch_serves_the_page_and_follows(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("atod_algos.report.command.SECONDS", 0.5)
    shutil.copytree(folders / "atod", tmp_path / "r")
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "r" / "result.json").unlink()
    stop, console = threading.Event(), Console(file=open(tmp_path / "out", "w"), soft_wrap=True)  # noqa: SIM115
    config = ReportConfig((tmp_path / "r",), interval=0.2, watch=True)
    thread = threading.Thread(target=watch, args=(config, console, stop))
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while "http" not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
            console.file.flush()
            time.sleep(0.05)
        url = re.search(r"http://127.0.0.1:\d+/", (tmp_path / "out").read_text())[0]
        before = urllib.request.urlopen(url + "stamp").read()
        page = urllib.request.urlopen(url).read().decode()
        assert page == (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
        foreign = urllib.request.Request(url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign)
        assert "frame-ancestors 'none'" in urllib.request.urlopen(url).headers["Content-Security-Policy"]
        port = int(url.rsplit(":")[-1].strip("/"))
        with pytest.raises(AtodError, match="choose another --port"):
            watch(dataclasses.replace(config, port=port), console, stop)
        dripping = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS + 6)]
        for one in dripping:
            with contextlib.suppress(OSError):
                one.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        while time.monotonic() < deadline:  # those that drip have had their time
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url)
                break
        assert urllib.request.urlopen(url).status == 200
        assert unpack(tmp_path / "r" / "report.html")["runs"][0]["done"] == 2
        (tmp_path / "whole").write_text("".join(lines))
        (tmp_path / "whole").rename(tmp_path / "r" / "metrics.jsonl")  # at once, so that no reader sees it half written
        while urllib.request.urlopen(url + "stamp").read() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        data = unpack(tmp_path / "r" / "report.html")
        assert data["runs"][0]["done"] == 4 and data["live"] == 0.2
    finally:
        stop.set()
        thread.join()


def test_weights_and_biases_gets_every_step(models, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: (
        calls.append(("init", given))
        or types.SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(GRPO, options_of(models, tmp_path / "r", "--steps", "2", "--wandb", "mine"))
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    given = calls[0][1]
    assert (given["project"], given["name"], given["resume"]) == ("mine", "r", "allow")
    assert given["id"].startswith("r-") and len(given["id"]) > 8, "not that of another folder of this name"
    assert given["config"]["algorithm"]["name"] == "grpo"
    assert calls[1][1] == 1 and "episode/success" in calls[1][2]


def test_weights_and_biases_missing_is_one_line(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        train(GRPO, options_of(models, tmp_path / "r", "--wandb", "mine"))
    assert "pip install wandb" in capsys.readouterr().err


def test_mistakes_are_answered_in_one_line(tmp_path, capsys):
    for arguments, words in (([], "give one or more run folders"), ([str(tmp_path)], "is not a run's folder")):
        with pytest.raises(SystemExit):
            main(arguments)
        err = capsys.readouterr().err.strip()
        assert words in err and len(err.splitlines()) == 1
    with pytest.raises(AtodError):
        read_run(tmp_path / "nowhere")
