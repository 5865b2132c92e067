"""Episodes made by hand, without models or environments."""

import numpy as np

from atod_algos.batch import Scores, make_batch
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn


def episode(observations, success, group="g", task="t", valid=None, rewards=None, tokens=2):
    """An episode that answers the given observations with ``tokens`` tokens each."""
    turns = tuple(
        Turn(
            k,
            observation,
            (),
            (1, 2, 3),
            tuple(range(4, 4 + tokens)),
            (-0.5,) * tokens,
            "",
            "",
            True,
            valid[k] if valid else True,
            rewards[k] if rewards else 0.0,
        )
        for k, observation in enumerate(observations)
    )
    stop = StopReason.SUCCESS if success else StopReason.TURN_LIMIT
    return Trajectory("e", task, "train", "", group, 0, turns, "", success, float(success), stop)


def batch_from(*groups):
    return make_batch([Group(members[0].task_id, tuple(members)) for members in groups])


def uniform_scores(batch):
    return Scores(np.full(batch.n_tokens, -0.5))


def outcome(task, solved, seed=0, turns=1, label="x"):
    """An episode of which only the outcome counts, as evaluations read it."""
    turn = Turn(0, "o", (), (), (), (), "r", "a", True, True, float(solved))
    reason = StopReason.SUCCESS if solved else StopReason.TURN_LIMIT
    return Trajectory(
        "e", task, "s", "t", task, seed, (turn,) * turns, "", solved, float(solved), reason, labels={"k": label}
    )
