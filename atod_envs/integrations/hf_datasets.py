"""Trajectories as Hugging Face ``datasets``: whole episodes, or data for supervised and preference training.

Whole episodes keep everything and read back equal. Training data comes as chat messages, written by the prompt style
that the episodes were played with, or as the recorded token ids with labels on the sampled ones alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from atod_envs.integrations.messages import (
    assistant,
    conversations,
    find_style,
    responses,
    turn_prompts,
    user,
)
from atod_envs.integrations.rows import token_rows
from atod_envs.styles import Layout, PromptStyle, whole_characters
from atod_envs.trajectory import Group, StopReason, Trajectory, from_record, map_text, to_record

try:
    import datasets
except ImportError as error:
    raise ImportError(
        "this export needs datasets: pip install 'atod[datasets]', or write .jsonl or .parquet"
    ) from error

IGNORED = -100
"""Label of a token that no loss is taken of."""


def _columns(**kinds: str) -> dict[str, Any]:
    return {name: datasets.Value(kind) for kind, names in kinds.items() for name in names.split()}


_TURN = {
    **_columns(
        int64="index prompt_shared",
        string="observation response action",
        bool="format_ok valid",
        float64="reward seconds_policy seconds_env",
    ),
    "admissible": datasets.List(datasets.Value("string")),
    "prompt_ids": datasets.List(datasets.Value("int64")),
    "response_ids": datasets.List(datasets.Value("int64")),
    "logprobs": datasets.List(datasets.Value("float64")),
}
_EPISODE = datasets.Features(
    {
        **_columns(
            string="env_id task_id split task group_id final_observation stop_reason data_version",
            int64="seed policy_version schema",
            bool="success",
            float64="score",
        ),
        "turns": datasets.List(_TURN),
        "labels": datasets.List(_columns(string="name value")),
    }
)
"""Columns of :func:`episodes`. Guessed from the rows, those of an expert, who has no ids, would be of other kinds."""


def episodes(trajectories: Iterable[Trajectory]) -> datasets.Dataset:
    """One row an episode, with everything that a trajectory holds; :func:`trajectories` reads it back.

    Raises:
        ValueError: a text holds half a character, which Arrow refuses; write such episodes as .jsonl or .parquet.
    """
    rows = []
    for trajectory in trajectories:
        record = to_record(trajectory)
        record["labels"] = [{"name": name, "value": value} for name, value in record["labels"].items()]
        if map_text(record, whole_characters) != record:
            raise ValueError(
                f"the episode of task {trajectory.task_id!r} holds half a character, which Arrow text cannot represent; "
                "write_jsonl and write_parquet of atod_envs.trajectory can"
            )
        rows.append(record)
    if not rows:
        raise ValueError("no trajectories to export")
    return datasets.Dataset.from_list(rows, features=_EPISODE)


def trajectories(dataset: Iterable[dict[str, Any]]) -> Iterator[Trajectory]:
    """Read episodes back; the inverse of :func:`episodes`."""
    for row in dataset:
        labels = {pair["name"]: pair["value"] for pair in row["labels"]}
        yield from_record({**row, "labels": labels}, "dataset row")


def supervised(
    trajectories: Iterable[Trajectory], style: str | PromptStyle = "atod", *, successful: bool = True
) -> datasets.Dataset:
    """Chats for supervised training: ``prompt`` and ``completion`` of single turns, ``messages`` of conversations.

    TRL's ``SFTTrainer`` learns from completions alone, but of ``messages`` from every token, the environment's too,
    unless ``SFTConfig(assistant_only_loss=True)`` says otherwise. That needs a chat template with ``{% generation %}``
    marks, or one that TRL knows; it refuses others. :func:`tokens` needs neither.

    Args:
        trajectories: episodes of any agent; bare actions (of an expert) are phrased by the style.
        style: the prompt style, by name or as an object.
        successful: keep solved episodes only.
    """
    rows: list[dict[str, Any]] = []
    for trajectory in trajectories:
        if trajectory.stop_reason is StopReason.ABORTED or (successful and not trajectory.success):
            continue
        found = find_style(trajectory.env_id, style)
        for chat in conversations(trajectory, found):
            about = {"task_id": trajectory.task_id, "score": trajectory.score}
            if found.layout is Layout.CONVERSATION:
                rows.append({"messages": chat, **about})
            else:
                rows.append({"prompt": chat[:1], "completion": chat[1:], **about})
    return _dataset(rows, "no solved episode among them; successful=False takes all")


def tokens(trajectories: Iterable[Trajectory], *, successful: bool = True) -> datasets.Dataset:
    """The recorded ids: ``input_ids``, and ``labels`` that are -100 except on sampled ids.

    Raises:
        ValueError: an episode has no token ids.
    """
    rows = []
    for trajectory in trajectories:
        if trajectory.stop_reason is StopReason.ABORTED or (successful and not trajectory.success):
            continue
        for row in token_rows(trajectory):
            labels = [i if sampled else IGNORED for i, sampled in zip(row.response_ids, row.mask, strict=True)]
            rows.append(
                {
                    "input_ids": row.prompt_ids + row.response_ids,
                    "labels": [IGNORED] * len(row.prompt_ids) + labels,
                    "task_id": trajectory.task_id,
                }
            )
    return _dataset(rows, "no solved episode among them; successful=False takes all")


def preferences(groups: Iterable[Group], style: str | PromptStyle = "atod") -> datasets.Dataset:
    """Pairs for preference training: ``prompt``, ``chosen`` and ``rejected``, as chats.

    Two attempts at a task with different returns are compared where they first part: up to there the same was shown and
    answered, so the pair is two responses in one situation, and no observation stands in what is compared. Attempts
    that were shown different things before they answered differently (other episode seeds) make no pair, nor do
    attempts whose environment broke.
    """
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    for group in groups:
        finished = [one for one in group.trajectories if one.stop_reason is not StopReason.ABORTED]
        for one, other in itertools.combinations(finished, 2):
            if one.reward == other.reward:
                continue
            better, worse = (one, other) if one.reward > other.reward else (other, one)
            row = _parting(better, worse, find_style(better.env_id, style))
            if row is not None:
                key = tuple(str(row[name]) for name in ("prompt", "chosen", "rejected"))
                if key not in seen:
                    seen.add(key)
                    rows.append(row)
    return _dataset(rows, "no two attempts at a task differ in return after parting from the same situation")


def _parting(better: Trajectory, worse: Trajectory, style: PromptStyle) -> dict[str, Any] | None:
    prompts = turn_prompts(better, style)
    said = list(zip(responses(better, style), responses(worse, style), strict=False))
    for place, (ours, theirs) in enumerate(said):
        if better.turns[place].observation != worse.turns[place].observation:
            return None
        if ours == theirs:
            continue
        before = range(place) if style.layout is Layout.CONVERSATION else range(0)
        prompt = [message for k in before for message in (user(prompts[k]), assistant(said[k][0]))]
        return {
            "prompt": [*prompt, user(prompts[place])],
            "chosen": [assistant(ours)],
            "rejected": [assistant(theirs)],
            "task_id": better.task_id,
            "turn": place,
            "margin": better.reward - worse.reward,
        }
    return None


def _dataset(rows: list[dict[str, Any]], complaint: str) -> datasets.Dataset:
    if not rows:
        raise ValueError(f"nothing to export: {complaint}")
    return datasets.Dataset.from_list(rows)
