"""Which questions are played: splits, mixtures of data sets in stated proportions, and the fixed evaluation panel.

The invariant: draws, orders and panels depend on the question ids, the proportions and the seed alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atod_envs.errors import UnknownName
from atod_envs.tasks import TaskSet

from .questions import DATASETS, Question, dataset_name

ALL = "all"
EVAL = "eval"
"""Split names besides the data's own: every question; every question that is not for training."""


class QuestionSet(TaskSet):
    """The questions of a split, possibly from several data sets in stated proportions.

    Args:
        split: the split's name.
        questions: its questions.
        weights: how often each data set is drawn, relative to the others; `None` draws every question equally often.
    """

    def __init__(self, split: str, questions: Sequence[Question], weights: Mapping[str, float] | None = None) -> None:
        super().__init__(split, [question.question_id for question in questions])
        self.questions = {question.question_id: question for question in questions}
        by_set: dict[str, list[str]] = {}
        for question in questions:
            by_set.setdefault(question.dataset, []).append(question.question_id)
        rank = {name: place for place, name in enumerate(DATASETS)}
        self.by_dataset = {
            name: TaskSet(name, by_set[name]) for name in sorted(by_set, key=lambda name: (rank.get(name, 99), name))
        }
        self.weights = dict(weights) if weights is not None else {n: float(len(t)) for n, t in self.by_dataset.items()}
        total = sum(self.weights[name] for name in self.by_dataset)
        self._chances = np.cumsum([self.weights[name] / total for name in self.by_dataset])

    @functools.cached_property
    def version(self) -> str:
        """A digest of the questions and their answers: equal questions give equal versions."""
        digest = hashlib.blake2b(digest_size=6)
        for task_id, question in sorted(self.questions.items()):
            digest.update(json.dumps([task_id, question.text, question.answers]).encode())
        return digest.hexdigest()

    def draw(self, rng: np.random.Generator) -> str:
        """Draw a data set by its weight, then one of its questions uniformly."""
        place = int(np.searchsorted(self._chances, rng.random(), side="right"))
        return list(self.by_dataset.values())[min(place, len(self.by_dataset) - 1)].draw(rng)

    def order(self, seed: int) -> tuple[str, ...]:
        """Every question once, shuffled, with the data sets interleaved in their proportions until one is used up."""
        places = [
            ((place + 0.5) / self.weights[name], name, task_id)
            for name, tasks in self.by_dataset.items()
            for place, task_id in enumerate(tasks.order(seed))
        ]
        return tuple(task_id for _, _, task_id in sorted(places))

    def panel(self, size: int | None = None, name: str = "panel") -> tuple[str, ...]:
        """A fixed evaluation list with equal shares of the data sets; a small set gives all it has, others fill up.

        Args:
            size: questions in all; `None` takes all.
            name: distinguishes panels that should not coincide.

        Returns:
            Question ids, one data set after the other.

        Raises:
            ValueError: there are fewer questions than asked for.
        """
        if size is not None and not 0 < size <= len(self):
            raise ValueError(f"a panel of {size} questions was asked for, but split {self.split!r} holds {len(self)}")
        shares = _equal_shares({key: len(tasks) for key, tasks in self.by_dataset.items()}, size or len(self))
        return tuple(
            task_id
            for key, tasks in self.by_dataset.items()
            if shares[key]
            for task_id in tasks.panel(shares[key], f"{name}/{key}")
        )


