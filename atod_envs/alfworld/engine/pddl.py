"""PDDL text to plain data: the domain's action schemas and a problem's objects, facts and goal.

Invariant: what this reader accepts it represents fully. A construct that the engine does not implement is refused with
a `DataError` that quotes it; nothing is skipped in silence. As in the reference translator, names are lower-cased,
every declared type is also an `object`, and an undeclared type is a type with no members.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from atod_envs.errors import DataError

Tree: TypeAlias = str | list["Tree"]

_TOKENS = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")
_SUPPORTED_REQUIREMENTS = frozenset(
    {":strips", ":adl", ":typing", ":action-costs", ":equality", ":negative-preconditions"}
    | {":disjunctive-preconditions", ":existential-preconditions", ":universal-preconditions"}
    | {":quantified-preconditions", ":conditional-effects"}
)


@dataclass(frozen=True, slots=True)
class Literal:
    """A possibly negated predicate over variables (`?x`) and constants; `=` compares two terms."""

    predicate: str
    args: tuple[str, ...]
    positive: bool = True


@dataclass(frozen=True, slots=True)
class Junction:
    """All (`and`) or any (`or`) of the parts. `and` of nothing is true, `or` of nothing is false."""

    kind: str
    parts: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Quantified:
    """`exists` or `forall` over typed variables."""

    kind: str
    variables: tuple[tuple[str, str], ...]
    body: Formula


Formula: TypeAlias = Literal | Junction | Quantified


@dataclass(frozen=True, slots=True)
class Effect:
    """A literal that becomes true when `condition` (None: always) held before the action."""

    literal: Literal
    condition: Formula | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """An action schema with its typed parameters in the order in which the operator names them."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    precondition: Formula
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """Types (name to direct parent), predicates (name to arity), constants and action schemas."""

    name: str
    types: Mapping[str, str]
    predicates: Mapping[str, int]
    constants: tuple[tuple[str, str], ...]
    actions: tuple[Action, ...]

    def subtypes(self, name: str) -> frozenset[str]:
        """The declared types whose members a variable of type `name` may take (empty if it is not declared)."""
        if name == "object":
            return frozenset(self.types) | {"object"}
        children: dict[str, list[str]] = {}
        for child, parent in self.types.items():
            children.setdefault(parent, []).append(child)
        found = {name} & set(self.types)
        pending = [name]
        while pending:
            fresh = [child for child in children.get(pending.pop(), ()) if child not in found]
            found.update(fresh)
            pending += fresh
        return frozenset(found)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem: objects with their types, initial facts, names that only functions mention, and the goal."""

    name: str
    objects: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, ...], ...]
    function_arguments: tuple[str, ...]
    goal: Formula


def parse_domain(text: str) -> Domain:
    """Read a domain.

    Raises:
        DataError: malformed text or a construct outside the supported fragment, quoted.
    """
    sections = _definition(text, "domain")
    name = _name(sections[0], "domain")
    types: dict[str, str] = {}
    predicates: dict[str, int] = {}
    constants: tuple[tuple[str, str], ...] = ()
    raw_actions: list[list[Tree]] = []
    for section in sections[1:]:
        head = section[0] if isinstance(section, list) and section else section
        if not isinstance(section, list):
            raise DataError(f"unexpected {quote(section)} in the PDDL domain")
        if head == ":requirements":
            unknown = [word for word in section[1:] if isinstance(word, list) or word not in _SUPPORTED_REQUIREMENTS]
            if unknown:
                raise DataError(f"unsupported PDDL requirement {quote(unknown[0])}")
        elif head == ":types":
            types.update(_typed(section[1:]))
        elif head == ":constants":
            constants = tuple(_typed(section[1:]))
        elif head == ":predicates":
            for entry in section[1:]:
                if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
                    raise DataError(f"not a predicate: {quote(entry)}")
                arity = len(_typed(entry[1:]))
                if arity not in (1, 2):
                    raise DataError(f"unsupported predicate {quote(entry)}: one or two arguments are supported")
                predicates[entry[0]] = arity
        elif head == ":functions":
            continue
        elif head == ":action":
            raw_actions.append(section)
        else:
            raise DataError(f"unsupported PDDL construct {quote(section)}")
    return Domain(name, types, predicates, constants, tuple(_action(raw, predicates) for raw in raw_actions))


def parse_problem(text: str, domain: Domain) -> Problem:
    """Read a problem of `domain`.

    Raises:
        DataError: malformed text, another domain's problem, undeclared objects or predicates, unsupported constructs.
    """
    sections = _definition(text, "problem")
    name = _name(sections[0], "problem")
    objects: tuple[tuple[str, str], ...] = domain.constants
    facts: list[tuple[str, ...]] = []
    mentioned: list[str] = []
    goal: Formula | None = None
    for section in sections[1:]:
        if not isinstance(section, list) or not section:
            raise DataError(f"unexpected {quote(section)} in the PDDL problem")
        head = section[0]
        if head == ":domain":
            if section[1:] != [domain.name]:
                raise DataError(f"the problem is of the domain {quote(section)}, expected {domain.name!r}")
        elif head == ":objects":
            objects += tuple(_typed(section[1:]))
        elif head == ":init":
            _facts(section[1:], domain, facts, mentioned)
        elif head == ":goal":
            if len(section) != 2:
                raise DataError(f"malformed goal {quote(section)}")
            goal = _formula(section[1], domain.predicates)
            _check_scope(goal, frozenset(), "the goal")
        elif head not in (":requirements", ":metric"):
            raise DataError(f"unsupported PDDL construct {quote(section)}")
    if goal is None:
        raise DataError("the PDDL problem has no (:goal ...)")
    known = {name for name, _ in objects}
    if len(known) != len(objects):
        names = [name for name, _ in objects]
        raise DataError(f"object {next(n for n in names if names.count(n) > 1)!r} is declared twice")
    for fact in facts:
        if not known.issuperset(fact[1:]):
            raise DataError(f"fact ({' '.join(fact)}) names an object that (:objects ...) does not declare")
    return Problem(name, objects, tuple(facts), tuple(mentioned), goal)


def conjunction(parts: Sequence[Formula]) -> Formula:
    """The flattened `and` of `parts`."""
    flat: list[Formula] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Junction) and part.kind == "and" else (part,))
    return flat[0] if len(flat) == 1 else Junction("and", tuple(flat))


def negate(formula: Formula) -> Formula:
    """The negation of a formula, with negations pushed down to the literals."""
    if isinstance(formula, Literal):
        return Literal(formula.predicate, formula.args, not formula.positive)
    if isinstance(formula, Junction):
        return Junction("or" if formula.kind == "and" else "and", tuple(negate(part) for part in formula.parts))
    return Quantified("forall" if formula.kind == "exists" else "exists", formula.variables, negate(formula.body))


def quote(tree: Tree) -> str:
    """The construct as PDDL text for an error message, shortened to 120 characters."""

    def show(node: Tree) -> str:
        return node if isinstance(node, str) else "(" + " ".join(show(child) for child in node) + ")"

    text = show(tree)
    return f"'{text if len(text) <= 120 else text[:117] + '...'}'"


def _definition(text: str, kind: str) -> list[Tree]:
    # Comments end at the line's end. The reference also splits "?x?y", which no sane file contains.
    lowered = text.lower()
    if ";" in lowered:
        lowered = _COMMENT.sub("", lowered)
    stack: list[list[Tree]] = [[]]
    top = stack[0]
    for token in _TOKENS.findall(lowered):
        if token == "(":
            child: list[Tree] = []
            top.append(child)
            stack.append(child)
            top = child
        elif token == ")":
            stack.pop()
            if not stack:
                raise DataError(f"unbalanced ')' in the PDDL {kind}")
            top = stack[-1]
        else:
            top.append(token)
    if len(stack) != 1:
        raise DataError(f"the PDDL {kind} ends inside an open '(': is the file truncated?")
    if len(top) != 1 or not isinstance(top[0], list) or top[0][:1] != ["define"] or len(top[0]) < 2:
        raise DataError(f"the PDDL {kind} is not one (define ...) form: {quote(top[:1])}")
    return top[0][1:]


def _name(tree: Tree, kind: str) -> str:
    if not isinstance(tree, list) or len(tree) != 2 or tree[0] != kind or not isinstance(tree[1], str):
        raise DataError(f"expected ({kind} NAME), found {quote(tree)}")
    return tree[1]


def _typed(items: Sequence[Tree]) -> list[tuple[str, str]]:
    """A typed list: `a b - t c` gives [(a, t), (b, t), (c, object)]."""
    result: list[tuple[str, str]] = []
    pending: list[str] = []
    iterator = iter(items)
    for item in iterator:
        if not isinstance(item, str):
            raise DataError(f"unsupported construct {quote(item)} in a typed list")
        if item == "-":
            kind = next(iterator, None)
            if not isinstance(kind, str):
                raise DataError(f"unsupported type {quote(kind or [])} in a typed list")
            result.extend((name, kind) for name in pending)
            pending.clear()
        else:
            pending.append(item)
    result.extend((name, "object") for name in pending)
    return result


def _action(raw: list[Tree], predicates: Mapping[str, int]) -> Action:
    if len(raw) < 2 or not isinstance(raw[1], str) or len(raw) % 2:
        raise DataError(f"malformed action {quote(raw)}")
    fields: dict[str, Tree] = {}
    for key, value in zip(raw[2::2], raw[3::2], strict=True):
        if not isinstance(key, str) or key not in (":parameters", ":precondition", ":effect"):
            raise DataError(f"unsupported construct {quote(key)} in the PDDL action {raw[1]!r}")
        fields[key] = value
    parameters = fields.get(":parameters", [])
    if not isinstance(parameters, list):
        raise DataError(f"malformed parameters of the PDDL action {raw[1]!r}")
    effects: list[Effect] = []
    effect = fields.get(":effect", [])
    if effect:
        _effects(effect, None, predicates, effects)
    precondition = fields.get(":precondition", [])
    formula = _formula(precondition, predicates) if precondition else Junction("and", ())
    typed = tuple(_typed(parameters))
    known = frozenset(name for name, _ in typed)
    for part in (
        formula,
        *(part for found in effects for part in (found.literal, found.condition) if part is not None),
    ):
        _check_scope(part, known, f"action {raw[1]!r}")
    return Action(raw[1], typed, formula, tuple(effects))


def _effects(tree: Tree, condition: Formula | None, predicates: Mapping[str, int], out: list[Effect]) -> None:
    head = tree[0] if isinstance(tree, list) and tree else tree
    if not isinstance(tree, list):
        raise DataError(f"malformed effect {quote(tree)}")
    if head == "and":
        for part in tree[1:]:
            _effects(part, condition, predicates, out)
    elif head == "when" and len(tree) == 3:
        guard = _formula(tree[1], predicates)
        _effects(tree[2], guard if condition is None else conjunction((condition, guard)), predicates, out)
    elif head == "increase" and len(tree) == 3 and tree[1] == ["total-cost"]:
        return  # Costs steer a planner; they do not change what a player sees.
    elif head in ("forall", "increase", "decrease", "assign", "when"):
        raise DataError(f"unsupported effect {quote(tree)}")
    else:
        literal = _formula(tree, predicates)
        if not isinstance(literal, Literal) or literal.predicate == "=":
            raise DataError(f"unsupported effect {quote(tree)}")
        out.append(Effect(literal, condition))


def _formula(tree: Tree, predicates: Mapping[str, int]) -> Formula:
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise DataError(f"malformed condition {quote(tree)}")
    head, rest = tree[0], tree[1:]
    if head in ("and", "or"):
        parts = [_formula(part, predicates) for part in rest]
        return conjunction(parts) if head == "and" else Junction("or", tuple(parts))
    if head == "not" and len(rest) == 1:
        return negate(_formula(rest[0], predicates))
    if head == "imply" and len(rest) == 2:
        return Junction("or", (negate(_formula(rest[0], predicates)), _formula(rest[1], predicates)))
    if head in ("exists", "forall") and len(rest) == 2 and isinstance(rest[0], list):
        return Quantified(head, tuple(_typed(rest[0])), _formula(rest[1], predicates))
    arity = 2 if head == "=" else predicates.get(head)
    if arity is None:
        raise DataError(f"unknown PDDL construct {quote(tree)}: {head!r} is neither a keyword nor a declared predicate")
    args = tuple(arg for arg in rest if isinstance(arg, str))
    if len(args) != arity or len(args) != len(rest):
        raise DataError(f"{quote(tree)} does not have {arity} plain argument(s)")
    return Literal(head, args)


def _check_scope(formula: Formula, known: frozenset[str], where: str) -> None:
    """Refuse a variable that neither the action's parameters nor a quantifier declares."""
    if isinstance(formula, Literal):
        stray = [arg for arg in formula.args if arg.startswith("?") and arg not in known]
        if stray:
            raise DataError(f"{where} uses the undeclared variable {stray[0]!r} in {formula.predicate!r}")
    elif isinstance(formula, Junction):
        for part in formula.parts:
            _check_scope(part, known, where)
    else:
        _check_scope(formula.body, known | {name for name, _ in formula.variables}, where)


def _facts(items: Sequence[Tree], domain: Domain, facts: list[tuple[str, ...]], mentioned: list[str]) -> None:
    arities = domain.predicates
    for item in items:
        if not isinstance(item, list) or not item:
            raise DataError(f"malformed initial fact {quote(item)}")
        words = tuple(word for word in item if isinstance(word, str))
        if len(words) == len(item) and arities.get(words[0]) == len(words) - 1:
            facts.append(words)
        elif item[0] == "=" and len(item) == 3 and isinstance(item[1], list):
            # A function's value, such as a distance: it only costs. But the objects that it names count as seen.
            if item[1][:1] != ["total-cost"]:
                mentioned.extend(word for word in item[1][1:] if isinstance(word, str))
        else:
            raise DataError(f"unsupported initial fact {quote(item)}")
