"""The language of the built-in encyclopedia: sentences that state facts and questions that ask for them.

Each sentence and question is a template with named slots, so the same table writes the text and, compiled to a regular
expression, reads it. The invariant: a sentence that was written from facts reads back as exactly those facts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

YEAR_SLOTS: Final = frozenset({"born_in", "released", "founded", "held_in", "settled"})
"""Slots that hold a year; all others hold names or words."""

LONGEST_SENTENCE: Final = 400
"""Characters that a sentence or question of ours may have (the longest has 110); what is longer is not of ours, and not
tried."""

POINTS_TO: Final[Mapping[str, str]] = {
    "birthplace": "city",
    "teacher": "person",
    "creator": "person",
    "founder": "person",
    "leader": "person",
    "seat": "city",
    "place": "city",
    "region": "region",
    "capital": "city",
}
"""Slots that hold another entity, and what it is."""

FACTS: Final[Mapping[str, tuple[str, ...]]] = {
    "person": ("role", "birthplace", "born_in", "teacher"),
    "city": ("region", "river", "settled"),
    "region": ("capital", "language"),
    "work": ("form", "creator", "released"),
    "school": ("seat", "founder", "founded"),
    "event": ("place", "held_in", "leader"),
}
"""What is known of each kind of entity."""

# The first sentence of a passage names its entity; the variants differ in order, so that position alone tells nothing.
SENTENCES: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "person": (
        (
            "{name} was a {role} born in {birthplace} in {born_in}.",
            "{name}, a {role}, was born in {born_in} in {birthplace}.",
            "Born in {birthplace} in {born_in}, {name} worked as a {role}.",
        ),
        ("The {role} was taught by {teacher}.", "{teacher} was the teacher of {name}."),
    ),
    "city": (
        (
            "{name} is a city in {region} on the river {river}.",
            "{name} lies on the river {river} in {region}.",
        ),
        ("The city was settled in {settled}.", "People first settled there in {settled}."),
    ),
    "region": (
        ("{name} is a region with {capital} as its capital.", "{capital} is the capital of the region {name}."),
        ("Its people speak {language}.", "The language of the region is {language}."),
    ),
    "work": (
        (
            "{name} is a {form} by {creator}, released in {released}.",
            "{name}, a {form} of {released}, is by {creator}.",
        ),
    ),
    "school": (
        ("{name} is a school in {seat}.", "The school {name} stands in {seat}."),
        ("It was founded by {founder} in {founded}.", "{founder} founded it in {founded}."),
    ),
    "event": (
        ("The {name} took place in {place} in {held_in}.", "The {name} was held in {held_in} in {place}."),
        ("It was led by {leader}.", "{leader} led it."),
    ),
}

ALIAS_SENTENCE: Final[Mapping[str, str]] = {
    "person": "{name} is also known as {alias}.",
    "city": "{name} was once called {alias}.",
    "work": "{name} is also known as {alias}.",
}


@dataclass(frozen=True, slots=True)
class QuestionForm:
    """One way to ask.

    Attributes:
        kind: `single`, `bridge`, `comparison` or `compositional`.
        subject: kind of the entity in the question.
        path: facts to follow from it, one after the other; the last is the answer. A comparison has one fact, a year.
        templates: wordings with the slot `{x}`, in comparisons also `{y}`.
    """

    kind: str
    subject: str
    path: tuple[str, ...]
    templates: tuple[str, ...]


# Kind | subject | facts to follow | wordings.
_FORM_TABLE: Final = """
single | person | birthplace | Where was {x} born? | In which city was {x} born?
single | person | born_in | In which year was {x} born? | When was {x} born?
single | person | teacher | Who was the teacher of {x}? | Who taught {x}?
single | city | river | Which river flows through {x}? | On which river does {x} lie?
single | city | region | In which region is {x}? | Which region does {x} belong to?
single | region | capital | What is the capital of {x}?
single | region | language | Which language is spoken in {x}?
single | work | creator | Who made {x}? | Who is the creator of {x}?
single | work | released | In which year was {x} released? | When was {x} released?
single | school | founder | Who founded {x}? | Who was the founder of {x}?
single | school | seat | In which city is the school {x}?
single | event | place | Where did the {x} take place? | Which city held the {x}?
single | event | leader | Who led the {x}? | Who was the leader of the {x}?
bridge | work | creator/birthplace | Where was the creator of {x} born?
bridge | work | creator/teacher | Who taught the creator of {x}?
bridge | work | creator/born_in | In which year was the creator of {x} born?
bridge | person | birthplace/region | In which region is the birthplace of {x}?
bridge | person | birthplace/river | Which river flows through the birthplace of {x}?
bridge | person | teacher/birthplace | Where was the teacher of {x} born?
bridge | school | founder/born_in | In which year was the founder of {x} born?
bridge | school | seat/river | Which river flows through the city of the school {x}?
bridge | event | place/region | In which region did the {x} take place?
bridge | event | leader/birthplace | Where was the leader of the {x} born?
comparison | person | born_in | Who was born first, {x} or {y}? | Who is older, {x} or {y}?
comparison | work | released | Which was released first, {x} or {y}? | Which came out first, {x} or {y}?
comparison | city | settled | Which city was settled first, {x} or {y}?
comparison | school | founded | Which school was founded first, {x} or {y}?
compositional | work | creator/birthplace/river | Which river flows through the birthplace of the creator of {x}?
compositional | work | creator/birthplace/region | In which region is the birthplace of the creator of {x}?
compositional | work | creator/teacher/born_in | In which year was the teacher of the creator of {x} born?
compositional | school | founder/birthplace/region | In which region is the birthplace of the founder of {x}?
compositional | school | founder/teacher/birthplace | Where was the teacher of the founder of {x} born?
compositional | event | leader/birthplace/river | Which river flows through the birthplace of the leader of the {x}?
compositional | person | birthplace/region/capital | What is the capital of the region where {x} was born?
"""


def _form(row: str) -> QuestionForm:
    kind, subject, path, *templates = row.split(" | ")
    return QuestionForm(kind, subject, tuple(path.split("/")), tuple(templates))


FORMS: Final = tuple(_form(row) for row in _FORM_TABLE.strip().splitlines())
"""Every way to ask."""

KINDS: Final = ("single", "bridge", "comparison", "compositional")


def stock_phrases() -> list[str]:
    """The fixed text of all sentences and questions: what stands between slots, without the blank before a slot."""
    sentences = [template for groups in SENTENCES.values() for group in groups for template in group]
    # Sentences follow a title or another sentence, so there is a blank before them; questions come first.
    templates = [f" {template}" for template in (*sentences, *ALIAS_SENTENCE.values())]
    templates += [template for form in FORMS for template in form.templates]
    phrases = {part.rstrip() for template in templates for part in re.split(r"\{\w+\}", template)}
    return sorted(phrases - {""})


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with a group for each slot; a slot that occurs twice must agree."""
    seen: set[str] = set()

    def group(found: re.Match[str]) -> str:
        slot = found[1]
        if slot in seen:
            return f"(?P={slot})"
        seen.add(slot)
        return rf"(?P<{slot}>\d{{4}})" if slot in YEAR_SLOTS else rf"(?P<{slot}>[^.,]+?)"

    body = re.sub(r"\\\{(\w+)\\\}", group, re.escape(template))
    return re.compile(body)


