"""From grammar rules to Python functions that print a facts.

Scopes are static: which placeholders are bound at a symbol follows from the rules alone, so a rule becomes one Python
expression over the bound objects, with its references written out in place. Queries that bind new placeholders become
closures that the expression calls. Invariant: answers to a query come in the reference's order (objects sorted by id,
the query's predicates from left to right), and two placeholders never stand for one object.

Names in generated code: `w` the facts, `e` the tuple of bound objects, `n`, `u`, `r`, `c` their names and
relations.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from atod_envs.alfworld.engine.conditions import Names
from atod_envs.alfworld.engine.facts import Facts
from atod_envs.alfworld.engine.grammar import TASK_MARK, Expression, Grammar, Item, Listing, Plain, Symbol, parse_query
from atod_envs.errors import DataError

REMEMBERED = 4096
"""Lists of things that a game remembers in words; a full memory starts over."""

Env: TypeAlias = tuple[int, ...]
Scope: TypeAlias = tuple[tuple[str, str], ...]
Printer: TypeAlias = Callable[[Facts, Env], str]
Finder: TypeAlias = Callable[[Facts, Env, list[Env]], None]


@dataclass(frozen=True, slots=True)
class Text:
    """A text as a Python expression.

    Attributes:
        code: the expression.
        fixed: it depends on the bound objects alone, not on facts that actions change.
        slots: the bound objects on which it depends, as positions in the scope.
    """

    code: str
    fixed: bool
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class Search:
    """A compiled query that binds new placeholders: `name(w, e)` in generated code gives its answers."""

    name: str
    scope: Scope
    fixed: bool


class TextCompiler:
    """Compiles symbols of one grammar.

    Args:
        grammar: the rules.
        names: predicate and type numbers; predicates that only the texts use have been added by the caller.
    """

    def __init__(self, grammar: Grammar, names: Names) -> None:
        self._grammar = grammar
        self._names = names
        self._space: dict[str, Any] = {}
        self._done: dict[tuple[str, Scope], Text] = {}
        self._open: list[str] = []

    def printer(self, text: Text) -> Printer:
        """The function that prints a text for a facts and the bound objects."""
        space = dict(self._space)
        source = f"def show(w, e):\n    n = w.names; u = w.unary; r = w.rows; c = w.columns\n    return {text.code}"
        exec(source, space)
        show: Printer = space["show"]
        return show

    def sequence(self, symbols: tuple[Symbol, ...], scope: Scope) -> Text:
        """Compile a row of symbols for a scope: the (name, type) of every bound placeholder."""
        parts = [self._symbol(symbol, scope) for symbol in symbols]
        slots = frozenset[int]().union(*(part.slots for part in parts))
        code = " + ".join(part.code for part in parts if part.code != "''") or "''"
        return Text(f"({code})" if len(parts) > 1 else code, all(part.fixed for part in parts), slots)

    def rule(self, name: str, scope: Scope) -> Text:
        """Compile a named rule."""
        key = (name, scope)
        if key in self._done:
            return self._done[key]
        rules = self._grammar.rules.get(name)
        if not rules:
            raise DataError(f"the game grammar has no rule '#{name}#'")
        if name in self._open:
            raise DataError(f"rule '#{name}#' of the game grammar refers to itself")
        last = next((index for index, rule in enumerate(rules) if not rule.condition), None)
        if last is None:
            raise DataError(f"rule '#{name}#' of the game grammar has no alternative without a condition")
        self._open.append(name)
        text = self.sequence(rules[last].symbols, scope)
        for rule in reversed(rules[:last]):
            body = self.sequence(rule.symbols, scope)
            test = self._condition(rule.condition, scope)
            text = Text(
                f"({body.code} if {test.code} else {text.code})",
                test.fixed and body.fixed and text.fixed,
                test.slots | body.slots | text.slots,
            )
        self._open.pop()
        self._done[key] = text
        return text

    def _symbol(self, symbol: Symbol, scope: Scope) -> Text:
        if isinstance(symbol, Plain):
            if TASK_MARK in symbol.text:
                return Text(f"{symbol.text!r}.replace({TASK_MARK!r}, w.static.task_text)", True, frozenset())
            return Text(repr(symbol.text), True, frozenset())
        if isinstance(symbol, Listing):
            return self._listing(symbol.item, scope)
        if isinstance(symbol, Item):
            if symbol.query is None:
                return self._body(symbol, scope)
            search = self._search(symbol.query, scope)
            body = self._body(symbol, search.scope)
            code = f"''.join([{body.code} for e in {search.name}(w, e)])"
            return Text(code, search.fixed and body.fixed, frozenset(range(len(scope))))
        return self.rule(symbol.name, scope)

    def _body(self, item: Item, scope: Scope) -> Text:
        if isinstance(item.body, Expression):
            return expression(item.body.source, scope)
        return self.rule(item.body.name, scope)

    def _listing(self, item: Item, scope: Scope) -> Text:
        if item.query is None:
            return self._body(item, scope)
        query = parse_query(item.query)
        asked = [argument for _, arguments in query.literals for argument in arguments]
        body_code = item.body.source if isinstance(item.body, Expression) else ""
        if body_code and all(argument in scope for argument in asked):
            # Nothing new is bound, so there is at most one answer: the usual form of a command's target.
            test, body = self._condition(item.query, scope), self._body(item, scope)
            empty = self.rule("list_empty", scope)
            code = f"({body.code} if {test.code} else {empty.code})"
            return Text(code, test.fixed and empty.fixed, test.slots | body.slots | empty.slots)
        search = self._search(item.query, scope)
        body = self._body(item, search.scope)
        marks = [self.rule(name, scope) for name in ("list_empty", "list_separator", "list_last_separator")]
        join = self._join([self.printer(mark) for mark in marks])
        code = f"{join}(w, e, [{body.code} for e in {search.name}(w, e)])"
        fixed = search.fixed and body.fixed and all(mark.fixed for mark in marks)
        relation = self._one_relation(item.query, scope)
        alone = body.fixed and body.slots <= {len(scope)} and not any(mark.slots or not mark.fixed for mark in marks)
        if relation is not None and alone:
            code = f"{self._remembered(Text(code, False, frozenset()), *relation)}(w, e)"
        return Text(code, fixed, frozenset(range(len(scope))))

    def _one_relation(self, query: str, scope: Scope) -> tuple[bool, int, int] | None:
        """For a query about one relation to one bound object: direction, predicate, and the object's slot."""
        literals = parse_query(query).literals
        if len(literals) != 1 or len(literals[0][1]) != 2:
            return None
        name, (first, second) = literals[0]
        if (first in scope) == (second in scope):
            return None
        return first in scope, self._predicate(name), scope.index(first if first in scope else second)

    def _remembered(self, text: Text, forward: bool, number: int, slot: int) -> str:
        # What stands in one relation to one object: the same set always prints the same words.
        show = self.printer(text)
        name = f"listing_{len(self._space)}"

        def remembered(facts: Facts, env: Env) -> str:
            members = (facts.rows if forward else facts.columns)[number].get(env[slot], 0)
            for value in env:
                if members >> value & 1:
                    members ^= 1 << value  # Bound already, so not among the answers.
            memo = facts.static.memo
            words = memo.get((name, members))
            if words is None:
                if len(memo) >= REMEMBERED:
                    memo.clear()
                words = memo[name, members] = show(facts, env)
            return words

        self._space[name] = remembered
        return name

    def _join(self, marks: list[Printer]) -> str:
        empty, separator, last = marks
        name = f"join_{len(self._space)}"

        def join(facts: Facts, env: Env, words: list[str]) -> str:
            if len(words) < 2:
                return words[0] if words else empty(facts, env)
            return separator(facts, env).join(words[:-1]) + last(facts, env) + words[-1]

        self._space[name] = join
        return name

    def _condition(self, query: str, scope: Scope) -> Text:
        """A query as a Python condition: whether it has an answer."""
        literals = parse_query(query).literals
        if any(argument not in scope for _, arguments in literals for argument in arguments):
            search = self._search(query, scope)
            return Text(f"{search.name}(w, e)", search.fixed, frozenset(range(len(scope))))
        tests, slots = [], set[int]()
        for name, arguments in literals:
            at = [scope.index(argument) for argument in arguments]
            slots.update(at)
            number = self._predicate(name)
            if len(at) == 1:
                tests.append(f"u[{number}] >> e[{at[0]}] & 1")
            elif len(at) == 2:
                tests.append(f"r[{number}].get(e[{at[0]}], 0) >> e[{at[1]}] & 1")
            else:
                raise DataError(f"the game grammar has an unsupported query {query!r}")
        fixed = not any(name in self._names.fluents for name, _ in literals)
        return Text("(" + " and ".join(tests) + ")", fixed, frozenset(slots))

    def _search(self, query: str, scope: Scope) -> Search:
        """Compile a query to a function that returns every answer: the scope's objects and then the new ones."""
        literals = parse_query(query).literals
        scopes = [scope]
        for _, arguments in literals:
            fresh = [argument for argument in dict.fromkeys(arguments) if argument not in scopes[-1]]
            scopes.append((*scopes[-1], *fresh))
        finder: Finder = _append
        for (name, arguments), before in reversed(list(zip(literals, scopes, strict=False))):
            finder = self._literal(name, arguments, before, finder)

        def search(facts: Facts, env: Env) -> list[Env]:
            answers: list[Env] = []
            finder(facts, env, answers)
            return answers

        name = f"search_{len(self._space)}"
        self._space[name] = search
        return Search(name, scopes[-1], not any(name in self._names.fluents for name, _ in literals))

    def _literal(self, name: str, arguments: Scope, before: Scope, then: Finder) -> Finder:
        number = self._predicate(name)
        if len(set(arguments)) != len(arguments) or len(arguments) > 2:
            raise DataError(f"the game grammar has an unsupported query: {name} of {arguments}")
        kinds = [self._names.types.setdefault(kind, len(self._names.types)) for _, kind in arguments]
        slots = [before.index(argument) if argument in before else -1 for argument in arguments]
        if len(arguments) == 1:
            (slot,), (kind,) = slots, kinds

            def one(facts: Facts, env: Env, out: list[Env]) -> None:
                members = facts.unary[number] & facts.types[kind]
                if slot >= 0:
                    if members >> env[slot] & 1:
                        then(facts, env, out)
                    return
                for value in _others(members, env):
                    then(facts, (*env, value), out)

            return one
        (x, y), (x_kind, y_kind) = slots, kinds

        def two(facts: Facts, env: Env, out: list[Env]) -> None:
            rows = facts.rows[number]
            if x >= 0:
                seconds = rows.get(env[x], 0) & facts.types[y_kind]
                if y >= 0:
                    if seconds >> env[y] & 1:
                        then(facts, env, out)
                    return
                for value in _others(seconds, env):
                    then(facts, (*env, value), out)
            elif y >= 0:
                for value in _others(facts.columns[number].get(env[y], 0) & facts.types[x_kind], env):
                    then(facts, (*env, value), out)
            else:
                for first in sorted(rows):
                    if facts.types[x_kind] >> first & 1 and first not in env:
                        wider = (*env, first)
                        for second in _others(rows[first] & facts.types[y_kind], wider):
                            then(facts, (*wider, second), out)

        return two

    def _predicate(self, name: str) -> int:
        number = self._names.predicates.get(name)
        if number is None:
            raise DataError(f"the game grammar asks for {name!r}, which the PDDL domain does not declare")
        return number


