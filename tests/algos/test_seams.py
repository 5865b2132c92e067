"""What algorithms may ask of rollout, scoring and storage: expert beginnings, privileged text, tables."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from toy import WORDS
from toyworld import TOY, small_model

from agents.base import Decision
from agents.chat import ChatFormat
from agents.engines.base import Completion
from agents.engines.transformers import TransformersEngine
from agents.expert import expert_solution
from atod_algos.algorithm import Advantages, RolloutLimits, require_terms
from atod_algos.batch import RowLayout, Scores, make_batch, put_in_front
from atod_algos.evaluate import evaluate
from atod_algos.learner.logprobs import score
from atod_algos.metrics import turn_table
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.turn_plans import ExpertFirst
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(tokenizer, 5)


@pytest.fixture
def rollout(tokenizer, model):
    def make(style="compact", env=TOY, context=256, **options):
        engine = TransformersEngine(model, slots=8, max_context=context)
        return Rollout(
            engine, ChatFormat(tokenizer), lambda: gym.make(env, **options), style=style, max_tokens=6, temperature=1.0
        )

    return make


class Stubborn:
    """Says three wrong words and then the right one."""

    def __init__(self):
        self.turn = 0

    def reset(self, task, observation, admissible):
        self.turn, self.word = 0, task.split()[1]

    def act(self, observation, admissible):
        wrong = [word for word in WORDS if word != self.word]
        return Decision(wrong[self.turn] if self.turn < 3 else self.word, "x")

    def observe(self, action, observation, admissible):
        self.turn += 1


@pytest.fixture
def stubborn(monkeypatch):
    import agents.expert

    monkeypatch.setitem(agents.expert.EXPERTS, "toy", f"{__name__}:Stubborn")


@pytest.mark.parametrize("style", ["compact", "atod"])
def test_an_expert_plays_the_beginning_and_leaves_no_tokens(rollout, stubborn, style, tokenizer):
    specs = [EpisodeSpec(f"say-{word}-train", word, 7 + i) for i, word in enumerate(WORDS)]
    played = rollout(style)
    trajectories = played.play(specs, RolloutLimits(who=ExpertFirst(2)))
    for spec, trajectory in zip(specs, trajectories, strict=True):
        solution = expert_solution(gym.make(TOY), spec.task_id, spec.seed)
        assert len(solution) == 4
        expert, policy = trajectory.turns[:2], trajectory.turns[2:]
        assert [turn.action for turn in expert] == [decision.action for decision in solution[:2]]
        assert all(not turn.prompt_ids and not turn.response_ids for turn in expert)
        assert policy and all(turn.prompt_ids and turn.response_ids for turn in policy)
        told = tokenizer.decode(policy[0].prompt_ids)
        assert all(turn.response in told for turn in expert) == (style == "compact")
    batch = make_batch(played.play_groups(specs, RolloutLimits(who=ExpertFirst(2))))
    assert batch.index_K.min() == 2 and batch.turns_N.max() == 2
    sampled = [i for t in trajectories for turn in t.turns for i in turn.response_ids]
    assert [batch.rows[r][c] for r, c in zip(batch.row_M, batch.column_M, strict=True)] == sampled
    played.close()


def test_an_expert_that_leaves_everything_or_fails_plays_nothing(rollout, stubborn):
    specs = [EpisodeSpec("say-fig-train", "g", 3)]
    alone = rollout().play(specs)[0]
    for limits, options in ((RolloutLimits(who=ExpertFirst(4)), {}), (RolloutLimits(who=ExpertFirst(9)), {})):
        same = rollout(**options).play(specs, limits)[0]
        assert [turn.response_ids for turn in same.turns] == [turn.response_ids for turn in alone.turns]
    short = rollout(max_turns=3)  # the expert needs four turns, so it has no solution to begin
    assert all(turn.prompt_ids for turn in short.play(specs, RolloutLimits(who=ExpertFirst(1)))[0].turns)


def test_limits_bind_training_and_never_evaluation(rollout):
    played = rollout()
    cut = played.play([EpisodeSpec("say-fig-train", "g", 3)], RolloutLimits(max_turns=1))[0]
    assert len(cut.turns) == 1 and cut.stop_reason is StopReason.TURN_LIMIT
    result = evaluate(played.play, ["say-fig-train", "say-plum-train"])
    assert all(len(t.turns) == 4 or t.success for t in result.trajectories)


def test_the_real_experts_beginnings_are_replayed(rollout):
    env = gym.make("atod/ALFWorld-v0", data="builtin", split="train")
    task = env.unwrapped.tasks[0]
    solution = expert_solution(env, task, 5)
    env.close()
    played = rollout(env="atod/ALFWorld-v0", context=4096, data="builtin", split="train")
    turns = played.play([EpisodeSpec(task, "g", 5)], RolloutLimits(who=ExpertFirst(1)))[0].turns
    assert len(solution) > 2 and len(turns) >= len(solution)
    assert [turn.action for turn in turns[: len(solution) - 1]] == [decision.action for decision in solution[:-1]]
    assert all(turn.valid and not turn.response_ids for turn in turns[: len(solution) - 1])
    assert turns[len(solution) - 1].response_ids  # the last step is left to the policy
    played.close()


@pytest.mark.parametrize("layout", list(RowLayout))
def test_privileged_text_changes_what_is_read_and_nothing_else(rollout, model, layout, tokenizer):
    specs = [EpisodeSpec(f"say-{word}-train", word, 11 + i) for i, word in enumerate(WORDS)]
    batch = make_batch(rollout().play_groups(specs), layout)
    plain, _ = score(model, batch, temperature=1.0)
    nothing, _ = score(model, put_in_front(batch, [[]] * 4), temperature=1.0)
    np.testing.assert_array_equal(nothing, plain)

    hint = ChatFormat(tokenizer).encode("You say fig.")
    shown = put_in_front(batch, [hint, [], hint, []])
    for i in range(batch.n_tokens):
        assert shown.rows[shown.row_M[i]][shown.column_M[i]] == batch.rows[batch.row_M[i]][batch.column_M[i]]
    privileged, _ = score(model, shown, temperature=1.0)
    told_M = np.isin(batch.trajectory_M, [0, 2])
    np.testing.assert_allclose(privileged[~told_M], plain[~told_M], atol=1e-5)
    assert np.abs(privileged[told_M] - plain[told_M]).max() > 1e-3
    # The same, by hand: the first row of the first trajectory with the hint before it.
    import torch

    row = torch.tensor([[*hint, *batch.rows[0]]])
    with torch.no_grad():
        by_hand = torch.log_softmax(model(input_ids=row).logits.float(), -1)[0]
    at = batch.row_M == 0
    wanted = [float(by_hand[len(hint) + c - 1, batch.rows[0][c]]) for c in batch.column_M[at]]
    np.testing.assert_allclose(privileged[at], wanted, atol=1e-4)


def test_the_turn_table_holds_what_the_figures_need(rollout, stubborn, model):
    specs = [EpisodeSpec("say-fig-train", "1/0", seed) for seed in (1, 2)]
    batch = make_batch(rollout().play_groups(specs, RolloutLimits(who=ExpertFirst(3))))
    student, _ = score(model, batch, temperature=1.0)
    scores = Scores(student, student - 0.5, privileged_M=student + 0.25)
    table = turn_table(9, batch, scores, np.array([10.0, 0.0]), np.full(len(batch.index_K), 0.5), tokens=True)
    n = np.array(table["n"])
    assert {len(column) for column in table.values()} == {len(batch.index_K)}
    assert set(table["step"]) == {9} and set(table["group"]) == {"1/0"}
    assert set(table["trajectory_uid"]) == {"1/0/0", "1/0/1"} and min(table["turn"]) == 1
    np.testing.assert_allclose(np.array(table["sum_abs_gap"]) / n, 0.5)
    np.testing.assert_allclose(np.array(table["sum_gap"]) / n, -0.5)
    np.testing.assert_allclose(np.array(table["sum_sq_gap"]) / n, 0.25)
    np.testing.assert_allclose(np.array(table["sum_privileged_gap"]) / n, 0.25)
    assert sum(table["sum_surprise"]) == pytest.approx(-student.sum())
    assert sum(table["sum_teacher_surprise"]) == pytest.approx(-student.sum() + 0.5 * batch.n_tokens)
    turns = [turn for t in batch.trajectories for turn in t.turns if turn.prompt_ids]
    assert table["token_ids"] == [list(turn.response_ids) for turn in turns]
    assert table["prompt_length"] == [len(turn.prompt_ids) for turn in turns]
    assert [len(values) for values in table["token_teacher"]] == table["n"]
    assert [table["reward"][k] for k in range(len(turns))] == [10.0 if t == 0 else 0.0 for t in table["trajectory"]]


@pytest.mark.parametrize("style", ["compact", "atod"])
def test_what_follows_an_experts_beginning_depends_on_task_and_seed_alone(rollout, stubborn, style):
    specs = [EpisodeSpec(f"say-{word}-train", word, 7 + i) for i, word in enumerate(WORDS)]
    limits = RolloutLimits(who=ExpertFirst(2))
    together = rollout(style).play(specs, limits)
    for spec, trajectory in zip(specs, together, strict=True):
        alone = rollout(style).play([spec], limits)[0]
        assert [turn.response_ids for turn in alone.turns] == [turn.response_ids for turn in trajectory.turns]
        assert [turn.prompt_ids for turn in alone.turns] == [turn.prompt_ids for turn in trajectory.turns]


class Says:
    """An engine that answers every prompt with the same ids."""

    version, max_context = 0, 512

    def __init__(self, ids):
        self._ids, self._asked = tuple(ids), []

    def submit(self, request_id, prompt_ids, params):
        self._asked.append(request_id)

    def step(self):
        asked, self._asked = self._asked, []
        return [Completion(name, self._ids, (-0.5,) * len(self._ids), True, 0.0) for name in asked]

    def close(self):
        pass


@pytest.mark.parametrize("style", ["compact", "atod"])
@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_thought_that_the_template_opens_is_no_fault_of_the_policy(tokenizer, style, opens):
    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        + opens.replace("\n", "\\n").join(["{{ '", "' }}"])
        + "{% endif %}"
    )
    chat = ChatFormat(made)
    said = [*made.encode("so\n</think><action>fig</action>", add_special_tokens=False), chat.stop_ids[0]]
    played = Rollout(Says(said), chat, lambda: gym.make(TOY), style=style, max_tokens=64)
    specs = [EpisodeSpec(f"say-{word}-train", "g", seed) for seed, word in enumerate(("fig", "pear"))]
    trajectories = played.play(specs)
    played.close()
    assert [t.success for t in trajectories] == [True, False]
    turns = [turn for t in trajectories for turn in t.turns]
    assert all(turn.action == "fig" and turn.valid for turn in turns) and len(turns) == 1 + 4
    assert {turn.format_ok for turn in turns} == {bool(opens)}
    assert {turn.response.startswith("<think>\nso") for turn in turns} == {bool(opens)}
    batch = make_batch([Group(t.task_id, (t,)) for t in trajectories])
    assert set(batch.valid_K) == {bool(opens)}, "what the released rules fine"


@pytest.mark.parametrize(
    "given, words",
    [
        (
            lambda batch: {"reward_M": np.zeros(batch.n_tokens + 1)},
            r"reward_M has the shape .* a number for each sampled",
        ),
        (lambda batch: {"reward_M": np.zeros(1)}, r"reward_M has the shape \(1,\); expected .*batch.trajectory_M"),
        (lambda batch: {"turn_weight_K": np.zeros(1)}, r"turn_weight_K .* a number for each turn"),
        (
            lambda batch: {"reward_M": np.full(batch.n_tokens, np.nan)},
            "mine: reward_M is nan at 0; nothing was learned",
        ),
    ],
)
def test_terms_of_another_shape_are_refused_by_name(rollout, given, words):
    played = rollout().play([EpisodeSpec("say-fig-train", "say-fig-train", seed) for seed in range(2)])
    batch = make_batch([Group("say-fig-train", tuple(played))])
    with pytest.raises(AtodError, match=words):
        require_terms(Advantages(**given(batch)), batch, "mine")
    with pytest.raises(AtodError, match=r"mine: advantages\(\) returned a NoneType; expected Advantages"):
        require_terms(None, batch, "mine")
    right = Advantages(reward_M=np.zeros(batch.n_tokens))
    assert require_terms(right, batch, "mine") is right
