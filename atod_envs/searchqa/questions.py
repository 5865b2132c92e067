"""Questions: loaders of the public forms of the seven data sets, and one stable id for each question.

Understood are JSON lines in FlashRAG's form (`id`, `question`, `golden_answers`), Search-R1's Parquet (`data_source`,
`reward_model.ground_truth.target`), and JSON lists of `{"question", "answer"}`; each also gzip-compressed. The
invariant: the id, the data set and the split of a question depend on its row, its place in the file and
the file's name alone, never on what else is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from atod_envs.errors import DataError
from atod_envs.files import AGAIN, entries_below, json_lines, parquet_rows, read_json

DATASETS: Final = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
"""The seven sets of the published evaluation, in its order."""

_ALIASES: Final = {"hotpot": "hotpotqa", "2wiki": "2wikimultihopqa", "trivia": "triviaqa", "naturalquestions": "nq"}
_SPLIT: Final = re.compile(r"(?:^|[/_.\-])(train|dev|test|validation|valid|val)(?=$|[/_.\-])")
_SPLIT_NAMES: Final = {"validation": "dev", "valid": "dev", "val": "dev"}
# FlashRAG numbers each data set on its own, so its ids name a question only together with the set.
_LOCAL_ID: Final = re.compile(r"(?:(?:train|dev|test|valid|val)_)?\d+")
_TEXT_KEYS: Final = ("question", "extra_info")
_ANSWER_KEYS: Final = ("golden_answers", "answers", "answer", "answer_aliases", "reward_model")
_MOVE: Final = f"{AGAIN}, or move it out of the folder of questions"
CORPUS_NAMES: Final = ("passages", "corpus", "wiki-18", "wiki18")
"""Names of corpus files, before their endings."""

_SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        question_id: stable id; the task id of its episode.
        dataset: the set it comes from.
        split: `train`, `dev` or `test`.
        text: the question.
        answers: gold answers; one of them suffices.
        gold_titles: titles of the passages that hold the evidence, where the data says.
        kind: what reasoning it takes (`single`, `bridge`, ...), where the data says.
    """

    question_id: str
    dataset: str
    split: str
    text: str
    answers: tuple[str, ...]
    gold_titles: tuple[str, ...] = ()
    kind: str = ""


def dataset_name(name: str) -> str:
    """The usual name of a data set: lower case, without Search-R1's prefix, aliases resolved."""
    plain = name.strip().lower().removeprefix("searchr1_").replace("-", "").replace(" ", "")
    return _ALIASES.get(plain, plain)


def _named(stem: str) -> str:
    """The data set that a file's name tells: a known one by its first word, as in ``hotpot_dev_distractor_v1``."""
    first = dataset_name(re.split(r"[_.\-\s]", stem)[0])
    return first if first in DATASETS else dataset_name(stem)


def load_questions(path: str | Path) -> list[Question]:
    """Read a question file, or all question files below a folder.

    Args:
        path: a file (`.jsonl`, `.json`, also `.gz`; `.parquet`) or a folder such as FlashRAG's, with files
            `<dataset>/<split>.jsonl`. In a folder that holds a `questions.jsonl`, only that is read.

    Returns:
        The questions in the order of the files' names and rows.

    Raises:
        DataError: nothing is there, a row is not understood, or two questions share an id.
    """
    path = Path(path)
    questions: list[Question] = []
    for file in question_files(path):
        questions += _read_file(file)
    seen: dict[str, Question] = {}
    for question in questions:
        other = seen.setdefault(question.question_id, question)
        if other is not question:
            raise DataError(
                f"{path}: question id {question.question_id!r} occurs twice; give every question its own id"
            )
    return questions


def question_files(path: Path) -> list[Path]:
    """The question files that a path names, sorted: itself, the folder's ``questions.jsonl``, or all below it.

    Raises:
        DataError: nothing is there, or a file that may hold questions cannot be read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected a question file or a folder of them")
    whole = path / "questions.jsonl"
    if whole.is_file():
        return [whole]
    files = [file for file in candidate_files(path) if _holds_questions(file)]
    if not files:
        raise DataError(
            f"{path} holds no question file; expected <dataset>/<split>.jsonl, <split>.parquet or questions.jsonl"
        )
    return files


def candidate_files(folder: Path) -> list[Path]:
    """Every file below a folder that may hold questions, sorted; a corpus is known by its name.

    Raises:
        DataError: not all of them can be found; see :func:`atod_envs.files.entries_below`.
    """
    found = sorted(
        Path(file.path)
        for file in (entries_below(folder) if folder.is_dir() else ())
        if file.name.endswith(_SUFFIXES) and file.is_file()
    )
    return [file for file in found if file.name.partition(".")[0] not in CORPUS_NAMES]


def _holds_questions(file: Path) -> bool:
    """Whether a file's first row has anything of a question; logs and settings lie in the same folders.

    A file that cannot be read is an error, and so is an empty one: either may be a data set that would be missed.
    """
    if ".json" in file.name and ".jsonl" not in file.name and not isinstance(whole := read_json(file, _MOVE), list):
        if isinstance(whole, dict) and isinstance(whole.get("Data"), list):
            raise DataError(
                f"{file}: expected a list of questions, found an object with 'Data' (TriviaQA's own form); use the rows of "
                "FlashRAG or Search-R1, or move it out of the folder of questions"
            )
        return False
    first = next(_rows(file), None)
    if first is None:
        raise DataError(f"{file}: expected questions, found no row; {_MOVE}")
    return any(key in first[1] for key in (*_TEXT_KEYS, *_ANSWER_KEYS))


def _read_file(file: Path) -> Iterator[Question]:
    stem = file.name
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    named = _named(_SPLIT.sub("", re.sub(r"_\d+$", "", stem)).strip("_.-") or file.parent.name)
    for number, (place, row) in enumerate(_rows(file)):
        where = f"{file}, {place}"
        text, answers = _text_of(row, where), _answers_of(row, where)
        dataset = dataset_name(
            _optional_text(row, "dataset", where) or _optional_text(row, "data_source", where) or named
        )
        split = _split_of(row, stem, where)
        yield Question(
            question_id=_id_of(row, dataset, split, number, where),
            dataset=dataset,
            split=split,
            text=text,
            answers=answers,
            gold_titles=_texts(row.get("gold_titles") or [], f"{where}: gold_titles"),
            kind=_optional_text(row, "kind", where),
        )


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their places in the file."""
    if file.suffix == ".parquet":
        for number, row in parquet_rows(file):
            yield f"row {number}", row
    elif ".jsonl" in file.name:
        for number, row in json_lines(file):
            yield f"line {number}", row
    else:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise DataError(
                f"{file}: expected a list of objects with 'question' and 'answer', found {type(rows).__name__}"
            )
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(
                    f"{file}, row {number}: expected an object with 'question' and 'answer', found {row!r:.60}"
                )
            yield f"row {number}", row