def expression(source: str, scope: Scope) -> Text:
    """Compile an expression over entities: names, attributes, text constants, `+`, `or`, `and`.

    Raises:
        DataError: anything else, quoted.
    """
    refusal = f"the game grammar has an unsupported expression {source.strip()!r}"
    slots = {name: slot for slot, (name, _) in enumerate(scope)}
    used: set[int] = set()

    def build(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return repr(node.value)
        if isinstance(node, ast.Name) and node.id in slots:
            return build(ast.Attribute(node, "name"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in slots:
            slot = slots[node.value.id]
            used.add(slot)
            articles = {"indefinite": "'a'", "definite": "'the'"}
            forms = {"name": f"n[e[{slot}]]", "id": f"w.static.objects[e[{slot}]]", **articles}
            if node.attr in forms:
                return forms[node.attr]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return f"({build(node.left)} + {build(node.right)})"
        if isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.Or) else " and "
            return "(" + word.join(build(value) for value in node.values) + ")"
        raise DataError(refusal)

    try:
        code = build(ast.parse(source.strip(), mode="eval").body)
    except SyntaxError:
        raise DataError(refusal) from None
    return Text(code, True, frozenset(used))


def _append(facts: Facts, env: Env, out: list[Env]) -> None:
    out.append(env)


def _others(members: int, env: Env) -> list[int]:
    """The members of a set in ascending order, except the objects that are bound already."""
    found = []
    while members:
        low = members & -members
        members ^= low
        value = low.bit_length() - 1
        if value not in env:
            found.append(value)
    return found
