"""Rows, SkyRL's GeneratorOutput and verl's row dictionaries against the recorded ids."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from atod_envs.integrations.rows import single_row, token_rows
from atod_envs.integrations.verl import TENSORS, collate, data_proto, verl_rows
from atod_envs.trajectory import Group, StopReason


@pytest.fixture(scope="module")
def conversations():
    return tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 3})


@pytest.fixture(scope="module")
def windows():
    return tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 3}, style="atod")


def test_a_conversation_is_one_row(conversations):
    for trajectory in conversations[0].trajectories:
        row = single_row(trajectory, "this test")
        last = trajectory.turns[-1]
        assert tuple(row.prompt_ids + row.response_ids) == last.prompt_ids + last.response_ids
        assert [i for i, m in zip(row.response_ids, row.mask, strict=True) if m] == [
            i for turn in trajectory.turns for i in turn.response_ids
        ]
        assert [p for p, m in zip(row.logprobs, row.mask, strict=True) if m] == [
            p for turn in trajectory.turns for p in turn.logprobs
        ]
        assert all(p == 0.0 for p, m in zip(row.logprobs, row.mask, strict=True) if not m)
        assert row.turns == [0, 1, 2] and len(row.rewards) == len(row.mask)


def test_rewards_stand_at_the_last_sampled_id_of_their_turn(conversations):
    trajectory = conversations[0].trajectories[0]
    turns = tuple(replace(turn, reward=0.25 * (turn.index + 1)) for turn in trajectory.turns)
    row = single_row(replace(trajectory, turns=turns), "this test")
    places = [i for i, reward in enumerate(row.rewards) if reward]
    assert [row.rewards[i] for i in places] == [0.25, 0.5, 0.75]
    ends = [i for i in range(len(row.mask)) if row.mask[i] and (i + 1 == len(row.mask) or not row.mask[i + 1])]
    assert places == ends


def test_windows_are_a_row_a_turn_and_no_single_row(windows):
    trajectory = windows[0].trajectories[0]
    assert [row.turns for row in token_rows(trajectory)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match="as_conversation"):
        single_row(trajectory, "this test")


def test_episodes_without_ids_are_refused():
    trajectory = tiny.expert_trajectory("atod/ALFWorld-v0", {"data": "builtin"})
    with pytest.raises(ValueError, match="no token ids"):
        token_rows(trajectory)
    with pytest.raises(ValueError, match="no token ids"):
        verl_rows([Group(trajectory.task_id, (trajectory,))], pad_token_id=0, prompt_length=9, response_length=9)


def test_verl_rows_unpad_to_what_was_recorded(windows):
    rows = verl_rows(windows, pad_token_id=0, prompt_length=4000, response_length=8, reward_scale=10.0)
    turns = [(t, turn) for group in windows for t in group.trajectories for turn in t.turns]
    assert len(rows) == len(turns)
    for row, (trajectory, turn) in zip(rows, turns, strict=True):
        seen = row["attention_mask"].astype(bool)
        assert tuple(row["input_ids"][seen]) == turn.prompt_ids + turn.response_ids
        assert tuple(row["responses"][row["response_mask"].astype(bool)]) == turn.response_ids
        assert tuple(row["raw_prompt_ids"]) == turn.prompt_ids
        assert np.array_equal(row["position_ids"][seen], np.arange(seen.sum()))
        assert np.allclose(row["rollout_log_probs"][: len(turn.logprobs)], turn.logprobs)
        assert row["episode_rewards"] == 10.0 * trajectory.reward and row["episode_lengths"] == 3.0
        assert row["turn_step"] == turn.index and row["uid"] == trajectory.group_id
        assert row["anchor_obs"] == turn.observation and row["is_action_valid"] == (turn.valid and turn.format_ok)
    assert len({row["traj_uid"] for row in rows}) == 4 and len({row["uid"] for row in rows}) == 2
    stacked = collate(rows)
    assert stacked["prompts"].shape == (12, 4000) and stacked["uid"].dtype == object
    with pytest.raises(ValueError, match="prompt_length=50"):
        verl_rows(windows, pad_token_id=0, prompt_length=50, response_length=8)


def test_aborted_episodes_are_left_out(windows):
    first = windows[0]
    stopped = replace(first.trajectories[0], stop_reason=StopReason.ABORTED)
    rows = verl_rows(
        [Group(first.task_id, (stopped, first.trajectories[1]))], pad_token_id=0, prompt_length=4000, response_length=8
    )
    assert len(rows) == 3


def test_columns_that_some_rows_lack_are_kept(windows):
    first, second = windows
    plain = [replace(trajectory, labels={}) for trajectory in first.trajectories]
    named = [replace(trajectory, labels={"kind": "pick"}) for trajectory in second.trajectories]
    groups = [Group(first.task_id, tuple(plain)), Group(second.task_id, tuple(named))]
    stacked = collate(verl_rows(groups, pad_token_id=0, prompt_length=4000, response_length=8))
    assert stacked["label/kind"].tolist() == [None] * 6 + ["pick"] * 6


def test_verl_itself_takes_the_rows(windows):
    """verl's own DataProto holds them, and its GRPO computes our group-relative advantage from them."""
    pytest.importorskip("verl.protocol", reason="verl is not installed here (it pins its own torch and transformers)")
    import torch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    groups = [
        tiny.with_rewards(group, rewards) for group, rewards in zip(windows, ([1.0, 0.0], [0.5, 0.25]), strict=True)
    ]
    proto = data_proto(verl_rows(groups, pad_token_id=0, prompt_length=4000, response_length=8), temperature=1.0)
    assert len(proto) == 12 and proto.meta_info["temperature"] == 1.0
    assert set(TENSORS) <= set(proto.batch.keys()) and proto[3].non_tensor_batch["turn_step"] == 0
    # One row an episode, as verl scores outcomes: each episode's return at the end of its last turn.
    last = [i for i in range(12) if proto[i].non_tensor_batch["turn_step"] == 2]
    chosen = proto.select_idxs(last)
    rewards = torch.zeros(4, 8)
    rewards[torch.arange(4), chosen.batch["response_mask"].sum(1) - 1] = torch.tensor(
        chosen.non_tensor_batch["episode_rewards"].astype(np.float32)
    )
    advantages, _ = compute_grpo_outcome_advantage(
        rewards, chosen.batch["response_mask"], chosen.non_tensor_batch["uid"], norm_adv_by_std_in_grpo=False
    )
    assert advantages[:, 0].tolist() == pytest.approx([0.5, -0.5, 0.125, -0.125])


def test_a_style_that_is_no_dataclass_becomes_a_conversation_too():
    from toy import ToyStyle

    from atod_envs.styles import History, Layout, as_conversation

    style = ToyStyle(Layout.WINDOW)
    turned = as_conversation(style)
    assert turned.layout is Layout.CONVERSATION and style.layout is Layout.WINDOW and as_conversation(turned) is turned
    assert turned.prompt(History("say fig", ["Speak."])) == "say fig: Speak."
    assert turned.parse(turned.respond("fig", "why")).action == "fig"
