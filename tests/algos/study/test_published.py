"""Studies that go on from published results: joined task by task, refused where they differ in more than methods."""

import dataclasses
import json
import re
import shutil

import pytest
from episodes import outcome
from paths import REPOSITORY

from atod_algos.evaluate import Evaluation
from atod_algos.study import METHODS
from atod_algos.study.checks import RESULTS, Tuned
from atod_algos.study.claims import decide
from atod_algos.study.command import StudyConfig, run
from atod_algos.study.outcomes import groups_of, name_of, outcomes_of, read_published, require_shared
from atod_algos.study.tables import write_tables
from atod_algos.study.tuning import chosen_in
from atod_envs.errors import AtodError, DataError, UnknownName

pytestmark = pytest.mark.slow


@pytest.fixture
def toy(preset, tmp_path):
    """Runs a study of the toy world with one rate, in a folder of its own."""

    def study(name, *methods, **more):
        run(StudyConfig("toy", out=tmp_path / name, methods=methods, lrs=(2e-3,), **more))
        return json.loads((tmp_path / name / RESULTS).read_text())

    return study


def test_published_cells_stand_beside_ones_own_and_are_compared_task_by_task(toy, tmp_path):
    together = toy("together", "vanilla", "grpo", "gigpo")
    toy("theirs", "vanilla", "grpo")
    for folder in (tmp_path / "theirs").glob("toy/*/seed*"):
        (folder / "evaluation-last" / "result.json").unlink()  # the results alone are read
    mine = toy("mine", "gigpo", published=(tmp_path / "theirs",))
    decided = {claim["claim"]: claim for claim in mine["claims"]["toy"]}
    assert {claim for claim in decided if not claim.startswith("the first,")} == {"gigpo beats GRPO"} and len(
        decided
    ) == 2
    assert mine["claims"] == together["claims"] and decided["gigpo beats GRPO"]["seeds"] == [0, 1]

    def plain(results):
        return [{k: v for k, v in c.items() if not re.match("seconds|commits", k)} for c in results["cells"]]

    assert plain(mine) == plain(together) and mine["panels"] == together["panels"]
    assert mine["settings"] == together["settings"]
    text = (tmp_path / "mine" / "tables.md").read_text()
    assert f"4 of these 6 cells are published ones: {tmp_path / 'theirs' / RESULTS}." in text
    left, right = ((tmp_path / name / "tables.md").read_text().split("## toy")[1] for name in ("mine", "together"))
    assert left == right and "| gigpo | 2 |" in left and "| GRPO | " in left.split("Groups by outcome")[1]
    # What was joined can be published again, and a world that one does not study is left out.
    assert len(read_published(tmp_path / "mine")) == 6
    assert [c["method"] for c in toy("again", "vanilla", published=(tmp_path / "mine" / RESULTS,))["cells"]] == [
        "vanilla", "vanilla", "grpo", "grpo", "gigpo", "gigpo",
    ]  # fmt: skip
    other = json.loads((tmp_path / "mine" / RESULTS).read_text())
    for cell in other["cells"]:
        cell["world"] = "elsewhere"
    (tmp_path / "elsewhere.json").write_text(json.dumps(other))
    assert len(toy("again", "vanilla", published=(tmp_path / "elsewhere.json",))["cells"]) == 2


def test_published_results_are_not_written_over(toy, tmp_path):
    toy("theirs", "vanilla", seeds=(0,))
    published = tmp_path / "published"
    published.mkdir()
    file = published / RESULTS
    shutil.copy(tmp_path / "theirs" / RESULTS, file)
    before = file.read_bytes()
    with pytest.raises(AtodError, match="holds published results of a study, and would be written over"):
        run(StudyConfig("toy", out=published, tables_only=True))
    with pytest.raises(AtodError, match="holds no finished cell"):
        run(StudyConfig("toy", out=tmp_path / "mistyped", tables_only=True))
    assert not (tmp_path / "mistyped").exists()
    for method in ("vanilla", "teacher"):  # the same cell, or another
        with pytest.raises(AtodError, match="would be written over"):
            toy("published", method, seeds=(0,))
    assert file.read_bytes() == before and list(published.iterdir()) == [file]


