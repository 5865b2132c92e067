"""What the small models that come with the project are made of: worlds, tokenizers, sizes, and how long they learn."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gymnasium as gym

from agents.chat import ChatFormat
from agents.reference.tokenizer import train_tokenizer
from atod_algos.training.config import builtin_profile
from atod_algos.training.demonstrations import ImitationOptions, demonstrate
from atod_envs.alfworld.household import tables
from atod_envs.options import read_options
from atod_envs.searchqa.generate import name_parts
from atod_envs.searchqa.language import FACTS, stock_phrases
from atod_envs.webshop.product_types import MAKER_ENDS, MAKER_MIDDLES, MAKER_STARTS, read_product_types


@dataclass(frozen=True)
class Recipe:
    """How the models of one world are made.

    Attributes:
        env: registered id of the environment.
        world: makes the raw environment that is imitated in, given the number of the round, from 0.
        words: finds what the tokenizer is made of.
        shapes: by role, the arguments of ``Qwen3Config`` that set the size.
        imitation: by role, how long it imitates: one stretch, or several, each with a schedule of its own.
        reward: by role, settings of the GRPO run that follows; by default none follows.
        copying: begin with heads that copy; see ``teach_copying``.
        max_response: tokens of a turn; by default those of the environment's profile.
    """

    env: str
    world: Callable[[int], gym.Env[str, str]]
    words: Callable[[], Words]
    shapes: Mapping[str, Mapping[str, int]]
    imitation: Mapping[str, tuple[ImitationOptions, ...]]
    reward: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    copying: bool = False
    max_response: int | None = None


@dataclass(frozen=True)
class Words:
    """What a tokenizer is made of: arguments of ``train_tokenizer``, and of several worlds their union."""

    texts: Sequence[str] = ()
    tags: Sequence[str] = ()
    stock: Sequence[str] = ()
    extra: Sequence[str] = ()

    def __add__(self, other: Words) -> Words:
        """The words of both, each once."""
        return Words(
            [*self.texts, *other.texts],
            *(
                list(dict.fromkeys([*mine, *others]))
                for mine, others in zip(
                    (self.tags, self.stock, self.extra), (other.tags, other.stock, other.extra), strict=True
                )
            ),
        )

    def tokenizer(self) -> Any:
        """A tokenizer that has them."""
        return train_tokenizer(self.texts, tags=self.tags, stock=self.stock, extra=self.extra)


def shape(layers: int, heads: int, key_value_heads: int, head_dim: int, mlp: int) -> dict[str, int]:
    """Size of a model of width 96."""
    return {
        "hidden_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
    }


# --- ALFWorld -----------------------------------------------------------------------------------------------------


def household(number: int = 0) -> gym.Env[str, str]:
    """The built-in world's training split, in every round."""
    return gym.make("atod/ALFWorld-v0", data="builtin", split="train", max_turns=20)


def household_words() -> Words:
    """Those of the expert's episodes, and of everything a household can hold."""
    bare = train_tokenizer(["a b"], tags=["<think>"])
    tasks = household().unwrapped.tasks  # type: ignore[attr-defined]
    shown = demonstrate(tasks[:600], household, ChatFormat(bare), style="compact", seed=0)
    texts = []
    for trajectory in shown:
        texts += [trajectory.task, trajectory.final_observation]
        texts += [text for turn in trajectory.turns for text in (turn.observation, turn.response)]
    return Words(texts, tags=["<think>", "</think><action>", "</action>"], extra=names_of_things())


def names_of_things() -> list[str]:
    """Names of all receptacle and object classes of the official games, with the blank before them."""
    held = tables().contains
    names = set(held).union(*held.values())
    return sorted(f" {name.lower()}" for name in names)


# --- Search-QA ----------------------------------------------------------------------------------------------------


SINGLE_ROUNDS = 6
"""Rounds over questions that one search answers, before all kinds are asked."""


def encyclopedia(number: int) -> gym.Env[str, str]:
    """Another encyclopedia every round, none the built-in one: with new names each time, only copies can be right."""
    dataset = "single" if number < SINGLE_ROUNDS else None
    options = read_options(builtin_profile("atod/SearchQA-v0")["option"])
    return gym.make("atod/SearchQA-v0", data=f"builtin:{100 + number}", split="train", dataset=dataset, **options)


def encyclopedia_words() -> Words:
    """Those of the grammar: syllables, words of titles, halves of years, phrases, the searcher's thoughts.

    They hold no name whole, so the names of the test questions are as new to the models as those of any other
    encyclopedia.
    """
    facts = sorted({fact.replace("_", " ") for known in FACTS.values() for fact in known})
    thoughts = [f" {verb} {fact}" for verb in ("find", "found") for fact in facts]
    numbers = [*(f" {n}" for n in range(10, 20)), *(f"{n:02d}" for n in range(100)), *"0123456789"]
    return Words(
        tags=["<think>", " </think><search>", " </search>", " </think><answer>", " </answer>"],
        stock=[*stock_phrases(), *thoughts, " before", " or"],
        extra=[*name_parts(), *numbers, *"\n-:.,?"],
    )


# --- WebShop ------------------------------------------------------------------------------------------------------


def shop(number: int = 0) -> gym.Env[str, str]:
    """The built-in shop's training goals, in every round."""
    return gym.make(
        "atod/WebShop-v0",
        data="builtin",
        split="train",
        nouns="rules",
        max_turns=builtin_profile("atod/WebShop-v0")["max_turns"],
    )


