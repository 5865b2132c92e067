"""Loaders of the public forms, ids, splits, mixtures and panels."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from atod_envs.errors import DataError, UnknownName
from atod_envs.searchqa.questions import DATASETS, Question, load_questions
from atod_envs.searchqa.sampling import QuestionSet, parse_datasets, purposes, select, summarise
from atod_envs.searchqa.sources import load_tasks


def test_the_real_files(realdata):
    folder = realdata / "searchqa"
    questions = load_questions(folder)
    assert Counter(question.dataset for question in questions) == {
        "nq": 1000,
        "triviaqa": 1000,
        "popqa": 1000,
        "hotpotqa": 1300,
        "2wikimultihopqa": 700,
        "musique": 734,
        "bamboogle": 125,
    }
    assert sum(bool(question.gold_titles) for question in questions) == 700
    for name, dataset, split, count in (
        ("nq_test_3610.json", "nq", "test", 3610),
        ("hotpotqa_dev_7405.json.gz", "hotpotqa", "dev", 7405),
        ("musique_dev_2417.json", "musique", "dev", 2417),
        ("2wikimultihopqa_dev_12576.json.gz", "2wikimultihopqa", "dev", 12576),
        ("bamboogle_125.jsonl", "bamboogle", "test", 125),
    ):
        rows = load_questions(folder / name)
        assert len(rows) == count
        assert {(row.dataset, row.split) for row in rows} == {(dataset, split)}
        assert all(row.text and row.answers for row in rows)


def test_ids_agree_between_files(realdata):
    """A question has the same id in the full set and in the sample."""
    folder = realdata / "searchqa"
    sample = {row.question_id: row.text for row in load_questions(folder / "questions.jsonl")}
    for name, common in (
        ("hotpotqa_dev_7405.json.gz", 700),
        ("2wikimultihopqa_dev_12576.json.gz", 700),
        ("musique_dev_2417.json", 634),
        ("bamboogle_125.jsonl", 125),
    ):
        both = [row for row in load_questions(folder / name) if row.question_id in sample]
        assert len(both) == common
        assert all(sample[row.question_id] == row.text for row in both)


def test_flashrag_folders(tmp_path):
    for dataset, split, texts in (("nq", "train", "ab"), ("nq", "test", "c"), ("popqa", "test", "d")):
        (tmp_path / dataset).mkdir(exist_ok=True)
        rows = [{"id": f"{split}_{n}", "question": t, "golden_answers": [t.upper()]} for n, t in enumerate(texts)]
        (tmp_path / dataset / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wiki-18.jsonl").write_text(json.dumps({"id": "0", "contents": '"T"\ntext'}))
    found = load_questions(tmp_path)
    assert {(q.question_id, q.dataset, q.split, q.answers) for q in found} == {
        ("nq_train_0", "nq", "train", ("A",)),
        ("nq_train_1", "nq", "train", ("B",)),
        ("nq_test_0", "nq", "test", ("C",)),
        ("popqa_test_0", "popqa", "test", ("D",)),
    }


def test_links_are_followed_and_nothing_is_missed(tmp_path):
    for dataset in ("nq", "popqa"):
        (tmp_path / dataset).mkdir()
        (tmp_path / dataset / "test.jsonl").write_text(json.dumps({"question": dataset, "answer": "A"}))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "nq").symlink_to(tmp_path / "nq")
    (folder / "popqa").symlink_to(tmp_path / "popqa")
    assert [question.dataset for question in load_questions(folder)] == ["nq", "popqa"]
    for place, target, said in (
        (folder / "hotpotqa", tmp_path / "gone", r"hotpotqa: cannot be read \(No such file"),
        (folder / "musique.jsonl", "musique.jsonl", r"musique\.jsonl: cannot be read \(Too many levels"),
        (tmp_path / "nq" / "again", folder, "again is a link to a folder that it lies in"),
    ):
        place.symlink_to(target)
        with pytest.raises(DataError, match=said):
            load_questions(folder)
        place.unlink()


def test_search_r1_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = [
        {
            "id": f"train_{n}",
            "data_source": source,
            "question": f"q{n}?",
            "golden_answers": [f"a{n}", "b"],
            "reward_model": {"ground_truth": {"target": [f"a{n}", "b"]}, "style": "rule"},
            "extra_info": {"index": n, "split": "train"},
        }
        for n, source in enumerate(["nq", "hotpotqa"])
    ]
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "train.parquet")
    processed = [
        {
            "data_source": "searchR1_" + row["data_source"],
            "prompt": [{"role": "user", "content": "Answer the given question: " + row["question"]}],
            "reward_model": row["reward_model"],
            "extra_info": {"index": row["extra_info"]["index"], "split": "train", "question": row["question"]},
        }
        for row in raw
    ]
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(processed), tmp_path / "p" / "train.parquet")
    expected = [
        Question("nq_train_0", "nq", "train", "q0?", ("a0", "b")),
        Question("hotpotqa_train_1", "hotpotqa", "train", "q1?", ("a1", "b")),
    ]
    assert load_questions(tmp_path / "train.parquet") == expected
    assert load_questions(tmp_path / "p" / "train.parquet") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '{"question": "x"}', "expected a question and its answers"),
        ("q.jsonl", '{"question": "x", "answer": "y"}\n{broken', "line 2"),
        ("q.jsonl", "[1]", "expected a JSON object"),
        ("q.json", '{"a": 1}', "expected a list"),
        ("q.json", "[", "broken JSON"),
        (
            "q.jsonl",
            '{"id": "k", "question": "x", "answer": "y"}\n{"id": "k", "question": "z", "answer": "y"}',
            "'k' occurs twice",
        ),
        ("q.parquet", "PAR1", "Parquet"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_questions(tmp_path / name)
    assert name in str(caught.value)


def test_a_truncated_gzip_is_named(tmp_path):
    data = gzip.compress(b'{"question": "x", "answer": "y"}\n' * 100)
    (tmp_path / "q.jsonl.gz").write_bytes(data[:-20])
    with pytest.raises(DataError, match="broken JSON lines"):
        load_questions(tmp_path / "q.jsonl.gz")


ROW = {"question": "who?"}


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": {"text": ["X"], "answer_start": [3]}}, ("X",)),
        ({"answers": {"text": ["X", "Y"], "answer_start": [3, 9]}}, ("X", "Y")),
        (
            {"answer": {"value": "X", "aliases": ["Y", "X"], "normalized_value": "x", "type": "WikipediaEntity"}},
            ("X", "Y"),
        ),
        ({"answers": [{"text": "a", "answer_start": 3}, {"text": "b"}]}, ("a", "b")),
        ({"answer": "X", "answer_aliases": ["Y", "Z"]}, ("X", "Y", "Z")),
        ({"answer": "X", "answers": ["X"], "golden_answers": ["X"]}, ("X",)),
        ({"golden_answers": ["a", "b"], "reward_model": {"ground_truth": {"target": ["b", "a"]}}}, ("a", "b")),
        ({"reward_model": {"ground_truth": "X"}}, ("X",)),
        ({"answer": "X", "answers": [], "golden_answers": None}, ("X",)),
    ],
)
def test_the_published_forms_of_answers_are_read(tmp_path, row, answers):
    (tmp_path / "q.jsonl").write_text(json.dumps({**ROW, **row}))
    assert load_questions(tmp_path / "q.jsonl")[0].answers == answers


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["a", None]}, "answers: expected text that is not empty, found None"),
        ({"answers": ["a", " "]}, "found ' '"),
        ({"answer": 42}, "expected a list of texts, found 42"),
        ({"answers": [True]}, "found True"),
        ({"answers": {"a": "b"}}, "answers: expected text, a list of texts"),
        ({"answers": {"text": []}}, "expected"),
        ({"answers": {"text": {"x": 1}}}, "expected text"),
        ({"answer": {"value": "X", "aliases": "Y"}}, "expected a list of texts, found 'Y'"),
        ({"answer": "X", "answer_aliases": ["Y", 3]}, "answer_aliases: expected text that is not empty, found 3"),
        ({"answer": "X", "golden_answers": ["Y"]}, "expected one set of answers"),
        ({"answer": "X", "gold_titles": "abc"}, "gold_titles: expected a list of texts, found 'abc'"),
        ({"answer": "X", "split": "tets"}, "split is 'tets'; expected train, dev or test"),
        ({"answer": "X", "id": 1.5}, "id is 1.5"),
        ({"answer": "X", "id": True}, "id is True"),
        ({"answer": "X", "dataset": 3}, "dataset: expected text"),
        ({"question": ["who?"], "answer": "X"}, "expected a question"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_row(tmp_path, row, message):
    good = {**ROW, "answer": "X", "id": "one"}
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**ROW, **row}))
    with pytest.raises(DataError, match=message) as caught:
        load_questions(tmp_path / "q.jsonl")
    assert "q.jsonl, line 2" in str(caught.value)


def test_an_unanswered_list_is_refused(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{**ROW, "answer": "a"}, {**ROW, "answers": []}]))
    with pytest.raises(DataError, match=r"q\.json, row 2: expected a question and its answers"):
        load_questions(tmp_path / "q.json")


def _two_sets(folder, content):
    for name in ("nq", "hotpotqa"):
        (folder / name).mkdir(parents=True)
    rows = [{"id": f"test_{n}", "question": f"q{n}?", "golden_answers": ["a"]} for n in range(10)]
    text = "\n".join(map(json.dumps, rows))
    (folder / "nq" / "test.jsonl").write_text(text)
    (folder / "hotpotqa" / "test.jsonl").write_bytes(content(text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16; save the file as UTF-8"),
        (lambda text: text[:20].encode(), "broken JSON"),
        (lambda text: text[:-20].encode(), "line 10: broken JSON"),
        (lambda text: b"", "expected questions, found no row"),
        (lambda text: b"[" * 100_000, "nested too deeply"),
        (lambda text: b"[1]", "expected a JSON object"),
        (lambda text: b'{"answers": ["a"]}', "expected a question"),
        (lambda text: b'{"question": "x"}', "expected a question and its answers"),
    ],
    ids=["utf-16", "torn", "torn later", "empty", "deep", "list", "no question", "no answer"],
)
def test_a_data_set_in_a_folder_is_never_dropped(tmp_path, content, message):
    _two_sets(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        load_questions(tmp_path)
    assert "hotpotqa" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("hotpot_dev_distractor_v1.json", "hotpotqa"),
        ("musique_ans_v1.0_dev.json", "musique"),
        ("NQ-open.dev.json", "nq"),
        ("my_questions_dev.json", "my_questions"),
    ],
)
def test_official_names_of_files_tell_the_data_set(name, dataset, tmp_path):
    (tmp_path / name).write_text(json.dumps([{"question": "who?", "answer": "a"}]))
    (question,) = load_questions(tmp_path / name)
    assert (question.dataset, question.split) == (dataset, "dev")


def test_the_form_of_triviaqa_itself_is_not_dropped_from_a_folder(tmp_path):
    (tmp_path / "web-dev.json").write_text(json.dumps({"Data": [{"Question": "who?", "Answer": {"Value": "a"}}]}))
    (tmp_path / "nq_dev.json").write_text(json.dumps([{"question": "who?", "answer": "a"}]))
    with pytest.raises(DataError, match="TriviaQA's own form"):
        load_questions(tmp_path)


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path):
    _two_sets(tmp_path, lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert Counter(question.dataset for question in load_questions(tmp_path)) == {"nq": 10, "hotpotqa": 10}


def test_logs_settings_and_corpora_may_lie_in_the_folder(tmp_path):
    _two_sets(tmp_path, str.encode)
    (tmp_path / "log.jsonl").write_text('{"step": 1}')
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"not even gzip")
    assert len(load_questions(tmp_path)) == 20


@pytest.mark.parametrize("name", ["questions.jsonl", "nq/test.jsonl"])
def test_questions_that_change_while_the_process_lives_are_loaded_again(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)

    def texts(answer):
        row = {"id": "test_0", "question": "who?", "golden_answers": [answer]}
        file.write_text(json.dumps(row))
        return [question.answers for question in load_tasks(tmp_path, "test", None).questions.values()]

    assert texts("a") == [("a",)]
    assert texts("bb") == [("bb",)]
    (tmp_path / "more.json").write_text('[{"question": "what?", "answer": "c", "id": "z"}]')
    assert len(load_tasks(tmp_path, "test", None)) == (1 if name == "questions.jsonl" else 2)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="holds no question file"):
        load_questions(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_questions(tmp_path / "no")


def _questions(**sizes):
    return [Question(f"{name}-{n}", name, "train", "q", ("a",)) for name, size in sizes.items() for n in range(size)]


def test_mixtures_keep_their_proportions():
    tasks = select(_questions(nq=500, hotpotqa=50, popqa=9), "train", "nq:1,hotpotqa:3")
    assert set(tasks.by_dataset) == {"nq", "hotpotqa"}
    rng = np.random.default_rng(0)
    drawn = Counter(tasks.draw(rng).split("-")[0] for _ in range(4000))
    assert drawn["hotpotqa"] / 4000 == pytest.approx(0.75, abs=0.03)
    order = tasks.order(5)
    assert sorted(order) == sorted(tasks) and order == tasks.order(5) != tasks.order(6)
    assert Counter(task.split("-")[0] for task in order[:60])["hotpotqa"] == pytest.approx(45, abs=1)


def test_without_weights_every_question_is_equally_likely():
    tasks = select(_questions(nq=300, popqa=100), "train", None)
    rng = np.random.default_rng(0)
    drawn = Counter(tasks.draw(rng).split("-")[0] for _ in range(4000))
    assert drawn["nq"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_panel_is_fixed_and_balanced(realdata):
    questions = load_questions(realdata / "searchqa")
    tasks = select(questions, "eval", None)
    panel = tasks.panel(2048)
    assert panel == select(questions[::-1], "eval", None).panel(2048)
    shares = Counter(tasks.questions[task].dataset for task in panel)
    assert set(shares) == set(DATASETS) and shares["bamboogle"] == 125
    assert max(shares.values()) - min(shares[name] for name in DATASETS if name != "bamboogle") <= 1
    assert len(set(panel)) == 2048
    with pytest.raises(ValueError, match="a panel of 99999 questions"):
        tasks.panel(99999)


def test_results_per_set():
    table = summarise([("popqa", 1.0, 1.0), ("nq", 0.0, 0.5), ("nq", 1.0, 1.0), ("nq", 0.0, 0.0)])
    assert list(table) == ["nq", "popqa", "average", "all"]
    assert table["nq"].count == 3 and table["nq"].em == pytest.approx(1 / 3)
    assert table["average"].em == pytest.approx((1 / 3 + 1) / 2)
    assert table["all"].em == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no results"):
        summarise([])


def _held_out(**splits):
    questions = [Question(f"{s}/{d}", d, s, "q", ("a",)) for d, names in splits.items() for s in names.split()]
    return purposes(questions)


def test_splits_by_purpose_follow_the_data():
    """Public files: some sets have only dev, some only test; a report on test alone would leave sets out."""
    assert _held_out(nq="train dev test", popqa="dev test") == ("train", "dev", "test")
    assert _held_out(nq="train test", hotpotqa="train dev") == ("train", "dev", "eval")
    assert _held_out(nq="train test", hotpotqa="test") == ("train", "test", "test")
    assert _held_out(hotpotqa="train dev") == ("train", "dev", "eval")


def test_wrong_names_say_what_is_allowed():
    questions = _questions(nq=3)
    with pytest.raises(UnknownName, match=r"trian.*train"):
        select(questions, "trian", None)
    with pytest.raises(UnknownName, match=r"popqa.*nq"):
        select(questions, "train", "popqa")
    for bad in ("nq:0", "nq:x", {"nq": -1}, "nq:nan", "nq:inf"):
        with pytest.raises(ValueError, match="positive number"):
            parse_datasets(bad)
    assert parse_datasets("2wiki:2, searchR1_nq") == {"2wikimultihopqa": 2.0, "nq": 1.0}
    assert isinstance(select(questions, "all", ["nq"]), QuestionSet)
