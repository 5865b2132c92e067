"""`atod data` against a server of our own: whole files or clear errors, whatever the network does."""

import hashlib
import http.server
import io
import json
import threading
import zipfile
from dataclasses import dataclass, field

import pytest

from atod_envs.alfworld.generate import main as generate_games
from atod_envs.datasets import command, download
from atod_envs.datasets.download import RECORD, fetch, read_record, verify
from atod_envs.datasets.sources import DATASETS, Source, bundle
from atod_envs.errors import DataError, UnknownName
from atod_envs.webshop.generate import main as generate_catalogue


@dataclass
class Site:
    """What the server says next: files by path, and faults to be used up one by one."""

    files: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)
    headers: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    url: str = ""

    def source(self, path, **options):
        return Source(f"{self.url}/{path}", path, 1, **options)


@pytest.fixture
def site():
    state = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.lstrip("/")
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            state.requests.append((name, start))
            fault = state.faults.pop(0) if state.faults else None
            if isinstance(fault, int):
                return self.send_error(fault)
            if name.startswith("moved/"):
                self.send_response(302)
                self.send_header("Location", f"/{name.removeprefix('moved/')}")
                for key, value in state.headers.items():
                    self.send_header(key, value)
                return self.end_headers()
            if name not in state.files:
                return self.send_error(404)
            body = state.files[name]
            stamp = state.headers.get("ETag")
            if self.headers.get("If-Range") not in (None, stamp):
                start = 0
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if fault == "html":
                body = b"<html>quota exceeded</html>"
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if stamp:
                self.send_header("ETag", stamp)
            self.send_header(
                "Content-Type", "text/html; charset=utf-8" if fault == "html" else "application/octet-stream"
            )
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else rest)
            if fault == "cut":
                self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def archive(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)
    return packed.getvalue()


BODY = bytes(range(256)) * 4000


def test_a_download_is_whole_recorded_and_not_repeated(site, tmp_path):
    site.files["a/b.json"] = BODY
    seen = []
    done = fetch(site.source("a/b.json"), tmp_path, report=lambda *args: seen.append(args))
    assert (tmp_path / "a/b.json").read_bytes() == BODY and done.sha256 == hashlib.sha256(BODY).hexdigest()
    assert read_record(tmp_path)["a/b.json"] == done and seen[-1] == ("a/b.json", len(BODY), len(BODY))
    fetch(site.source("a/b.json"), tmp_path)
    assert len(site.requests) == 1 and not list(tmp_path.rglob("*.part"))


def test_two_that_download_one_file_together_get_it_once_and_whole(site, tmp_path):
    """The other comes in the middle of the transfer: on its own it would go on with the same part."""
    site.files["a/b.json"] = BODY
    others = []

    def come(*_):
        if not others:
            others.append(threading.Thread(target=fetch, args=(site.source("a/b.json"), tmp_path)))
            others[0].start()
            others[0].join(0.2)

    done = fetch(site.source("a/b.json"), tmp_path, report=come)
    others[0].join(60)
    assert done == read_record(tmp_path)["a/b.json"] and done.sha256 == hashlib.sha256(BODY).hexdigest()
    assert (tmp_path / "a/b.json").read_bytes() == BODY and site.requests == [("a/b.json", 0)]


def test_a_broken_connection_is_resumed_where_it_broke(site, tmp_path):
    site.files["x"] = BODY
    site.faults = ["cut", 503, "cut"]
    fetch(site.source("x"), tmp_path, pause=0)
    assert (tmp_path / "x").read_bytes() == BODY
    starts = [start for _, start in site.requests]
    assert starts[0] == 0 and starts[1] == starts[2] == len(BODY) // 2 and starts[3] > starts[2]


def test_a_dead_server_ends_in_advice_and_keeps_what_came(site, tmp_path):
    site.files["x"] = BODY
    site.faults = ["cut"] + [500] * 9
    with pytest.raises(DataError, match="run the command again to go on"):
        fetch(site.source("x"), tmp_path, pause=0)
    assert not (tmp_path / "x").exists() and (tmp_path / "x.part").stat().st_size == len(BODY) // 2
    site.faults = []
    fetch(site.source("x"), tmp_path, pause=0)
    assert (tmp_path / "x").read_bytes() == BODY


