"""The built-in world: an encyclopedia of fictional things and questions about it, made on first use.

The invariant: the same seed and scale give the same passages and questions on every machine; the questions of train,
dev and test are about disjoint entities, in one shared corpus that also holds entities that no question is about and
passages that only mention names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from atod_envs.dice import Dice
from atod_envs.errors import AtodError
from atod_envs.files import writing_into, written_aside
from atod_envs.options import program
from atod_envs.retrieval.corpus import contents_of
from atod_envs.stopping import stoppable

from .generate import Entity, Names, check_part, make_part, write_distractors, write_passage
from .language import FORMS, KINDS, POINTS_TO, QuestionForm
from .questions import Question

SEED: Final = 1
PARTS: Final[Mapping[str, float]] = {"train": 1.0, "dev": 0.25, "test": 0.5, "unasked": 0.7}
"""Scale of each part; no question is about the last."""

QUESTIONS_PER_SCALE: Final = 1000
"""Questions of each kind in a part of scale 1."""

DISTRACTORS_PER_SCALE: Final = 400


@dataclass(frozen=True)
class Encyclopedia:
    """An encyclopedia and its questions.

    Attributes:
        entities: by part.
        questions: of train, dev and test; their data set is their kind.
        seed: what it was made from.
        scale: size relative to the built-in world.
    """

    entities: Mapping[str, Sequence[Entity]]
    questions: Sequence[Question]
    seed: int
    scale: float

    def passages(self) -> Iterator[tuple[str, str]]:
        """Ids and contents of all passages, shuffled so that neighbours tell nothing."""
        dice = Dice(f"passages/{self.seed}")
        everything = [entity for part in self.entities.values() for entity in part]
        written = [write_passage(dice, entity) for entity in everything]
        written += write_distractors(dice, everything, round(DISTRACTORS_PER_SCALE * self.scale))
        for number, (title, text) in enumerate(dice.shuffled(written)):
            yield str(number), contents_of(title, text)


def make_encyclopedia(seed: int = SEED, scale: float = 1.0) -> Encyclopedia:
    """Make an encyclopedia.

    Args:
        seed: another seed gives another world.
        scale: 1 gives about 3,300 passages and 7,000 questions.

    Returns:
        The world.

    Raises:
        ValueError: the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale}; expected a positive number")
    names = Names(Dice(f"names/{seed}"))
    entities: dict[str, list[Entity]] = {}
    questions: list[Question] = []
    for part, share in PARTS.items():
        made = make_part(Dice(f"part/{part}/{seed}"), names, share * scale)
        check_part(made)
        entities[part] = made
        if part != "unasked":
            questions += _ask(Dice(f"questions/{part}/{seed}"), made, part, round(QUESTIONS_PER_SCALE * share * scale))
    return Encyclopedia(entities, questions, seed, scale)


@cache
def encyclopedia() -> Encyclopedia:
    """The world that ships with the project."""
    return make_encyclopedia()


def _ask(dice: Dice, entities: Sequence[Entity], part: str, each: int) -> Iterator[Question]:
    """Distinct questions about one part, `each` of every kind (fewer where the part is too small for so many)."""
    by_kind: dict[str, list[Entity]] = {}
    for entity in entities:
        by_kind.setdefault(entity.kind, []).append(entity)
    by_name = {(entity.kind, entity.name): entity for entity in entities}
    for kind in KINDS:
        forms = [form for form in FORMS if form.kind == kind]
        asked: set[tuple[str, ...]] = set()
        attempts = 0
        while len(asked) < each and attempts < 20 * each:
            attempts += 1
            form = dice.pick(forms)
            one, other = dice.pick(by_kind[form.subject]), dice.pick(by_kind[form.subject])
            key = ("/".join(form.path), one.name, other.name if kind == "comparison" else "")
            answers = _compare(form, one, other) if kind == "comparison" else _follow(form, one, by_name)
            if answers is None or key in asked:
                continue
            asked.add(key)
            text = dice.pick(form.templates).format(x=_called(dice, one), y=_called(dice, other))
            yield Question(f"builtin_{part}_{kind}_{len(asked):05d}", kind, part, text, answers, kind=kind)


def _called(dice: Dice, entity: Entity) -> str:
    """The entity's name, or its alias in half the cases."""
    return entity.alias if entity.alias and dice.chance(0.5) else entity.name


def _follow(form: QuestionForm, entity: Entity, by_name: Mapping[tuple[str, str], Entity]) -> tuple[str, ...]:
    for slot in form.path[:-1]:
        entity = by_name[POINTS_TO[slot], entity.facts[slot]]
    last = form.path[-1]
    value = entity.facts[last]
    if last not in POINTS_TO:
        return (value,)
    return _names(by_name[POINTS_TO[last], value])


def _compare(form: QuestionForm, one: Entity, other: Entity) -> tuple[str, ...] | None:
    """The entity with the smaller year, or None where the two do not differ."""
    (slot,) = form.path
    if one is other or one.facts[slot] == other.facts[slot]:
        return None
    return _names(min(one, other, key=lambda entity: int(entity.facts[slot])))


def _names(entity: Entity) -> tuple[str, ...]:
    return (entity.name, entity.alias) if entity.alias else (entity.name,)


def write_encyclopedia(made: Encyclopedia, directory: str | Path) -> None:
    """Write a world as data files: `corpus.jsonl` and `questions.jsonl`, to be given as `data=`."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(folder / "corpus.jsonl") as corpus,  # neither is put into place before both are whole
        written_aside(folder / "questions.jsonl") as questions,
        corpus.open("w", encoding="utf-8") as passages_out,
        questions.open("w", encoding="utf-8") as out,
    ):
        for docid, contents in made.passages():
            passages_out.write(json.dumps({"id": docid, "contents": contents}, ensure_ascii=False) + "\n")
        for question in made.questions:
            row = {
                "id": question.question_id,
                "dataset": question.dataset,
                "split": question.split,
                "question": question.text,
                "golden_answers": list(question.answers),
                "kind": question.kind,
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a world to a folder; returns the exit status."""
    parser = argparse.ArgumentParser(program("atod_envs.searchqa.builtin"), description="Write an encyclopedia.")
    parser.add_argument("--out", required=True, help="folder for corpus.jsonl and questions.jsonl")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s, the built-in world")
    parser.add_argument("--scale", type=float, default=1.0, help="size; default: %(default)s, about 3,300 passages")
    options = parser.parse_args(arguments)
    try:
        made = make_encyclopedia(options.seed, options.scale)
        with writing_into(Path(options.out), "--out"):
            write_encyclopedia(made, options.out)
    except (AtodError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {sum(1 for _ in made.passages()):,} passages, {len(made.questions):,} questions")
    return 0


if __name__ == "__main__":
    with stoppable():
        sys.exit(main())