@cache
def _readers(kind: str) -> tuple[re.Pattern[str], ...]:
    variants = [template for group in SENTENCES[kind] for template in group]
    alias = ALIAS_SENTENCE.get(kind)
    return tuple(_pattern(template) for template in (*variants, *([alias] if alias else [])))


def read_facts(kind: str, text: str) -> dict[str, str]:
    """The facts that a passage about an entity of this kind states; a sentence that fits no template is passed over."""
    facts: dict[str, str] = {}
    for sentence in text.split(".")[:-1]:
        if len(sentence) > LONGEST_SENTENCE:
            continue
        for pattern in _readers(kind):
            if found := pattern.fullmatch(f"{sentence}.".strip()):
                facts |= {slot: value for slot, value in found.groupdict().items() if slot not in facts}
                break
    return facts


@cache
def question_readers() -> tuple[tuple[re.Pattern[str], QuestionForm], ...]:
    """Patterns of all wordings, the most specific (longest) first."""
    pairs = [(template, form) for form in FORMS for template in form.templates]
    pairs.sort(key=lambda pair: -len(pair[0]))
    return tuple((re.compile(_question_pattern(template)), form) for template, form in pairs)


def _question_pattern(template: str) -> str:
    return re.sub(r"\\\{(\w)\\\}", r"(?P<\1>.+?)", re.escape(template))