def half(site, folder, name="x"):
    """Half of a file is there, and the connection is gone."""
    site.faults = ["cut"] + [500] * 9
    with pytest.raises(DataError, match="run the command again to go on"):
        fetch(site.source(name), folder, pause=0)
    site.faults, site.requests[:] = [], []


@pytest.mark.parametrize("stamped", [True, False])
def test_halves_of_two_files_are_never_joined(site, tmp_path, stamped):
    """Changed on the server meanwhile: a stamp says so, without one another length does."""
    site.headers = {"ETag": '"old"'} if stamped else {}
    site.files["x"] = BODY
    half(site, tmp_path)
    other = bytes(255 - byte for byte in BODY) if stamped else BODY[:-7]
    site.files["x"], site.headers = other, {"ETag": '"new"'} if stamped else {}
    fetch(site.source("x"), tmp_path, pause=0)
    assert (tmp_path / "x").read_bytes() == other
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


def test_a_mirror_does_not_go_on_with_the_publishers_part(site, tmp_path):
    site.files |= {"x": BODY, "mirror": BODY[::-1]}
    half(site, tmp_path)
    fetch(Source(f"{site.url}/mirror", "x", 1), tmp_path, pause=0)
    assert (tmp_path / "x").read_bytes() == BODY[::-1] and site.requests == [("mirror", 0)]


def test_a_part_that_is_whole_already_is_kept(site, tmp_path):
    """The process was killed after the last byte."""
    site.files["x"] = BODY
    half(site, tmp_path)
    (tmp_path / "x.part").write_bytes(BODY)
    fetch(site.source("x"), tmp_path, pause=0)
    assert (tmp_path / "x").read_bytes() == BODY and site.requests == [("x", len(BODY))]
    half(site, tmp_path / "again")
    (tmp_path / "again" / "x.part").write_bytes(BODY + b"more")
    fetch(site.source("x"), tmp_path / "again", pause=0)
    assert (tmp_path / "again" / "x").read_bytes() == BODY


def test_an_unreachable_host_says_so(tmp_path):
    with pytest.raises(DataError, match="cannot be reached"):
        fetch(Source("http://127.0.0.1:9/x", "x", 1), tmp_path, pause=0)


@pytest.mark.parametrize("fault, words", [(404, "answered 404"), (403, "answered 403"), ("html", "web page instead")])
def test_refusals_are_not_retried(site, tmp_path, fault, words):
    site.files["x"] = BODY
    site.faults = [fault]
    with pytest.raises(DataError, match=words):
        fetch(site.source("x"), tmp_path, pause=0)
    assert len(site.requests) == 1 and not (tmp_path / "x").exists()


def test_the_publishers_checksum_is_enforced(site, tmp_path):
    site.files["x"] = BODY
    site.headers = {"X-Linked-Etag": f'"{hashlib.sha256(BODY).hexdigest()}"'}
    fetch(Source(f"{site.url}/moved/x", "x", 1), tmp_path / "good")
    site.headers = {"X-Linked-Etag": '"' + "0" * 64 + '"'}
    with pytest.raises(DataError, match="publisher's server says 0000"):
        fetch(Source(f"{site.url}/moved/x", "x", 1), tmp_path / "bad")
    assert not list((tmp_path / "bad").iterdir())


def test_a_colleagues_record_is_enforced(site, tmp_path):
    site.files["x"] = BODY
    with pytest.raises(DataError, match="record to follow says abc"):
        fetch(site.source("x"), tmp_path, expected="abc")
    fetch(site.source("x"), tmp_path)
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch(site.source("x"), tmp_path, expected="abc")


def test_a_full_disk_is_noticed_before_the_download(site, tmp_path, monkeypatch):
    site.files["x"] = BODY
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="make room or give another folder"):
        fetch(site.source("x"), tmp_path)


