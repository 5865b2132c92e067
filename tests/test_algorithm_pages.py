"""The algorithms' pages: the same sections in order, made parts up to date, every metric of their own explained."""

import ast
import importlib.util
import inspect
import re
import sys
from importlib.metadata import entry_points

import pytest
from paths import REPOSITORY

POINTS = {
    point.name: point for point in entry_points(group="atod.algorithms") if point.module.startswith("atod_algos.")
}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_pages", REPOSITORY / "docs" / "make_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(name):
    return (REPOSITORY / "docs" / "algorithms" / f"{name}.md").read_text()


def test_every_page_has_an_algorithm():
    pages = {path.stem for path in (REPOSITORY / "docs" / "algorithms").glob("*.md")}
    assert pages == set(POINTS)


@pytest.mark.parametrize("name", POINTS)
def test_sections_are_the_same(name, maker):
    assert re.findall(r"^## (.+)$", page_of(name), re.MULTILINE) == list(maker.HEADINGS)


@pytest.mark.parametrize("name", POINTS)
def test_made_parts_are_up_to_date(name, maker):
    page = page_of(name)
    assert re.findall(r"<!-- made: (\w+) -->", page)[::2] == ["head", "equations", "lines", "differences", "options"]
    assert page == maker.filled(page, maker.parts(name, POINTS[name].load())), "run python docs/make_pages.py"


@pytest.mark.parametrize("name", POINTS)
def test_own_metrics_are_explained(name):
    """The keys of ``notes`` and ``coefficients`` in the algorithm's file are those of its page."""
    tree = ast.parse(inspect.getsource(sys.modules[POINTS[name].load().__module__]))
    named = [
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "Advantages"
        for argument in call.keywords
        if argument.arg in ("notes", "coefficients")
    ]
    named += [node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.target.id == "notes"]
    keys = {key.value for node in named if isinstance(node, ast.Dict) for key in node.keys if key is not None}
    assert name in ("grpo", "opd", "sod") or keys, "this test has lost sight of the algorithm's metrics"
    page = page_of(name)
    assert not [key for key in keys if f"`{name}/{key}`" not in page]
