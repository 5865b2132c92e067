"""The analyzer against recorded terms and, where Java is there, against Lucene itself."""

import random
import time

import pytest
from lucene_child import ask

from atod_envs.retrieval.analyzer import MAX_TOKEN_UNITS, analyze, tokenize, unicode_rules
from atod_envs.retrieval.porter import stem


def test_the_whole_chain():
    text = "The quick-thinking foxes' U.S. relational databases were running, it's 3.5 times faster!"
    assert " ".join(analyze(text)) == "quick think fox u. relat databas were run 3.5 time faster"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("can't won’t o'neill's", ["can't", "won’t", "o'neill's"]),
        ("1,000.50 a.b a:b a;b 1;2", ["1,000.50", "a.b", "a:b", "a", "b", "1;2"]),
        ("snake_case __init__ _ 4x4", ["snake_case", "__init__", "4x4"]),
        ("naïve Ünïcode", ["naïve", "Ünïcode"]),
        ("東京タワー ひらがな", ["東", "京", "タワー", "ひ", "ら", "が", "な"]),
        ("ภาษาไทย 한국어", ["ภาษาไทย", "한국어"]),
        ("👨\u200d👩\u200d👧 🇩🇪🇫🇷 #️⃣ 1️⃣", ["👨\u200d👩\u200d👧", "🇩🇪", "🇫🇷", "#️⃣", "1️⃣"]),
        ("צה\"ל ג'", ['צה"ל', "ג'"]),
        ("\u200b\u00ad -- ...", []),
        ("", []),
    ],
)
def test_word_breaks(text, tokens):
    assert tokenize(text) == tokens


def test_lower_case_is_one_to_one_as_in_java():
    assert analyze("İSTANBUL ΟΔΟΣ STRASSE") == ["istanbul", "οδοσ", "strass"]


def test_possessives_of_every_apostrophe():
    assert analyze("cat's cat’s cat＇S") == ["cat"] * 3


def test_long_tokens_are_cut_at_255_units():
    assert [len(token) for token in tokenize("a" * 600)] == [255, 255, 90]
    assert [len(token) for token in tokenize("é" * 256)] == [255, 1]
    assert [len(token) for token in tokenize("\U00010400" * 200)] == [127, 73]
    assert tokenize("_" * 300 + "a") == ["_" * (MAX_TOKEN_UNITS - 1) + "a"]


@pytest.mark.parametrize(
    "piece", ["_", "\uff3f", "\u200d", "a.", "é.", "#\u0301", 'א"', "👨\u200d", "1,", "🇩", "Ⓜ\u200d"]
)
def test_time_is_linear_for_any_text(piece):
    started = time.process_time()
    tokenize(piece * 100_000)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"),
        ("ponies", "poni"),
        ("ties", "ti"),
        ("feed", "feed"),
        ("agreed", "agre"),
        ("hopping", "hop"),
        ("hoping", "hope"),
        ("falling", "fall"),
        ("happy", "happi"),
        ("sky", "sky"),
        ("relational", "relat"),
        ("possibly", "possibl"),
        ("archaeology", "archaeolog"),
        ("geology", "geologi"),
        ("adjustment", "adjust"),
        ("adoption", "adopt"),
        ("controll", "control"),
        ("as", "as"),
        ("s", "s"),
        ("ion", "ion"),
        ("aed", "a"),
    ],
)
def test_porter(word, expected):
    assert stem(word) == expected


def test_terms_equal_lucenes(tmp_path):
    """Every kind of character in random company, and every suffix the stemmer knows on real-looking stems."""
    rng = random.Random(7)
    table, _ = unicode_rules()
    kinds = [[chr(first), chr(last)] for first, last, _ in table.ranges]
    plain = "aAbsSzyYeding'’._:,;1290 -#*İΣß"
    texts = [
        "".join(
            rng.choice(rng.choice(kinds)) if rng.random() < 0.6 else rng.choice(plain)
            for _ in range(rng.choice((2, 5, 13, 30)))
        )
        for _ in range(5000)
    ]
    suffixes = (
        "ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti"
    )
    suffixes += (
        " iviti biliti logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent sion"
    )
    suffixes += " tion ou ism ate iti ous ive ize ed ing s es ies sses eed y e ll"
    stems = ["".join(rng.choice("bcdfglmnprstvwxyaeiou") for _ in range(rng.randint(0, 6))) for _ in range(400)]
    texts += [" ".join(start + suffix for suffix in suffixes.split()) for start in stems]
    texts += [
        text * repeats
        for text in ("a", "é", "\U00010400", "a\u0301", "1.")
        for repeats in (127, 128, 254, 255, 256, 600)
    ]
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    expected = ask(tmp_path, texts=texts)
    different = [
        (text, wanted, found)
        for text, wanted in zip(texts, expected, strict=True)
        if (found := analyze(text)) != wanted
    ]
    assert not different, different[:3]