def test_archives_are_unpacked_and_their_files_verified(site, tmp_path):
    site.files["z.zip"] = archive({"d/one.txt": "1", "d/two.txt": "2"})
    done = fetch(site.source("z.zip", unpack=True), tmp_path)
    assert (tmp_path / "d/one.txt").read_text() == "1" and set(done.files) == {"d/one.txt", "d/two.txt"}
    assert verify(tmp_path) == [] and not (tmp_path / "z.zip").exists()
    (tmp_path / "d/one.txt").write_text("changed")
    (tmp_path / "d/two.txt").unlink()
    assert sorted(verify(tmp_path)) == [
        f"{tmp_path / 'd/one.txt'} was changed since it was downloaded",
        f"{tmp_path / 'd/two.txt'} is missing",
    ]
    fetch(site.source("z.zip", unpack=True), tmp_path)
    assert verify(tmp_path) == [], "a missing file brings the archive back"


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_archive_that_is_interrupted_leaves_nothing_of_a_split(site, tmp_path, monkeypatch, how):
    site.files["z.zip"] = archive({f"d/train/{n}/game": "1" for n in range(5)})
    extract, left = zipfile.ZipFile.extract, [3]

    def stop(self, member, path):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return extract(self, member, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(zipfile.ZipFile, "extract", stop)
        if how == "killed":  # what is cleared up stays
            patched.setattr(download.shutil, "rmtree", lambda *_, **__: None)
        fetch(site.source("z.zip", unpack=True), tmp_path)
    assert not (tmp_path / "d").exists() and read_record(tmp_path) == {}
    site.files["z.zip"] = archive({"d/train/0/game": "2", "d/valid/0/game": "2"})
    (tmp_path / "z.zip.part").write_bytes(site.files["z.zip"])
    fetch(site.source("z.zip", unpack=True), tmp_path)
    site.files["y.zip"] = archive({"d/train/0/about": "3", "d/train/0/game": "4", "d/test/0/game": "5"})
    fetch(site.source("y.zip", unpack=True), tmp_path)
    held = {path.relative_to(tmp_path / "d").as_posix(): path.read_text() for path in tmp_path.rglob("d/*/0/*")}
    assert held == {"train/0/game": "4", "train/0/about": "3", "valid/0/game": "2", "test/0/game": "5"}
    assert {path.name for path in tmp_path.iterdir()} == {"d", RECORD}


def _linked():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr("good.txt", "1")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
    return packed.getvalue()


@pytest.mark.parametrize(
    "content, words",
    [
        (_linked(), "holds a link"),
        (archive({"good.txt": "1", "/abs.txt": "!"}), "outside the data folder"),
        (archive({"good.txt": "1", "a/../../evil.txt": "!"}), "outside the data folder"),
        (archive({"good.txt": "1" * 500})[:-200], "not a zip archive"),
    ],
    ids=["link", "absolute", "dots", "cut"],
)
def test_nothing_of_a_hostile_archive_is_written(site, tmp_path, content, words):
    site.files["z.zip"] = content
    with pytest.raises(DataError, match=words):
        fetch(site.source("z.zip", unpack=True), tmp_path / "data")
    assert not (tmp_path / "data" / "good.txt").exists()


@pytest.mark.parametrize("content, words", [(b"no zip", "not a zip archive"), (None, "outside the data folder")])
def test_a_hostile_or_broken_archive_is_not_used(site, tmp_path, content, words):
    site.files["z.zip"] = archive({"../evil.txt": "!"}) if content is None else content
    with pytest.raises(DataError, match=words):
        fetch(site.source("z.zip", unpack=True), tmp_path / "data")
    assert not (tmp_path / "evil.txt").exists()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No data of the machine's user, and an empty cache."""
    for data in DATASETS.values():
        monkeypatch.delenv(data.variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_get_status_verify_build_of_alfworld(site, tmp_path, alone, monkeypatch, capsys):
    made = tmp_path / "made"
    for split in ("train", "valid_seen"):
        generate_games(["--out", str(made), "--games", "2", "--seed", "1", "--size", "small", "--split", split])
    every = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    games = {name: data for name, data in every.items() if name.endswith("game.tw-pddl")}
    first, second = (source.path for source in bundle("alfworld", None).sources)
    site.files[first] = archive(games)
    site.files[second] = archive({name: data for name, data in every.items() if name not in games})
    assert command.main(["get", "alfworld", "--to", "d", "--mirror", site.url]) == 0
    monkeypatch.setenv("ALFWORLD_DATA", "d")
    assert command.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "train        2 games" in out and "valid_unseen missing" in out and f"downloaded  {first}" in out
    assert "built in" in out, "WebShop and Search-QA have no data"
    assert command.main(["build", "alfworld"]) == 0 and command.main(["verify", "alfworld"]) == 0
    assert "all of 2 downloads are unchanged" in capsys.readouterr().out
    next((tmp_path / "d").rglob("traj_data.json")).write_text("{}")
    assert command.main(["verify", "alfworld"]) == 1
    assert "was changed since it was downloaded" in capsys.readouterr().out


def test_get_and_build_of_webshop_and_searchqa(site, tmp_path, alone, monkeypatch, capsys):
    generate_catalogue(["--products", "30", "--out", str(tmp_path / "made")])
    sources = bundle("webshop", "small").sources
    for source in sources:
        stem = source.path.removesuffix("_1000.json").removesuffix(".json")
        site.files[source.path] = next((tmp_path / "made").glob(f"{stem}*.json")).read_bytes()
    assert command.main(["get", "webshop", "--bundle", "small", "--to", "shop", "--mirror", site.url]) == 0
    monkeypatch.setenv("WEBSHOP_DATA", "shop")
    assert command.main(["status"]) == 0
    assert "not built yet: atod data build webshop" in capsys.readouterr().out
    assert command.main(["build", "webshop"]) == 0
    assert command.main(["status"]) == 0
    assert "30 products, version products/" in capsys.readouterr().out

    for source in bundle("searchqa", "questions").sources:
        split = source.path.split("/")[1].removesuffix(".jsonl")
        row = {"id": f"{split}_0", "question": "Who?", "golden_answers": ["me"]}
        site.files[source.path] = (json.dumps(row) + "\n").encode()
    assert command.main(["get", "searchqa", "--to", "qa", "--mirror", site.url]) == 0
    monkeypatch.setenv("SEARCHQA_DATA", "qa")
    assert command.main(["status"]) == 0
    out = capsys.readouterr().out
    assert "musique            dev    1 questions" in out and "corpus             missing" in out

    like = tmp_path / "shop" / RECORD
    assert command.main(["get", "webshop", "--to", "other", "--mirror", site.url, "--like", str(like)]) == 0
    site.files[sources[0].path] += b" "
    assert command.main(["get", "webshop", "--to", "third", "--mirror", site.url, "--like", str(like)]) == 1
    assert "record to follow says" in capsys.readouterr().err
    rows = json.loads(like.read_text())
    del rows[sources[1].path]
    like.write_text(json.dumps(rows))
    assert command.main(["get", "webshop", "--to", "fourth", "--mirror", site.url, "--like", str(like)]) == 1
    assert f"the record has no checksum of {sources[1].path};" in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists(), "nothing is downloaded"


def test_wrong_folder_and_names_are_answered(alone, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WEBSHOP_DATA", "nowhere")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert command.main(["status"]) == 1
    out = capsys.readouterr().out
    assert "problem     $WEBSHOP_DATA='nowhere'" in out and "is not an ALFWorld data root" in out
    assert command.main(["verify"]) == 1
    said = capsys.readouterr()
    assert "error: alfworld: " in said.err and "error: webshop: $WEBSHOP_DATA='nowhere'" in said.err
    assert "searchqa: built in, nothing to verify" in said.out, "the others are looked at all the same"
    assert command.main(["get", "webshop", "--bundle", "smal"]) == 1
    assert "did you mean 'small'" in capsys.readouterr().err
    with pytest.raises(UnknownName):
        bundle("webshop", "huge")


def test_every_source_has_its_own_place():
    for data in DATASETS.values():
        for part in data.bundles.values():
            paths = [source.path for source in part.sources]
            assert len(set(paths)) == len(paths) and all(s.url.startswith("https://") for s in part.sources)
