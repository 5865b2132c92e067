"""Files that may hold anything: every reader reads what is there, or names the file and place that it cannot read."""

import errno
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import REPOSITORY

from atod_envs import caches
from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.generate import generate
from atod_envs.alfworld.index import TRAJECTORY_FILE, read_trajectory
from atod_envs.datasets.download import RECORD, read_record
from atod_envs.errors import DataError
from atod_envs.files import append_line, json_lines, load_array, parquet_rows, read_json, read_object, read_text
from atod_envs.retrieval import build
from atod_envs.retrieval.bm25 import BM25Index
from atod_envs.retrieval.corpus import Corpus, read_passages
from atod_envs.searchqa.questions import load_questions
from atod_envs.trajectory import StopReason, Trajectory, Turn, read_jsonl, read_parquet, write_jsonl, write_parquet
from atod_envs.webshop.catalogue.build import build_store
from atod_envs.webshop.catalogue.files import find_files
from atod_envs.webshop.catalogue.store import Store
from atod_envs.webshop.generate import CatalogueSpec, write_catalogue

CHANGES = 120
DEEP = "[" * 100_000
DIGITS = "1" * 5_000


def a_trajectory(number=0):
    turn = Turn(0, "o", ("a", "b"), (1, 2, 3), (4, 5), (-0.5, -1.0), "<action>a</action>", "a", True, True, 0.5)
    labels = {"toy/kind": "fruit"}
    return Trajectory(
        "toy", f"t{number}", "train", "say", "g", 7, (turn,), "end", True, 1.0, StopReason.SUCCESS, 3, labels, "v"
    )


