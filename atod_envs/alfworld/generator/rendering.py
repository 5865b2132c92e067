"""Worlds as official files: the problem text, ``game.tw-pddl``, ``traj_data.json``.

The invariant: what is written here is read by any player of the published games, and the stored walkthrough is a
shortest plan that wins. Text depends on the scene alone; facts are written in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources

from atod_envs.alfworld.generator import sentences
from atod_envs.alfworld.generator.scenes import Scene, SceneGoal, display_names
from atod_envs.alfworld.household import ABLE, LAMPS, LOOK, OPENABLE, PROCESSES, TWO, spoken, tables, takes
from atod_envs.alfworld.planner.shortest_plan import Situation, shortest_plan
from atod_envs.dice import Dice

GOAL_SLOT = "UNKNOWN GOAL"
"""Where a grammar file takes the task sentence."""

_ALWAYS_TYPES = ("SinkType", "SinkBasinType", "MicrowaveType", "FridgeType", "KnifeType", "ButterKnifeType")
"""Constants that the domain names, so every problem has to declare them."""


@cache
def domain() -> str:
    """The rules, as they go into every game file."""
    return (resources.files("atod_envs.alfworld") / "assets" / "alfred.pddl").read_text(encoding="utf-8")


@cache
def grammar() -> str:
    """The texts, with a slot for the task sentence."""
    return (resources.files("atod_envs.alfworld") / "assets" / "alfred.twl2").read_text(encoding="utf-8")


def game_data(scene: Scene, dice: Dice) -> dict[str, object]:
    """The content of ``game.tw-pddl``.

    Args:
        scene: what to write down.
        dice: chooses between the two templated sentences.
    """
    return {
        "pddl_domain": domain(),
        "grammar": grammar().replace(GOAL_SLOT, sentences.templated(scene.goal, dice)),
        "pddl_problem": problem(scene),
        "solvable": True,
        "walkthrough": list(walkthrough(scene)),
    }


def walkthrough(scene: Scene) -> tuple[str, ...]:
    """A shortest plan for a scene as it begins."""
    spots, things, goal = scene.layout.spots, scene.things, scene.goal
    names = display_names([spot.ident for spot in spots] + [thing.ident for thing in things])
    process = PROCESSES.get(goal.task_type)
    wanted = [thing for thing in things if thing.kind == goal.thing]
    return shortest_plan(
        Situation(
            task_type=goal.task_type,
            here=scene.layout.start,
            reach={names[spot.ident]: spot.location for spot in spots},
            closed=frozenset(names[spot.ident] for spot in spots if spot.kind in OPENABLE),
            things={names[thing.ident]: (names[spots[thing.spot].ident],) for thing in wanted},
            loose=frozenset(names[thing.ident] for thing in wanted),
            able=frozenset(names[thing.ident] for thing in wanted),  # by choice of the goal
            done=frozenset(),
            targets=tuple(names[spot.ident] for spot in spots if spot.kind == goal.receptacle),
            stations=tuple(names[spot.ident] for spot in spots if process is not None and spot.kind == process.station),
            lamps={names[t.ident]: (names[spots[t.spot].ident],) for t in things if t.kind == goal.lamp},
        )
    )


def problem(scene: Scene) -> str:
    """The problem file: objects, facts, goal."""
    layout, things = scene.layout, scene.things
    receptacle_kinds = list(dict.fromkeys(spot.kind for spot in layout.spots))
    thing_kinds = list(dict.fromkeys(thing.kind for thing in things))
    types = {f"{kind}Type": "rtype" for kind in receptacle_kinds} | {f"{kind}Type": "otype" for kind in thing_kinds}
    for name in _ALWAYS_TYPES:
        types.setdefault(name, "otype" if "Knife" in name or name == "SinkType" else "rtype")
    if scene.goal.receptacle:
        types.setdefault(f"{scene.goal.receptacle}Type", "rtype")
    locations = [*dict.fromkeys(spot.location for spot in layout.spots), layout.start]
    lines = ["(define (problem household)", "(:domain alfred)", "(:objects", "  agent1 - agent"]
    lines += [f"  {name} - {kind}" for name, kind in types.items()]
    lines += [f"  {spot.ident} - receptacle" for spot in layout.spots]
    lines += [f"  {thing.ident} - object" for thing in things]
    lines += [f"  {location} - location" for location in locations]
    lines += [")", "(:init"]
    lines += [f"  ({fact})" for fact in _facts(scene, receptacle_kinds, thing_kinds)]
    lines += [")", goal_condition(scene.goal), ")", ""]
    return "\n".join(lines)


def _facts(scene: Scene, receptacle_kinds: list[str], thing_kinds: list[str]) -> Iterator[str]:
    spots, things = scene.layout.spots, scene.things
    yield f"atLocation agent1 {scene.layout.start}"
    for spot in spots:
        yield f"receptacleType {spot.ident} {spot.kind}Type"
        yield f"receptacleAtLocation {spot.ident} {spot.location}"
        if spot.kind in OPENABLE:
            yield f"openable {spot.ident}"
    for place in receptacle_kinds:
        for kind in thing_kinds:
            if takes(place, kind):
                yield f"canContain {place}Type {kind}Type"
    for thing in things:
        spot = spots[thing.spot]
        yield f"objectType {thing.ident} {thing.kind}Type"
        yield f"inReceptacle {thing.ident} {spot.ident}"
        yield f"objectAtLocation {thing.ident} {spot.location}"
        if thing.kind not in LAMPS:
            yield f"pickupable {thing.ident}"
        for predicate, kinds in ABLE.items():
            if thing.kind in kinds:
                yield f"{predicate} {thing.ident}"


def goal_condition(goal: SceneGoal) -> str:
    """The ``(:goal ...)`` block of a task."""
    if goal.task_type == LOOK:
        return f"""(:goal (and
  (exists (?ot - object ?r - receptacle ?a - agent ?l - location)
    (and (objectType ?ot {goal.lamp}Type) (toggleable ?ot) (isToggled ?ot)
         (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))
  (exists (?o - object ?a - agent)
    (and (objectType ?o {goal.thing}Type) (holds ?a ?o)))))"""
    if goal.task_type == TWO:
        return f"""(:goal (and
  (exists (?r - receptacle)
    (exists (?o1 - object)
      (and (objectType ?o1 {goal.thing}Type) (receptacleType ?r {goal.receptacle}Type) (inReceptacle ?o1 ?r)
           (exists (?o2 - object)
             (and (not (= ?o1 ?o2))
                  (objectType ?o2 {goal.thing}Type) (receptacleType ?r {goal.receptacle}Type)
                  (inReceptacle ?o2 ?r))))))))"""
    process = PROCESSES.get(goal.task_type)
    extra = "" if process is None else f" ({process.able} ?o) ({process.done} ?o)"
    return f"""(:goal (and
  (exists (?r - receptacle)
    (exists (?o - object)
      (and (inReceptacle ?o ?r)
           (objectType ?o {goal.thing}Type) (receptacleType ?r {goal.receptacle}Type){extra})))))"""


def trajectory_data(scene: Scene, trial: str, plan: list[str], dice: Dice) -> dict[str, object]:
    """The content of ``traj_data.json``, as far as players of the text games read it, and the plan in ALFRED's words.

    Args:
        scene: the scene.
        trial: name of the trial folder.
        plan: the walkthrough.
        dice: chooses the task sentences.
    """
    goal = scene.goal
    steps = [step for command in plan if (step := _high_level(command)) is not None]
    descriptions = [_in_words(action, arguments) for action, arguments in steps]
    scene_number = scene.layout.scene
    return {
        "images": [],
        "pddl_params": {
            "mrecep_target": "",
            "object_sliced": False,
            "object_target": goal.thing,
            "parent_target": goal.receptacle,
            "toggle_target": goal.lamp,
        },
        "plan": {
            "high_pddl": [
                {"discrete_action": {"action": action, "args": arguments}, "high_idx": index}
                for index, (action, arguments) in enumerate([*steps, ("NoOp", [])])
            ],
            "low_actions": [],
        },
        "scene": {
            "dirty_and_empty": False,
            "floor_plan": f"FloorPlan{scene_number}",
            "object_poses": [],
            "object_toggles": [],
            "random_seed": 0,
            "scene_num": scene_number,
        },
        "task_id": trial,
        "task_type": goal.task_type,
        "turk_annotations": {
            "anns": [
                {
                    "assignment_id": f"generated_{number}",
                    "high_descs": descriptions,
                    "task_desc": sentence,
                    "votes": [1, 1],
                }
                for number, sentence in enumerate(sentences.free(goal, dice))
            ]
        },
    }


def _high_level(command: str) -> tuple[str, list[str]] | None:
    """ALFRED's high-level action for a command; opening belongs to the action that follows it."""
    words = command.split()
    match words:
        case ["go", "to", kind, _]:
            return "GotoLocation", [kind]
        case ["take", kind, _, "from", *_]:
            return "PickupObject", [kind]
        case ["move", kind, _, "to", place, _]:
            return "PutObject", [kind, place]
        case ["clean" | "heat" | "cool" as verb, kind, *_]:
            return f"{verb.capitalize()}Object", [kind]
        case ["use", kind, _]:
            return "ToggleObject", [kind]
        case _:
            return None


@cache
def _class_names() -> dict[str, str]:
    return {kind.lower(): kind for kind in (*tables().contains, *tables().seen_in)}


def _in_words(action: str, arguments: list[str]) -> str:
    nouns = [spoken(_class_names().get(name, name)) for name in arguments]
    phrases = {
        "GotoLocation": "Walk to the {0}.",
        "PickupObject": "Take the {0}.",
        "PutObject": "Leave the {0} at the {1}.",
        "CleanObject": "Wash the {0} under the tap.",
        "HeatObject": "Warm the {0} in the microwave.",
        "CoolObject": "Chill the {0} in the fridge.",
        "ToggleObject": "Switch the {0} on.",
    }
    return phrases[action].format(*nouns)