def shop_words() -> Words:
    """Those of the product types: attributes, kinds, options, pieces of names, the shopper's thoughts."""
    names: set[str] = set()
    for product_type in read_product_types():
        names |= {
            *product_type.plain,
            *product_type.having,
            *product_type.purpose,
            product_type.query,
            product_type.noun.lower(),
            *product_type.options,
        }
        names |= {value for values in product_type.options.values() for value in values}
    choices = {f" choose {name}" for product_type in read_product_types() for name in product_type.options}
    buttons = [" buy now", " < prev", " next >", " features", " description", " reviews", " back to search"]
    thoughts = [
        " search for it",
        " look at it",
        " buy it",
        " back to it",
        " read more",
        " look at others",
        " take the best",
    ]
    frames = [
        "page 1 (total results: ",
        "\n-",
        " description | features | reviews | buy now",
        " rating: n.a.",
        " rating:",
    ]
    frames += [" price: $", " $", " to $", " made with", " a good choice for"]
    asking = [
        "Find me",
        ", and price lower than",
        ".00 dollars",
        ", and",
        "same page",
        *(f".{cents}" for cents in (99, 49, 95)),
    ]
    makers = [*(f" {start.lower()}" for start in MAKER_STARTS), *MAKER_MIDDLES, *MAKER_ENDS]
    ranks = [f" #{n}" for n in range(1, 11)]
    numbers = [*(f" {n}" for n in range(10, 1000, 10)), *(f"{n:02d}" for n in range(100)), *"0123456789"]
    return Words(
        tags=["<think>", "</think><action>", "search[", "click[", "]</action>"],
        stock=[*sorted(f" {name}" for name in names), *sorted(choices), *buttons, *thoughts, *frames, *asking, *ranks],
        extra=[*makers, *numbers, " with", " for", " and", *"\n-:.,?$()&|"],
    )


# --- All three with one tokenizer ---------------------------------------------------------------------------------

ORDER = "SSASSASASASASASWASASSASASAWSASASASWASASASASAWSASASASWASASASW" + "SSSSASSSSWSSSSASSSSW"
"""The world of each round of the student that knows three: Search-QA is learned slowest, WebShop fastest. In the last
20 rounds Search-QA catches up."""


def any_world(number: int) -> gym.Env[str, str]:
    """The world of a round, the n-th round of that world."""
    worlds = {"A": household, "W": shop, "S": encyclopedia}
    return worlds[ORDER[number]](ORDER[:number].count(ORDER[number]))


def all_words() -> Words:
    """Those of the three worlds."""
    return household_words() + encyclopedia_words() + shop_words()


READER = shape(2, 4, 4, 32, 192)
"""Size of the models that copy."""
HOUSEHOLD = ImitationOptions(rounds=30, episodes=256, lr=4e-3, last_beta=0.5, seed=1)
SHOP = ImitationOptions(12, 192, 2, lr=4e-3, last_beta=0.5, batch_tokens=2048, stop=6, seed=1)
ENCYCLOPEDIA = ImitationOptions(60, 400, 1, lr=3e-3, last_beta=0.5, batch_tokens=2048, seed=1)
"""How long each world's teacher imitates; its student is the same model, stopped earlier."""


def common_teacher(env: str, world: Callable[[int], gym.Env[str, str]], options: ImitationOptions) -> Recipe:
    """A teacher of the student that knows all worlds."""
    return Recipe(env, world, all_words, {"teacher": READER}, {"teacher": (options,)}, copying=True, max_response=32)


RECIPES: Mapping[str, Recipe] = {
    "alfworld": Recipe(
        "atod/ALFWorld-v0",
        household,
        household_words,
        {"student": shape(2, 6, 2, 16, 288), "teacher": shape(2, 6, 2, 16, 288)},
        {"student": (replace(HOUSEHOLD, stop=19),), "teacher": (HOUSEHOLD,)},
        {"teacher": {"steps": 12, "lr": 3e-4, "minibatches": 4, "warmup_steps": 5, "eval_every": 0, "seed": 7}},
    ),
    "searchqa": Recipe(
        "atod/SearchQA-v0",
        encyclopedia,
        encyclopedia_words,
        {"student": READER, "teacher": READER},
        {"student": (replace(ENCYCLOPEDIA, stop=25),), "teacher": (ENCYCLOPEDIA,)},
        {"teacher": {"steps": 20, "lr": 3e-4, "minibatches": 4, "warmup_steps": 5, "eval_every": 0, "seed": 7}},
        copying=True,
    ),
    "webshop": Recipe(
        "atod/WebShop-v0",
        shop,
        shop_words,
        {"student": READER, "teacher": READER},
        {"student": (replace(SHOP, stop=4),), "teacher": (SHOP,)},
        {"teacher": {"steps": 12, "lr": 4e-4, "minibatches": 4, "warmup_steps": 5, "eval_every": 0, "seed": 7}},
        copying=True,
    ),
    "all": Recipe(
        "atod/WebShop-v0",
        any_world,
        all_words,
        {"student": READER},
        {
            "student": (
                ImitationOptions(60, 256, 1, lr=4e-3, last_beta=0.5, batch_tokens=2048, seed=1),
                ImitationOptions(20, 256, lr=3e-3, first_beta=0.4, last_beta=0.6, batch_tokens=2048, seed=2),
            )
        },
        copying=True,
        max_response=32,
    ),
    "all/alfworld": common_teacher("atod/ALFWorld-v0", household, HOUSEHOLD),
    "all/webshop": common_teacher("atod/WebShop-v0", shop, SHOP),
    "all/searchqa": common_teacher("atod/SearchQA-v0", encyclopedia, ENCYCLOPEDIA),
}
"""By the folder that the models lie in: an environment's key, and ``all`` for one student of three environments with
their teachers."""
