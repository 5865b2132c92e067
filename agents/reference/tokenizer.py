"""A small tokenizer for a text world, made from a sample of its text.

Text worlds speak in stock phrases about numbered things. One token for each thing (`` cabinet 1``) and each phrase
between things (``. On the``) makes an episode five times shorter than letters would, and naming a thing a matter of
copying one token. Anything else falls back to bytes, so every text can be encoded and comes back unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
THING = r" [a-z]+ [0-9]{1,2}(?![0-9a-z])"
"""A numbered thing with the blank before it."""
_THINGS = 256
"""Most frequent numbered things that become one token."""
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Chat template: it keeps every turn as it was generated."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    phrases: int = 96,
    words: int = 400,
    tags: Iterable[str] = (),
    stock: Iterable[str] = (),
    extra: Iterable[str] = (),
) -> Any:
    """Make a tokenizer from a sample of texts.

    Args:
        texts: observations, tasks and responses of the world.
        phrases: most frequent runs of text between things that become one token.
        words: most frequent words that become one token.
        tags: strings that always are one token.
        stock: phrases that are one token wherever no word or number runs on behind them.
        extra: words and parts of words that get a token although the sample may lack them.

    Returns:
        A ``transformers`` fast tokenizer with a chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags, fixed = tuple(tags), tuple(stock)
    thing_count: Counter[str] = Counter()
    phrase_count: Counter[str] = Counter()
    word_count: Counter[str] = Counter()
    splitter = re.compile("|".join([*map(re.escape, sorted(tags, key=len, reverse=True)), THING]))
    for text in texts:
        thing_count.update(found for found in splitter.findall(text) if found not in tags)
        for run in splitter.split(text):
            for line in run.splitlines(keepends=True):
                phrase_count[line] += 1
            word_count.update(re.findall(r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]", run))
    classes = {thing.split()[0] for thing in thing_count}

    def names_nothing(phrase: str) -> bool:
        """A phrase that names no thing: those must stay words of their own, to be copied."""
        return 1 < len(phrase) <= 40 and not phrase.isspace() and classes.isdisjoint(re.findall("[a-z]+", phrase))

    chosen_phrases = [p for p, n in _common(phrase_count) if n >= 20 and names_nothing(p)][:phrases]
    chosen_words = [w for w, n in _common(word_count) if n >= 2][:words]
    chosen_things = [t for t, _ in _common(thing_count)][:_THINGS]
    pieces = [*tags, *fixed, *chosen_things, *chosen_phrases, *chosen_words, *extra, *(f" {n}" for n in range(31))]
    vocabulary: dict[str, float] = dict.fromkeys(SPECIAL, 0.0)
    vocabulary |= {f"<0x{byte:02X}>": -20.0 for byte in range(256)}
    # Among ways to cut a text, the fewest pieces win; equal scores make that a matter of counting.
    vocabulary |= {piece: -10.0 for piece in pieces if piece not in vocabulary}

    tokenizer = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=0, byte_fallback=True))
    alternatives = sorted({*tags, *fixed, *chosen_phrases}, key=lambda p: (-len(p), p))
    ends = {p: "(?![A-Za-z])" if p[-1].isalpha() else "(?![0-9])" if p[-1].isdigit() else "" for p in fixed}
    escaped = [re.escape(p) + ends.get(p, "") for p in alternatives]
    pattern = "|".join([*escaped, THING, r" ?[A-Za-z]+", r" ?[0-9]+", r"[^A-Za-z0-9]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def _common(counts: Counter[str]) -> list[tuple[str, int]]:
    """By falling frequency, ties in alphabetical order."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
