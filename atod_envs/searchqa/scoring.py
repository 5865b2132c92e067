"""Exact match, containment and F1 with the standard normalisation of open-domain question answering.

The rules are those of SQuAD's script as FlashRAG and Search-R1 use them. The invariant: scores equal the published
ones to the last bit; an answer is compared with every gold answer and the best counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
# Answers for which a partial overlap means nothing.
_CLOSED: Final = frozenset({"yes", "no", "noanswer"})


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """How an answer compares with the gold answers.

    Attributes:
        em: 1.0 where the normalised answer equals a gold answer.
        acc: 1.0 where it contains one.
        f1: the best harmonic mean of token precision and recall.
    """

    em: float
    acc: float
    f1: float


def normalise(text: str) -> str:
    """Lower case; ASCII punctuation and English articles removed; white space single."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """F1 of the bags of words of two normalised texts; yes and no count only when they agree."""
    if answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    found, wanted = answer.split(), gold.split()
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score_answer(answer: str, golds: Sequence[str]) -> AnswerScores:
    """Score one answer against all gold answers.

    Args:
        answer: the text of the answer; empty where none was given.
        golds: the gold answers, at least one.

    Returns:
        The best of each score over the gold answers.
    """
    normal = normalise(answer)
    targets = [normalise(gold) for gold in golds]
    return AnswerScores(
        em=max(float(normal == target) for target in targets),
        acc=max(float(target in normal) for target in targets),
        f1=max(token_f1(normal, target) for target in targets),
    )


def last_answer(text: str) -> str:
    """The stripped content of the last `<answer>` block of a whole rollout; empty where there is none."""
    opening, closing = "<answer>", "</answer>"
    found, at = "", 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        found, at = text[start + len(opening) : end], end + len(closing)
    return found.strip()
