"""Guided-OPD: who plays which turn, whose turns are learned from, and where a teacher cannot play."""

import json

import gymnasium as gym
import numpy as np
import pytest
from toy import WORDS, ToyStyle
from toyworld import ECHO, TOY

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from agents.models import load_model
from agents.policy import Policy
from atod_algos.algorithm import RolloutLimits
from atod_algos.batch import Scores, make_batch
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.signals.guided_opd import GuidedOPD
from atod_algos.training.cli import main
from atod_algos.turn_plans import Guided
from atod_envs.errors import AtodError
from atod_envs.styles import Layout
from atod_envs.trajectory import Group, read_jsonl


def test_the_share_falls_to_nothing_by_hand():
    method = GuidedOPD(guide_share=0.8, guide_steps=4)
    half = 0.8 * (1 + 2**-0.5) / 2, 0.4, 0.8 * (1 - 2**-0.5) / 2
    assert [method.share(step) for step in range(1, 7)] == pytest.approx([0.8, *half, 0, 0])
    assert method.limits(2) == RolloutLimits(who=Guided(method.share(2), "teacher", guide_learned=True))
    assert method.limits(5) == RolloutLimits(), "then an episode is the student's alone"
    assert GuidedOPD().share(1) == 1.0, "the guide begins with whole episodes"
    assert GuidedOPD(guide_share=0.5, guide_weight=0).plan(1) == Guided(0.5)
    for wrong in ({"guide_share": 1.1}, {"guide_share": -0.1}, {"guide_steps": 0}):
        with pytest.raises(AtodError, match="--guide-share"):
            GuidedOPD(**wrong)
    for wrong in ({"guide_weight": 0.0}, {"guide_weight": -1.0}, {"guide_weight": float("nan")}):
        with pytest.raises(AtodError, match="--guide-weight"):
            GuidedOPD(**wrong)


def test_coins_follow_from_the_episode_alone():
    plan = Guided(0.3)
    coins = [[plan.begin(EpisodeSpec("t", "g", seed), lambda: ())(turn) for turn in range(20)] for seed in range(100)]
    again = [[plan.begin(EpisodeSpec("u", "h", seed), lambda: ())(turn) for turn in range(20)] for seed in range(100)]
    assert coins == again
    assert np.mean([player == "teacher" for row in coins for player in row]) == pytest.approx(0.3, abs=0.03)
    assert Guided(0.3, "expert").expert_watches and not Guided(0.3, "expert").teacher_plays


@pytest.fixture(scope="module")
def played(models):
    """The same episodes with the student, with the teacher, and with plans that let the teacher play some turns."""
    loaded = {role: load_model(str(folder), role) for role, folder in models.items()}
    specs = [EpisodeSpec(f"say-{word}-train", word, seed) for seed, word in enumerate(WORDS * 3)]

    def play(player, who=None):
        engines = {role: TransformersEngine(model.model, slots=8, max_context=128) for role, model in loaded.items()}
        chat = ChatFormat(loaded["student"].tokenizer)
        rollout = Rollout(
            engines[player],
            chat,
            lambda: gym.make(TOY, max_turns=4),
            style=ToyStyle(Layout.CONVERSATION),
            max_tokens=8,
            teacher=Policy(engines["teacher"], chat, 8) if player == "student" else None,
        )
        return rollout.play(specs, RolloutLimits(who=who))

    return {
        "student": play("student"),
        "teacher": play("teacher"),
        **{share: play("student", Guided(share)) for share in (0.0, 0.5, 1.0)},
        "learned": play("student", Guided(0.5, guide_learned=True)),
    }


def said(episodes):
    return [[turn.response for turn in episode.turns] for episode in episodes]


def test_the_guide_is_the_teacher_and_its_turns_are_not_learned_from(played):
    assert said(played[0.0]) == said(played["student"]) != said(played["teacher"]) == said(played[1.0])
    assert all(turn.response_ids for episode in played[0.0] for turn in episode.turns)
    assert not any(turn.response_ids for episode in played[1.0] for turn in episode.turns)


