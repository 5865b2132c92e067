"""The engine on games that need no download: rules, texts, refusals, sharing."""

import json
import time
import tracemalloc

import pytest

from atod_envs.alfworld.engine.game import TASK_TYPES, Game, display_names
from atod_envs.alfworld.engine.grammar import Item, Listing, Plain, Reference, parse_grammar, parse_symbols, split_task
from atod_envs.alfworld.engine.pddl import parse_domain
from atod_envs.alfworld.engine.session import NOTHING, GameSession, put_as_move
from atod_envs.alfworld.generate import generate
from atod_envs.alfworld.generator import builtin
from atod_envs.errors import DataError

GRAMMAR = builtin.game(builtin.task_ids("train")[0])["grammar"]
DOMAIN = builtin.game(builtin.task_ids("train")[0])["pddl_domain"]

PROBLEM = """
(define (problem tiny) (:domain alfred)
 (:objects agent1 - agent  start here there - location
   Shelf_bar_1 Shelf_bar_2 Fridge_bar_1 Sink_bar_1_bar_SinkBasin - receptacle
   Apple_bar_1 Apple_bar_2 Knife_bar_1 DeskLamp_bar_1 Box_bar_1 Unseen_bar_1 - object
   ShelfType FridgeType SinkBasinType MicrowaveType - rtype
   AppleType KnifeType ButterKnifeType DeskLampType BoxType - otype)
 (:init (atLocation agent1 start)
   (receptacleAtLocation Shelf_bar_1 here) (receptacleAtLocation Shelf_bar_2 here)
   (receptacleAtLocation Fridge_bar_1 there) (receptacleAtLocation Sink_bar_1_bar_SinkBasin there)
   (receptacleType Shelf_bar_1 ShelfType) (receptacleType Shelf_bar_2 ShelfType)
   (receptacleType Fridge_bar_1 FridgeType) (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
   (objectType Apple_bar_1 AppleType) (objectType Apple_bar_2 AppleType) (objectType Knife_bar_1 KnifeType)
   (objectType DeskLamp_bar_1 DeskLampType) (objectType Box_bar_1 BoxType)
   (canContain ShelfType AppleType) (canContain FridgeType AppleType) (canContain ShelfType KnifeType)
   (openable Fridge_bar_1)
   (pickupable Apple_bar_1) (pickupable Apple_bar_2) (pickupable Knife_bar_1) (pickupable Box_bar_1)
   (cleanable Apple_bar_1) (coolable Apple_bar_1) (coolable Apple_bar_2) (sliceable Apple_bar_1)
   (toggleable DeskLamp_bar_1) (isReceptacleObject Box_bar_1)
   (inReceptacle Apple_bar_1 Shelf_bar_1) (objectAtLocation Apple_bar_1 here)
   (inReceptacle Knife_bar_1 Shelf_bar_2) (objectAtLocation Knife_bar_1 here)
   (inReceptacle DeskLamp_bar_1 Shelf_bar_1) (objectAtLocation DeskLamp_bar_1 here)
   (inReceptacle Box_bar_1 Shelf_bar_2) (objectAtLocation Box_bar_1 here)
   (inReceptacle Apple_bar_2 Fridge_bar_1) (objectAtLocation Apple_bar_2 there)
   (inReceptacleObject Apple_bar_1 Box_bar_1))
 (:goal (and (exists (?r - receptacle) (exists (?o - object)
   (and (objectType ?o AppleType) (receptacleType ?r FridgeType) (isCool ?o) (inReceptacle ?o ?r)))))))
"""


def tiny(problem=PROBLEM, **changes):
    data = {"pddl_domain": DOMAIN, "grammar": GRAMMAR, "pddl_problem": problem, "solvable": True, "walkthrough": None}
    return Game.parse({**data, **changes}, name="tiny")


def play(session, *commands):
    steps = [session.step(command) for command in commands]
    return [step.observation for step in steps]


def test_first_observation_lists_the_room_in_the_order_of_ids():
    step = GameSession(tiny()).reset()
    assert step.observation.startswith(
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see "
        "a fridge 1, a shelf 2, a shelf 1, and a sinkbasin 1.\n\nYour task is to: "
    )
    assert step.admissible == (
        "go to fridge 1",
        "go to shelf 1",
        "go to shelf 2",
        "go to sinkbasin 1",
        "help",
        "inventory",
        "look",
    )
    assert (step.reward, step.done, step.won, step.understood) == (0.0, False, False, True)
    assert step.progress == pytest.approx(1 / 3), "an apple is in the fridge, but it is not a cool one"


