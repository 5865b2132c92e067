"""FutureBridge-OPD: where a bridge is tried, when it is kept, and what is learned from, against hand-made numbers."""

import json

import numpy as np
import pytest
from toyworld import ECHO, TOY

from atod_algos.algorithm import RolloutLimits
from atod_algos.batch import Scores, make_batch
from atod_algos.signals.futurebridge import FutureBridge
from atod_algos.training.cli import main
from atod_algos.turn_plans import Branch, Branches, EpisodeSpec, ExpertFirst, Replay
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory, read_jsonl
from atod_envs.trajectory import Turn as RealTurn


def turn(index, ids=(5, 6), valid=True):
    return RealTurn(index, f"o{index}", (), (1, 2) if ids else (), tuple(ids), (0.0,) * len(ids), f"r{index}", f"a{index}", True, valid, 0.0)  # fmt: skip


def episode(*turns, group="g", stop=StopReason.FAILURE):
    return Trajectory("e", "t", "s", "", group, 0, turns, "", False, 0.0, stop)


def scored(episodes, gap_of):
    """A batch, and scores whose gap log pi_T - log pi_S at each token is ``gap_of[trajectory][turn][token]``."""
    batch = make_batch([Group("t", (e,)) for e in episodes])
    gap_M = np.concatenate([np.ravel(turn) for own in gap_of for turn in own]).astype(float)
    return batch, Scores(np.full(batch.n_tokens, -1.0), -1.0 + gap_M)


class Table:
    """Plays branches from a table: what the bridge is, and the gaps of the turns after it."""

    def __init__(self, bridge, gaps):
        self.bridge, self.gaps, self.asked = bridge, gaps, []

    def play(self, branches, learned):
        self.asked.append((learned, dict(branches)))
        if learned == "teacher":
            found = {}
            for n, branch in branches.items():
                past = [turn(i, ids=()) for i in range(len(branch.beginning))]
                found[n] = episode(*past, self.bridge(len(past)), stop=StopReason.TURN_LIMIT)
            return found
        return {
            n: episode(
                *[turn(i, ids=()) for i in range(len(branch.beginning))],
                *[turn(len(branch.beginning) + i, valid=gaps is not None) for i in range(len(branch.players))],
            )
            for (n, branch), gaps in zip(branches.items(), self.gaps, strict=True)
        }

    def score(self, episodes):
        return scored(episodes, [gaps for gaps in self.gaps if gaps is not None])


GAPS = [[[-1, -1], [-3, -1], [1, -1], [1, 1], [-9, -9]]]
"""Means -1, -2, 0, 1, -9: the last turn does not count, so the bridge goes to turn 1; q_own = 3/4."""


@pytest.mark.parametrize(
    ("after", "kept"), [([[1, 1], [1, 1]], 1), ([[1, 1], [1, -1]], 0), ([[1, -1], [-1, -1]], 0), (None, 0)]
)
def test_the_bridge_goes_to_the_largest_disagreement_and_must_better_the_own_turns(after, kept):
    method = FutureBridge(horizon=2)
    batch, scores = scored([episode(*[turn(i) for i in range(5)])], GAPS)
    table = Table(lambda at: turn(at, ids=(7, 8, 9)), [after])
    bridges, numbers = method.branch(batch, scores, 1, table)
    assert len(bridges) == kept and numbers["kept"] == kept and numbers["tried"] == float(after is not None)
    past = (Replay("o0", "a0", "r0", (5, 6)),)
    (teacher, asked), (student, continued) = table.asked
    assert teacher == "teacher" and asked == {0: Branch(past, ("teacher",))}
    shown = Replay("o1", "a1", "r1", (7, 8, 9))
    assert student == "student" and continued == {0: Branch((*past, shown), ("student", "student"))}
    if after is not None:
        assert numbers["preferred_own"] == 3 / 4
        assert numbers["preferred_bridged"] == np.mean(np.ravel(after) == 1)
        assert numbers["bridge_tokens"] == pytest.approx(3 / 13 if kept else 0)
    for bridge in bridges:
        assert [t.response_ids for t in bridge.turns] == [(), (7, 8, 9)], "the teacher's tokens alone are learned from"