def test_a_later_command_of_a_study_does_not_change_what_it_chose(toy, preset, tmp_path):
    """One row with another rate, as the study's page asks for, leaves the others' alone."""
    toy("chosen", "grpo", seeds=(0,))
    run(StudyConfig("toy", out=tmp_path / "chosen", methods=("vanilla",), seeds=(0,), lrs=(1e-5,)))
    assert chosen_in(tmp_path / "chosen", METHODS["grpo"], preset.worlds[0]) == Tuned(2e-3)
    with pytest.raises(AtodError, match="has not tried ATOD in toy"):
        chosen_in(tmp_path / "chosen", METHODS["atod"], preset.worlds[0])


def test_published_cells_of_other_settings_models_or_tasks_are_refused(toy, tmp_path):
    theirs = toy("theirs", "grpo", seeds=(0,))
    file = tmp_path / "theirs" / RESULTS

    def refused(change, said):
        broken = json.loads(json.dumps(theirs))
        change(broken)
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(AtodError, match=said):
            toy("mine", "atod", seeds=(0,), published=(tmp_path / "broken.json",))

    refused(
        lambda r: r["settings"]["toy"].update(steps=150), r"grpo, seed 0 \(.*broken.json\) has steps=150, other cells 2"
    )
    refused(lambda r: r["settings"]["toy"].update(rules="released"), "has rules='released', other cells 'paper'")
    refused(lambda r: r["settings"]["toy"].update({"student's files": "00"}), "has student's files='00', other cells")
    refused(lambda r: r.pop("panels"), "is of an older version, which kept neither")
    refused(lambda r: r["cells"][0].update(solved="01"), "expected a label, and a 0 or 1, for each of 4 tasks")
    refused(
        lambda r: next(iter(r["panels"].values())).update(labels=[]), "expected a label, and a 0 or 1, for each of 4"
    )
    refused(lambda r: r["cells"][0].update(solved="1111"), "is not the share of the tasks solved")
    refused(
        lambda r: r["cells"][0].update(groups={"fail_first": 0}),
        "expected the numbers fail_first, fail_last, success_last",
    )
    refused(lambda r: r["cells"][0].update(groups=5), "expected panels and cells of a study")
    refused(lambda r: r["cells"][0].update(seed="0"), "expected a method and a seed")
    refused(lambda r: r["cells"].append(5), "expected panels and cells of a study")
    refused(lambda r: r.update(cells=5), "expected an entry 'cells' of type list")
    assert not list((tmp_path / "mine").glob("toy/*")), "nothing was trained for a table that cannot be"

    def rename(results):
        (digest,) = results["panels"]
        results["panels"] = {"other": results["panels"][digest]}
        results["cells"][0]["panel"] = "other"

    refused(rename, "has tasks='panel other', other cells 'panel ")
    refused(
        lambda r: r["cells"][0].update(seconds=None), r"broken\.json, toy, grpo, seed 0: expected a number as seconds"
    )
    with pytest.raises(AtodError, match=r"expected the study-results\.json of a study, or the folder that holds it"):
        toy("mine", "atod", seeds=(0,), published=(tmp_path / "nowhere",))
    with pytest.raises(UnknownName, match="unknown method 'gigop'; did you mean 'gigpo'"):
        toy("mine", "gigop")
    for name in ("iw_opd", "guided_opd"):
        with pytest.raises(UnknownName, match=f"did you mean '{name.replace('_', '-')}'"):
            toy("mine", name)
    assert file.exists()


def test_rows_that_are_not_trained_are_compared_by_their_models(toy, preset, models, tmp_path, monkeypatch):
    """Another student under the published students, another teacher next to one's own: neither makes a claim."""
    toy("theirs", "vanilla", "teacher", "atod", seeds=(0,))
    copied = {role: shutil.copytree(models[role], tmp_path / "moved" / role) for role in ("student", "teacher")}

    def study(name, methods, **train):
        world = preset.worlds[0]
        changed = dataclasses.replace(world, train={**world.train, **train})
        monkeypatch.setattr("atod_algos.study.command.PRESETS", {"toy": dataclasses.replace(preset, worlds=(changed,))})
        return toy(name, *methods, seeds=(0,), published=(tmp_path / "theirs",))

    moved = {role: str(path) for role, path in copied.items()}
    found = study("moved-models", ("vanilla", "teacher", "grpo"), **moved)
    assert {c["method"] for c in found["cells"]} == {"vanilla", "teacher", "grpo", "atod"}, (
        "files count, not their place"
    )
    for methods, train, said in (
        (("vanilla",), {"student": moved["teacher"]}, "has student's files="),
        (("teacher",), {"teacher": moved["student"]}, "has teacher's files="),
        (("atod",), {"teacher": moved["student"]}, "has teacher's files="),
    ):
        with pytest.raises(AtodError, match=said):
            study(f"other-{methods[0]}", methods, **train)


