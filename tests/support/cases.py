"""Scored batches made by hand, without models or environments, for tests of equations and their properties."""

import numpy as np

from atod_algos.batch import Scores, TokenBatch
from atod_algos.metrics import step_metrics


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=tolerance)


def one_token_a_turn(d, h):
    """A scored batch of one trajectory with these d and h, a token a turn, -h under the student."""
    turns = [{"student_logp": [-u], "teacher_logp": [-u + gap], "mask": [1]} for gap, u in zip(d, h, strict=True)]
    return batch_of([{"group": "x", "reward": 0.0, "turns": turns}])[:2]


def published(algorithm, batch, scores, step):
    """The metrics of a step with this algorithm."""
    result = algorithm.advantages(batch, scores, step)
    return step_metrics(algorithm, batch, scores, result, algorithm.reward(batch))


def batch_of(trajectories) -> tuple[TokenBatch, Scores, np.ndarray]:
    """A TokenBatch straight from a golden case; masked tokens never enter it."""
    student, teacher, turn_M, trajectory_K, index_K, valid_K, groups = [], [], [], [], [], [], []
    for n, trajectory in enumerate(trajectories):
        groups.append(trajectory["group"])
        for k, turn in enumerate(trajectory["turns"]):
            for s, t, m in zip(turn["student_logp"], turn["teacher_logp"], turn["mask"], strict=True):
                if m:
                    student.append(s)
                    teacher.append(t)
                    turn_M.append(len(trajectory_K))
            trajectory_K.append(n)
            index_K.append(k)
            valid_K.append(turn.get("valid", True))
    reward_N = np.array([t["reward"] for t in trajectories], dtype=float)
    m = len(student)
    batch = TokenBatch(
        rows=(np.arange(m + 1),),
        row_M=np.zeros(m, int),
        column_M=np.arange(1, m + 1),
        turn_M=np.array(turn_M),
        sampler_logprobs_M=np.array(student),
        trajectory_K=np.array(trajectory_K),
        index_K=np.array(index_K),
        prompt_length_K=np.zeros(len(index_K), int),
        valid_K=np.array(valid_K),
        group_N=np.unique(groups, return_inverse=True)[1],
        success_N=reward_N > 0,
        score_N=reward_N / 10,
        trajectories=(),
    )
    return batch, Scores(np.array(student), np.array(teacher)), reward_N


def _turn(student, teacher, valid=True):
    return {"student_logp": student, "teacher_logp": teacher, "mask": [1] * len(student), "valid": valid}


RAGGED = [
    {
        "group": "x",
        "reward": 10.0,
        "turns": [
            _turn([-0.5, -1.5], [-0.1, -0.9]),
            _turn([-0.2], [-0.3]),
            _turn([-0.4, -0.8, -0.6], [-0.7, -0.2, -0.6]),
        ],
    },
    {"group": "x", "reward": 0.0, "turns": [_turn([-1.0, -0.5], [-0.8, -0.7]), _turn([-0.3], [-0.5], False)]},
    {"group": "x", "reward": 10.0, "turns": [_turn([-0.9, -0.1], [-0.4, -0.3])]},
    {"group": "y", "reward": 0.0, "turns": [_turn([-0.7, -0.3], [-0.2, -0.6]), _turn([-1.6], [-2.1])]},
]
"""A small ragged batch: three episodes of one group, one of another, of one to three turns of one to three tokens."""

GAPS = np.array([0.4, 0.6, -0.1, -0.3, 0.6, 0.0, 0.2, -0.2, -0.2, 0.5, -0.2, 0.5, -0.3, -0.5])
"""Teacher minus student of its 14 tokens."""