def changed(data, rng):
    """Some bytes changed, cut off, doubled or left out."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(5)
        if way == 0:
            del data[at:]
        elif way == 1:
            del data[at : at + rng.randint(1, 20)]
        elif way == 2:
            data[at:at] = rng.choice(
                [b"[" * 2000, DIGITS.encode(), b"\xff\xfe", b"\xef\xbb\xbf", b"null", b'"', b"{}", b"\x00", b"NaN"]
            )
        elif at < len(data):
            data[at] = rng.randrange(256) if way == 3 else data[at] ^ 1 << rng.randrange(8)
        if not data:
            break
    return bytes(data)


def questions_file(path):
    rows = [
        {"id": f"train_{n}", "question": "who?", "golden_answers": ["a", "b"], "gold_titles": ["t"]} for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def questions_list(path):
    path.write_text(json.dumps([{"question": "who?", "answer": {"value": "a", "aliases": ["b"]}}] * 4))


def passages_file(path):
    path.write_text("\n".join(json.dumps({"id": str(n), "title": "t", "text": "x"}) for n in range(6)))


def packed(write):
    def write_packed(path):
        plain = path.with_suffix("")
        write(plain)
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))

    return write_packed


def rows_parquet(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([{"question": f"q{n}?", "golden_answers": ["a"], "id": f"dev_{n}"} for n in range(9)]),
        path,
    )


def trajectories_parquet(path):
    pytest.importorskip("pyarrow")
    write_parquet(path, [a_trajectory(n) for n in range(3)])


def a_game(path):
    path.write_text(json.dumps(generate("train", 0, seed=3, size="small").game))


READERS = {
    "trajectories.jsonl": (
        lambda path: write_jsonl(path, [a_trajectory(n) for n in range(3)]),
        lambda path: list(read_jsonl(path)),
    ),
    "trajectories.jsonl.gz": (
        lambda path: write_jsonl(path, [a_trajectory(n) for n in range(3)]),
        lambda path: list(read_jsonl(path)),
    ),
    "trajectories.parquet": (trajectories_parquet, lambda path: list(read_parquet(path))),
    "questions.jsonl": (questions_file, load_questions),
    "questions.jsonl.gz": (packed(questions_file), load_questions),
    "questions.json": (questions_list, load_questions),
    "questions.parquet": (rows_parquet, load_questions),
    "corpus.jsonl": (passages_file, lambda path: list(read_passages(path))),
    "corpus.jsonl.gz": (packed(passages_file), lambda path: list(read_passages(path))),
    "game.tw-pddl": (a_game, Game.load),
    TRAJECTORY_FILE: (
        lambda path: path.write_text(json.dumps({"task_type": "x", "a": [1, {"b": None}]})),
        lambda path: read_trajectory(path.parent),
    ),
    RECORD: (
        lambda path: path.write_text(json.dumps({"f": {"url": "u", "sha256": "0", "size": 3, "files": {}}})),
        lambda path: read_record(path.parent),
    ),
    "array.npy": (lambda path: np.save(path, np.arange(100)), load_array),
}


@pytest.mark.parametrize("name", READERS)
def test_random_changes_end_in_a_value_or_in_the_one_error(name, tmp_path):
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    read(path)
    whole, rng = path.read_bytes(), random.Random(name)
    refused = 0
    for _ in range(CHANGES):
        data = changed(whole, rng)
        path.write_bytes(data)
        try:
            read(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) or name in str(error), error
            assert "\n" not in str(error)
    assert refused > CHANGES // 10


@pytest.mark.parametrize("part", ["items_shuffle", "items_ins_v2", "items_human_ins"])
def test_random_changes_of_a_catalogue_end_in_a_store_or_in_the_one_error(part, tmp_path):
    source = tmp_path / "source"
    write_catalogue(CatalogueSpec(12, seed=1), source)
    path = next(source.glob(f"{part}*.json"))
    whole, rng = path.read_bytes(), random.Random(part)
    refused = 0
    for number in range(30):
        path.write_bytes(changed(whole, rng))
        try:
            build_store(find_files(source), tmp_path / f"store{number}")
        except DataError as error:
            refused += 1
            assert path.name in str(error)
    assert refused > 5


def test_random_changes_of_a_store_are_noticed(tmp_path):
    write_catalogue(CatalogueSpec(12, seed=1), tmp_path / "source")
    folder = tmp_path / "store"
    build_store(find_files(tmp_path / "source"), folder)
    rng = random.Random(5)
    for path in sorted(file for file in folder.rglob("*") if file.is_file() and "bm25" not in file.parts):
        whole = path.read_bytes()
        for _ in range(6):
            path.write_bytes(data := changed(whole, rng))
            if data != whole:
                with pytest.raises(DataError, match="delete the folder"):
                    Store(folder)
        path.write_bytes(whole)
    assert len(Store(folder)) == 12


def an_index(root):
    passages = [(str(n), f"passage {n} of things") for n in range(50)]
    Corpus.write(passages, root / "corpus")
    BM25Index.build(passages, directory=root / "bm25")
    return (root / "corpus", Corpus.open), (root / "bm25", BM25Index.open)


def test_random_changes_of_an_index_are_noticed(tmp_path):
    rng = random.Random(6)
    for folder, open_it in an_index(tmp_path):
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            for _ in range(8):
                path.write_bytes(
                    data := whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else changed(whole, rng)
                )
                if data != whole:
                    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
                        open_it(folder)
            path.write_bytes(whole)
            open_it(folder)


@pytest.mark.parametrize("large", [False, True])
def test_a_changed_value_is_noticed_whatever_the_size_and_the_clock(large, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "SMALL", 0 if large else 1 << 20)
    for folder, open_it in an_index(tmp_path):
        path = next(folder / name for name in ("impacts.npy", "passage_bytes.bin") if (folder / name).exists())
        whole, status = path.read_bytes(), path.stat()
        time.sleep(0.02)  # file systems tell times in steps of some milliseconds
        path.write_bytes(bytes([*whole[:-3], whole[-3] ^ 1, *whole[-2:]]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(DataError, match=f"{path.name} is damaged"):
            open_it(folder)
        path.write_bytes(whole)
        open_it(folder)


def test_a_large_index_is_read_whole_only_where_it_may_have_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caches, "SMALL", 0)
    (_, _), (folder, open_it) = an_index(tmp_path / "wiki")
    read, checksum = [], caches.file_checksum
    monkeypatch.setattr(caches, "file_checksum", lambda path: read.append(path.name) or checksum(path))
    open_it(folder)
    assert not read  # as it was built
    shutil.copytree(tmp_path / "wiki", tmp_path / "copy")
    for expected in (13, 0):
        open_it(tmp_path / "copy" / "bm25")
        assert len(read) == expected
        read.clear()
    (tmp_path / "copy" / "bm25" / "checked.json").write_text("[" * 9)
    open_it(tmp_path / "copy" / "bm25")
    assert len(read) == 13
    assert build.main(["--out", str(tmp_path / "copy"), "--verify"]) == 0
    assert "bm25: 13 files as built" in capsys.readouterr().out
    (tmp_path / "copy" / "corpus" / "id_numbers.npy").unlink()
    assert build.main(["--out", str(tmp_path / "copy"), "--verify"]) == 1
    assert "id_numbers.npy is missing" in capsys.readouterr().err


def test_an_index_from_before_there_were_checksums_opens(tmp_path, capsys):
    for folder, open_it in an_index(tmp_path):
        path = folder / ("corpus.json" if folder.name == "corpus" else "index.json")
        about = json.loads(path.read_text())
        path.write_text(json.dumps({name: about[name] for name in about if name not in ("files", "checksum")}))
        assert len(open_it(folder)) == 50
    assert build.main(["--out", str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().out.count("before there were checksums") == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (DEEP.encode(), "nested too deeply"),
        (f'{{"a": {DIGITS}}}'.encode(), "broken JSON"),
        (b'{"a": "\xff"}', "in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16; save the file as UTF-8"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found null"),
        (b"7", "expected a JSON object, found a number"),
        (b'{"a": 1', "broken JSON"),
        (b'{"b": {"a": 1, "c": 2, "a": 1}}', "the field 'a' stands twice"),
    ],
)
def test_what_is_not_understood_is_named(content, message, tmp_path):
    for name, read in (("a.json", read_object), ("a.jsonl", lambda path: list(json_lines(path)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value) and (name == "a.json" or "line 1" in str(caught.value))


def test_byte_order_marks_windows_line_ends_and_blank_lines_are_understood(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x\r\n"))
    assert read_text(tmp_path / "a.txt.gz") == "x\r\n"


def test_compressed_files_that_are_cut_or_changed_are_named(tmp_path):
    data = gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)
    path = tmp_path / "a.jsonl.gz"
    flipped = bytes([*data[:40], data[40] ^ 4, *data[41:]])
    for broken in (data[:-4], data[:20], b"", flipped, b"plain text"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz, line \d+: broken JSON"):
            list(json_lines(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(json_lines(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


def test_an_array_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(99))
    monkeypatch.setattr(
        np, "load", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files"))
    )
    with pytest.raises(DataError, match=r"a\.npy: cannot be read \(Too many open files\); expected a readable file$"):
        load_array(tmp_path / "a.npy", "delete the folder")


def test_a_line_that_cannot_be_written_whole_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    append_line(path, '{"a": 1}')
    code = f"""if True:
        import resource, signal
        from pathlib import Path
        from atod_envs.files import append_line
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            append_line(Path({str(path)!r}), "x" * 99)
        except OSError as error:
            print(error.strerror)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "File too large\n", done.stderr
    append_line(path, '{"a": 2}')
    assert [row for _, row in json_lines(path)] == [{"a": 1}, {"a": 2}]


