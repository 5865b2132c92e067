"""A domain and a grammar compiled together: what can be done, what it changes, and which texts it prints.

Game files carry their own copy of both, nearly always the same text, so the compiled form is shared: `compiled_rules`
keeps one per distinct text. Invariant: a `Rules` object never changes after it is made, except that numbers of further
types are appended as games name them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from atod_envs.alfworld.engine.conditions import Generated, Names, Writer, branches, predicates
from atod_envs.alfworld.engine.grammar import Grammar, Item, Listing, Symbol, parse_grammar, parse_query
from atod_envs.alfworld.engine.operators import KeyWriter, apply_name, apply_source
from atod_envs.alfworld.engine.pddl import Action, Domain, Formula, parse_domain
from atod_envs.alfworld.engine.texts import Printer, TextCompiler
from atod_envs.errors import DataError


@dataclass(frozen=True, slots=True)
class Schema:
    """An action, compiled.

    Attributes:
        command: prints the command.
        feedback: prints the answer to it.
        touched: bit set of the predicates that it may change.
        apply: generated; carries out the effects.
    """

    name: str
    command: Printer
    feedback: Printer
    touched: int
    apply: Generated


@dataclass(frozen=True, slots=True)
class Ground:
    """One plan of an action with its generated functions; see `KeyWriter.expand_source`."""

    schema: Schema
    expand: Generated
    choose: Generated | None
    finish: Generated | None


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """See the module. Compared by identity: two are equal only if they are one.

    Attributes:
        keys: generated; the keys of everything that can be done in a state.
        bundles: the plans that a key with this first number stands for.
        reads: bit set of the predicates on which `keys` depends.
        changing: the two-place predicates that actions change.
        intro: the text shown at the start.
    """

    domain: Domain
    names: Names
    keys: Callable[..., tuple[tuple[int, ...], ...]]
    bundles: tuple[tuple[Ground, ...], ...]
    reads: int
    changing: tuple[int, ...]
    intro: Printer

    def bits(self, found: frozenset[str]) -> int:
        """A set of predicates as a bit set of their numbers."""
        return sum(1 << self.names.predicates[name] for name in found if name != "=")


@lru_cache(maxsize=64)
def compiled_rules(domain_text: str, grammar_text: str) -> Rules:
    """Compile a domain and a grammar, or return what was compiled before from the same texts.

    Raises:
        DataError: a construct that the engine does not implement, quoted.
    """
    domain = parse_domain(domain_text)
    grammar = parse_grammar(grammar_text)
    fluents = {effect.literal.predicate for action in domain.actions for effect in action.effects}
    arities = dict(domain.predicates)
    for name in sorted(_mirrors(grammar, domain)):
        arities[name] = arities[name.removeprefix("not_")]
        fluents.add(name)
    numbers = {name: number for number, name in enumerate(arities)}
    names = Names(predicates=numbers, fluents=frozenset(fluents))
    writer, texts = Writer(names), TextCompiler(grammar, names)
    keys, sources, reads = KeyWriter(writer), list[str](), frozenset[str]()
    drafts: dict[int, _Draft] = {}
    for index, action in enumerate(domain.actions):
        if not action.effects:
            continue  # The reference's translator drops an action without effects.
        for branch in branches(action.parameters, action.precondition):
            if all(domain.subtypes(kind) for _, kind in branch.variables):
                keys.add(index, branch)
        reads |= predicates(action.precondition) & names.fluents
        drafts[index] = _draft(texts, grammar, action)
        sources.append(apply_source(writer, action))
    sources.append(keys.keys_source())
    for plan in keys.plans:
        action = domain.actions[plan.action]
        sources.append(keys.expand_source(plan, action.parameters, action.effects, drafts[plan.action].used))
    space = writer.compile(sources)
    schemas: dict[int, Schema] = {}
    for index, draft in drafts.items():
        action = domain.actions[index]
        changed = {effect.literal.predicate for effect in action.effects}
        touched = sum(1 << numbers[name] for name in changed)
        apply = space[apply_name(action)]
        schemas[index] = Schema(action.name, draft.command, draft.feedback, touched, apply)
    bundles = tuple(
        tuple(
            Ground(
                schemas[plan.action],
                space[f"expand_{plan.number}"],
                space.get(f"choose_{plan.number}"),
                space.get(f"finish_{plan.number}"),
            )
            for plan in bundle
        )
        for bundle in keys.bundles
    )
    changing = tuple(numbers[name] for name in sorted(fluents) if arities[name] == 2)
    bits = sum(1 << numbers[name] for name in reads)
    return Rules(domain, names, space["keys"], bundles, bits, changing, texts.printer(texts.rule("intro", ())))


@dataclass(frozen=True, slots=True)
class _Draft:
    """The texts of an action, and the positions of the parameters that its command names."""

    command: Printer
    feedback: Printer
    used: tuple[int, ...]


def _draft(texts: TextCompiler, grammar: Grammar, action: Action) -> _Draft:
    wording = grammar.actions.get(action.name)
    if wording is None:
        raise DataError(f"the game grammar has no texts for the PDDL action {action.name!r}")
    scope = tuple((name.removeprefix("?"), kind) for name, kind in action.parameters)
    command, feedback = texts.sequence(wording.template, scope), texts.sequence(wording.feedback, scope)
    if not command.fixed:
        raise DataError(f"the command template of action {action.name!r} depends on facts that actions change")
    return _Draft(texts.printer(command), texts.printer(feedback), tuple(sorted(command.slots)))


def _mirrors(grammar: Grammar, domain: Domain) -> set[str]:
    """The `not_p` relations that texts ask for: where an action has made p false, not merely where p is not true."""
    found: set[str] = set()

    def note(query: str) -> None:
        for name, _ in parse_query(query).literals:
            if name.startswith("not_") and name.removeprefix("not_") in domain.predicates:
                found.add(name)

    def visit(symbols: tuple[Symbol, ...]) -> None:
        for symbol in symbols:
            item = symbol.item if isinstance(symbol, Listing) else symbol
            if isinstance(item, Item) and item.query is not None:
                note(item.query)

    for alternatives in grammar.rules.values():
        for rule in alternatives:
            if rule.condition:
                note(rule.condition)
            visit(rule.symbols)
    for wording in grammar.actions.values():
        visit(wording.template)
        visit(wording.feedback)
    return found - set(domain.predicates)


@dataclass(frozen=True, slots=True)
class GoalCode:
    """A goal's shape, compiled: constants are arguments, so that games with the same kind of goal share it.

    Attributes:
        constants: in the order of the generated code's constant numbers, as positions among the goal's constants.
        won: whether the goal holds.
        conditions: whether each of the goal's partial conditions holds.
        reads: bit set of the predicates that the goal mentions.
    """

    constants: tuple[int, ...]
    won: Generated
    conditions: tuple[Generated, ...]
    reads: int


@lru_cache(maxsize=512)
def compile_goal(rules: Rules, goal: Formula, conditions: tuple[Formula, ...]) -> GoalCode:
    """Compile a goal whose constants have been replaced by `$0`, `$1`, ... (see `goals.abstract`)."""
    names = Names(rules.names.predicates, rules.names.types, {}, rules.names.fluents)
    writer = Writer(names)
    sources = [
        f"def goal_{index}(u, r, c, T, K, U):\n    return bool({writer.test(formula, {})})"
        for index, formula in enumerate((goal, *conditions))
    ]
    space = writer.compile(sources)
    functions = [space[f"goal_{index}"] for index in range(len(conditions) + 1)]
    found = predicates(goal).union(*(predicates(condition) for condition in conditions))
    order = tuple(int(name[1:]) for name in names.constants)
    return GoalCode(order, functions[0], tuple(functions[1:]), rules.bits(found))
