"""Search-QA: a question is answered after searching, as in Search-R1 and verl-agent.

An episode begins with the question. An action is `<search>query</search>`, answered with the best passages between
`<information>` tags, or `<answer>answer</answer>`, which ends the episode; the reward is exact match. The invariant:
what an action does depends on the action, the question and the corpus alone, and a search that fails raises and
changes nothing, so that the same step can be tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from atod_envs.retrieval.protocol import LocalSearch, SearchService, check_depth
from atod_envs.snapshots import Snapshot
from atod_envs.text_env import Frame, TextEnv

from .actions import ANSWER_PATTERN, SEARCH_PATTERN, information, project
from .prompts import STYLES
from .sampling import QuestionSet
from .scoring import score_answer
from .sources import load_service, load_splits, load_tasks

if TYPE_CHECKING:
    from atod_envs.styles import PromptStyle

    from .questions import Question

ACTIONS = (SEARCH_PATTERN, ANSWER_PATTERN)


class SearchQAEnv(TextEnv):
    """Answer questions with a search engine.

    Args:
        split: `train`, `dev`, `test`, `eval` (all that is not for training) or `all`.
        data: a question file, or a folder with questions and a corpus; `"builtin"` for the encyclopedia that is made
            here; by default `$SEARCHQA_DATA`, and without it the built-in one.
        dataset: which data sets, and in which proportions: a name, `"nq:2,hotpotqa:1"`, a mapping; all by default.
        retriever: `"bm25"`, `"lucene"`, the address of a server (`http://...`), a folder that the index command wrote,
            or anything with `retrieve(queries, k)`.
        corpus: the corpus file, where it is not in `data`.
        topk: passages a search returns.
        max_turns: actions before an episode is truncated.
        render_mode: `"ansi"` or nothing.

    The last action before the turn limit is not searched for, as published: no turn would read the result.
    """

    env_key: ClassVar[str] = "searchqa"
    default_max_turns: ClassVar[int] = 4
    label: ClassVar[str] = "dataset"
    splits: tuple[str, str, str] = ("train", "dev", "test")
    tasks: QuestionSet

    def __init__(
        self,
        split: str = "train",
        *,
        data: str | Path | None = None,
        dataset: str | Mapping[str, float] | Iterable[str] | None = None,
        retriever: str | Path | SearchService = "bm25",
        corpus: str | Path | None = None,
        topk: int = 3,
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_depth(topk)
        super().__init__(load_tasks(data, split, dataset), max_turns=max_turns, render_mode=render_mode)
        self.splits = load_splits(data)
        self._service = load_service(data, retriever, corpus)
        self.blocking = not isinstance(self._service, LocalSearch)
        searched = self._service.corpus.checksum[:12] if isinstance(self._service, LocalSearch) else "remote"
        self.data_version = f"questions/{self.tasks.version}/{searched}"
        self._topk = topk
        self._question: Question

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """The published prompt, the wording of the paper's figure, and a compact conversation."""
        return STYLES

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        self._question = question = self.tasks.questions[task_id]
        return question.text, Frame(question.text, ACTIONS, extra=self._about(question))

    def load_state(self, snapshot: Snapshot) -> None:
        """A question has no state but its turns, so nothing is searched again."""
        self._question = self.tasks.questions[snapshot.task_id]

    def _act(self, action: str) -> Frame:
        asked = project(action)
        extra: dict[str, object] = dict(self._about(self._question))
        if asked.answer is not None:
            scores = score_answer(asked.answer, self._question.answers)
            extra |= {"em": scores.em, "f1": scores.f1, "acc": scores.acc, "golds": self._question.answers}
            return Frame(
                "", (), scores.em, scores.em, scores.em == 1.0, terminated=True, valid=asked.format_ok, extra=extra
            )
        if asked.query is None or self._turn + 1 >= self.max_turns:
            return Frame("", ACTIONS, valid=asked.format_ok, extra=extra)
        (passages,) = self._service.retrieve([asked.query], self._topk)
        extra["hits"] = tuple(passage.docid for passage in passages)
        return Frame(information(passages), ACTIONS, valid=asked.format_ok, extra=extra)

    @staticmethod
    def _about(question: Question) -> dict[str, object]:
        return {"dataset": question.dataset, "kind": question.kind}
