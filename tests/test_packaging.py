"""The wheel: complete, typed, installable into an empty environment, and at home outside the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from paths import REPOSITORY

pytestmark = pytest.mark.slow

PACKAGES = ("atod_envs", "agents", "atod_algos")
PYTHONS = ("3.11", "3.12", "3.13")
ENVIRONMENTS = ("all", "verifiers", "openenv", "vllm")


def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()


def run(*words, cwd, **environment):
    # The published alfworld package, once imported, names its data folder in the environment.
    left_out = ("PYTHONPATH", "VIRTUAL_ENV", "ALFWORLD_DATA", "WEBSHOP_DATA", "SEARCHQA_DATA")
    env = {key: value for key, value in os.environ.items() if key not in left_out} | environment
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from a clean copy of what is tracked and new (so that no left-over build folder sneaks in)."""
    pytest.importorskip("build", reason="the wheel is built with the package 'build' (extra dev)")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        place = REPOSITORY / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - held == set(), "add their endings to [tool.setuptools.package-data]"
    assert held - wanted == set()
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_every_extra_is_documented():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (REPOSITORY / "docs" / "install.md").read_text()
    assert [extra for extra in extras if f"`{extra}`" not in page] == []


def makefile_extras(environment):
    """The extras that the Makefile installs into one of its environments."""
    asked = [
        "make",
        "--no-print-directory",
        "--eval",
        "print-extras: ; @echo $(extras_" + environment + ")",
        "print-extras",
    ]
    return [extra for extra in run(*asked, cwd=REPOSITORY).replace(" ", "").strip().split(",") if extra]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_locked_versions_are_what_the_project_asks_for(environment):
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    locked = {}
    for line in (REPOSITORY / "constraints" / f"{environment}.txt").read_text().splitlines():
        if not line.startswith("#"):
            entry = requirements.Requirement(line)  # no address, no path, no option of pip
            (pin,) = entry.specifier
            assert pin.operator == "==" and entry.url is None and not entry.extras, line
            locked.setdefault(canonical(entry.name), []).append(pin.version)
    extras = makefile_extras(environment)
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    assert extras and wanted
    for entry in map(requirements.Requirement, wanted):
        versions = locked.get(canonical(entry.name), [])
        if canonical(entry.name) == "torch":  # TORCH names it
            assert not versions
        else:
            assert versions and all(version in entry.specifier for version in versions), f"{entry}: run `make lock`"


def test_the_hooks_are_the_locked_versions():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    locked = (REPOSITORY / "constraints" / "all.txt").read_text()
    for tool, repository in (("ruff", "ruff-pre-commit"), ("codespell", "codespell")):
        version = re.search(rf"^{tool}==(.+)$", locked, re.MULTILINE)[1]
        assert re.search(rf"/{repository}\n +rev: v(.+)\n", hooks)[1] == version


def test_every_extra_is_installed_by_the_makefile_or_left_out_for_a_reason():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) - {extra for environment in ENVIRONMENTS for extra in makefile_extras(environment)} == {
        "8bit",
        "vllm",
        "smollm2",
        "trackio",
        "mlflow",
    }


def test_a_changed_project_or_lock_file_is_installed_again(tmp_path):
    checkout = tmp_path / "a folder"
    (checkout / "constraints").mkdir(parents=True)
    (checkout / ".venv").mkdir()
    shutil.copy(REPOSITORY / "Makefile", checkout)
    sources = [checkout / "pyproject.toml", *(checkout / "constraints" / f"{name}.txt" for name in ENVIRONMENTS)]
    stamps = [checkout / ".venv" / name for name in ("tools", "train", "all")]

    def complete():
        for age, file in enumerate([*sources, *stamps]):
            file.touch()
            os.utime(file, (1_000_000 + age, 1_000_000 + age))

    def up_to_date(*words):
        return subprocess.run(["make", "-q", *words], cwd=checkout, capture_output=True).returncode == 0

    complete()
    assert up_to_date(".venv/all") and not up_to_date("LOCK=", ".venv-newest/all")
    for changed in ("pyproject.toml", "constraints/all.txt"):
        complete()
        (checkout / changed).touch()
        assert not up_to_date(".venv/train") and not up_to_date(".venv/all"), changed
    complete()
    (checkout / ".venv" / "all").unlink()  # cut off: what was complete is not done again
    assert up_to_date(".venv/train") and not up_to_date(".venv/all")


