"""From PDDL conditions to Python functions over bit sets.

A relation is kept as bit sets over the game's objects, so "which objects satisfy this, given the others" is a handful
of integer operations. This module orders the variables of a condition, and writes the nested loops as Python source.
The last variable on which anything changeable depends is never looped over: its whole set is computed at once, and
becomes part of a key under which the engine remembers what that set means.

Invariant: the generated functions are pure, and enumerate exactly the satisfying assignments of the condition.

Names in generated code: `u[p]` members of a one-place predicate, `r[p].get(x, 0)` the y with p(x, y), `c[p].get(y, 0)`
the x with p(x, y), `T` members of each type, `K` constants, `U` everything, `v0, v1, ...` variables in the plan's
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from atod_envs.alfworld.engine.pddl import Formula, Junction, Literal, Quantified, negate
from atod_envs.errors import DataError

Generated: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Branch:
    """One way to satisfy a condition: variables (name, type) and clauses that must all hold."""

    variables: tuple[tuple[str, str], ...]
    clauses: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """Numbers of the predicates, types and constants that generated code may mention."""

    predicates: Mapping[str, int]
    types: dict[str, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    fluents: frozenset[str] = frozenset()


def branches(variables: Sequence[tuple[str, str]], formula: Formula) -> list[Branch]:
    """Split a condition at the disjunctions that hold quantifiers, and lift `exists` to variables."""
    fresh = count()
    result: list[Branch] = []

    def spread(done: list[Formula], todo: list[Formula], extra: list[tuple[str, str]]) -> None:
        todo = list(todo)
        done, extra = list(done), list(extra)
        while todo:
            part = todo.pop(0)
            if isinstance(part, Junction) and part.kind == "and":
                todo[:0] = part.parts
            elif isinstance(part, Junction) and any(_has_exists(child) for child in part.parts):
                for child in part.parts:
                    spread(done, [child, *todo], extra)
                return
            elif isinstance(part, Quantified) and part.kind == "exists":
                renamed = {name: f"{name}'{next(fresh)}" for name, _ in part.variables}
                extra.extend((renamed[name], kind) for name, kind in part.variables)
                todo.insert(0, rename(part.body, renamed))
            else:
                done.append(part)
        result.append(Branch((*variables, *extra), tuple(done)))

    spread([], [formula], [])
    return result


def rename(formula: Formula, names: Mapping[str, str]) -> Formula:
    """Substitute free variables."""
    if isinstance(formula, Literal):
        return Literal(formula.predicate, tuple(names.get(arg, arg) for arg in formula.args), formula.positive)
    if isinstance(formula, Junction):
        return Junction(formula.kind, tuple(rename(part, names) for part in formula.parts))
    bound = {name for name, _ in formula.variables}
    inner = {old: new for old, new in names.items() if old not in bound}
    return Quantified(formula.kind, formula.variables, rename(formula.body, inner))


def free(formula: Formula) -> frozenset[str]:
    """The free variables of a formula."""
    if isinstance(formula, Literal):
        return frozenset(arg for arg in formula.args if arg.startswith("?"))
    if isinstance(formula, Junction):
        return frozenset().union(*(free(part) for part in formula.parts))
    return free(formula.body) - {name for name, _ in formula.variables}


def predicates(formula: Formula) -> frozenset[str]:
    """The predicates that a formula mentions."""
    if isinstance(formula, Literal):
        return frozenset({formula.predicate})
    if isinstance(formula, Junction):
        return frozenset().union(*(predicates(part) for part in formula.parts))
    return predicates(formula.body)


class Writer:
    """Writes Python functions for conditions of one domain.

    Args:
        names: numbers of predicates, types and constants; types and constants are added as they are met.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self._helpers: list[str] = []
        self._serial = count()

    def compile(self, sources: Iterable[str]) -> dict[str, Any]:
        """Execute the helpers and the given function sources; return the resulting names."""
        space: dict[str, Any] = {}
        exec("\n".join([*self._helpers, *sources]), space)
        return space

    def order(self, branch: Branch) -> list[tuple[str, str]]:
        """The variables in the order in which to bind them: through changeable relations first, nearest the root."""
        remaining = list(branch.variables)
        bound: list[str] = []
        ordered: list[tuple[str, str]] = []
        while remaining:
            best = max(range(len(remaining)), key=lambda i: (*self._rank(remaining[i][0], branch, bound), -i))
            ordered.append(remaining.pop(best))
            bound.append(ordered[-1][0])
        return ordered

    def _rank(self, name: str, branch: Branch, bound: list[str]) -> tuple[int, int]:
        rank, nearness, changeable = 0, -len(bound), 0
        for clause in branch.clauses:
            if name not in free(clause):
                continue
            if predicates(clause) & self.names.fluents:
                changeable += 1
            if not isinstance(clause, Literal) or not clause.positive or len(clause.args) != 2:
                continue
            other = [arg for arg in clause.args if arg != name]
            if not other or (other[0].startswith("?") and other[0] not in bound):
                continue
            link = 2 if clause.predicate in self.names.fluents and other[0] in bound else 1
            distance = -bound.index(other[0]) if other[0] in bound else -len(bound)
            rank, nearness = max((rank, nearness), (link, distance))
        return (changeable, 0) if not bound else (rank, nearness)

    def split(self, branch: Branch, ordered: list[tuple[str, str]]) -> int:
        """Position of the vector variable: the last one on which a changeable clause depends (0 if none does)."""
        position = {name: index for index, (name, _) in enumerate(ordered)}
        vector = 0
        for clause in branch.clauses:
            if predicates(clause) & self.names.fluents:
                vector = max([vector, *(position[name] for name in free(clause))])
        return vector

    def loops(self, branch: Branch, ordered: list[tuple[str, str]]) -> list[tuple[str, list[str], str]]:
        """For each variable: the set to loop over, the tests still to make inside, and the full set at once."""
        env = {name: f"v{index}" for index, (name, _) in enumerate(ordered)}
        pending = list(branch.clauses)
        bound: set[str] = set()
        steps: list[tuple[str, list[str], str]] = []
        for name, kind in ordered:
            ready = [clause for clause in pending if free(clause) <= bound | {name}]
            pending = [clause for clause in pending if clause not in ready]
            base, tests, masks = [self._type(kind)], [], [self._type(kind)]
            for clause in ready:
                linking = isinstance(clause, Literal) and clause.positive and len(clause.args) == 2
                if name in free(clause) and not _has_quantifier(clause):
                    masks.append(self.mask(clause, name, env))
                    if linking and clause.predicate != "=":  # type: ignore[union-attr]
                        base.append(masks[-1])
                    else:
                        tests.append(self.test(clause, env))
                elif name in free(clause):
                    raise DataError("unsupported PDDL construct: a quantifier over the last variable of a condition")
                else:
                    tests.append(self.test(clause, env))
                    masks.append(f"(U if {tests[-1]} else 0)")
            bound.add(name)
            steps.append((_both(base), tests, _both(masks)))
        return steps

    def mask(self, formula: Formula, name: str, env: Mapping[str, str]) -> str:
        """The set of values of the variable `name` that satisfy a quantifier-free formula, the others being bound."""
        if isinstance(formula, Junction):
            if not formula.parts:
                return "U" if formula.kind == "and" else "0"
            sign = " & " if formula.kind == "and" else " | "
            return "(" + sign.join(self.mask(part, name, env) for part in formula.parts) + ")"
        if not isinstance(formula, Literal):
            raise DataError("unsupported PDDL construct: a quantifier inside a disjunction or negation")
        if name not in formula.args:
            return f"(U if {self.test(formula, env)} else 0)"
        if formula.args.count(name) == 2:
            raise DataError(f"unsupported PDDL construct: {formula.predicate} of one variable with itself")
        if formula.predicate == "=":
            other = next(arg for arg in formula.args if arg != name)
            positive = f"(1 << {self.term(other, env)})"
        else:
            number = self._predicate(formula.predicate)
            if len(formula.args) == 1:
                positive = f"u[{number}]"
            elif formula.args[1] == name:
                positive = f"r[{number}].get({self.term(formula.args[0], env)}, 0)"
            else:
                positive = f"c[{number}].get({self.term(formula.args[1], env)}, 0)"
        return positive if formula.positive else f"(U ^ {positive})"

    def test(self, formula: Formula, env: Mapping[str, str]) -> str:
        """A Python condition for a formula whose free variables are all bound."""
        if isinstance(formula, Junction):
            if not formula.parts:
                return str(formula.kind == "and")
            return "(" + f" {formula.kind} ".join(self.test(part, env) for part in formula.parts) + ")"
        if isinstance(formula, Quantified):
            if formula.kind == "forall":
                return f"(not {self.test(negate(formula), env)})"
            return self._exists(formula, env)
        terms = [self.term(arg, env) for arg in formula.args]
        if formula.predicate == "=":
            return f"{terms[0]} {'==' if formula.positive else '!='} {terms[1]}"
        number = self._predicate(formula.predicate)
        positive = f"u[{number}] >> {terms[0]} & 1"
        if len(terms) == 2:
            positive = f"r[{number}].get({terms[0]}, 0) >> {terms[1]} & 1"
        return f"({positive})" if formula.positive else f"(not {positive})"

    def _exists(self, formula: Quantified, env: Mapping[str, str]) -> str:
        if any(arg.startswith("\0") for arg in _terms(formula)):
            raise DataError("unsupported PDDL construct: quantifiers nested more than two deep")
        outer = sorted(free(formula))
        name = f"exists_{next(self._serial)}"
        lines = [f"def {name}(u, r, c, T, K, U{''.join(f', o{i}' for i in range(len(outer)))}):"]
        given = {variable: f"o{index}" for index, variable in enumerate(outer)}
        for branch in branches((), formula):
            lines += self._search(branch, given)
        lines.append("    return False")
        self._helpers.append("\n".join(lines))
        return f"{name}(u, r, c, T, K, U{''.join(f', {env[variable]}' for variable in outer)})"

    def _search(self, branch: Branch, given: Mapping[str, str]) -> list[str]:
        # A search inside a search: the outer variables are arguments, so substitute them as if they were constants.
        inner = Branch(branch.variables, tuple(rename(clause, _frozen(given)) for clause in branch.clauses))
        ordered = self.order(inner)
        lines: list[str] = []
        indent = "    "
        steps = self.loops(inner, ordered)
        if not steps:
            tests = [self.test(clause, {}) for clause in inner.clauses]
            return [f"    if {' and '.join(tests) or 'True'}:", "        return True"]
        for index, (_, _, full) in enumerate(steps):
            if index == len(steps) - 1:
                lines += [f"{indent}if {full}:", f"{indent}    return True"]
            else:
                lines += loop(indent, index, full)
                indent += "    "
        return lines

    def _type(self, kind: str) -> str:
        return "U" if kind == "object" else f"T[{self.names.types.setdefault(kind, len(self.names.types))}]"

    def _predicate(self, name: str) -> int:
        return self.names.predicates[name]

    def term(self, term: str, env: Mapping[str, str]) -> str:
        """A variable's local name, or the place of a constant's number."""
        if term.startswith("?"):
            return env[term]
        if term.startswith("\0"):
            return term[1:]
        return f"K[{self.names.constants.setdefault(term, len(self.names.constants))}]"