def test_a_consumers_error_is_not_taken_for_the_files(tmp_path):
    pytest.importorskip("pyarrow")
    rows_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="mine"):
        for _ in parquet_rows(tmp_path / "a.parquet"):
            raise ValueError("mine")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": "7"}, "'seed' is '7'; expected whole number"),
        ({"success": 1}, "'success' is 1; expected true or false"),
        ({"score": float("nan")}, "'score' is nan; expected number"),
        ({"labels": {"a": 1}}, "expected texts by name"),
        ({"turns": {}}, "'turns' is {}; expected list"),
        ({"turns": [1]}, "turn 0 is 1"),
        ({"stop_reason": "tired"}, "tired"),
        ({"extra": 1}, "extra"),
        ({"schema": True}, "schema True"),
    ],
)
def test_a_trajectory_with_a_field_of_another_kind_is_refused(change, message, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [a_trajectory()])
    record = json.loads((tmp_path / "t.jsonl").read_text())
    (tmp_path / "t.jsonl").write_text(json.dumps({**record, **change}))
    with pytest.raises(DataError, match=message) as caught:
        list(read_jsonl(tmp_path / "t.jsonl"))
    assert "t.jsonl, line 1" in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [("index", 1), ("prompt_shared", 5), ("response_ids", [4, "5"]), ("logprobs", [-1]), ("prompt_ids", None)],
)
def test_a_turn_that_does_not_fit_is_refused(field, value, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [a_trajectory()])
    record = json.loads((tmp_path / "t.jsonl").read_text())
    record["turns"][0][field] = value
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"t\.jsonl, line 1"):
        list(read_jsonl(tmp_path / "t.jsonl"))


def test_no_duration_is_taken_from_a_clock_that_can_be_set():
    """A clock that is set by an hour ends no wait, expires no lease and changes no measured time."""
    wall = re.compile(r"\btime\.time(_ns)?\(|from time import|datetime\.(now|utcnow|today)\(")
    files = [path for room in ("atod_envs", "agents", "atod_algos") for path in (REPOSITORY / room).rglob("*.py")]
    found = [str(path) for path in files if wall.search(path.read_text(encoding="utf-8"))]
    assert len(files) > 250 and found == []