def test_where_no_bridge_can_be_compared_none_is_played():
    method = FutureBridge(horizon=2)
    cases = {
        "two turns, one after the bridge": ([turn(0), turn(1)], [[-1, -1], [0, 0]]),
        "no turn but the last": ([turn(0)], [[-1, -1]]),
        "an own turn after it was not understood": (
            [turn(0), turn(1, valid=False), turn(2)],
            [[-1, -1], [0, 0], [0, 0]],
        ),
        "the turn itself was not understood": ([turn(0, valid=False), turn(1), turn(2)], [[-9, -9], [0, 0], [0, 0]]),
    }
    for why, (turns, gaps) in cases.items():
        batch, scores = scored([episode(*turns)], [gaps])
        assert method.places(batch, scores) == {}, why
    table = Table(lambda at: turn(at, valid=False), [])
    batch, scores = scored([episode(*[turn(i) for i in range(5)])], GAPS)
    assert method.branch(batch, scores, 1, table) == ((), {"tried": 0.0, "kept": 0.0}), (
        "a bridge that is not understood"
    )
    assert table.asked[1] == ("student", {})


def test_the_experts_beginning_shrinks_as_in_the_authors_code():
    method = FutureBridge(turns_every=5)
    assert [method.limits(step).who.leaves for step in (1, 5, 6, 11)] == [1, 1, 2, 3]
    assert method.limits(1) == RolloutLimits(who=ExpertFirst(1, teacher_plays=True))
    plan = FutureBridge(turns_every=0).limits(1).who
    assert plan.teacher_plays and {plan.begin(EpisodeSpec("t", "g", n), tuple)(n) for n in range(9)} == {"student"}
    for wrong in ({"horizon": 0}, {"turns_every": -1}):
        with pytest.raises(AtodError, match="--horizon"):
            FutureBridge(**wrong)


def test_a_branch_repeats_goes_on_and_ends():
    past = (Replay("o", "a", "r", (1,)),)
    actor = Branches({"g/0": Branch(past, ("teacher", "student"))}).begin(EpisodeSpec("t", "g/0", 0), tuple)
    assert [actor(turn) for turn in range(5)] == [past[0], "teacher", "student", None, None]


@pytest.fixture
def options(models):
    return [
        "--env", TOY, ECHO, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "4", "--max-response", "12", "--max-context", "160", "--lr", "2e-3", "--tasks-per-step", "8",
        "--group-size", "3", "--eval-every", "0", "--report-tasks", "4", "--threads", "1", "--checkpoint-every", "1",
        "--turns-every", "0", "--horizon", "1",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_from_bridges_and_resumes_exactly(options, tmp_path):
    main(FutureBridge, [*options, "--steps", "2", "--run", str(tmp_path / "whole")])
    for steps in ("1", "2"):
        main(FutureBridge, [*options, "--steps", steps, "--run", str(tmp_path / "parts")])
    kept = ("futurebridge/", "episode/", "actor/", "sampler/", "toy/", "batch/")
    whole, parts = (
        [
            {k: v for k, v in json.loads(line).items() if k.startswith(kept)}
            for line in (tmp_path / run / "metrics.jsonl").open()
        ]
        for run in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 2
    assert sum(row["futurebridge/tried"] for row in whole) > 0 and sum(row["futurebridge/kept"] for row in whole) > 0
    for step, row in enumerate(whole, 1):
        episodes = list(read_jsonl(tmp_path / "whole" / "trajectories" / f"step_{step:06d}.jsonl.gz"))
        own, bridges = episodes[:24], episodes[24:]
        assert row["futurebridge/kept"] == len(bridges) / 24
        assert row["episode/success"] == np.mean([t.success for t in own]), "bridges are no episodes"
        assert row["batch/tokens"] == sum(t.n_tokens for t in own)
        assert row["sampler/logprob_gap_max"] < 1e-3, "a bridge was sampled by another model"
        for bridge in bridges:
            *past, last = bridge.turns
            assert last.response_ids and not any(t.response_ids for t in past)
            source = next(t for t in own if bridge.group_id.startswith(t.group_id + "/") and t.seed == bridge.seed)
            assert [t.response for t in past] == [t.response for t in source.turns[: len(past)]]
            assert last.prompt_ids == source.turns[len(past)].prompt_ids, "in the student's own place"


def test_staleness_and_the_samplers_log_probs_are_refused_at_the_start(options, tmp_path, capsys):
    for setting in (["--staleness", "1"], ["--old-logprobs", "sampler"]):
        with pytest.raises(SystemExit):  # a dry run says so, too
            main(FutureBridge, [*options, *setting, "--dry-run", "--run", str(tmp_path / "r")])
        words = f"{' '.join(setting)}: futurebridge also learns from turns that no student sampled"
        assert words in " ".join(capsys.readouterr().err.split())
