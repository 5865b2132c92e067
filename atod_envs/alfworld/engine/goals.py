"""The goal of a game as conditions that can be counted.

ALFRED scores an episode by the share of its goal conditions that are met; this module derives such conditions from the
PDDL goal alone, with no list of task types. A goal is a conjunction of `exists` parts. Within a part, every changeable
literal whose variables the goal names by class (or are the agent) is one condition, met when some objects of these
classes satisfy it; literals that say the same count once. A part with more than one changeable literal adds one
condition: all of them met at once. For "put a clean mug in the coffee machine" that gives three: a mug in a coffee
machine, a clean mug, a clean mug in a coffee machine; for two objects it gives two, as in ALFRED.

Invariant: all conditions are met if the goal holds; the last condition of every part being met means that the part
holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atod_envs.alfworld.engine.conditions import Branch, branches, free, predicates, rename
from atod_envs.alfworld.engine.pddl import Formula, Junction, Literal, Quantified, conjunction


def abstract(goal: Formula) -> tuple[Formula, tuple[str, ...]]:
    """Replace the constants of a goal by `$0`, `$1`, ...; return the shape and the constants."""
    found: dict[str, str] = {}

    def visit(formula: Formula) -> None:
        if isinstance(formula, Literal):
            for arg in formula.args:
                if not arg.startswith("?"):
                    found.setdefault(arg, f"${len(found)}")
        elif isinstance(formula, Junction):
            for part in formula.parts:
                visit(part)
        else:
            visit(formula.body)

    visit(goal)
    return rename(goal, found), tuple(found)


def conditions(goal: Formula, fluents: frozenset[str]) -> tuple[Formula, ...]:
    """The conditions that make up a goal, in the order of its text."""
    parts = goal.parts if isinstance(goal, Junction) and goal.kind == "and" else (goal,)
    result: list[Formula] = []
    for part in parts:
        alternatives = branches((), part)
        if len(alternatives) == 1 and alternatives[0].variables:
            result.extend(_part(part, alternatives[0], fluents))
        else:
            result.append(part)
    return tuple(dict.fromkeys(result)) or (goal,)


def _part(part: Formula, branch: Branch, fluents: frozenset[str]) -> list[Formula]:
    kinds = dict(branch.variables)
    fixed = [clause for clause in branch.clauses if not predicates(clause) & fluents]
    changeable = [clause for clause in branch.clauses if predicates(clause) & fluents]
    named = {
        arg
        for clause in fixed
        if isinstance(clause, Literal) and clause.positive and any(not other.startswith("?") for other in clause.args)
        for arg in clause.args
        if arg.startswith("?")
    }
    found: dict[Formula, None] = {}
    for clause in changeable:
        variables = free(clause)
        if not all(name in named or kinds[name] == "agent" for name in variables):
            continue
        about = [other for other in fixed if free(other) and free(other) <= variables]
        found[_canonical(clause, about, kinds)] = None
    singles = list(found)
    return singles if len(changeable) == 1 and singles else [*singles, part]


def _canonical(clause: Formula, about: Sequence[Formula], kinds: Mapping[str, str]) -> Formula:
    """`exists` over the clause's variables, with names and order that do not depend on how the goal was written."""
    order: list[str] = []
    for literal in (clause, *about):
        order.extend(arg for arg in getattr(literal, "args", ()) if arg.startswith("?") and arg not in order)
    names = {name: f"?x{index}" for index, name in enumerate(order)}
    static = sorted((rename(literal, names) for literal in dict.fromkeys(about)), key=repr)
    body = conjunction([rename(clause, names), *static])
    return Quantified("exists", tuple((names[name], kinds[name]) for name in order), body)
