"""AnswerScores and parsing against 1,662 recorded rollouts of real models."""

import gzip
import json
import re
from collections import Counter

import pytest

from atod_envs.searchqa.actions import project
from atod_envs.searchqa.scoring import last_answer, normalise, score_answer


@pytest.fixture(scope="module")
def rollouts(realdata):
    with gzip.open(realdata / "searchqa" / "search_r1_rollouts.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_recorded_score_is_reproduced(rollouts):
    assert len(rollouts) == 1662
    for row in rollouts:
        scores = score_answer(row["pred"], row["golden_answers"])
        assert {"em": scores.em, "acc": scores.acc, "f1": scores.f1} == row["metric_score"], row["id"]
        assert last_answer(row["response"]) == row["pred"], row["id"]


def test_every_recorded_turn_is_parsed(rollouts):
    """What stands before a retrieval is a search, what stands before a complaint is none, the last turn is the answer.

    Six recorded "retrievals" were written by the model itself or cut off, so that no search stands before them.
    """
    foreign = r"(<information>.*?</information>|My previous action is invalid\..*?Let me try again\.)"
    seen = Counter()
    for row in rollouts:
        parts = re.split(foreign, row["response"], flags=re.DOTALL)
        for turn, reply in zip(parts[::2], [*parts[1::2], ""], strict=True):
            action = project(turn)
            after = "retrieval" if reply.startswith("<information>") else "complaint" if reply else "end"
            does = "search" if action.query is not None else "answer" if action.answer is not None else "nothing"
            assert action.format_ok == (does != "nothing")
            seen[after, does if turn.strip() else "empty"] += 1
            if after == "end":
                assert (action.answer or "") == row["pred"]
            elif does == "search":
                assert action.query == re.findall(r"<search>(.*?)</search>", turn, re.DOTALL)[-1].strip()
    assert seen == {
        ("retrieval", "search"): 1577,
        ("retrieval", "empty"): 16,
        ("retrieval", "nothing"): 6,
        ("complaint", "nothing"): 8,
        ("end", "answer"): 1528,
        ("end", "nothing"): 134,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an A.B.C. of the sea", "abc of sea"),
        ("Theatre", "theatre"),
        ("1,000", "1000"),
        ("naïve – “quote”", "naïve – “quote”"),
        ("the", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


def test_the_best_gold_answer_counts():
    scores = score_answer("Robert Downey", ["Iron Man", "Robert Downey Jr."])
    assert (scores.em, scores.acc) == (0.0, 0.0)
    assert scores.f1 == pytest.approx(0.8)
    assert score_answer("it was the Nile river", ["Nile"]).acc == 1.0


def test_yes_and_no_have_no_partial_credit():
    assert score_answer("yes it is", ["yes"]).f1 == 0.0
    assert score_answer("Yes.", ["yes"]).f1 == 1.0
    assert score_answer("", ["nothing"]).f1 == 0.0
