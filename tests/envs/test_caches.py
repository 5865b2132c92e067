"""Caches that are killed, shared, read-only or full of something else, and places with awkward names."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atod_envs.alfworld.generate import main as make_games
from atod_envs.caches import build_once, cache_folder, home_cache
from atod_envs.errors import DataError
from atod_envs.retrieval import build as retrieval_build
from atod_envs.searchqa import sources
from atod_envs.searchqa.builtin import make_encyclopedia, write_encyclopedia
from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.generate import CatalogueSpec, write_catalogue


def test_a_folder_appears_when_it_is_complete_and_is_built_once(tmp_path):
    built = []

    def build(scratch):
        built.append(scratch)
        assert not (tmp_path / "thing").exists()
        (scratch / "part").write_text("x")

    for _ in range(2):
        assert (build_once(tmp_path / "thing", build, "part") / "part").read_text() == "x"
    assert len(built) == 1 and not built[0].exists()


def test_what_a_failed_or_killed_builder_left_is_removed_by_the_next(tmp_path):
    def fail(scratch):
        (scratch / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(tmp_path / "thing", fail)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom atod_envs.caches import build_once\n"
        "def build(scratch):\n (scratch / 'half').write_text('x'); print('building', flush=True); time.sleep(100)\n"
        "build_once(Path(sys.argv[1]), build)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "thing")], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "building\n"
    killed.kill()
    killed.wait()
    assert list(tmp_path.glob("thing.part-*"))
    build_once(tmp_path / "thing", lambda scratch: (scratch / "whole").write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["whole"]


def test_processes_that_start_together_build_once(tmp_path):
    code = (
        "import sys, time, os\nfrom pathlib import Path\nfrom atod_envs.caches import build_once\n"
        "def build(scratch):\n time.sleep(0.5); (scratch / 'who').write_text(str(os.getpid())); print('built')\n"
        "print((build_once(Path(sys.argv[1]), build) / 'who').read_text())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "thing")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert sum("built" in words for words in said) == 1 and len({words[-1] for words in said}) == 1


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file where a folder is needed")
    with pytest.raises(DataError, match=r"blocked/x/thing: cannot be written .*; set \$ATOD_CACHE"):
        build_once(tmp_path / "blocked" / "x" / "thing", lambda scratch: None)
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "blocked"))
    write_catalogue(CatalogueSpec(5), tmp_path / "shop")
    with pytest.raises(DataError, match="cannot be written"):
        open_store(tmp_path / "shop")
    monkeypatch.setenv("ATOD_CACHE", "~not-a-user/cache")
    with pytest.raises(DataError, match=r"\$ATOD_CACHE='~not-a-user/cache'; Could not determine home directory"):
        cache_folder()
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DataError, match=r"no home folder to keep caches in; set \$ATOD_CACHE"):
        home_cache()


def test_a_full_disk_while_a_cache_is_built_says_where(tmp_path):
    def build(scratch):
        (scratch / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"thing: cannot be written \(No space left on device\); make room, or set"):
        build_once(tmp_path / "thing", build)
    assert not list(tmp_path.glob("thing*.part-*")) and not (tmp_path / "thing").exists()


def test_an_index_over_a_corpus_file_is_built_by_one_process_only(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    write_encyclopedia(make_encyclopedia(scale=0.05), tmp_path / "data")
    first = sources.load_service(tmp_path / "data", "bm25", None).retrieve(["the river"], 3)
    sources.indexed.cache_clear()  # as another process begins
    monkeypatch.setattr(retrieval_build, "build_index", lambda *_, **__: pytest.fail("built again"))
    assert sources.load_service(tmp_path / "data", "bm25", None).retrieve(["the river"], 3) == first


def test_a_store_that_is_built_anew_in_its_place_is_opened_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    write_catalogue(CatalogueSpec(5), tmp_path / "shop")
    folder = open_store(tmp_path / "shop").folder
    assert len(open_store(folder)) == 5
    write_catalogue(CatalogueSpec(7), tmp_path / "other")
    other = open_store(tmp_path / "other").folder
    folder.rename(tmp_path / "away")
    other.rename(folder)
    assert len(open_store(folder)) == 7


PLAY = """
import sys, gymnasium as gym, atod_envs
folder = sys.argv[1]
for env_id, action in (("ALFWorld", "look"), ("WebShop", "search[a ü]"), ("SearchQA", "<search>the river ü</search>")):
    env = gym.make(f"atod/{env_id}-v0", data=f"{folder}/{env_id}", split="train")
    env.reset(seed=1)
    for _ in range(2):
        shown, *_, info = env.step(action)
    print(env_id, info["turn"], env.unwrapped.data_version)
"""


def test_blanks_and_unicode_in_paths_the_plain_locale_and_no_home(tmp_path):
    folder = tmp_path / "Daten mit Ümlaut 数据"
    folder.mkdir()
    assert make_games(["--out", str(folder / "ALFWorld"), "--games", "6", "--seed", "1", "--size", "small"]) in (
        0,
        None,
    )
    write_catalogue(CatalogueSpec(30), folder / "WebShop")
    write_encyclopedia(make_encyclopedia(scale=0.05), folder / "SearchQA")
    plain = {name: value for name, value in os.environ.items() if name not in ("HOME", "LANG", "XDG_CACHE_HOME")}
    plain |= {"LC_ALL": "C", "ATOD_CACHE": str(folder / "cache"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", PLAY, str(folder)], env=plain, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert [line.split()[:2] for line in done.stdout.decode().splitlines()] == [
        ["ALFWorld", "2"],
        ["WebShop", "2"],
        ["SearchQA", "2"],
    ]
