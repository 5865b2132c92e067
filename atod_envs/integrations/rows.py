"""Trajectories as rows of token ids with a mask: the common form behind the trainers' own formats.

A turn whose prompt continues the turn before shares its row, as everywhere in this project. The invariant:
``prompt_ids`` followed by ``response_ids`` is exactly what the engine saw and sampled, and ``mask`` is 1 on the sampled
ids alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atod_envs.trajectory import Group, StopReason, Trajectory


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One training sequence of one trajectory.

    Attributes:
        prompt_ids: the prompt of the row's first turn.
        response_ids: everything after it: responses, and what the environment said between them.
        mask: 1 for an id that the policy sampled, 0 for one that it was shown; as long as ``response_ids``.
        logprobs: sampling log-probs; 0.0 where ``mask`` is 0. As long as ``response_ids``.
        rewards: each turn's reward at its last sampled id, 0.0 elsewhere. As long as ``response_ids``.
        turns: indices of the turns in it.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    logprobs: list[float]
    rewards: list[float]
    turns: list[int]


def token_rows(trajectory: Trajectory) -> list[TokenRow]:
    """The rows of a trajectory: one for a conversation, one a turn where each prompt stands alone.

    Raises:
        ValueError: a turn has no token ids (a policy without tokens made it).
    """
    rows: list[TokenRow] = []
    ids: tuple[int, ...] = ()
    for turn in trajectory.turns:
        if not turn.response_ids:
            raise ValueError(
                f"turn {turn.index} of task {trajectory.task_id!r} has no token ids; only episodes that a language model "
                "played on an engine can be laid out as tokens (see atod_algos.rollout.episodes)"
            )
        if not (ids and turn.prompt_ids[: len(ids)] == ids):
            rows.append(TokenRow(list(turn.prompt_ids), [], [], [], [], []))
            ids = turn.prompt_ids
        row = rows[-1]
        shown = turn.prompt_ids[len(ids) :]
        row.response_ids.extend((*shown, *turn.response_ids))
        row.mask.extend([0] * len(shown) + [1] * len(turn.response_ids))
        row.logprobs.extend((*([0.0] * len(shown)), *turn.logprobs))
        row.rewards.extend([0.0] * (len(shown) + len(turn.response_ids) - 1) + [turn.reward])
        row.turns.append(turn.index)
        ids = turn.prompt_ids + turn.response_ids
    return rows


def single_row(trajectory: Trajectory, wanted_by: str) -> TokenRow:
    """The one row of a trajectory that is one conversation.

    Args:
        trajectory: the trajectory.
        wanted_by: for the message: what can take one row only.

    Raises:
        ValueError: it has no turn, or needs several rows.
    """
    rows = token_rows(trajectory)
    if not rows:
        raise ValueError(
            f"the episode of task {trajectory.task_id!r} has no turn: its first prompt did not fit the model's context"
        )
    if len(rows) > 1:
        raise ValueError(
            f"{wanted_by} takes one sequence an episode, but the {len(trajectory.turns)} turns of task "
            f"{trajectory.task_id!r} need {len(rows)}: their prompts do not continue each other. Use a prompt style of "
            "layout 'conversation', e.g. as_conversation('atod') or 'compact'"
        )
    return rows[0]


def finished(groups: Iterable[Group]) -> list[Trajectory]:
    """All trajectories of the groups that were not aborted, in order."""
    return [t for group in groups for t in group.trajectories if t.stop_reason is not StopReason.ABORTED]
