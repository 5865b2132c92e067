"""Minari: trajectories as an offline data set of the Farama Foundation's format.

Observations and actions are Gymnasium ``Text`` spaces over the characters that occur, so the data set loads in plain
Minari, without this project; its ``recover_environment`` makes the environment where this project is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym

from atod_envs.styles import whole_characters
from atod_envs.trajectory import StopReason, Trajectory

try:
    import minari
    from minari.data_collector import EpisodeBuffer
except ImportError as error:
    raise ImportError("this export needs minari: pip install 'atod[minari]'") from error


def write_dataset(
    dataset_id: str, trajectories: Iterable[Trajectory], *, env: str | gym.Env[Any, Any] | None = None, **about: Any
) -> Any:
    """Write a Minari data set of the environment's own texts: observations, actions, rewards, both flags of the end.

    An episode has one observation more than actions. ``infos`` holds ``success`` and ``score`` (at the end), ``valid``,
    and ``response`` where a policy wrote more than the action.

    Args:
        dataset_id: Minari's name of it, e.g. ``"alfworld/expert-v0"``; it lies where ``$MINARI_DATASETS_PATH`` says.
        trajectories: of one environment; aborted ones are left out, and those without a turn, as Minari has no empty
            episodes.
        env: what :meth:`recover_environment` makes: an id with its defaults, or an environment with its arguments.
            ``None`` takes the trajectories' own id.
        **about: further arguments of ``minari.create_dataset_from_buffers`` (``algorithm_name``, ``author``, ...).

    Returns:
        The ``MinariDataset``.

    Raises:
        ValueError: no episode, or episodes of several environments.
    """
    kept = [one for one in trajectories if one.turns and one.stop_reason != StopReason.ABORTED]
    ids = sorted({trajectory.env_id for trajectory in kept})
    if len(ids) != 1:
        raise ValueError(f"a Minari data set holds episodes of one environment; got {len(kept)} episodes of {ids}")
    buffers = [_buffer(number, trajectory) for number, trajectory in enumerate(kept)]
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=ids[0] if env is None else env,
        observation_space=_space([text for buffer in buffers for text in buffer.observations]),
        action_space=_space([text for buffer in buffers for text in buffer.actions]),
        data_format="arrow",
        **about,
    )


def _buffer(number: int, trajectory: Trajectory) -> Any:
    turns = trajectory.turns
    ended = trajectory.stop_reason in (StopReason.SUCCESS, StopReason.FAILURE)
    before = [False] * (len(turns) - 1)
    options = {"task_id": trajectory.task_id, "split": trajectory.split, "stop_reason": str(trajectory.stop_reason)}
    return EpisodeBuffer(
        id=number,
        seed=trajectory.seed if trajectory.seed >= 0 else None,
        options=options,
        observations=[
            whole_characters(text) for text in (*(t.observation for t in turns), trajectory.final_observation)
        ],
        actions=[whole_characters(turn.action) for turn in turns],
        rewards=[turn.reward for turn in turns],
        terminations=[*before, ended],
        truncations=[*before, not ended],
        infos={
            "valid": [True, *(turn.valid for turn in turns)],
            "response": ["", *(whole_characters(turn.response) for turn in turns)],
            "success": [*([False] * len(turns)), trajectory.success],
            "score": [*([0.0] * len(turns)), trajectory.score],
        },
    )


def _space(texts: Sequence[str]) -> gym.spaces.Text:
    characters = frozenset().union(*map(frozenset, texts)) or frozenset(" ")
    return gym.spaces.Text(max(1, max(map(len, texts))), min_length=0, charset="".join(sorted(characters)))
