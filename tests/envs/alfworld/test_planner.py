"""The omniscient planner: its plans win, and nothing shorter does."""

import random

import pytest
from games import archived

from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession
from atod_envs.alfworld.generator import builtin
from atod_envs.alfworld.household import CLEAN, PICK
from atod_envs.alfworld.planner.plan import Unsolvable, plan, read_situation
from atod_envs.alfworld.planner.shortest_plan import Situation, shortest_plan


def wins(game, commands):
    """Whether the commands are admissible in turn, and the last one and no earlier one wins."""
    session = GameSession(game)
    for number, command in enumerate(commands, 1):
        assert command in session.admissible
        if session.step(command).won:
            return number == len(commands)
    return False


def builtin_game(split, number):
    task_id = builtin.task_ids(split)[number]
    return Game.parse(builtin.game(task_id), name=task_id)


def facts(session):
    world = session.facts
    return (tuple(world.unary), tuple(tuple(sorted(row.items())) for row in world.rows))


def wins_within(game, depth):
    """Whether any sequence of at most that many commands wins: tried out, all of them."""
    idle = ("look", "inventory", "help", "examine ")
    session = GameSession(game)
    seen, paths = {facts(session)}, [()]
    for _ in range(depth):
        longer = []
        for path in paths:
            session.reset()
            for command in path:
                session.step(command)
            for command in session.admissible:
                if command.startswith(idle):
                    continue
                session.reset()
                for earlier in path:
                    session.step(earlier)
                if session.step(command).won:
                    return True
                if (found := facts(session)) not in seen:
                    seen.add(found)
                    longer.append((*path, command))
        paths = longer
    return False


def test_plans_are_as_long_as_the_published_optimal_ones(realdata):
    archive = realdata / "alfworld" / "alfworld_valid_full.tar.xz"
    number = 0
    for game in [*archived(archive, "valid_seen"), *archived(archive, "valid_unseen")]:
        shortest = plan(game)
        assert wins(game, shortest)
        assert len(shortest) == len(game.walkthrough), game.name
        number += 1
    assert number == 274


def test_plans_games_of_the_older_release(realdata):
    archive = realdata / "alfworld" / "alfworld_oldgrammar_valid_382.tar.xz"
    games = list(archived(archive, "valid_unseen", 4))
    assert len(games) > 25
    assert all(wins(game, plan(game)) for game in games)


@pytest.mark.parametrize("number", range(8))
def test_nothing_shorter_wins_builtin_games(number):
    """Exhaustive search finds no win in fewer commands (up to six, for time)."""
    game = builtin_game("valid_unseen", number)
    shortest = plan(game)
    assert wins(game, shortest)
    assert not wins_within(game, min(len(shortest) - 1, 5))
    if len(shortest) <= 6:
        assert wins_within(game, len(shortest))


def test_one_command_brings_the_goal_nearer_by_one_at_most(realdata):
    """On random walks: the plan's length never falls by more than one, which fails if some plan is not shortest."""
    games = [builtin_game("train", number) for number in range(60)]
    games += archived(realdata / "alfworld" / "alfworld_valid_full.tar.xz", "valid_seen", 6)
    followed = 0
    for number, game in enumerate(games):
        rng = random.Random(number)
        session = GameSession(game)
        before = len(plan(game, session.facts))
        for _ in range(25):
            try:
                best = plan(game, session.facts)
            except Unsolvable:
                break
            follow = rng.random() < 0.4 and bool(best)
            step = session.step(best[0] if follow else rng.choice(session.admissible))
            assert step.understood
            if step.won:
                assert before == 1
                break
            try:
                after = len(plan(game, session.facts))
            except Unsolvable:
                break
            assert after >= before - 1
            assert not follow or after == before - 1
            followed += follow
            before = after
    assert followed > 100


def test_a_thing_in_two_places_at_once():
    """A mug in the machine and on the counter is still in the machine when it was taken from the counter."""
    state = Situation(
        task_type=CLEAN,
        here="door",
        reach={"countertop 1": "a", "coffeemachine 1": "a", "sinkbasin 1": "b"},
        closed=frozenset(),
        things={"mug 1": ("countertop 1", "coffeemachine 1")},
        loose=frozenset({"mug 1"}),
        able=frozenset({"mug 1"}),
        done=frozenset(),
        targets=("coffeemachine 1",),
        stations=("sinkbasin 1",),
    )
    assert shortest_plan(state) == (
        "go to countertop 1",
        "take mug 1 from countertop 1",
        "go to sinkbasin 1",
        "clean mug 1 with sinkbasin 1",
    )


def test_reached_and_unreachable_goals():
    reached = Situation(
        task_type=PICK,
        here="door",
        reach={"shelf 1": "a"},
        closed=frozenset(),
        things={"mug 1": ("shelf 1",)},
        loose=frozenset({"mug 1"}),
        able=frozenset({"mug 1"}),
        done=frozenset(),
        targets=("shelf 1",),
    )
    assert shortest_plan(reached) == ()
    game = builtin_game("train", 0)
    start = read_situation(game)
    assert start.task_type == PICK and start.holding is None and start.closed
    session = GameSession(game)
    for command in plan(game):
        session.step(command)
    assert plan(game, session.facts) == ()
    with pytest.raises(Unsolvable, match="pick_and_place_simple"):
        shortest_plan(
            Situation(
                task_type=PICK,
                here="door",
                reach={},
                closed=frozenset(),
                things={},
                loose=frozenset(),
                able=frozenset(),
                done=frozenset(),
            )
        )
