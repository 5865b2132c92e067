"""How often the noun finder decides WebShop's reward: spaCy against the rules, on pairs of products of one category.

    pip install 'atod[nouns]'
    python benchmarks/webshop_nouns.py --data DIR        # official files
    python benchmarks/webshop_nouns.py                   # the built-in catalogue

Both finders score the purchase of one product for a goal made from another one of the same category. Counted are the
pairs whose type factor differs, which multiplies the whole reward, and those that lie within one noun of a cliff (0.1
and 0.2), where the rules alone cannot be trusted to the last step.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict

from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.catalogue.product import Product
from atod_envs.webshop.nouns import NounFinder, noun_finder
from atod_envs.webshop.reward import type_factor

CLIFFS = (0.1, 0.2)


def factor(bought: Product, wanted: Product, finder: NounFinder) -> float:
    """The type factor of a purchase, as the environment computes it."""
    shared = len(_categories(bought) & _categories(wanted)) >= 2
    return type_factor(bought.query == wanted.query, shared, share(bought, wanted, finder))


def share(bought: Product, wanted: Product, finder: NounFinder) -> float:
    """Distinct shared nouns over all wanted ones."""
    nouns = finder.find(wanted.title)
    return len(set(finder.find(bought.title)) & set(nouns)) / len(nouns) if nouns else 0.2


def near(bought: Product, wanted: Product, finder: NounFinder) -> bool:
    """Whether one shared noun more or less leads across a cliff."""
    step = 1 / max(1, len(finder.find(wanted.title)))
    at = share(bought, wanted, finder)
    return any(_side(at + change, cliff) != _side(at, cliff) for cliff in CLIFFS for change in (-step, step))


def _side(value: float, cliff: float) -> bool:
    return value >= cliff if cliff == 0.1 else value > cliff


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="official files; default: the built-in catalogue")
    parser.add_argument("--pairs", type=int, default=40_000, help="default: %(default)s")
    options = parser.parse_args()
    store = open_store(options.data or "builtin")
    spacy, rules = noun_finder("spacy"), noun_finder("rules")
    by_category = defaultdict(list)
    for row in range(len(store)):
        by_category[store.product(row).category].append(row)
    rng = random.Random(0)
    rows = [row for row in range(len(store)) if len(by_category[store.product(row).category]) > 1]
    changed: Counter[tuple[float, float]] = Counter()
    edge = 0
    for _ in range(options.pairs):
        wanted = store.product(rng.choice(rows))
        others = by_category[wanted.category]
        bought = store.product(rng.choice(others))
        while bought.asin == wanted.asin:
            bought = store.product(rng.choice(others))
        pair = factor(bought, wanted, spacy), factor(bought, wanted, rules)
        changed[pair] += pair[0] != pair[1]
        edge += near(bought, wanted, rules)
    differing = sum(changed.values())
    print(f"{store.name}: {options.pairs} pairs of one category, {spacy.name} against {rules.name}")
    print(
        f"other type factor: {differing} ({differing / options.pairs:.2%}); within a noun of a cliff: {edge / options.pairs:.2%}"
    )
    for (ours, theirs), count in sorted((+changed).items(), key=lambda item: -item[1]):
        print(f"  {ours:g} by spaCy, {theirs:g} by the rules: {count} ({count / options.pairs:.2%})")


if __name__ == "__main__":
    main()
