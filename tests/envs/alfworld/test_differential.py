"""Random commands on our engine and on the published one: no difference. The long form is `benchmarks/alfworld.py`."""

import json
import sys
import tarfile
from pathlib import Path

import pytest

from atod_envs.alfworld.engine.game import TASK_TYPES
from atod_envs.alfworld.generator import builtin

pytestmark = pytest.mark.slow

pytest.importorskip("alfworld", reason="the published engine is not installed")

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def tools():
    sys.path.append(str(BENCHMARKS))  # At the end: a file there is called alfworld.
    try:
        import alfworld_differential
        import alfworld_reference
    finally:
        sys.path.remove(str(BENCHMARKS))
    return alfworld_differential, alfworld_reference


@pytest.fixture(scope="module")
def reference(tools):
    return tools[1].Reference()


def check(report, steps):
    assert report.differences == []
    assert report.refused == []
    assert report.steps == steps
    assert len(report.verbs) > 5


def test_built_in_games_of_every_type(tools, reference):
    games = [
        (task_id.split("/")[-2].partition("-")[0], builtin.game(task_id)) for task_id in builtin.task_ids("train")[:6]
    ]
    assert {kind for kind, _ in games} == set(TASK_TYPES)
    with tools[1].accelerated():
        report = tools[0].compare(games, reference, 360, 20, seed=1)
    check(report, 360)


def test_real_games_of_every_type(tools, reference, realdata):
    files = sorted((realdata / "alfworld" / "sample_12").rglob("game.tw-pddl"))
    games = [(path.parts[-3].partition("-")[0], path) for path in files]
    with tools[1].accelerated():
        report = tools[0].compare(games, reference, 504, 14, seed=2)
    check(report, 504)
    assert set(report.games) == set(TASK_TYPES)


def test_games_of_the_older_release(tools, reference, realdata):
    games = {}
    with tarfile.open(realdata / "alfworld" / "alfworld_oldgrammar_valid_382.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("game.tw-pddl"):
                data = json.load(archive.extractfile(member))
                kind = member.name.split("/")[2].partition("-")[0]
                if data.get("solvable") and kind not in games:
                    games[kind] = data
    with tools[1].accelerated():
        report = tools[0].compare(sorted(games.items()), reference, 252, 14, seed=3)
    check(report, 252)
    assert report.verbs["put"] > 0 and report.verbs["move"] == 0


EDITS = {
    "hands full of things": ("(not (holdsAny ?a))", "(pickupable ?o)"),
    "one container open at a time": ("(not (opened ?r))", "(forall (?re - receptacle) (not (opened ?re)))"),
    "dirty things stay cold": ("(heatable ?o)", "(heatable ?o) (imply (isCool ?o) (isClean ?o))"),
    "slicing with something else": ("(sliceable ?co)", "(sliceable ?co) (not (= ?co ?ko))"),
    "one may go to where one is": ("(atLocation ?a ?lEnd)", "(atLocation ?a ?lEnd) (checked ?lStart)"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_rules_that_somebody_has_edited(tools, reference, edit):
    """The engine interprets a file's own rules; it does not merely know the published ones."""
    old, new = EDITS[edit]
    domain = builtin.game(builtin.task_ids("train")[0])["pddl_domain"]
    assert old in domain
    domain = domain.replace(old, new, 1)
    games = [(edit, {**builtin.game(task_id), "pddl_domain": domain}) for task_id in builtin.task_ids("train")[6:8]]
    with tools[1].accelerated():
        report = tools[0].compare(games, reference, 100, 17, seed=4)
    check(report, 100)


def test_the_accelerated_reference_answers_as_the_plain_one(tools, reference):
    game = builtin.game(builtin.task_ids("valid_seen")[3])
    report = tools[0].compare([("plain", game)], reference, 25, 25, seed=5)
    check(report, 25)
