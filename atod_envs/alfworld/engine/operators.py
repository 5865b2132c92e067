"""Generated code for actions: what can be done in a state, what each of it is called, and what it changes.

Invariant: the keys that `keys` returns for a state stand for exactly the operators that the reference's translator
grounds and that are applicable there (except that the translator also drops an operator all of whose effects make facts
false that can never be true, which no released game has); equal keys stand for equal operators whatever the rest of the
state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from atod_envs.alfworld.engine.conditions import Branch, Writer, loop
from atod_envs.alfworld.engine.pddl import Action, Effect, Formula, Junction, Literal, conjunction

Key: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How one branch of one action is enumerated.

    Attributes:
        action: index of the action in the domain.
        ordered: the variables in the order in which they are bound.
        vector: position of the variable whose whole set stands in the key; the variables after it follow from fixed
            relations alone.
    """

    action: int
    number: int
    branch: Branch
    ordered: tuple[tuple[str, str], ...]
    vector: int


class KeyWriter:
    """Writes the one function that finds, for a state, the keys of everything that can be done in it.

    Plans that are possible under the same tests, after the same loops and for the same set share one key; a key's first
    number says which `bundles` of plans it stands for.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._root: dict[str, Any] = {"emit": {}, "loops": {}}
        self.plans: list[Plan] = []
        self.bundles: list[list[Plan]] = []

    def add(self, action: int, branch: Branch) -> None:
        """Add one branch of an action's precondition."""
        ordered = self._writer.order(branch)
        vector = self._writer.split(branch, ordered)
        plan = Plan(action, len(self.plans), branch, tuple(ordered), vector)
        self.plans.append(plan)
        node = self._root
        tests: list[str] = []
        if not ordered:
            tests = [self._writer.test(clause, {}) for clause in branch.clauses]
            self._emit(node, tests, "1", plan)
        for index, (base, inside, full) in enumerate(self._writer.loops(branch, ordered)[: vector + 1]):
            if index == vector:
                self._emit(node, tests, full, plan)
            else:
                node = node["loops"].setdefault(base, {"emit": {}, "loops": {}})
                tests = tests + inside

    def _emit(self, node: dict[str, Any], tests: list[str], full: str, plan: Plan) -> None:
        key = (" and ".join(dict.fromkeys(tests)), full)
        if key not in node["emit"]:
            node["emit"][key] = len(self.bundles)
            self.bundles.append([])
        self.bundles[node["emit"][key]].append(plan)

    def keys_source(self) -> str:
        """Source of `keys(u, r, c, T, K, U) -> tuple[Key, ...]`."""
        body = self._body(self._root, 0, "    ")
        return "\n".join(["def keys(u, r, c, T, K, U):", "    out = []", *body, "    return tuple(out)"])

    def _body(self, node: Mapping[str, Any], depth: int, indent: str) -> list[str]:
        lines: list[str] = []
        values = "".join(f"v{i}, " for i in range(depth))
        for (tests, full), bundle in node["emit"].items():
            inner = indent
            if tests:
                lines.append(f"{indent}if {tests}:")
                inner += "    "
            lines += [f"{inner}m = {full}", f"{inner}if m: out.append(({bundle}, {values}m))"]
        for base, child in node["loops"].items():
            lines += loop(indent, depth, base)
            lines += _hoisted(self._body(child, depth + 1, indent + "    "), depth, indent + "    ")
        return lines

    def expand_source(
        self, plan: Plan, parameters: Sequence[tuple[str, str]], effects: Sequence[Effect], used: Sequence[int]
    ) -> str:
        """Source of the functions that turn a key into operators.

        `expand_N(u, r, c, T, K, U, key, words, word)` gives the parameters' values of every operator by its command.
        `words` remembers the commands, by the values at the positions `used`; `word(values)` makes a new one.

        Where what follows the key's set does not depend on it (where one can go does not depend on where one is), that
        would list nearly the same for every key. Then `expand_N` gives one table for the whole game, from the command
        to the possible values of what follows, `choose_N(key, table)` the commands that a key stands for, and
        `finish_N(key, values)` the parameters' values of one of them.
        """
        steps = self._writer.loops(plan.branch, list(plan.ordered))
        env = {name: f"v{index}" for index, (name, _) in enumerate(plan.ordered)}
        values = _tuple([env[name] for name, _ in parameters])
        mark = _tuple([env[parameters[position][0]] for position in used])
        head = f"def expand_{plan.number}(u, r, c, T, K, U, key, words, word):"
        given = f"    _, {''.join(f'v{i}, ' for i in range(plan.vector))}m = key" if steps else "    pass"
        outer = loop("    ", plan.vector, "m") if steps else []
        inner: list[str] = []
        indent = "        " if steps else "    "
        for index in range(plan.vector + 1, len(steps)):
            inner += loop(indent, index, steps[index][2])
            indent += "    "
        spoken = [
            f"{indent}text = words.get({mark})",
            f"{indent}if text is None: text = words[{mark}] = word({values})",
        ]
        idle = self._idle(plan, effects, env) or "False"
        rest = [f"v{index}" for index in range(plan.vector + 1, len(steps))]
        mentioned = set(re.findall(r"v\d+", " ".join([mark, *(step[2] for step in steps[plan.vector + 1 :])])))
        if not rest or "K[" in idle or mentioned & {f"v{index}" for index in range(plan.vector + 1)}:
            skip = [f"{indent}if {idle}: {'continue' if steps else 'return out'}"] if idle != "False" else []
            found = f"{indent}if text not in out: out[text] = {values}"
            return "\n".join([head, "    out = {}", given, *outer, *inner, *skip, *spoken, found, "    return out"])
        lines = [
            head,
            f"    if {plan.number} in words: return words[{plan.number}]",
            "    out = {}",
            given,
            *outer,
            *inner,
            *spoken,
            f"{indent}out[text] = out.get(text, ()) + ({_tuple(rest)},)",
            "        break",
            f"    words[{plan.number}] = out = dict(sorted(out.items()))",
            "    return out",
            f"def choose_{plan.number}(key, table):",
            "    out = []",
            given,
            *outer,
            "        for text, tails in table.items():",
            f"            for {_tuple(rest)} in tails:",
            f"                if not ({idle}):",
            "                    out.append(text)",
            "                    break",
            "    return out",
            f"def finish_{plan.number}(key, tails):",
            given,
            *outer,
            f"        for {_tuple(rest)} in tails:",
            f"            if not ({idle}): return {values}",
            "    return None",
        ]
        return "\n".join(lines)

    def _idle(self, plan: Plan, effects: Sequence[Effect], env: Mapping[str, str]) -> str | None:
        """When every effect is a fact already: the reference's translator drops such an operator. None means never."""
        if any(effect.condition is not None for effect in effects):
            return None
        held = _asserted(plan.branch.clauses)
        added = [effect.literal for effect in effects if effect.literal.positive]
        tests = []
        for effect in effects:
            literal = effect.literal
            same = [other for other in held if other.positive == literal.positive]
            same += [] if literal.positive else added
            alike = [other for other in same if other.predicate == literal.predicate]
            if not alike:
                return None
            pairs = [list(zip(literal.args, other.args, strict=True)) for other in alike]
            tests.append(" or ".join(self._alike(pair, env) for pair in pairs))
        return " and ".join(f"({test})" for test in tests)

    def _alike(self, pairs: Sequence[tuple[str, str]], env: Mapping[str, str]) -> str:
        tests = [self._writer.test(Literal("=", pair), env) for pair in pairs if pair[0] != pair[1]]
        return " and ".join(tests) or "True"


