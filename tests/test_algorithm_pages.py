"""The algorithms' pages: the same sections in order, made parts up to date, every metric of their own explained."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import sys
from importlib.metadata import entry_points

import pytest
from paths import REPOSITORY

from atod_algos.guard import parse
from atod_algos.study import METHODS, PRESETS
from atod_algos.study.command import StudyConfig, tuned_as
from atod_algos.study.tuning import chosen_in

POINTS = {
    point.name: point for point in entry_points(group="atod.algorithms") if point.module.startswith("atod_algos.")
}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_pages", REPOSITORY / "docs" / "make_pages.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "docs")  # as where it is run as a script
        spec.loader.exec_module(module)
    return module


def page_of(name):
    return (REPOSITORY / "docs" / "algorithms" / f"{name}.md").read_text()


def test_the_studys_numbers_are_those_of_its_results(maker):
    for path, made in maker.pages().items():
        page = path.read_text()
        assert re.findall(r"<!-- made: ([\w-]+) -->", page)[::2] == list(made)
        assert page == maker.filled(page, made), "run python docs/make_pages.py"


def test_the_studys_commands_can_be_followed(maker):
    """Every method, in every world that a command names, has settings in the published results, and so many cells."""
    made = sys.modules["make_study"]
    cells = json.loads(made.RESULTS.read_text())["cells"]
    named = set()
    for command in made.commands(cells, "laptop"):
        config = parse(StudyConfig, shlex.split(command)[3:], "atod_algos.study", "")
        for world in PRESETS[config.preset].worlds:
            for method in map(METHODS.get, config.methods if world.name in (config.worlds or made.WORLDS) else ()):
                if method.algorithm:
                    assert chosen_in(REPOSITORY / config.settings_of, tuned_as(method), world)
                named |= {(world.name, method.name, seed) for seed in config.seeds}
    assert named == {(cell["world"], cell["method"], cell["seed"]) for cell in cells}


def test_every_page_has_an_algorithm():
    pages = {path.stem for path in (REPOSITORY / "docs" / "algorithms").glob("*.md")}
    assert pages == set(POINTS)


@pytest.mark.parametrize("name", POINTS)
def test_sections_are_the_same(name, maker):
    assert re.findall(r"^## (.+)$", page_of(name), re.MULTILINE) == list(maker.HEADINGS)


@pytest.mark.parametrize("name", POINTS)
def test_made_parts_are_up_to_date(name, maker):
    page, made = page_of(name), maker.parts(name, POINTS[name].load())
    assert re.findall(r"<!-- made: ([\w-]+) -->", page)[::2] == list(made)
    assert page == maker.filled(page, made), "run python docs/make_pages.py"


@pytest.mark.parametrize("name", POINTS)
def test_results_are_the_studys(name, maker):
    """A row of the study's own table stands on the page with the curve, or the page says that there is none."""
    page, image = page_of(name), REPOSITORY / "docs" / "images" / f"results-{name}.svg"
    tables = (REPOSITORY / "docs" / "study" / "tables.md").read_text()
    label = next((m.label for m in METHODS.values() if m.algorithm == name), None)
    if not maker.rows_of(name):
        assert "Not run in [the study]" in page and not image.exists()
        return
    row = re.search(rf"^\| {label} \| (.+) \| [\d.-]+ \|$", tables, re.MULTILINE)[1]  # the last column is a mean
    assert f"| **{label}** | {row} |" in page
    assert image.read_text() == maker.curves(name) and f"../images/{image.name}" in page


@pytest.mark.parametrize("name", POINTS)
def test_own_metrics_are_explained(name):
    """The keys of ``notes`` and ``coefficients``, and those that ``branch`` gives, are those of the page."""
    tree = ast.parse(inspect.getsource(sys.modules[POINTS[name].load().__module__]))
    named = [
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "Advantages"
        for argument in call.keywords
        if argument.arg in ("notes", "coefficients")
    ]
    named += [node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.target.id == "notes"]
    branch = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "branch"]
    named += [node for f in branch for node in ast.walk(f) if isinstance(node, ast.Dict)]
    keys = {key.value for node in named if isinstance(node, ast.Dict) for key in node.keys if key is not None}
    assert name in ("grpo", "opd", "sod") or keys, "this test has lost sight of the algorithm's metrics"
    page = page_of(name)
    assert not [key for key in keys if f"`{name}/{key}`" not in page]
