"""A scripted searcher for the built-in world: it reads the question, follows its facts search by search, and answers.

The invariant: it knows the language of the encyclopedia and nothing of its contents; what it answers comes from
passages that were shown in this episode. It works out anew at every turn what is known and what is missing, so it can
take over after any actions of another agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atod_envs.experts import Move

from .actions import project, read_information
from .language import LONGEST_SENTENCE, POINTS_TO, QuestionForm, question_readers, read_facts

UNKNOWN = "unknown"
"""What it answers when it does not find out."""


@dataclass(frozen=True, slots=True)
class _Gap:
    """A fact that no shown passage states."""

    kind: str
    name: str
    fact: str


class SearchQAExpert:
    """Plays built-in Search-QA episodes; see the module's docstring."""

    def __init__(self) -> None:
        self._form: QuestionForm | None = None
        self._named: tuple[str, ...] = ()
        self._shown: dict[str, str] = {}
        self._searched: set[str] = set()
        self._advised = ""

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode.

        Args:
            task: the question.
            observation: the first observation (the question again).
            admissible: the forms of action.
        """
        self._form, self._named = None, ()
        self._shown, self._searched, self._advised = {}, set(), ""
        for pattern, form in question_readers() if len(task) <= LONGEST_SENTENCE else ():
            if found := pattern.fullmatch(task.strip()):
                self._form, self._named = form, tuple(found.groupdict().values())
                return

    def observe(self, action: str, observation: str, admissible: Sequence[str] = ()) -> None:
        """Take note of an action of any agent, and of the answer to it."""
        query = project(action).query
        if query is not None:
            self._searched.add(query.lower())
        self._see(observation)

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """The next search or the answer.

        Args:
            observation: what the environment said last.
            admissible: the forms of action.
        """
        if self._see(observation) and self._advised:
            self._searched.add(self._advised)
        if self._form is None:
            return _answer(UNKNOWN, "what is asked?")
        found: list[str] = []
        for name in self._named:
            value, gap = self._follow(self._form.subject, name, self._form.path)
            if gap is not None:
                return self._search(gap, found)
            found.append(value)
        if self._form.kind != "comparison":
            return _answer(found[0], f"found {_words(self._form.path[-1])}")
        (first, name), (second, _) = sorted(zip(found, self._named, strict=True))
        return _answer(name, f"{first} before {second}")

    def _see(self, observation: str) -> bool:
        """Remember the passages in an observation; whether it was the answer to a search."""
        self._shown |= dict(read_information(observation))
        return observation.startswith("<information>")

    def _follow(self, kind: str, name: str, path: Sequence[str]) -> tuple[str, _Gap | None]:
        """Where a chain of facts leads, as far as passages were shown for it."""
        for fact in path:
            value = self._look_up(kind, name, fact)
            if value is None:
                return "", _Gap(kind, name, fact)
            kind, name = POINTS_TO.get(fact, ""), value
        return name, None

    def _look_up(self, kind: str, name: str, fact: str) -> str | None:
        for title, text in self._shown.items():
            facts = read_facts(kind, text)
            if fact in facts and name in (title, facts.get("alias")):
                return facts[fact]
        return None

    def _search(self, gap: _Gap, found: Sequence[str]) -> Move:
        """Search for the name, a second time with what it is; then give up."""
        thought = ", ".join([*found, f"find {_words(gap.fact)}"])
        for query in (gap.name, f"{gap.name} {gap.kind}"):
            if query.lower() not in self._searched:
                self._advised = query.lower()
                return Move(f"<search>{query}</search>", thought)
        return _answer(UNKNOWN, f"no {_words(gap.fact)}")


def _words(fact: str) -> str:
    return fact.replace("_", " ")


def _answer(answer: str, thought: str) -> Move:
    return Move(f"<answer>{answer}</answer>", thought)