def _equal_shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` as equally as the sizes allow, one by one in turn; it must not exceed their sum."""
    shares = dict.fromkeys(sizes, 0)
    while total > 0:
        for name, size in sizes.items():
            if total > 0 and shares[name] < size:
                shares[name] += 1
                total -= 1
    return shares


def parse_datasets(dataset: str | Mapping[str, float] | Iterable[str] | None) -> dict[str, float] | None:
    """The proportions that a `dataset` argument asks for.

    Args:
        dataset: `None` (all, every question equally), a name, `"nq,hotpotqa"` (equal parts), `"nq:2,hotpotqa:1"`, a
            list of names, or a mapping from name to weight.

    Returns:
        Weight by data set, or `None` where all are taken.

    Raises:
        ValueError: a weight is not a positive number.
    """
    if dataset is None or dataset == ALL:
        return None
    if isinstance(dataset, Mapping):
        pairs = [(str(name), str(weight)) for name, weight in dataset.items()]
    else:
        names = dataset.split(",") if isinstance(dataset, str) else [str(name) for name in dataset]
        pairs = [(name.partition(":")[0], name.partition(":")[2] or "1") for name in names if name.strip()]
    weights: dict[str, float] = {}
    for name, text in pairs:
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"dataset {name!r} has the weight {text!r}; expected a positive number, as in 'nq:2,hotpotqa:1'"
            )
        weights[dataset_name(name)] = weight
    return weights


def purposes(questions: Sequence[Question]) -> tuple[str, str, str]:
    """The splits to train on, to choose checkpoints on and to report on.

    Some public sets are evaluated on `dev` because the answers of their `test` are secret. Where that is so, `eval` is
    reported on, which has all sets, and `dev` questions that a checkpoint was chosen by may be among them.
    """
    held_out = {question.dataset for question in questions if question.split != "train"}
    tested = {question.dataset for question in questions if question.split == "test"}
    report = "test" if tested == held_out else EVAL
    choose = "dev" if any(question.split == "dev" for question in questions) else report
    return "train", choose, report


def select(
    questions: Sequence[Question], split: str, dataset: str | Mapping[str, float] | Iterable[str] | None
) -> QuestionSet:
    """The questions of a split and of some data sets.

    Args:
        questions: everything that was loaded.
        split: `train`, `dev`, `test`, `eval` (all that is not `train`) or `all`.
        dataset: see `parse_datasets`.

    Returns:
        The question set.

    Raises:
        UnknownName: no question has that split, or a data set has none in it.
    """
    splits = {question.split for question in questions}
    chosen = [q for q in questions if split in (ALL, q.split) or (split == EVAL and q.split != "train")]
    if not chosen:
        raise UnknownName("split", split, [*sorted(splits), EVAL, ALL])
    weights = parse_datasets(dataset)
    if weights is None:
        return QuestionSet(split, chosen)
    present = {question.dataset for question in chosen}
    for name in weights:
        if name not in present:
            raise UnknownName(f"dataset (split {split!r})", name, sorted(present))
    return QuestionSet(split, [question for question in chosen if question.dataset in weights], weights)


@dataclass(frozen=True, slots=True)
class SetResult:
    """Results on one data set.

    Attributes:
        count: questions answered or not.
        em: mean exact match.
        f1: mean F1.
    """

    count: int
    em: float
    f1: float


def summarise(results: Iterable[tuple[str, float, float]]) -> dict[str, SetResult]:
    """Per-set results of an evaluation.

    Args:
        results: (data set, exact match, F1) of each episode.

    Returns:
        One entry for each data set, in the published order, then `average` (mean over the sets, as published) and `all`
        (mean over the questions).

    Raises:
        ValueError: there are no results.
    """
    rows: dict[str, list[tuple[float, float]]] = {}
    for dataset, em, f1 in results:
        rows.setdefault(dataset, []).append((em, f1))
    if not rows:
        raise ValueError("there are no results to summarise; expected at least one finished episode")
    rank = {name: place for place, name in enumerate(DATASETS)}
    table = {name: _mean(rows[name]) for name in sorted(rows, key=lambda name: (rank.get(name, 99), name))}
    overall = _mean([row for group in rows.values() for row in group])
    average = SetResult(
        overall.count, float(np.mean([r.em for r in table.values()])), float(np.mean([r.f1 for r in table.values()]))
    )
    return {**table, "average": average, "all": overall}


def _mean(rows: Sequence[tuple[float, float]]) -> SetResult:
    return SetResult(len(rows), float(np.mean([em for em, _ in rows])), float(np.mean([f1 for _, f1 in rows])))
