"""Search-QA: multi-turn question answering over a retriever, with exact scoring and a built-in world."""

from __future__ import annotations

from .scoring import AnswerScores, score_answer

__all__ = ["AnswerScores", "score_answer"]