def apply_source(writer: Writer, action: Action) -> str:
    """Source of `apply_NAME(u, r, c, T, K, U, values)`: carry out an action's effects, removals before additions.

    A relation `not_p`, kept where some text asks for it, records what actions have made false.
    """
    env = {name: f"p{index}" for index, (name, _) in enumerate(action.parameters)}
    lines = [f"def {apply_name(action)}(u, r, c, T, K, U, values):"]
    if env:
        lines.append(f"    {''.join(local + ', ' for local in env.values())} = values")
    guards: dict[int, str] = {}
    for index, effect in enumerate(action.effects):
        if effect.condition is not None:
            guards[index] = f"g{index}"
            lines.append(f"    g{index} = {writer.test(effect.condition, env)}")
    ordered = sorted(enumerate(action.effects), key=lambda item: item[1].literal.positive)
    for index, effect in ordered:
        indent = "    "
        if index in guards:
            lines.append(f"    if {guards[index]}:")
            indent += "    "
        literal = effect.literal
        lines += _update(writer, literal, env, indent)
        if f"not_{literal.predicate}" in writer.names.predicates:
            lines += _update(
                writer, Literal(f"not_{literal.predicate}", literal.args, not literal.positive), env, indent
            )
    return "\n".join([*lines, "    return None"])


def apply_name(action: Action) -> str:
    """The name of the function that carries out an action."""
    return "apply_" + re.sub(r"\W", "_", action.name)


def _update(writer: Writer, literal: Literal, env: Mapping[str, str], indent: str) -> list[str]:
    number = writer.names.predicates[literal.predicate]
    terms = [writer.term(arg, env) for arg in literal.args]
    sign = "| {}" if literal.positive else "& ~{}"
    if len(terms) == 1:
        return [f"{indent}u[{number}] = u[{number}] {sign.format(f'(1 << {terms[0]})')}"]
    lines = []
    for table, (key, value) in (("r", terms), ("c", reversed(terms))):
        change = sign.format(f"(1 << {value})")
        lines += [f"{indent}t = {table}[{number}]", f"{indent}t[{key}] = t.get({key}, 0) {change}"]
    return lines


def _tuple(items: Sequence[str]) -> str:
    return f"({''.join(item + ', ' for item in items)})"


def _hoisted(body: list[str], depth: int, indent: str) -> list[str]:
    """Look up only once what a loop's body looks up about its variable more than once."""
    text = "\n".join(body)
    lookups = re.findall(rf"[rc]\[\d+\]\.get\(v{depth}, 0\)", text)
    head: list[str] = []
    for number, lookup in enumerate(dict.fromkeys(lookups)):
        if lookups.count(lookup) > 1:
            head.append(f"{indent}x{depth}_{number} = {lookup}")
            text = text.replace(lookup, f"x{depth}_{number}")
    return head + text.split("\n")


def _asserted(clauses: Sequence[Formula]) -> list[Literal]:
    """The literals that a conjunction of clauses asserts outright."""
    whole = conjunction(clauses)
    parts = whole.parts if isinstance(whole, Junction) and whole.kind == "and" else (whole,)
    return [part for part in parts if isinstance(part, Literal)]
