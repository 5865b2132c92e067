"""AgentOPSD, TurnOPD and SAGE-OPD by numbers worked out by hand on a small ragged batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import GAPS, close

from atod_algos.advantages import GroupOptions
from atod_algos.grpo import GRPO
from atod_algos.signals.agent_opsd import AgentOPSD, standardised
from atod_algos.signals.sage_opd import SageOPD
from atod_algos.signals.turn_opd import TurnOPD
from atod_envs.errors import AtodError

SPREAD = 10 / math.sqrt(3) + 1e-6
GOOD, BAD = 10 / 3 / SPREAD, -20 / 3 / SPREAD
"""Rewards 10, 0, 10: mean 20/3, sample deviation 10/sqrt(3)."""

# --- AgentOPSD ----------------------------------------------------------------------------------------------------


def belief(prior, evidence, decay):
    """B_0, B_1, ... by the book."""
    gathered, found = 0.0, [prior]
    for own in evidence:
        gathered = decay * gathered + own
        found.append(1 / (1 + (1 - prior) / prior * math.exp(-gathered)))
    return found


def weights(revisions, sign, band=0.2):
    q = [sign * r for r in revisions]
    mean = sum(q) / len(q)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in q) / len(q))
    return [min(1 + band, max(1 - band, 1 + band * (x - mean) / (deviation + 1e-6))) for x in q]


def test_agent_opsd_by_hand(ragged):
    """Two of three attempts of the first group succeed: it begins at 2/3, the second at the floor."""
    batch, scores = ragged
    evidence = [[1.0, -0.1, 0.3], [0.0, -0.2], [0.3], [0.2, -0.5]]
    found = [belief(p, e, 0.95) for p, e in zip([2 / 3, 2 / 3, 2 / 3, 1e-3], evidence, strict=True)]
    close(found[0], [2 / 3, 1 / (1 + 0.5 / math.e), 0.8239220, 0.8582294], 1e-5)
    revisions = [np.diff(b) for b in found]
    w = np.concatenate([weights(r, s) for r, s in zip(revisions, [1, -1, 1, 0], strict=True)])
    # The first turn of the first episode decided it; the second episode's last turn spoke for its failure.
    assert w[0] == 1.2 and w[1] < w[2] < 1 and w[4] == pytest.approx(1.2, abs=1e-4) and w[5] == 1.0
    advantage = np.array([GOOD] * 3 + [BAD] * 2 + [GOOD] + [0.0] * 2)
    result = AgentOPSD().advantages(batch, scores, 1)
    close(result.turn_weight_K, w)
    close(result.token_M, (advantage * (0.5 + 0.5 * w))[batch.turn_M])
    close(np.mean(result.notes["evidence_mean"]), sum(map(sum, evidence)) / 8)
    close(np.mean(result.notes["belief_mean"]), np.concatenate([b[1:] for b in found]).mean())


def test_agent_opsd_standardises_before_it_takes_the_sign(ragged):
    """Advantages of one episode differ in sign under turn_row with a penalty. Revisions 0.3, -0.1, 0.1 have a mean of
    0.1 and a deviation of 0.4 / sqrt 6: z is 1.225, -1.225, 0. The penalised second turn takes its sign: 1.2, 1.2, 1.
    """
    batch, scores = ragged
    close(standardised(batch, np.array([0.3, -0.1, 0.1, 0, 0, 0, 0, 0]))[:3], [1.5**0.5, -(1.5**0.5), 0], 1e-4)
    invalid = dataclasses.replace(batch, valid_K=np.arange(8) != 1)
    algorithm = AgentOPSD(group=GroupOptions(group_stats="turn_row", invalid_penalty=9.0))
    advantage = algorithm.grpo_by_turn(invalid)
    assert advantage[0] > 0 > advantage[1] and advantage[2] > 0
    revision, _ = algorithm.beliefs(invalid, np.bincount(invalid.turn_M, GAPS))
    z = (revision[:3] - revision[:3].mean()) / (revision[:3].std() + 1e-6)
    expected = np.clip(1 + 0.2 * np.array([1, -1, 1]) * z, 0.8, 1.2)
    result = algorithm.advantages(invalid, scores, 1)
    close(result.turn_weight_K[:3], expected)
    assert expected[0] == 1.2 and expected[1] > 1 > expected[2]
    close(result.token_M[:6], (advantage[:3] * (0.5 + 0.5 * expected))[batch.turn_M[:6]])


def test_agent_opsd_is_grpo_where_nothing_is_mixed_in(ragged):
    batch, scores = ragged
    close(AgentOPSD(mix=0.0).advantages(batch, scores, 1).token_M, GRPO().advantages(batch, scores, 1).token_M)


def test_the_belief_saturates_and_decays(ragged):
    """The same evidence again moves it less; without decay log-odds add up; centred, they end where they began."""
    batch, _ = ragged
    revision, b = AgentOPSD(decay=1.0).beliefs(batch, np.array([2.0, 2.0, 2.0, 0, 0, 0, 0, 0]))
    assert revision[0] > revision[1] > revision[2] > 0
    close(math.log(b[2] / (1 - b[2])), math.log(2) + 6)
    close(revision[:3].sum(), b[2] - 2 / 3)
    _, centred = AgentOPSD(decay=1.0, centre=True).beliefs(batch, np.array([3.0, 1.0, -1.0, 0, 0, 0, 0, 0]))
    close(centred[2], 2 / 3)
    _, faded = AgentOPSD(decay=0.5).beliefs(batch, np.array([4.0, 0.0, 0.0, 0, 0, 0, 0, 0]))
    close(math.log(faded[2] / (1 - faded[2])), math.log(2) + 1)
    far = AgentOPSD(decay=1.0).beliefs(batch, np.full(8, 1e4))
    assert all(np.isfinite(x).all() for x in far)


def test_agent_opsds_kl_and_its_gradient(ragged):
    _, scores = ragged
    scores = dataclasses.replace(scores, reference_M=scores.teacher_M)
    current = torch.tensor(scores.student_M, requires_grad=True)
    loss = AgentOPSD(kl_coef=0.01).auxiliary_loss(current, np.arange(14), scores)
    close(loss.detach(), 0.01 * (np.exp(GAPS) - GAPS - 1))
    loss.sum().backward()
    close(current.grad, 0.01 * (1 - np.exp(GAPS)))
    assert AgentOPSD(kl_coef=0.0).auxiliary_loss(current, np.arange(14), scores) is None
    assert AgentOPSD().scores == {"privileged", "reference"} and AgentOPSD(kl_coef=0.0).scores == {"privileged"}
    with pytest.raises(AtodError, match="--decay 0"):
        AgentOPSD(decay=0.0)


# --- TurnOPD ------------------------------------------------------------------------------------------------------


def test_turn_opd_by_hand(ragged):
    """Turns of 2, 1, 3 | 2, 1 | 2 | 2, 1 tokens: balanced, an episode of 6 tokens in 3 turns weighs them 1, 2, 2/3."""
    batch, scores = ragged
    balanced = np.array([1, 1, 2, *[2 / 3] * 3, *[0.75] * 2, 1.5, 1, 1, *[0.75] * 2, 1.5])
    close(TurnOPD(balance_steps=0).advantages(batch, scores, 1).token_M, balanced * GAPS)
    quarter = TurnOPD(balance_steps=80).advantages(batch, scores, 20)
    close(quarter.teacher_weight_M, 0.75 + 0.25 * balanced)
    assert quarter.coefficients == {"balance": 0.25}
    close(TurnOPD(balance_steps=80).advantages(batch, scores, 500).teacher_weight_M, balanced)
    for n in range(4):
        own = batch.trajectory_M == n
        close(quarter.teacher_weight_M[own].mean(), 1.0)
        by_turn = [GAPS[batch.turn_M == k].mean() for k in np.flatnonzero(batch.trajectory_K == n)]
        close((balanced * GAPS)[own].mean(), np.mean(by_turn))
    with pytest.raises(AtodError, match="--balance-steps -1"):
        TurnOPD(balance_steps=-1)


# --- SAGE-OPD -----------------------------------------------------------------------------------------------------


def test_sage_opd_by_hand(ragged):
    batch, scores = ragged
    top = np.array([0.5, 0.7, 0.9, 0.2, 0.3, 0.4, 1.0, 0.8, 0.6, 0.5, 0.5, 0.25, 0.75, 0.8])
    scores = dataclasses.replace(scores, teacher_support_MS=np.log(top)[:, None].astype(np.float32))
    turn = np.array([0.6, 0.9, 0.3, 0.9, 0.6, 0.5, 0.5, 0.8])
    token = turn[[0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7]]
    result = SageOPD().advantages(batch, scores, 1)
    close(result.token_M, token * 14 / token.sum() * GAPS, 1e-5)
    close(result.turn_weight_K[batch.turn_M].sum(), 14)
    # Under --gap exact all that the divergence keeps is there, in any order.
    rest = np.log(np.minimum(1 - top, top) / 2 + 1e-9)[:, None]
    whole = np.concatenate([rest, scores.teacher_support_MS, rest], axis=1).astype(np.float32)
    exact = SageOPD().advantages(batch, dataclasses.replace(scores, teacher_support_MS=whole), 1)
    close(exact.teacher_weight_M, token * 14 / token.sum(), 1e-5)
    # Only the fifth turn was not understood.
    helped = turn * np.where(np.arange(8) == 4, 1.0, 0.25)
    told = helped[batch.turn_M]
    weak = SageOPD(intervene="invalid", weak=0.25).advantages(batch, scores, 1)
    close(weak.token_M, told * 14 / told.sum() * GAPS, 1e-5)
    alone = SageOPD(intervene="invalid", weak=0.0).advantages(batch, scores, 1).token_M
    close(alone[8], 14 * GAPS[8], 1e-5)
    assert np.count_nonzero(alone) == 1
    valid = dataclasses.replace(batch, valid_K=np.ones(8, bool))
    assert not SageOPD(intervene="invalid", weak=0.0).advantages(valid, scores, 1).token_M.any()
    with pytest.raises(AtodError, match=r"--weak 1\.0"):
        SageOPD(weak=1.0)