def test_names_come_from_ids():
    assert display_names({"Apple_bar_1", "sink_bar_x_bar_sinkbasin", "agent1", "loc_bar__minus_1_bar_2"}) == {
        "Apple_bar_1": "Apple 1",
        "sink_bar_x_bar_sinkbasin": "sinkbasin 1",
        "agent1": "agent1 ",
        "loc_bar__minus_1_bar_2": "loc 1",
    }


def test_receptacles_at_one_location():
    session = GameSession(tiny())
    session.reset()
    # shelf 2 is Shelf_bar_1: within a class the first id has the highest number.
    assert play(session, "go to shelf 2") == [
        "You arrive at shelf 2. On the shelf 2, you see a apple 2, and a desklamp 1."
    ]
    assert "go to shelf 1" not in session.admissible, "it is here already"
    assert "take knife 1 from shelf 1" in session.admissible, "but within reach"
    assert play(session, "look") == ["You are facing the shelf 2, and shelf 1. Next to it, you see nothing."]
    assert play(session, "take apple 2 from shelf 2", "move apple 2 to shelf 1", "look") == [
        "You pick up the apple 2 from the shelf 2.",
        "You move the apple 2 to the shelf 1.",
        "You are facing the shelf 2, and shelf 1. Next to it, you see a apple 2.",
    ]


def test_lamps_knives_boxes_and_bare_hands():
    session = GameSession(tiny())
    session.reset()
    texts = play(session, "go to shelf 1", "use desklamp 1", "use desklamp 1", "inventory", "take knife 1 from shelf 1")
    assert texts[1:4] == [
        "You turn on the desklamp 1.",
        "You turn on the desklamp 1.",
        "You are not carrying anything.",
    ]
    assert not any(command.startswith("take") for command in session.admissible), "one thing at a time"
    texts = play(session, "slice apple 2 with knife 1", "examine apple 2", "inventory", "move knife 1 to shelf 1")
    assert texts[0] == "You sliced the apple 2 with the knife 1."
    assert texts[1] in (NOTHING, "This is a sliced apple 2."), "the domain decides whether it must be held"
    assert texts[2:] == ["You are carrying: a knife 1.", "You move the knife 1 to the shelf 1."]
    texts = play(session, "take box 1 from shelf 1", "examine box 1")
    assert texts[1] == "This is a normal box 1. In it, you see a apple 2."
    assert not any(command.startswith("move") for command in session.admissible), "nothing takes a box"


def test_the_fridge_cools_through_its_door_and_the_game_can_be_won_and_undone():
    session = GameSession(tiny())
    session.reset()
    play(session, "go to shelf 2", "take apple 2 from shelf 2", "go to fridge 1")
    step = session.step("cool apple 2 with fridge 1")
    assert step.observation == "You cool the apple 2 using the fridge 1." and step.progress == pytest.approx(2 / 3)
    assert session.step("examine apple 2").observation == "This is a cold apple 2."
    assert session.step("move apple 2 to fridge 1").observation == NOTHING, "it is closed"
    assert (
        session.step("open fridge 1").observation
        == "You open the fridge 1. The fridge 1 is open. In it, you see a apple 1."
    )
    step = session.step("  move apple 2 to fridge 1 \n")
    assert (step.reward, step.done, step.won, step.progress) == (1.0, True, True, 1.0)
    step = session.step("take apple 2 from fridge 1")
    assert (step.reward, step.done, step.won, step.progress) == (0.0, False, False, 1.0)
    assert session.reset().progress == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "command", ["", "LOOK", "look around", "go to", "take apple 2", "{o}", "\ud800", "#look#", "a" * 9999]
)
def test_whatever_cannot_be_done_changes_nothing(command):
    session = GameSession(tiny())
    first = session.reset()
    step = session.step(command)
    assert step.observation == NOTHING and not step.understood
    assert step.admissible == first.admissible


def test_the_older_wording_is_reworded_only_where_it_can_be_done():
    listed = ("look", "move apple 1 to fridge 1")
    assert put_as_move(" put apple 1 in/on fridge 1", listed) == "move apple 1 to fridge 1"
    assert put_as_move("put apple 2 in/on fridge 1", listed) == "put apple 2 in/on fridge 1"
    assert put_as_move("put apple 1 in/on fridge 1", ("put apple 1 in/on fridge 1",)) == "put apple 1 in/on fridge 1"


