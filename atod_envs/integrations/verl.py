"""verl and verl-agent: one row a turn, with the keys that their trainers read.

verl-agent's actors, reward manager, GRPO, GiGPO and SDAR read: the padded tensors ``prompts``, ``responses``,
``input_ids``, ``attention_mask``, ``position_ids``, ``response_mask``, ``rollout_log_probs``; and by row ``uid``
(group), ``traj_uid``, ``turn_step``, ``index``, ``data_source``, ``anchor_obs``, ``raw_prompt_ids``,
``is_action_valid``, ``rewards``, ``active_masks``, ``episode_rewards``, ``episode_lengths``, ``tool_callings``. Prompts
are padded on the left, responses on the right. The invariant: unpadding a row gives back the recorded ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atod_envs.integrations.rows import finished
from atod_envs.trajectory import Group, Trajectory, Turn

TENSORS = (
    "prompts",
    "responses",
    "input_ids",
    "attention_mask",
    "position_ids",
    "response_mask",
    "rollout_log_probs",
)
"""Keys of a row that verl keeps as tensors; the others are per-row objects."""


def verl_rows(
    groups: Iterable[Group],
    *,
    pad_token_id: int,
    prompt_length: int,
    response_length: int,
    reward_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """One row dictionary for each turn of each trajectory.

    Args:
        groups: groups of trajectories that carry token ids; aborted ones are left out.
        pad_token_id: fills prompts on the left and responses on the right.
        prompt_length: width of ``prompts``.
        response_length: width of ``responses``.
        reward_scale: multiplies all rewards; verl-agent's ALFWorld and WebShop pay 10 where ours pay 1.

    Raises:
        ValueError: a turn has no ids or does not fit the widths; nothing is ever cut.
    """
    rows: list[dict[str, Any]] = []
    index: dict[str, int] = {}
    for number, trajectory in enumerate(finished(groups)):
        uid = trajectory.group_id or trajectory.task_id
        group = index.setdefault(uid, len(index))
        rows.extend(
            {
                **_tensors(turn, trajectory, pad_token_id, prompt_length, response_length),
                "raw_prompt_ids": list(turn.prompt_ids),
                "uid": uid,
                "traj_uid": f"{uid}/{number}",
                "turn_step": turn.index,
                "index": group,
                "data_source": trajectory.env_id,
                "anchor_obs": turn.observation,
                "is_action_valid": turn.valid and turn.format_ok,
                "rewards": turn.reward * reward_scale,
                "active_masks": True,
                "episode_rewards": trajectory.reward * reward_scale,
                "episode_lengths": float(len(trajectory.turns)),
                "tool_callings": float(sum(action.startswith("<search>") for action in _actions(trajectory))),
                "success": trajectory.success,
                **{f"label/{name}": value for name, value in trajectory.labels.items()},
            }
            for turn in trajectory.turns
        )
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stack rows: arrays [rows, width] for the tensors, arrays of objects for the rest; None where a row lacks a name.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("no rows to collate; were all episodes aborted?")
    stacked: dict[str, np.ndarray] = {name: np.stack([row[name] for row in rows]) for name in TENSORS}
    for name in dict.fromkeys(name for row in rows for name in row):  # labels may differ between episodes
        if name not in TENSORS:
            column = np.empty(len(rows), dtype=object)
            column[:] = [row.get(name) for row in rows]
            stacked[name] = column
    return stacked


def data_proto(rows: Sequence[Mapping[str, Any]], **meta_info: Any) -> Any:
    """The rows as verl's ``DataProto``.

    Args:
        rows: from :func:`verl_rows`.
        **meta_info: for the batch, e.g. ``temperature``.

    Raises:
        ImportError: verl is not installed.
    """
    try:
        import torch
        from verl.protocol import DataProto
    except ImportError as error:
        raise ImportError(
            "DataProto needs verl, which pins its own torch and transformers: install it in verl's environment, or take "
            f"verl_rows() and collate(), which need nothing ({error})"
        ) from error
    stacked = collate(rows)
    tensors = {name: torch.from_numpy(stacked.pop(name)) for name in TENSORS}
    return DataProto.from_dict(tensors=tensors, non_tensors=stacked, meta_info=dict(meta_info))


def _tensors(turn: Turn, trajectory: Trajectory, pad: int, prompt_length: int, response_length: int) -> dict[str, Any]:
    prompt, response = turn.prompt_ids, turn.response_ids
    where = f"turn {turn.index} of task {trajectory.task_id!r}"
    if not response:
        raise ValueError(f"{where} has no token ids; only episodes played on an engine can become rows")
    if len(prompt) > prompt_length or len(response) > response_length:
        raise ValueError(
            f"{where} has a prompt of {len(prompt)} and a response of {len(response)} tokens; they do not fit "
            f"prompt_length={prompt_length} and response_length={response_length}: raise these"
        )
    before, after = prompt_length - len(prompt), response_length - len(response)
    attention = np.array([0] * before + [1] * (len(prompt) + len(response)) + [0] * after, dtype=np.int64)
    prompts = np.array([pad] * before + list(prompt), dtype=np.int64)
    responses = np.array(list(response) + [pad] * after, dtype=np.int64)
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": np.concatenate([prompts, responses]),
        "attention_mask": attention,
        "position_ids": np.maximum(np.cumsum(attention) - 1, 0),
        "response_mask": attention[prompt_length:],
        "rollout_log_probs": np.array(list(turn.logprobs) + [0.0] * after, dtype=np.float32),
    }


def _actions(trajectory: Trajectory) -> list[str]:
    return [turn.action for turn in trajectory.turns]
