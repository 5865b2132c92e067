"""Task sentences: the two templates of each task type that games carry, and freer ones as people would write them.

The invariant: every sentence is a function of the goal (and, for the freer ones, of dice); the two templates are the
published ones, because agents are trained on their exact words.
"""

from __future__ import annotations

from atod_envs.alfworld.generator.scenes import SceneGoal
from atod_envs.alfworld.household import CLEAN, COOL, HEAT, LOOK, PICK, TWO, spoken
from atod_envs.dice import Dice

TEMPLATES: dict[str, tuple[str, str]] = {
    PICK: ("put a {thing} in {receptacle}", "put some {thing} on {receptacle}"),
    LOOK: ("look at {thing} under the {lamp}", "examine the {thing} with the {lamp}"),
    CLEAN: ("put a clean {thing} in {receptacle}", "clean some {thing} and put it in {receptacle}"),
    HEAT: ("put a hot {thing} in {receptacle}", "heat some {thing} and put it in {receptacle}"),
    COOL: ("put a cool {thing} in {receptacle}", "cool some {thing} and put it in {receptacle}"),
    TWO: ("put two {thing} in {receptacle}", "find two {thing} and put them in {receptacle}"),
}

_FREE: dict[str, tuple[str, ...]] = {
    PICK: (
        "Bring {a_thing} over to the {receptacle}.",
        "Move {a_thing} to the {receptacle}.",
        "Fetch the {thing} and leave it at the {receptacle}.",
        "I want {a_thing} on or in the {receptacle}.",
    ),
    LOOK: (
        "Hold {a_thing} up to the light of the {lamp}.",
        "Switch on the {lamp} and inspect {a_thing}.",
        "Take {a_thing} to the {lamp} and turn the light on.",
        "Check the {thing} by lamp light.",
    ),
    CLEAN: (
        "Wash {a_thing} and leave it at the {receptacle}.",
        "Rinse the {thing} in the sink, then take it to the {receptacle}.",
        "The {receptacle} needs a freshly washed {thing}.",
        "Bring a spotless {thing} to the {receptacle}.",
    ),
    HEAT: (
        "Warm {a_thing} up and leave it at the {receptacle}.",
        "Microwave the {thing}, then take it to the {receptacle}.",
        "The {receptacle} needs a hot {thing}.",
        "Bring a heated {thing} to the {receptacle}.",
    ),
    COOL: (
        "Chill {a_thing} and leave it at the {receptacle}.",
        "Cool the {thing} in the fridge, then take it to the {receptacle}.",
        "The {receptacle} needs a cold {thing}.",
        "Bring a chilled {thing} to the {receptacle}.",
    ),
    TWO: (
        "Bring both {things} to the {receptacle}.",
        "Collect two {things} and leave them at the {receptacle}.",
        "Move a pair of {things} to the {receptacle}.",
        "There should be two {things} at the {receptacle}.",
    ),
}


def templated(goal: SceneGoal, dice: Dice) -> str:
    """One of the two published sentences of the goal's task type, without the final stop."""
    return dice.pick(TEMPLATES[goal.task_type]).format(
        thing=goal.thing.lower(), receptacle=goal.receptacle.lower(), lamp=goal.lamp.lower()
    )


def free(goal: SceneGoal, dice: Dice, number: int = 3) -> list[str]:
    """Different sentences in everyday words for the goal."""
    thing = spoken(goal.thing)
    words = {
        "thing": thing,
        "a_thing": with_article(thing),
        "things": plural(thing),
        "receptacle": spoken(goal.receptacle),
        "lamp": spoken(goal.lamp),
    }
    return [sentence.format(**words) for sentence in dice.shuffled(_FREE[goal.task_type])[:number]]


def with_article(noun: str) -> str:
    """``an egg``, ``a mug``."""
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


def plural(noun: str) -> str:
    """``knives``, ``boxes``, ``mugs``."""
    if noun.endswith("knife"):
        return noun[:-2] + "ves"
    if noun.endswith(("ato",)):
        return noun + "es"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
