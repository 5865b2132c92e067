"""ReOPD: which turns are replayed, where the student plays, and what is learned from."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
from toy import WORDS, ToyEnv, ToyStyle
from toyworld import TOY, small_model

from agents.base import Decision
from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from atod_algos.algorithm import RolloutLimits
from atod_algos.opd import OPD
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.signals.reopd import ReOPD, stored_turns
from atod_algos.training.cli import main
from atod_algos.turn_plans import Replay, Stored
from atod_envs.errors import AtodError
from atod_envs.styles import Layout
from atod_envs.trajectory import StopReason, read_jsonl, write_jsonl

NOTHING = "Nothing happens."


def replays(seed, *actions):
    """Turns of the toy world, in which no word wins."""
    shown = [f"Speak ({seed}).", *[f"You say {action}." if action in WORDS else NOTHING for action in actions]]
    return tuple(Replay(o, a, f"<think></think><action>{a}</action>") for o, a in zip(shown, actions, strict=False))


def first_turns(plan, task="t", solution=lambda: (), seeds=4000):
    found = []
    for seed in range(seeds):
        actor = plan.begin(EpisodeSpec(task, "g", seed), solution)
        found.append(next(turn for turn in range(9) if actor(turn) == "student"))
    return np.bincount(found, minlength=4) / seeds


def test_positions_are_drawn_with_the_schedule_by_hand():
    stored = {"t": [replays(0, "a", "b", "c")]}
    # 1, 0.5, 0.25 over 1.75; the student never follows the whole stored episode
    assert first_turns(Stored(0.5, 1, stored)) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0], abs=0.025)
    assert first_turns(Stored(1.0, 1, stored)) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.025)
    assert list(first_turns(Stored(0.5, 1, stored), "another", seeds=50)) == [1, 0, 0, 0]
    decisions = [Decision(word, "") for word in WORDS[:2]]
    assert first_turns(Stored(0.6), solution=lambda: decisions) == pytest.approx([1 / 1.6, 0.6 / 1.6, 0, 0], abs=0.025)
    plan = Stored(0.6, 2, stored)
    turns = [[plan.begin(EpisodeSpec("t", g, seed), tuple)(turn) for turn in range(6)] for seed in (3, 4) for g in "ab"]
    assert turns[0] == turns[1] and turns[2] == turns[3], "from task and seed alone"
    assert all(row.count("student") == 2 and row[-1] is None for row in turns)


@pytest.fixture(scope="module")
def rollout(tokenizer):
    model = small_model(tokenizer, 5)

    def make(layout=Layout.CONVERSATION):
        engine = TransformersEngine(model, slots=8, max_context=256)
        return Rollout(
            engine, ChatFormat(tokenizer), lambda: gym.make(TOY, max_turns=4), style=ToyStyle(layout), max_tokens=6
        )

    return make


@pytest.mark.parametrize("layout", list(Layout))
def test_stored_turns_are_played_again_and_the_student_plays_one(rollout, layout, tokenizer):
    stored = {"say-fig-train": [replays(7, "plum", "mud", "pear")]}
    specs = [EpisodeSpec("say-fig-train", str(n), 7) for n in range(2)]
    plan = Stored(0.6, 1, stored)
    first = next(turn for turn in range(4) if plan.begin(specs[0], tuple)(turn) == "student")
    for trajectory in rollout(layout).play(specs, RolloutLimits(who=plan)):
        assert [turn.action for turn in trajectory.turns[:-1]] == ["plum", "mud", "pear"][:first]
        assert [bool(turn.response_ids) for turn in trajectory.turns] == [False] * first + [True]
        assert trajectory.stop_reason is StopReason.TURN_LIMIT
        if layout is Layout.CONVERSATION and first:
            assert "<action>plum</action>" in tokenizer.decode(trajectory.turns[-1].prompt_ids)


def test_a_stored_episode_of_another_seed_is_refused_and_another_style_is_phrased(rollout):
    seed = next(n for n in range(9) if Stored(1.0, 1, {"t": [replays(n, "a", "b")]}).begin(
        EpisodeSpec("t", "g", n), tuple)(0) != "student")  # fmt: skip
    spec = EpisodeSpec("say-fig-train", "g", seed)
    with pytest.raises(AtodError, match=rf"before turn 0 it was shown 'Speak \(99\).', .* shows 'Speak \({seed}\)"):
        rollout().play([spec], RolloutLimits(who=Stored(1.0, 1, {spec.task_id: [replays(99, "plum", "plum")]})))
    said = [dataclasses.replace(turn, response=f"I choose {turn.action}") for turn in replays(seed, "plum", "pear")]
    turns = rollout().play([spec], RolloutLimits(who=Stored(1.0, 1, {spec.task_id: [said]})))[0].turns
    assert [turn.response for turn in turns[:-1]] == ["<think></think><action>plum</action>"]


class StillEnv(ToyEnv):
    """The toy world, whose first words do not depend on the seed."""

    def _begin(self, task_id, seed):
        return super()._begin(task_id, 0)


STILL = "toy/Still-v0"
if STILL not in gym.registry:
    gym.register(STILL, entry_point=StillEnv, disable_env_checker=True)


@pytest.fixture
def options(models):
    return [
        "--env", STILL, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "4", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "2", "--eval-every", "0", "--report-tasks", "4", "--threads", "1", "--checkpoint-every", "1",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_on_its_own_stored_episodes_and_resumes_exactly(options, tmp_path, capsys):
    pool = tmp_path / "pool"
    main(OPD, [*options, "--steps", "1", "--run", str(pool)])
    stored = stored_turns(str(pool))
    assert set(stored) == {f"say-{word}-train" for word in WORDS} and sum(map(len, stored.values())) == 8
    method = [*options, "--episodes", str(pool), "--decay", "1"]
    main(ReOPD, [*method, "--steps", "2", "--run", str(tmp_path / "whole")])
    for steps in ("1", "2"):
        main(ReOPD, [*method, "--steps", steps, "--run", str(tmp_path / "parts")])
    kept = ("reopd/", "episode/", "actor/")
    whole, parts = (
        [
            {k: v for k, v in json.loads(line).items() if k.startswith(kept)}
            for line in (tmp_path / run / "metrics.jsonl").open()
        ]
        for run in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 2
    for step, row in enumerate(whole, 1):
        episodes = list(read_jsonl(tmp_path / "whole" / "trajectories" / f"step_{step:06d}.jsonl.gz"))
        own = [[turn.index for turn in episode.turns if turn.response_ids] for episode in episodes]
        assert all(len(turns) == 1 for turns in own), "one turn of the student in each episode"
        assert row["reopd/first_turn"] == pytest.approx(np.mean(own)) and row["episode/length/mean"] == 1
        assert row["reopd/replayed_turns"] == pytest.approx(np.sum(own) / (np.sum(own) + len(own)))
        actions = [[turn.action for turn in episode.turns[:-1]] for episode in episodes]
        for episode, done in zip(episodes, actions, strict=True):
            assert done in [[turn.action for turn in turns[: len(done)]] for turns in stored[episode.task_id]]
    (file,) = (pool / "trajectories").glob("*.jsonl.gz")
    write_jsonl(file, list(read_jsonl(file))[1:])
    with pytest.raises(SystemExit):
        main(ReOPD, [*method, "--steps", "3", "--run", str(tmp_path / "parts")])
    assert f"trained with another --episodes {pool}: its files have changed" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_cannot_be_meant_is_refused(options, tmp_path, capsys):
    for wrong in ({"decay": 0.0}, {"decay": 1.5}, {"student_turns": -1}):
        with pytest.raises(AtodError, match="--decay"):
            ReOPD(**wrong)
    elsewhere = tmp_path / "elsewhere.jsonl"
    main(OPD, [*options, "--steps", "1", "--run", str(tmp_path / "r")])
    found = [t for t in read_jsonl(tmp_path / "r" / "trajectories" / "step_000001.jsonl.gz")]
    write_jsonl(elsewhere, [dataclasses.replace(t, task_id="another") for t in found])
    for place, words in (
        (tmp_path / "nothing", "expected 'expert', a file of episodes"),
        (elsewhere, "it has episodes of 1 tasks, and none of them is a task of this run's first step"),
    ):
        with pytest.raises(SystemExit):
            main(ReOPD, [*options, "--steps", "1", "--episodes", str(place), "--run", str(tmp_path / "x")])
        assert words in " ".join(capsys.readouterr().err.split())
