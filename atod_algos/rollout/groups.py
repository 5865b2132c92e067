"""Episodes by group, and the check that there is something to learn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory


def collect_groups(trajectories: Iterable[Trajectory]) -> list[Group]:
    """Trajectories by ``group_id``, in order of first appearance."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    return [Group(members[0].task_id, tuple(members)) for members in groups.values()]


def require_turns(groups: Iterable[Group]) -> None:
    """Refuse episodes of which not one has a turn, because no prompt fitted the context.

    Raises:
        AtodError: says which settings to change.
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    if episodes and all(not t.turns and t.stop_reason is StopReason.CONTEXT_LIMIT for t in episodes):
        raise AtodError(
            f"not one of {len(episodes)} episodes could begin: every first prompt and a response are longer than the context; raise "
            "--max-context (as far as the model's own limit), lower --max-response, or choose a shorter prompt --style"
        )


def require_few_lost(trajectories: Sequence[Trajectory], tolerated: float) -> None:
    """Refuse episodes that several workers played if more environments raised than one process would have borne.

    Raises:
        AtodError: names one of the tasks.
    """
    lost = [t for t in trajectories if t.stop_reason is StopReason.ABORTED]
    if len(lost) > tolerated * len(trajectories):
        raise AtodError(
            f"the environments of {len(lost)} of {len(trajectories)} episodes raised, one at turn {len(lost[0].turns)} of task "
            f"{lost[0].task_id!r} (seed {lost[0].seed}); the workers' warnings say what. Fix them and run the same command to go "
            "on from the last checkpoint"
        )
