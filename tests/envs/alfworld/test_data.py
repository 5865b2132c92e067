"""Finding the games: the reference loader's filters, the cached index, broken files, and errors for wrong places."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from atod_envs.alfworld.data import BuiltinSource, find_data, open_source
from atod_envs.alfworld.engine.game import TASK_TYPES
from atod_envs.alfworld.generator import builtin
from atod_envs.alfworld.index import cache_file
from atod_envs.errors import DataError, UnknownName

SPLIT = "valid_seen"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def put(root, folder, *, game=None, trajectory=None, number=0):
    """Write a trial folder with a built-in game in it."""
    content = dict(builtin.game(builtin.task_ids("valid_seen")[number]))
    traj_data = content.pop("traj_data")
    target = Path(root) / "json_2.1.1" / SPLIT / folder / "trial_T1"
    target.mkdir(parents=True)
    (target / "game.tw-pddl").write_text(json.dumps(content if game is None else game(content)))
    if trajectory is not False:
        (target / "traj_data.json").write_text(json.dumps(trajectory or traj_data))
    return target


@pytest.fixture
def root(tmp_path):
    data = tmp_path / "data"
    for number in range(3):
        task_type = builtin.task_ids("valid_seen")[number].split("/")[-2].partition("-")[0]
        put(data, f"{task_type}-A-None-B-{number}", number=number)
    return data


def ids(root, **options):
    return open_source(root, SPLIT, **options).task_ids


def test_task_ids_are_folders_relative_to_the_data_root(root):
    found = ids(root)
    assert len(found) == 3 and list(found) == sorted(found)
    assert all(task_id.startswith(f"json_2.1.1/{SPLIT}/") and (root / task_id).is_dir() for task_id in found)


def test_the_reference_loaders_filters(root):
    whole = ids(root)
    put(root, "pick_and_place_with_movable_recep-A-B-C-1")
    put(root, "pick_and_place_simple-AppleSliced-None-C-1")
    put(root, "wash_the_dog-A-None-C-1", trajectory={"task_type": "wash_the_dog"})
    put(root, "pick_and_place_simple-A-None-C-2", game=lambda game: {**game, "solvable": False})
    put(root, "pick_and_place_simple-A-None-C-3", game=lambda game: {k: v for k, v in game.items() if k != "solvable"})
    (put(root, "pick_and_place_simple-A-None-C-4") / "game.tw-pddl").unlink()
    assert ids(root) == whole
    assert open_source(root, SPLIT).skipped == 0, "left out, not broken"
    assert len(ids(root, strict=True)) == 3


def test_links_are_followed_and_no_game_is_missed(root, tmp_path):
    whole = ids(root)
    put(tmp_path / "other", "pick_and_place_simple-A-None-B-7", number=5)
    split = root / "json_2.1.1" / SPLIT
    (split / "more").symlink_to(tmp_path / "other" / "json_2.1.1" / SPLIT)
    assert len(ids(root)) == len(whole) + 1
    for place, target, said in (
        (split / "gone", tmp_path / "gone", r"gone: cannot be read \(No such file"),
        (split / "again", root, "again is a link to a folder that it lies in"),
        (tmp_path / "other" / "json_2.1.1" / SPLIT / "back", split, "back is a link to a folder that it lies in"),
    ):
        place.symlink_to(target)
        with pytest.raises(DataError, match=said):
            ids(root)
        place.unlink()


def test_without_a_trajectory_the_folders_name_decides(root):
    put(root, "pick_cool_then_place_in_recep-A-None-B-9", trajectory=False)
    put(root, "pick_and_wait-A-None-B-9", trajectory=False)
    source = open_source(root, SPLIT)
    assert len(source.task_ids) == 4
    (found,) = (task_id for task_id in source.task_ids if task_id.endswith("-9/trial_T1"))
    assert source.task_type(found) == "pick_cool_then_place_in_recep"


def test_task_types_narrow_the_split(root):
    source = open_source(root, SPLIT)
    wanted = source.task_type(source.task_ids[0])
    assert all(source.task_type(task_id) == wanted for task_id in ids(root, task_types=[wanted]))
    missing = next(task_type for task_type in TASK_TYPES if task_type not in map(source.task_type, source.task_ids))
    with pytest.raises(DataError, match="3 other task type"):
        open_source(root, SPLIT, task_types=[missing])
    with pytest.raises(UnknownName, match="pick_two_obj_and_place"):
        open_source(root, SPLIT, task_types=["pick_two"])
    with pytest.raises(ValueError, match="empty"):
        open_source(root, SPLIT, task_types=[])


@pytest.mark.parametrize(
    ("breaking", "quoted"),
    [
        (lambda folder: (folder / "game.tw-pddl").write_text('{"pddl_domain": "(def'), "truncated"),
        (lambda folder: (folder / "game.tw-pddl").write_text('{"grammar": ""}'), "pddl_domain"),
        (lambda folder: (folder / "game.tw-pddl").write_bytes(b"\xff\xfe\x00"), "JSON"),
        (lambda folder: (folder / "traj_data.json").write_text('{"task_type": "pick'), "truncated"),
        (lambda folder: (folder / "traj_data.json").write_text("{}"), "task_type"),
    ],
)
def test_broken_files_are_refused_or_left_out_and_counted(root, caplog, breaking, quoted):
    folder = put(root, "pick_and_place_simple-A-None-B-7")
    breaking(folder)
    with caplog.at_level(logging.WARNING):
        source = open_source(root, SPLIT, strict=False)
    assert (len(source.task_ids), source.skipped) == (3, 1)
    assert "1 broken of 4" in caplog.text and str(folder) in caplog.text and quoted in caplog.text
    with pytest.raises(DataError, match="1 of 4 trial folders are broken") as caught:
        open_source(root, SPLIT)
    assert str(folder) in str(caught.value) and quoted in str(caught.value)


def test_a_file_that_could_not_be_read_once_is_read_again(root, monkeypatch):
    """Too many open files, a disk that was away: unlike a broken file that is not kept in the list."""
    from atod_envs.alfworld import index

    whole = ids(root)
    index.cache_file(root, SPLIT).unlink()
    load = index.Game.load

    def busy(path):
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            raise DataError(f"{path}: cannot be read") from None

    with monkeypatch.context() as patch:
        patch.setattr(index.Game, "load", busy)
        with pytest.raises(DataError, match="3 of 3 trial folders are broken"):
            open_source(root, SPLIT)
    assert index.Game.load == load and ids(root) == whole


def test_a_foreign_domain_is_quoted(root):
    moon = "(define (domain moon) (:types rock) (:predicates (heavy ?r - rock)))"
    folder = put(root, "pick_and_place_simple-A-None-B-8", game=lambda game: {**game, "pddl_domain": moon})
    with pytest.raises(DataError, match="which the PDDL domain does not declare") as caught:
        open_source(root, SPLIT, strict=True)
    assert str(folder) in str(caught.value)


def test_the_index_is_cached_and_notices_changes(root, monkeypatch):
    first = ids(root)
    looked = []
    from atod_envs.alfworld import index

    examine = index.examine
    monkeypatch.setattr(index, "examine", lambda *arguments: looked.append(arguments[1]) or examine(*arguments))
    assert ids(root) == first and not looked, "nothing has changed, so nothing is read"
    new = put(root, "pick_and_place_simple-A-None-B-5", number=4)
    assert len(ids(root)) == 4 and looked == [new.relative_to(root).as_posix()]
    game = new / "game.tw-pddl"
    game.write_text(game.read_text().replace('"solvable": true', '"solvable": false'))
    assert ids(root) == first
    assert len(looked) == 2
    shutil.rmtree(new.parent)
    assert ids(root) == first and len(looked) == 2
    cache_file(root, SPLIT).write_text("{ this is no index")
    assert ids(root) == first and len(looked) == 5, "a damaged cache is made again"


def test_a_list_of_games_that_was_tampered_with_is_made_again(root):
    first = ids(root)
    cache = cache_file(root, SPLIT)
    whole = cache.read_text()
    for one, other in (("pick_and_place_simple", "pick_cool_then_place_in_recep"), ("", "[" * 100_000)):
        cache.write_text(whole.replace(one, other, 1) if one else other)
        assert ids(root) == first
        assert cache.read_text() == whole, "what the files say is written again"


def test_a_game_that_changes_after_it_was_listed_is_refused(root):
    source = open_source(root, SPLIT)
    task_id = source.task_ids[0]
    path = root / task_id / "game.tw-pddl"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match="has changed since the games were listed"):
        source.game(task_id)
    assert open_source(root, SPLIT).game(task_id).walkthrough == open_source(root, SPLIT).game(task_id).walkthrough
    path.unlink()
    with pytest.raises(DataError, match=r"game\.tw-pddl"):
        source.content(task_id)


@pytest.mark.parametrize("hours", [-1, 1], ids=["older", "from the future"])
def test_a_clock_that_is_set_hides_no_change(root, hours):
    """A file from an hour ahead of the clock, changed to as many bytes, with its time of change put back."""
    source = open_source(root, SPLIT)
    path = root / source.task_ids[0] / "game.tw-pddl"
    then = time.time_ns() + hours * 3600 * 10**9
    os.utime(path, ns=(then, then))
    version = open_source(root, SPLIT).data_version
    text = path.read_text()
    path.write_text(text.replace('", "', '" ,"', 1))
    os.utime(path, ns=(then, then))
    assert open_source(root, SPLIT).data_version != version
    path.write_text(text)
    assert open_source(root, SPLIT).data_version == version


def test_the_index_is_never_written_into_the_data(root):
    before = sorted(path for path in root.rglob("*"))
    ids(root)
    assert sorted(path for path in root.rglob("*")) == before
    assert cache_file(root, SPLIT).is_file()


def test_an_index_that_cannot_be_kept_is_only_a_warning(root, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    monkeypatch.setenv("ATOD_CACHE", str(blocked))
    assert len(ids(root)) == 3
    assert "cannot be kept" in caplog.text


def test_wrong_places_are_named_in_one_line(root, tmp_path):
    for data, said in [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no folder json_2.1.1"),
        (root / "json_2.1.1", "not a folder inside it"),
        (root / "json_2.1.1" / SPLIT, "not a folder inside it"),
    ]:
        with pytest.raises(DataError, match=said) as caught:
            open_source(data, SPLIT)
        assert str(data) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="valid_seen"):
        open_source(root, "valid_sene")
    (root / "json_2.1.1" / "train").mkdir()
    with pytest.raises(DataError, match="no playable game"):
        open_source(root, "train")


def test_which_data_is_used_when_none_is_named(root, tmp_path, monkeypatch):
    assert find_data(None) is None, "no data: the built-in world"
    assert isinstance(open_source(None, "train"), BuiltinSource)
    folder = tmp_path / "home" / ".cache" / "alfworld"
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    assert find_data(None) is None, "importing the published package sets the variable to a folder that need not exist"
    (folder / "json_2.1.1").mkdir(parents=True)
    assert find_data(None) == folder
    monkeypatch.setenv("ALFWORLD_DATA", str(root))
    assert find_data(None) == root
    assert find_data("builtin") is None
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"\$ALFWORLD_DATA"):
        find_data(None)


def test_games_of_a_group_are_compiled_once(root):
    source = open_source(root, SPLIT)
    assert source.game(source.task_ids[0]) is source.game(source.task_ids[0])


def test_the_built_in_world_needs_no_files():
    source = open_source("builtin", "valid_unseen", task_types=["look_at_obj_in_light"])
    assert len(source.task_ids) > 10 and list(source.task_ids) == sorted(source.task_ids)
    task_id = source.task_ids[0]
    assert source.game(task_id).task_type == source.task_type(task_id) == "look_at_obj_in_light"
    with pytest.raises(UnknownName):
        open_source("builtin", "test")


def unpack(realdata, name, target):
    with tarfile.open(realdata / "alfworld" / name) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # as of Python 3.11.4
        archive.extractall(target)


@pytest.mark.parametrize(
    ("archive", "trajectories"), [("alfworld_valid_full", True), ("alfworld_oldgrammar_valid_382", False)]
)
def test_the_published_counts_of_the_evaluation_splits(realdata, tmp_path, archive, trajectories):
    unpack(realdata, f"{archive}.tar.xz", tmp_path)
    for split, count in (("valid_seen", 140), ("valid_unseen", 134)):
        source = open_source(tmp_path, split, strict=True)
        assert len(source.task_ids) == count
        assert (tmp_path / source.task_ids[0] / "traj_data.json").is_file() or not trajectories


def test_the_published_count_of_the_training_split_and_the_time_to_open_it(realdata, tmp_path):
    """In a process of its own: in the suite's, a collection of other tests' garbage costs more than the opening."""
    unpack(realdata, "alfworld_train_games.tar.xz", tmp_path)
    code = """if True:
        import json, sys, time
        from atod_envs.alfworld.data import FolderSource, open_source
        found = []
        for strict in (True, False):
            start = time.process_time()
            source = open_source(sys.argv[1], "train", strict=strict)
            found.append((time.process_time() - start, isinstance(source, FolderSource), source.task_ids))
        print(json.dumps(found))"""
    output = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    (whole, from_folder, first), (seconds, _, again) = json.loads(output.stdout)
    assert from_folder and len(first) == 3553 and again == first
    assert seconds < whole / 17  # 0.5 s where reading all games takes 8.7; measured there: 0.11
    assert os.path.getsize(cache_file(tmp_path, "train")) < 2_000_000
