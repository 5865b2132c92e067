"""Exact match and F1 by data set, from stored episodes: `python -m atod_envs.searchqa.report EPISODES...`.

Training runs and evaluations store episodes (`trajectories/step_*.jsonl.gz`, `episodes/*.jsonl.gz`); any of them can be
scored. The invariant: an episode counts with what it answered, and without an answer as wrong; nothing is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from atod_envs.errors import AtodError
from atod_envs.options import program
from atod_envs.stopping import stoppable
from atod_envs.trajectory import Trajectory, read_jsonl

from .actions import project
from .sampling import ALL, QuestionSet, SetResult, summarise
from .scoring import AnswerScores, score_answer
from .sources import load_tasks


def score_episodes(trajectories: Iterable[Trajectory], questions: QuestionSet) -> Iterator[tuple[str, float, float]]:
    """Score finished episodes as the environment does.

    Args:
        trajectories: episodes of Search-QA.
        questions: their questions.

    Yields:
        Data set, exact match and F1 of each, as `summarise` takes them.

    Raises:
        UnknownName: an episode's question is not among the questions.
    """
    for trajectory in trajectories:
        question = questions.questions[questions.require(trajectory.task_id)]
        answer = project(trajectory.turns[-1].action).answer if trajectory.turns else None
        scores = AnswerScores(0.0, 0.0, 0.0) if answer is None else score_answer(answer, question.answers)
        yield question.dataset, scores.em, scores.f1


def table(results: dict[str, SetResult]) -> str:
    """Results as a Markdown table, in per cent."""
    rows = [f"| {name} | {r.count:,} | {100 * r.em:.1f} | {100 * r.f1:.1f} |" for name, r in results.items()]
    return "\n".join(["| data set | episodes | EM | F1 |", "|---|---:|---:|---:|", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog=program("atod_envs.searchqa.report"), description="Score stored episodes by data set."
    )
    parser.add_argument("episodes", nargs="+", type=Path, help="files of trajectories (.jsonl, .jsonl.gz)")
    parser.add_argument("--data", help="what was played; default: $SEARCHQA_DATA, else the built-in world")
    options = parser.parse_args(arguments)
    try:
        questions = load_tasks(options.data, ALL, None)
        scored = [row for path in options.episodes for row in score_episodes(read_jsonl(path), questions)]
        print(table(summarise(scored)))
    except (AtodError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with stoppable():
        sys.exit(main())