def test_a_game_files_own_texts_are_used():
    grammar = GRAMMAR.replace("move {o} to {r}", "put {o} in/on {r}").replace(
        "You arrive at {r.name}.", "You arrive at {lend.name}."
    )
    session = GameSession(tiny(grammar=grammar))
    session.reset()
    assert play(session, "go to shelf 2")[0].startswith("You arrive at here . On the shelf 2")
    session.step("take apple 2 from shelf 2")
    assert "put apple 2 in/on shelf 1" in session.admissible


def test_a_game_files_own_rules_are_used():
    domain = DOMAIN.replace("(not (holdsAny ?a))\n", "\n", 1)
    assert domain != DOMAIN
    session = GameSession(tiny(pddl_domain=domain))
    session.reset()
    play(session, "go to shelf 1", "take knife 1 from shelf 1", "take apple 2 from shelf 2")
    assert session.step("inventory").observation == "You are carrying: a apple 2, and a knife 1."


def test_effects_that_depend_on_the_state():
    old = "(isSliced ?co)"
    domain = DOMAIN.replace(old, "(when (isClean ?co) (isSliced ?co)) (isHot ?co)")
    assert domain.count("(when (isClean ?co)") >= 1
    session = GameSession(tiny(pddl_domain=domain, problem=PROBLEM))
    session.reset()
    play(session, "go to shelf 1", "take knife 1 from shelf 1", "slice apple 2 with knife 1", "move knife 1 to shelf 1")
    play(session, "take apple 2 from shelf 2")
    assert session.step("examine apple 2").observation == "This is a hot apple 2.", (
        "it was not clean, so it is in one piece"
    )


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"pddl_problem": PROBLEM[:900]}, "truncated"),
        ({"pddl_problem": PROBLEM.replace("(:domain alfred)", "(:domain logistics)")}, "(:domain logistics)"),
        ({"pddl_problem": PROBLEM.replace("(openable Fridge_bar_1)", "(flies Fridge_bar_1)")}, "(flies fridge_bar_1)"),
        (
            {"pddl_problem": PROBLEM.replace("(openable Fridge_bar_1)", "(openable Ghost_bar_1)")},
            "(openable ghost_bar_1)",
        ),
        ({"pddl_problem": PROBLEM.replace("Unseen_bar_1 -", "Apple_bar_1 -")}, "'apple_bar_1'"),
        ({"pddl_problem": PROBLEM.replace("(isCool ?o)", "(preference p (isCool ?o))")}, "(preference p"),
        ({"pddl_domain": DOMAIN.replace("(:predicates", "(:constraints (always)) (:predicates", 1)}, "(:constraints"),
        ({"pddl_domain": DOMAIN.replace(":adl", ":adl :durative-actions")}, ":durative-actions"),
        ({"pddl_domain": DOMAIN.replace("(isSliced ?co)", "(forall (?x - object) (isSliced ?x))")}, "(forall"),
        (
            {"grammar": GRAMMAR.replace("{o.indefinite + ' ' + o.name", "{open('/etc/passwd').read() + o.name")},
            "passwd",
        ),
        ({"grammar": GRAMMAR.replace("#look.feedback#", "#lock.feedback#")}, "#lock.feedback#"),
        ({"grammar": GRAMMAR.replace("action OpenObject {", "verb OpenObject {")}, "verb OpenObject"),
        ({"grammar": GRAMMAR.replace("action OpenObject {", "action UnopenObject {")}, "'openobject'"),
        ({"grammar": 3}, "'grammar'"),
    ],
)
def test_what_the_engine_does_not_implement_is_refused_with_the_construct(change, quoted):
    with pytest.raises(DataError, match="tiny") as caught:
        tiny(**change)
    assert quoted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_truncated_are_named(tmp_path):
    path = tmp_path / "game.tw-pddl"
    with pytest.raises(DataError, match=str(path)):
        Game.load(path)
    path.write_text(json.dumps({"pddl_domain": DOMAIN})[:-100])
    with pytest.raises(DataError, match="truncated"):
        Game.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        Game.load(path)