def test_each_turn_is_played_by_whom_the_coin_says(played):
    for episode in played[0.5]:
        actor = Guided(0.5).begin(EpisodeSpec(episode.task_id, "", episode.seed), lambda: ())
        assert [bool(turn.response_ids) for turn in episode.turns] == [
            actor(turn.index) == "student" for turn in episode.turns
        ]
    mixed = [{bool(turn.response_ids) for turn in episode.turns} for episode in played[0.5]]
    assert {True, False} in mixed, "an episode has turns of both"


def test_the_guides_turns_are_learned_from_where_they_count(played):
    """The same episodes, with token ids in every turn: c on the guide's, the gap on the student's."""
    assert said(played["learned"]) == said(played[0.5])
    assert all(turn.response_ids and turn.logprobs for episode in played["learned"] for turn in episode.turns)
    batch = make_batch([Group(t.task_id, (t,)) for t in played["learned"]])
    scores = Scores(np.full(batch.n_tokens, -1.0), teacher_M=np.full(batch.n_tokens, -3.0))
    method = GuidedOPD(guide_share=0.5, guide_weight=0.7)
    found = method.advantages(batch, scores, step=1)
    mine = [bool(turn.response_ids) for episode in played[0.5] for turn in episode.turns]
    assert found.distillation_M.tolist() == [-2.0 if mine[k] else 0.7 for k in batch.turn_M]
    assert found.teacher_weight_M.tolist() == [1.0 if mine[k] else 0.7 for k in batch.turn_M]
    assert found.coefficients == {"guide_share": 0.5, "guided_turns": pytest.approx(1 - np.mean(mine))}
    without = GuidedOPD(guide_share=0.5, guide_weight=0.0)
    batch = make_batch([Group(t.task_id, (t,)) for t in played[0.5]])
    scores = Scores(np.full(batch.n_tokens, -1.0), teacher_M=np.full(batch.n_tokens, -3.0))
    found = without.advantages(batch, scores, step=1)
    assert set(found.distillation_M) == {-2.0} and set(found.teacher_weight_M) == {1.0}
    assert found.coefficients["guided_turns"] == pytest.approx(1 - np.mean(mine))


@pytest.fixture
def options(models):
    return [
        "--env", TOY, ECHO, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "0", "--report-tasks", "4", "--threads", "1", "--steps", "2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_from_the_students_turns_until_the_guide_is_gone(options, tmp_path):
    main(GuidedOPD, [*options, "--guide-share", "0.6", "--guide-steps", "1", "--run", str(tmp_path / "r")])
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["guided_opd/guide_share"] for row in rows] == [0.6, 0.0]
    for step, row in enumerate(rows, 1):
        episodes = list(read_jsonl(tmp_path / "r" / "trajectories" / f"step_{step:06d}.jsonl.gz"))
        turns = [turn for episode in episodes for turn in episode.turns]
        assert all(turn.response_ids for turn in turns)
        plan = GuidedOPD(guide_share=0.6, guide_steps=1).plan(step)
        guided = np.mean([plan.guides(t.seed, turn.index) for t in episodes for turn in t.turns])
        assert row["guided_opd/guided_turns"] == pytest.approx(guided) and (guided > 0.3 if step == 1 else not guided)


@pytest.mark.slow
@pytest.mark.parametrize("gap", ["sampled", "exact"])
def test_the_guide_may_play_every_turn(gap, options, tmp_path):
    main(GuidedOPD, [*options, "--guide-steps", "50", "--gap", gap, "--run", str(tmp_path / "r")])
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["guided_opd/guided_turns"] == 1.0 and rows[0]["batch/tokens"] > 0
    assert all(np.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in rows)


def test_where_the_teacher_cannot_play_is_said_at_the_start(options, models, tmp_path, capsys):
    student = str(models["student"])
    for further, words in (
        (["--staleness", "1"], "--staleness 1: guided_opd also learns from turns that no student sampled"),
        (["--guide", "expert", "--staleness", "1"], "no student sampled"),
        (["--old-logprobs", "sampler"], "--old-logprobs sampler: guided_opd also learns from turns"),
        (["--teacher", student, f"echo/small={student}"], "does not go with a teacher per label"),
    ):
        with pytest.raises(SystemExit):
            main(GuidedOPD, [*options, *further, "--run", str(tmp_path / "r")])
        assert words in " ".join(capsys.readouterr().err.split())