def test_a_published_row_needs_no_package(toy, tmp_path):
    theirs = toy("theirs", "grpo", seeds=(0,))
    theirs["cells"][0]["method"] = "rloo"
    (tmp_path / "rloo.json").write_text(json.dumps(theirs))
    found = toy("mine", "grpo", seeds=(0,), published=(tmp_path / "rloo.json",))
    assert [c["method"] for c in found["cells"]] == ["grpo", "rloo"]
    assert "rloo beats GRPO" in {claim["claim"] for claim in found["claims"]["toy"]}


def test_a_study_takes_the_settings_of_published_results(toy, preset, tmp_path):
    theirs = toy("theirs", "grpo", seeds=(0,))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / RESULTS).write_text(json.dumps(theirs))
    (tmp_path / "theirs").rename(tmp_path / "gone")
    run(StudyConfig("toy", out=tmp_path / "mine", methods=("grpo",), seeds=(1,), settings_of=tmp_path / "alone"))
    (cell,) = json.loads((tmp_path / "mine" / RESULTS).read_text())["cells"]
    assert cell["lr"] == 2e-3
    from atod_algos.study import METHODS

    world = preset.worlds[0]
    assert chosen_in(tmp_path / "alone" / RESULTS, METHODS["grpo"], world) == Tuned(2e-3)
    with pytest.raises(AtodError, match="has 0 settings of ATOD in toy, expected one"):
        chosen_in(tmp_path / "alone", METHODS["atod"], world)
    assert chosen_in(tmp_path / "mine", METHODS["grpo"], world) == Tuned(2e-3), "it took what another had chosen"
    with pytest.raises(AtodError, match="has 0 settings of ATOD"):
        run(StudyConfig("toy", out=tmp_path / "third", methods=("grpo", "atod"), settings_of=tmp_path / "alone"))
    assert not list((tmp_path / "third").glob("toy/*")), "all settings are found before the first cell is trained"
    theirs["cells"].append({**theirs["cells"][0], "seed": 5, "lr": "fast"})
    (tmp_path / "alone" / RESULTS).write_text(json.dumps(theirs))
    with pytest.raises(DataError, match="expected numbers as lr and updates of grpo in toy, found 'fast'"):
        chosen_in(tmp_path / "alone", METHODS["grpo"], world)
    with pytest.raises(AtodError, match=r"expected the folder of a study, with its study\.json or study-results\.json"):
        chosen_in(tmp_path / "nowhere", METHODS["grpo"], world)


def test_a_cell_without_a_run_folder_shares_no_groups(preset, tmp_path):
    assert groups_of({"folder": str(tmp_path)}) == {}
    write_tables(tmp_path, [], preset)
    assert decide("x", [], []) is None


def test_the_shipped_results_can_be_joined_and_give_a_claim_of_each_world_again():
    cells = read_published(REPOSITORY / "docs" / "study")
    claims = json.loads((REPOSITORY / "docs" / "study" / RESULTS).read_text())["claims"]
    require_shared((cell["world"], name_of(cell), cell["shared"]) for cell in cells)
    for world in {cell["world"] for cell in cells}:
        sides = [[c for c in cells if (c["world"], c["method"]) == (world, name)] for name in ("atod", "opd")]
        again = decide("ATOD beats OPD", *sides)
        (known,) = [one for one in claims[world] if one["claim"] == "ATOD beats OPD"]
        assert again.tasks.p_value == pytest.approx(known["tasks"]["p_value"])
        assert again.tasks.difference == pytest.approx(known["tasks"]["difference"])
        assert again.p_seeds == pytest.approx(known["p_seeds"], rel=1e-4) and list(again.seeds) == known["seeds"]
        assert {label: part.difference for label, part in again.by_label.items()} == pytest.approx(
            {label: part["difference"] for label, part in known["by_label"].items()}
        )


def test_data_that_are_scored_otherwise_are_another_panel(monkeypatch):
    episode = outcome("t", True, seed=0, label="x")

    def load(folder):
        return {"test/1": Evaluation((dataclasses.replace(episode, data_version=folder.parent.name),))}

    monkeypatch.setattr("atod_algos.study.outcomes.load_evaluation", load)
    first, again, other = (outcomes_of({"folder": name}).panel for name in ("shop/rules", "shop/rules", "shop/spacy"))
    assert first == again and first.tasks == other.tasks and first.digest != other.digest