def test_sessions_of_a_game_do_not_touch_each_other():
    game = tiny()
    one, two = GameSession(game), GameSession(game)
    one.reset(), two.reset()
    play(one, "go to shelf 2", "take apple 2 from shelf 2", "use desklamp 1")
    assert two.admissible == GameSession(game).reset().admissible
    assert play(two, "go to shelf 2")[0].endswith("you see a apple 2, and a desklamp 1.")


def test_a_session_is_cheap():
    game = Game.parse(builtin.game(builtin.task_ids("train")[0]), name="built-in")
    GameSession(game)
    tracemalloc.start()
    sessions = [GameSession(game) for _ in range(200)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / len(sessions) < 20_000


@pytest.mark.parametrize("number", range(6))
def test_the_walkthroughs_of_the_built_in_world_win_with_growing_progress(number):
    task_id = builtin.task_ids("valid_unseen")[number]
    game = Game.parse(builtin.game(task_id), name=task_id)
    session = GameSession(game)
    session.reset()
    assert game.task_type in TASK_TYPES and game.walkthrough
    last = 0.0
    for command in game.walkthrough:
        assert command in session.admissible
        step = session.step(command)
        assert last <= step.progress <= 1.0 and (step.progress == 1.0) == step.won
        last = step.progress
    assert session.won


def test_symbols_are_read_as_the_published_parser_reads_them():
    assert parse_symbols("\n\n Available") == (Plain("Available"),)
    assert parse_symbols("put a; b.") == (Plain("put a"),), "it stops at what fits nowhere"
    assert parse_symbols("#a#\n\n#b c#") == (Reference("a"), Plain("\n\n"), Reference("b c"))
    (listing,) = parse_symbols("[{#x# | p(o:object)}] ]")[:1]
    assert isinstance(listing, Listing) and listing.item == Item(Reference("x"), "p(o:object)")


def test_games_that_differ_in_the_task_sentence_share_their_grammar():
    text, sentence = split_task(GRAMMAR)
    other, _ = split_task(GRAMMAR.replace(json.dumps(sentence)[1:-1], "Your task is to: dance."))
    assert sentence is not None and sentence.startswith("Your task is to: ")
    assert text == other
    assert tiny().rules is tiny(grammar=GRAMMAR.replace(sentence, "Your task is to: dance.")).rules


def test_comments_and_case_do_not_matter_in_pddl():
    domain = parse_domain("(define (domain D) ; (broken\n (:types a b - c c) (:predicates (P ?x - A)))")
    assert domain.predicates == {"p": 1}
    assert domain.subtypes("c") == {"a", "b", "c"}
    assert domain.subtypes("nothing,") == frozenset()


def test_grammar_comments_are_skipped():
    grammar = parse_grammar('# note\naction Look { template :: "look"; # why\n feedback :: "You look."; }')
    assert grammar.actions["look"].template == (Plain("look"),)


HOSTILE = {
    "parentheses": lambda game: {"pddl_problem": "(" * 50_000},
    "conjunctions": lambda game: {"pddl_problem": with_goal(game, "(and " * 3000 + ")" * 3000)},
    "negations": lambda game: {"pddl_problem": with_goal(game, "(not " * 3000 + "(a)" + ")" * 3000)},
    "rules": lambda game: {"grammar": game["grammar"] + '\ngrammar :: """ {"a": ' + "[" * 50_000 + ' } """;'},
    "digits": lambda game: {"grammar": game["grammar"] + '\ngrammar :: """ {"a": ' + "1" * 5_000 + ' } """;'},
    "tabs": lambda game: {"grammar": 'grammar :: """' + "\t" * 50_000},
}
"""Texts of a game file that are nested too deeply, endless, or cut."""


def with_goal(game, goal):
    return f"{game['pddl_problem'].split('(:goal')[0]}(:goal {goal}))"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_game_is_refused_in_one_line(name):
    game = generate("train", 0, seed=3, size="small").game
    with pytest.raises(DataError, match=r"^the game g cannot be played: ") as caught:
        Game.parse({**game, **HOSTILE[name](game)}, name="g")
    assert "\n" not in str(caught.value)


def test_a_long_chain_of_types_is_read_at_once():
    game = generate("train", 0, seed=3, size="small").game
    chain = " ".join(f"t{n} - t{n + 1}" for n in range(3000))
    started = time.process_time()
    Game.parse({**game, "pddl_domain": game["pddl_domain"].replace("(:types", f"(:types {chain}", 1)}, name="g")
    assert time.process_time() - started < 5
