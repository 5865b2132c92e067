"""Fresh encyclopedias: fictional people, cities, regions, works, schools and events, and the facts between them.

The invariant: everything follows from the seed; every name belongs to one entity only; facts connect entities of one
part alone, so parts (train, dev, test) share no entity, and no answer can be known without reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from atod_envs.dice import Dice

from .language import ALIAS_SENTENCE, FACTS, POINTS_TO, SENTENCES

SIZES: Final[Mapping[str, int]] = {"region": 8, "city": 80, "person": 480, "work": 340, "school": 110, "event": 160}
"""Entities of each kind in a part of scale 1."""

ALIAS_SHARE: Final = 0.25
"""Share of people, cities and works that have a second name."""

_ONSETS_TEXT: Final = """
b br d dr f g gr h k kl l m n p r s sk st t tr v z
"""
_ONSETS: Final = tuple(_ONSETS_TEXT.split())
_VOWELS: Final = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
_CODAS: Final = ("", "", "l", "n", "r", "s", "th", "k", "m")
_CITY_ENDS: Final = ("holm", "burg", "mar", "dal", "vik", "ton", "gard", "stead")
_REGION_ENDS: Final = ("ia", "land", "mark", "ora", "esse")
_SURNAME_ENDS: Final = ("ek", "sen", "ov", "ini", "ard", "os", "wick", "ane")
_ROLES: Final = ("painter", "poet", "composer", "sculptor", "surveyor", "physician", "weaver", "sailor", "printer")
_WORK_FORMS: Final = ("novel", "film", "ballet", "play", "symphony", "ballad")
_SCHOOL_KINDS: Final = ("Academy", "College", "Institute", "Lyceum")
_ORDINALS: Final = ("Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh")
_EVENT_KINDS: Final = ("Battle", "Festival", "Congress", "Regatta", "Siege", "Expedition")
_ADJECTIVES_TEXT: Final = """
amber ashen bitter bright broken crimson distant empty frozen gentle gilded grey hidden hollow humble iron ivory jade
last lonely lost marble mild narrow nimble northern pale patient quiet restless rusty sacred salt scarlet silent
silver simple sleeping slow solemn stolen sunken swift tangled violet wandering weary white winding wooden
"""
_ADJECTIVES: Final = tuple(_ADJECTIVES_TEXT.split())
_NOUNS_TEXT: Final = """
anchor anvil apple arrow basket beacon bell bridge candle canyon castle cedar chapel clock cloud compass crane crown
dancer door falcon feather ferry field flute forest fountain garden gate glacier harbor harp hawk heron hill horizon
island kettle lake lantern lark ledger letter lighthouse loom maple meadow mill mirror needle oak orchard otter owl
path pearl pilot plough portrait quarry raven reed ribbon river road rose saddle shadow shepherd shore sparrow spring
stable stair stone storm swan table tailor tide tower valley vessel violin wagon wall well wheel willow window winter
wolf
"""
_NOUNS: Final = tuple(_NOUNS_TEXT.split())


_DISTRACTORS: Final = (
    ("Letter", "A letter of {year} mentions {one} and {other}. Its author is unknown."),
    ("Exhibition", "An exhibition of {year} showed papers about {one}, collected by {other}."),
    ("Coin", "A coin struck in {year} bears the words {one}. It was found by {other}."),
    ("Lecture", "In {year} {other} gave a lecture on {one}. The notes are lost."),
)


@dataclass(slots=True)
class Entity:
    """Something the encyclopedia has a passage about.

    Attributes:
        kind: `person`, `city`, `region`, `work`, `school` or `event`.
        name: unique in the world.
        alias: a second name, or empty.
        facts: value of each slot of `language.FACTS`; names of entities, words, or years.
    """

    kind: str
    name: str
    alias: str = ""
    facts: dict[str, str] = field(default_factory=dict)


class Names:
    """Draws names that were never drawn before.

    Args:
        dice: where the choices come from.
    """

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._taken: set[str] = set()
        self._firsts = [self._syllables(2).capitalize() for _ in range(160)]
        # Few surnames for many people: namesakes are what makes a search by name uncertain.
        self._surnames = [self.surname() for _ in range(240)]

    def _syllables(self, count: int) -> str:
        dice = self._dice
        return "".join(dice.pick(_ONSETS) + dice.pick(_VOWELS) + dice.pick(_CODAS) for _ in range(count))

    def _fresh(self, make: str) -> str:
        """A new name of a sort; after many collisions the syllables grow."""
        for attempt in range(10_000):
            name = self._compose(make, 1 + attempt // 50)
            key = name.lower().removeprefix("the ")  # a pen name must not read like a title
            if key not in self._taken:
                self._taken.add(key)
                return name
        raise RuntimeError(f"no unused {make} name was found; ask for a smaller world")

    def _compose(self, make: str, length: int) -> str:
        dice = self._dice
        if make == "person":
            last = dice.pick(self._surnames) if length == 1 else self.surname(length)
            return f"{dice.pick(self._firsts)} {last}"
        if make == "city":
            return (self._syllables(length) + dice.pick(_CITY_ENDS)).capitalize()
        if make == "region":
            return (self._syllables(length + 1) + dice.pick(_REGION_ENDS)).capitalize()
        if make == "work":
            title = f"The {dice.pick(_ADJECTIVES).title()} {dice.pick(_NOUNS).title()}"
            return title if length < 20 else f"{title} of {self._syllables(2).capitalize()}"
        if make == "pen name":
            return f"{dice.pick(_ADJECTIVES).title()} {dice.pick(_NOUNS).title()}"
        return (self._syllables(length + 1)).capitalize()  # rivers, languages

    def surname(self, length: int = 1) -> str:
        """A surname, not necessarily new."""
        return (self._syllables(length) + self._dice.pick(_SURNAME_ENDS)).capitalize()

    def new(self, make: str) -> str:
        """An unused name of a sort: a kind of entity, `pen name`, or `word`."""
        return self._fresh(make)

    def derived(self, name: str) -> str:
        """A name that was composed elsewhere, with a number in words appended while it is taken."""
        fresh = name
        for ordinal in _ORDINALS:
            if fresh.lower() not in self._taken:
                break
            fresh = f"{ordinal} {name}"
        self._taken.add(fresh.lower())
        return fresh


def name_parts() -> list[str]:
    """Everything that names are put together from: syllables and words, with a blank where a word begins."""
    syllables = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in dict.fromkeys(_CODAS)]
    words = [word.title() for word in (*_ADJECTIVES, *_NOUNS, *_SCHOOL_KINDS, *_EVENT_KINDS, *_ORDINALS, "the")]
    words += [*_ROLES, *_WORK_FORMS, "of"]
    ends = [*_CITY_ENDS, *_REGION_ENDS, *_SURNAME_ENDS]
    return [
        *syllables,
        *ends,
        *(f" {syllable.capitalize()}" for syllable in syllables),
        *(f" {word}" for word in words),
    ]


def make_part(dice: Dice, names: Names, scale: float) -> list[Entity]:
    """The entities of one part, with facts that stay inside it.

    Args:
        dice: choices.
        names: gives names that no other part has.
        scale: size relative to `SIZES`; at least two of every kind are made.

    Returns:
        Entities, kind by kind.
    """
    counts = {kind: max(2, round(size * scale)) for kind, size in SIZES.items()}
    regions = [Entity("region", names.new("region")) for _ in range(counts["region"])]
    cities = [Entity("city", names.new("city")) for _ in range(counts["city"])]
    people = [Entity("person", names.new("person")) for _ in range(counts["person"])]
    works = [Entity("work", names.new("work")) for _ in range(counts["work"])]
    for place, city in enumerate(cities):
        region = regions[place % len(regions)]
        city.facts = {"region": region.name, "river": names.new("word"), "settled": _year(dice, 1000, 1400)}
        region.facts.setdefault("capital", city.name)
        region.facts.setdefault("language", names.new("word"))
    for place, person in enumerate(people):
        teacher = people[(place + 1 + dice.below(len(people) - 1)) % len(people)]
        person.facts = {
            "role": dice.pick(_ROLES),
            "birthplace": dice.pick(cities).name,
            "born_in": _year(dice, 1500, 1900),
            "teacher": teacher.name,
        }
    for work in works:
        work.facts = {
            "form": dice.pick(_WORK_FORMS),
            "creator": dice.pick(people).name,
            "released": _year(dice, 1500, 1950),
        }
    schools = [_school(dice, names, cities, people) for _ in range(counts["school"])]
    events = [_event(dice, names, cities, people) for _ in range(counts["event"])]
    for entity in (*people, *cities, *works):
        if dice.chance(ALIAS_SHARE):
            entity.alias = names.new({"person": "pen name", "city": "city", "work": "work"}[entity.kind])
    return [*regions, *cities, *people, *works, *schools, *events]


def _year(dice: Dice, first: int, last: int) -> str:
    return str(first + dice.below(last - first))


def _school(dice: Dice, names: Names, cities: Sequence[Entity], people: Sequence[Entity]) -> Entity:
    seat, founder = dice.pick(cities), dice.pick(people)
    name = names.derived(f"{names.surname()} {dice.pick(_SCHOOL_KINDS)}")
    return Entity("school", name, "", {"seat": seat.name, "founder": founder.name, "founded": _year(dice, 1500, 1950)})


def _event(dice: Dice, names: Names, cities: Sequence[Entity], people: Sequence[Entity]) -> Entity:
    place, leader = dice.pick(cities), dice.pick(people)
    # Named after a hill or ford of its own, so that the name does not give the city away.
    name = names.derived(f"{dice.pick(_EVENT_KINDS)} of {names.new('word')}")
    return Entity("event", name, "", {"place": place.name, "held_in": _year(dice, 1400, 1950), "leader": leader.name})


def write_passage(dice: Dice, entity: Entity) -> tuple[str, str]:
    """Title and text of the passage about an entity: every fact once, in one of its wordings."""
    values = {"name": entity.name, "alias": entity.alias, **entity.facts}
    sentences = [dice.pick(variants).format(**values) for variants in SENTENCES[entity.kind]]
    if entity.alias:
        sentences.insert(1, ALIAS_SENTENCE[entity.kind].format(**values))
    return entity.name, " ".join(sentences)


def write_distractors(dice: Dice, entities: Sequence[Entity], count: int) -> Iterator[tuple[str, str]]:
    """Passages that mention entities without saying anything that is asked for.

    Yields:
        Titles and texts.
    """
    named = [entity for entity in entities if entity.kind in ("person", "city", "work", "school")]
    people = [entity for entity in entities if entity.kind == "person"]
    for number in range(count):
        one, other = dice.pick(named), dice.pick(people)
        year = _year(dice, 1600, 1950)
        kind, text = dice.pick(_DISTRACTORS)
        yield f"{kind} {number + 1}", text.format(year=year, one=one.name, other=other.name)


def check_part(entities: Sequence[Entity]) -> None:
    """Make sure that every fact is there and points inside the part.

    Raises:
        ValueError: it is not so.
    """
    names = {(entity.kind, entity.name) for entity in entities}
    for entity in entities:
        for slot in FACTS[entity.kind]:
            value = entity.facts.get(slot)
            if value is None or (slot in POINTS_TO and (POINTS_TO[slot], value) not in names):
                raise ValueError(f"{entity.kind} {entity.name!r}: fact {slot!r} is {value!r}, which is nowhere")