def _text_of(row: Mapping[str, Any], where: str) -> str:
    """The question itself; Search-R1's processed rows keep it in `extra_info`."""
    extra = row.get("extra_info")
    text = row.get("question")
    if text is None and isinstance(extra, Mapping):
        text = extra.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected a question and its answers; found the fields {', '.join(sorted(row))}")
    return text.strip()


def _answers_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The gold answers, however the public sets write them.

    Understood are text, a list of texts, SQuAD's ``{"text": [...]}``, TriviaQA's ``{"value": ..., "aliases": [...]}``,
    MuSiQue's ``answer_aliases`` next to ``answer``, and Search-R1's ``reward_model.ground_truth.target``.
    """
    found = {key: _gold(row[key], f"{where}: {key}") for key in _ANSWER_KEYS[:3] if row.get(key) not in (None, "", [])}
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    target = truth.get("target") if isinstance(truth, Mapping) else truth
    if target not in (None, "", []):
        found["reward_model"] = _gold(target, f"{where}: reward_model.ground_truth.target")
    if not found:
        raise DataError(f"{where}: expected a question and its answers; found the fields {', '.join(sorted(row))}")
    (name, answers), *others = found.items()
    for other, stated in others:
        if set(stated) != set(answers):
            raise DataError(
                f"{where}: {name} says {list(answers)} and {other} says {list(stated)}; expected one set of answers: remove the wrong one"
            )
    aliases = _texts(row.get("answer_aliases") or [], f"{where}: answer_aliases")
    return tuple(dict.fromkeys((*answers, *aliases)))


def _gold(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        if isinstance(value.get("value"), str):
            return tuple(dict.fromkeys((_one_text(value["value"], where), *_texts(value.get("aliases") or [], where))))
        value = value.get("text", value)
    if isinstance(value, Mapping):
        raise DataError(f"{where}: expected text, a list of texts, or 'text' or 'value' in {value!r:.80}")
    if isinstance(value, str):
        return (_one_text(value, where),)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "text" in item for item in value):
        value = [item["text"] for item in value]
    texts = _texts(value, where)
    if not texts:
        raise DataError(f"{where}: expected at least one answer, found {value!r:.60}")
    return texts


def _texts(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: expected a list of texts, found {values!r:.60}")
    return tuple(_one_text(value, where) for value in values)


def _one_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected text that is not empty, found {value!r:.60}")
    return value


def _optional_text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    return "" if value is None or value == "" else _one_text(value, f"{where}: {key}")


def _split_of(row: Mapping[str, Any], stem: str, where: str) -> str:
    extra = row.get("extra_info")
    stated = row.get("split") or (extra.get("split") if isinstance(extra, Mapping) else None)
    if stated is not None:
        found = _SPLIT.search(stated) if isinstance(stated, str) else None
        if found is None:
            raise DataError(f"{where}: split is {stated!r:.60}; expected train, dev or test")
        return _SPLIT_NAMES.get(found[1], found[1])
    for value in (row.get("id"), row.get("src"), stem):
        found = _SPLIT.search(value) if isinstance(value, str) else None
        if found:
            return _SPLIT_NAMES.get(found[1], found[1])
    return "test"


def _id_of(row: Mapping[str, Any], dataset: str, split: str, number: int, where: str) -> str:
    given = row.get("id")
    if given is None:
        extra = row.get("extra_info")
        given = extra.get("index", number) if isinstance(extra, Mapping) else number
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise DataError(f"{where}: id is {given!r:.60}; expected text or a whole number")
    given = str(given)
    if not _LOCAL_ID.fullmatch(given):
        return given
    return f"{dataset}_{given}" if "_" in given else f"{dataset}_{split}_{given}"