def loop(indent: str, index: int, base: str) -> list[str]:
    """The head of a loop of the variable `v<index>` over the members of a set."""
    return [
        f"{indent}m{index} = {base}",
        f"{indent}while m{index}:",
        f"{indent}    b = m{index} & -m{index}",
        f"{indent}    m{index} ^= b",
        f"{indent}    v{index} = b.bit_length() - 1",
    ]


def _both(masks: list[str]) -> str:
    useful = [mask for mask in dict.fromkeys(masks) if mask != "U"]
    return " & ".join(useful) if useful else "U"


def _frozen(given: Mapping[str, str]) -> dict[str, str]:
    return {name: "\0" + local for name, local in given.items()}


def _terms(formula: Formula) -> list[str]:
    if isinstance(formula, Literal):
        return list(formula.args)
    parts = formula.parts if isinstance(formula, Junction) else (formula.body,)
    return [term for part in parts for term in _terms(part)]


def _has_exists(formula: Formula) -> bool:
    if isinstance(formula, Junction):
        return any(_has_exists(part) for part in formula.parts)
    return isinstance(formula, Quantified) and formula.kind == "exists"


def _has_quantifier(formula: Formula) -> bool:
    if isinstance(formula, Junction):
        return any(_has_quantifier(part) for part in formula.parts)
    return isinstance(formula, Quantified)
