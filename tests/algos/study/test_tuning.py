"""What a study chooses for each method: by one rule, once, and for a longer study as well."""

import json
import shutil

import pytest

from atod_algos.study import METHODS
from atod_algos.study.cells import Tuned, read_study
from atod_algos.study.command import StudyConfig, run
from atod_algos.study.tuning import chosen_in, tune, tuned_of
from atod_envs.errors import AtodError, DataError

pytestmark = pytest.mark.slow


def test_tuning_is_the_same_for_all_and_ablations_change_one_thing(preset, tmp_path):
    run(StudyConfig("toy", out=tmp_path, methods=("grpo", "atod", "atod-uniform"), seeds=(0,)))
    tuned = {path.parent.parent.name: path for path in tmp_path.glob("toy/tuning/*/*/tuned.json")}
    assert set(tuned) == {"grpo", "atod"} and len(list(tmp_path.glob("toy/tuning/*/*/tuned.json"))) == 4
    by_method = {cell["method"]: cell for cell in read_study(tmp_path)}
    assert by_method["atod-uniform"]["lr"] == by_method["atod"]["lr"]
    scores = {p.parent.name: json.loads(p.read_text())["score"] for p in tmp_path.glob("toy/tuning/grpo/*/tuned.json")}
    assert scores[f"lr{by_method['grpo']['lr']:g}"] == max(scores.values())
    settings = [
        json.loads((tmp_path / "toy" / m / "seed0" / "config.json").read_text())["settings"]
        for m in ("atod", "atod-uniform")
    ]
    for one in settings:
        one["train"].pop("run")
    assert settings[0]["train"] == settings[1]["train"]
    changed = {k for k in settings[0]["algorithm"] if settings[0]["algorithm"][k] != settings[1]["algorithm"][k]}
    assert changed == {"weighting", "coef_anneal_steps"}  # the toy preset scales the annealing of ATOD alone
    long, asked = tmp_path / "long", ("atod-uniform",)
    run(StudyConfig("toy", long, methods=asked, seeds=(1,), settings_of=tmp_path))
    assert [cell["lr"] for cell in read_study(long)] == [by_method["atod"]["lr"]]
    assert [path.name for path in (long / "toy").iterdir()] == ["atod-uniform"], "nothing is chosen again"
    assert json.loads((long / "study.json").read_text())["settings_of"] == str(tmp_path)


def test_updates_are_chosen_at_the_best_rate(preset, tmp_path, monkeypatch):
    """Rates under the first number of updates, then the numbers at the best rate; no run is repeated."""
    scores = {(1e-3, 2): 0.3, (2e-3, 2): 0.5, (2e-3, 4): 0.4, (2e-3, 1): 0.6}
    tried = []

    def train(folder, method, world, rules, seed, tuned):
        tried.append((tuned.lr, tuned.updates))
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, "val/success_rate": value} for step, value in ((1, 0.9), (2, scores[tried[-1]]))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("atod_algos.study.tuning.train_cell", train)
    arguments = (tmp_path, METHODS["atod"], preset.worlds[0], "paper", 9, (1e-3, 2e-3), (2, 4, 1))
    assert tune(*arguments) == tune(*arguments) == Tuned(2e-3, 1)
    assert tried == [(1e-3, 2), (2e-3, 2), (2e-3, 4), (2e-3, 1)]
    assert tuned_of(tmp_path, preset.worlds[0]) == {"atod": {Tuned(*key): value for key, value in scores.items()}}
    with pytest.raises(AtodError, match="expected the folder of a study"):
        chosen_in(tmp_path, *arguments[1:3])
    grid = {"lrs": arguments[5], "updates": arguments[6]}
    for wrong in ({"lrs": [], "updates": []}, {**grid, "lrs": ["1e-3"]}):
        (tmp_path / "study.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="expected numbers as lrs and updates"):
            chosen_in(tmp_path, *arguments[1:3])
    (tmp_path / "study.json").write_text(json.dumps(grid))
    assert chosen_in(tmp_path, *arguments[1:3]) == Tuned(2e-3, 1)
    with pytest.raises(AtodError, match=r"has not tried GRPO in toy with learning rate 0\.001, 2 updates a step"):
        chosen_in(tmp_path, METHODS["grpo"], preset.worlds[0])
    shutil.rmtree(tmp_path / "toy" / "tuning" / "atod" / "lr0.002-updates4")
    with pytest.raises(AtodError, match=r"with learning rate 0\.002, 4 updates a step, so it has not chosen yet"):
        chosen_in(tmp_path, *arguments[1:3])


def test_one_learning_rate_needs_no_tuning(preset, tmp_path):
    taken = tune(tmp_path, METHODS["grpo"], preset.worlds[0], "paper", 9, (0.5,), (3,))
    assert taken == Tuned(0.5, 3) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"score": float("nan")}, "expected lr above 0"),
        ({"score": 2}, "expected lr above 0"),
        ({"score": "0.5"}, "expected lr above 0"),
        ({"updates": "2"}, "expected lr above 0"),
        ({"updates": None}, "expected lr above 0"),
        ({"lr": -1.0}, "expected lr above 0"),
        ({"lr": 10**400}, "expected lr above 0"),
        ({"lr": 5e-3}, "is about learning rate 0.005, 2 updates a step, and learning rate 0.001"),
    ],
)
def test_a_choice_that_is_broken_or_anothers_is_refused(wrong, said, preset, tmp_path):
    """A file of an earlier version has no updates, and stands under another name."""
    for lr in (1e-3, 2e-3):
        folder = tmp_path / "toy" / "tuning" / "grpo" / f"lr{lr:g}-updates2"
        folder.mkdir(parents=True)
        (folder / "tuned.json").write_text(json.dumps({"lr": lr, "updates": 2, "score": 0.5}))
    arguments = (tmp_path, METHODS["grpo"], preset.worlds[0], "paper", 9, (1e-3, 2e-3), (2,))
    assert tune(*arguments) == Tuned(1e-3, 2)
    earlier = tmp_path / "toy" / "tuning" / "grpo" / "lr0.001"
    earlier.mkdir()
    (earlier / "tuned.json").write_text(json.dumps({"lr": 1e-3, "validation": [0.5], "score": 0.5}))
    assert set(tuned_of(tmp_path, preset.worlds[0])["grpo"]) == {Tuned(1e-3), Tuned(1e-3, 2), Tuned(2e-3, 2)}
    first = tmp_path / "toy" / "tuning" / "grpo" / "lr0.001-updates2" / "tuned.json"
    first.write_text(json.dumps({"lr": 1e-3, "updates": 2, "score": 0.5, **wrong}))
    with pytest.raises(AtodError, match=said):
        tune(*arguments)