def test_a_missing_compiler_is_named_before_anything_is_built():
    for variable in ("CC", "CXX"):
        done = subprocess.run(
            ["make", "compilers"], cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, variable: "no-such-compiler"}
        )  # fmt: skip
        assert done.returncode != 0 and "no-such-compiler is missing: a C and a C++ compiler are needed" in done.stdout


def interpreter(minor):
    """A Python of that version, on the path or next to the others of its kind."""
    found = shutil.which(f"python{minor}")
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for place in [*([Path(found)] if found else []), *sorted(home.glob(f"{minor}.*/bin/python"))]:
        asked = subprocess.run(
            [place, "-c", "import sys, venv; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
        )
        if asked.stdout.strip() == minor:
            return place
    return None


SMOKE = """
import sys
import atod_envs
assert not {"torch", "transformers", "pyarrow", "scipy", "pandas"} & set(sys.modules)
import gymnasium as gym
for name, action in (("ALFWorld", "look"), ("WebShop", "search[shirt]"), ("SearchQA", "<search>who</search>"),
                     ("TextCraft", "inventory")):
    env = gym.make(f"atod/{name}-v0")
    env.reset(seed=0)
    observation, *_ = env.step(action)
    assert observation, name
print("plays on", sys.version.split()[0], "from", atod_envs.__file__)
"""


@pytest.fixture(scope="session")
def package_index(tmp_path_factory):
    """A package index can be reached."""
    reachable = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", tmp_path_factory.mktemp("index"), "typing-extensions"],
        capture_output=True,
    )  # fmt: skip
    if reachable.returncode:
        pytest.skip("no package index can be reached")


@pytest.mark.parametrize("minor", PYTHONS)
def test_the_environments_alone_install_into_an_empty_environment(minor, wheel, package_index, tmp_path):
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"no Python {minor} on this machine")
    # Without a pip of its own, which takes longer to put there than all the rest: this process's pip fills it.
    run(python, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv/bin/python"]
    run(*pip, "install", "--quiet", "--no-compile", wheel, cwd=tmp_path)
    said = run(tmp_path / "venv/bin/python", "-c", SMOKE, cwd=tmp_path, HOME=str(tmp_path))
    assert f"plays on {minor}" in said and str(tmp_path) in said
    assert "ALFWorld" in run(tmp_path / "venv/bin/atod", "data", "status", cwd=tmp_path, HOME=str(tmp_path))
    refused = subprocess.run(
        [tmp_path / "venv/bin/atod", "train", "atod"], capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode == 1 and "pip install 'atod[train]'" in refused.stderr


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked by pip, to be found before the repository; everything it needs is in this environment."""
    pytest.importorskip("torch")
    place = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel, cwd=place)
    return place


def test_training_works_outside_the_repository(installed, tmp_path):
    options = (
        "--steps 1 --tasks-per-step 1 --group-size 2 --max-turns 2 --minibatches 1 "
        "--eval-every 0 --eval-tasks 2 --report-tasks 2"
    )
    run(
        sys.executable, "-m", "atod_algos.atod", *options.split(), "--data", "builtin", "--run", tmp_path / "run",
        cwd=tmp_path, PYTHONPATH=str(installed), HOME=str(tmp_path),
    )  # fmt: skip
    assert (tmp_path / "run" / "result.json").is_file()
    where = run(
        sys.executable, "-c", "import atod_algos; print(atod_algos.__file__)", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert where.startswith(str(installed))


def test_types_are_exported(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "from agents.base import Agent\n"
        "from atod_envs.trajectory import Trajectory\n"
        "def length(trajectory: Trajectory) -> int:\n"
        "    reveal_type(trajectory.turns[0].logprobs)\n"
        "    return trajectory.task_id\n"
    )
    # Other packages' types are left out: only they take long.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-numpy.*,gymnasium.*,torch.*]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(installed), "MYPYPATH": str(installed)},
    )  # fmt: skip
    assert 'Revealed type is "tuple[float, ...]"' in done.stdout.replace("builtins.", "")
    assert 'expected "int"' in done.stdout and "py.typed" not in done.stdout
