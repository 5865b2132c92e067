"""What must hold for every scored batch, through each algorithm's own ``advantages`` and ``auxiliary_loss``."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import batch_of, close, one_token_a_turn, published
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.opd import OPD
from atod_algos.sdar import SDAR
from atod_algos.signals.agent_opsd import AgentOPSD
from atod_algos.signals.gkd import GKD
from atod_algos.signals.iw_opd import IWOPD
from atod_algos.signals.opsa import OPSA
from atod_algos.signals.sage_opd import SageOPD
from atod_algos.signals.siblings import Siblings
from atod_algos.signals.sign_safe import SignSafe
from atod_algos.signals.tropd import TrOPD
from atod_algos.signals.turn_opd import TurnOPD
from atod_algos.signals.vopd import VOPD
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.training.cli import with_rules

SIGNALS = (VOPD, OPSA, IWOPD, AgentOPSD, SignSafe, GKD, TrOPD, TurnOPD, SageOPD, Siblings)
ALGORITHMS = {
    f"{cls.name}-{rules}": with_rules(cls, rules) for cls in (GRPO, OPD, ATOD, SDAR, SOD, TCOD) for rules in cls.rules
} | {
    **{f"{cls.name}-paper": cls() for cls in SIGNALS},
    "atod-token": ATOD(weighting="token"),
    "atod-none": ATOD(weighting="none"),
    "atod-mean": ATOD(tdur_mean_preserve=True),
    "atod-constant": ATOD(coef_anneal_steps=0),
    "sod-alone": SOD(grpo_coef=0.0),
    "tcod-back": TCOD(curriculum="back_to_front"),
    "opd-kl": OPD(baseline="kl"),
    "atod-kl": ATOD(baseline="kl"),
    "opsa-entropy": OPSA(adapt="entropy"),
    "agent_opsd-centred": AgentOPSD(centre=True, decay=1.0),
    "sign_safe-crest": SignSafe(rule="crest"),
    "sign_safe-fading": SignSafe(fade_steps=10),
    "sign_safe-stepopsd": SignSafe(rule="stepopsd"),
    "sign_safe-sg_opd": SignSafe(rule="sg_opd"),
    "sign_safe-opdvr": SignSafe(rule="opdvr"),
    "turn_opd-balanced": TurnOPD(balance_steps=0),
    "sage_opd-invalid": SageOPD(intervene="invalid"),
    "siblings-opid": Siblings(rule="opid"),
    "siblings-grsd": Siblings(rule="grsd"),
    "iw_opd-turn": IWOPD(over="turn", mean_preserve=True),
}
EVERY = pytest.mark.parametrize("name", list(ALGORITHMS))
BY_OUTCOME = ("sign_safe-sg_opd", "sign_safe-opdvr", "siblings-paper", "siblings-opid")
"""They take the direction from an episode's own outcome, whatever the others of its group did, or learn only where
another one succeeded."""
PLAIN = [name for name in ALGORITHMS if not name.endswith("released")]
"""Without penalties for invalid turns and statistics over turn rows."""


def holds(**drawn):
    """A property over drawn values, in few and always the same examples: there are many algorithms."""
    few = settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.generate, Phase.shrink))
    return lambda test: few(given(**drawn)(test))


logprob = st.floats(-20, 0, width=32)
token = st.tuples(logprob, logprob, st.booleans())
turn = st.tuples(st.lists(token, max_size=3), st.booleans())
trajectory = st.tuples(st.lists(turn, max_size=4), st.booleans(), st.integers(0, 2))


def as_episode(drawn):
    turns, won, group = drawn
    return {
        "group": f"g{group}",
        "reward": 10.0 * won,
        "turns": [
            {
                "student_logp": [s for s, _, _ in tokens],
                "teacher_logp": [t for _, t, _ in tokens],
                "mask": [m for _, _, m in tokens],
                "valid": valid,
            }
            for tokens, valid in turns
        ],
    }


def spoken(episodes):
    return any(any(turn["mask"]) for episode in episodes for turn in episode["turns"])


episodes = st.lists(trajectory.map(as_episode), min_size=1, max_size=6).filter(spoken)


def scored(chosen, *, agree=False):
    """The batch, with every log-prob an algorithm may ask for."""
    batch, scores, _ = batch_of(chosen)
    other = scores.student_M if agree else scores.teacher_M
    return batch, dataclasses.replace(
        scores,
        teacher_M=other,
        privileged_M=other,
        reference_M=other,
        entropy_M=-scores.student_M,
        reverse_kl_M=np.abs(other - scores.student_M),
        gap_mean_M=-np.abs(other - scores.student_M),
        teacher_support_MS=other[:, None],
        support_MS=np.zeros((batch.n_tokens, 1), int),
    )


def advantages(name, chosen, step=7, **options):
    batch, scores = scored(chosen, **options)
    return batch, scores, ALGORITHMS[name].advantages(batch, scores, step)


def losses(name, batch, scores):
    """Gradient and value of the auxiliary loss at the weights that rolled out, zero where there is none."""
    current = torch.tensor(scores.student_M, requires_grad=True)
    loss = ALGORITHMS[name].auxiliary_loss(current, np.arange(batch.n_tokens), scores)
    if loss is None:
        return np.zeros(batch.n_tokens), np.zeros(batch.n_tokens)
    loss.sum().backward()
    return loss.detach().numpy(), current.grad.numpy()


@EVERY
@holds(chosen=episodes, step=st.integers(1, 300))
def test_everything_is_finite_and_of_one_size(name, chosen, step):
    batch, scores, result = advantages(name, chosen, step)
    loss_M, gradient_M = losses(name, batch, scores)
    for value_M in (result.token_M, loss_M, gradient_M):
        assert value_M.shape == (batch.n_tokens,) and np.isfinite(value_M).all()
    assert all(np.isfinite(value) for value in published(ALGORITHMS[name], batch, scores, step).values())
    assert result.turn_weight_K is None or result.turn_weight_K.shape == batch.index_K.shape


@EVERY
@holds(chosen=episodes, data=st.data())
def test_the_order_of_trajectories_does_not_matter(name, chosen, data):
    order = data.draw(st.permutations(range(len(chosen))))
    batch, scores, result = advantages(name, chosen)
    moved, moved_scores, moved_result = advantages(name, [chosen[n] for n in order])
    for of, moved_of in (
        (result.token_M, moved_result.token_M),
        *zip(losses(name, batch, scores), losses(name, moved, moved_scores), strict=True),
    ):
        parts = [of[batch.trajectory_M == n] for n in order]
        close(np.concatenate(parts), moved_of)
    metrics = published(ALGORITHMS[name], batch, scores, 7)
    moved_metrics = published(ALGORITHMS[name], moved, moved_scores, 7)
    assert metrics.keys() == moved_metrics.keys()
    close(list(metrics.values()), [moved_metrics[key] for key in metrics], 1e-5)


@EVERY
@holds(chosen=episodes, noise=st.floats(-30, 0))
def test_what_was_not_sampled_is_not_felt(name, chosen, noise):
    """Other log-probs of masked tokens, and other prompts, change nothing at all."""
    batch, scores, result = advantages(name, chosen)
    for episode in chosen:
        for one in episode["turns"]:
            for key in ("student_logp", "teacher_logp"):
                one[key] = [x if m else noise for x, m in zip(one[key], one["mask"], strict=True)]
    again, again_scores, again_result = advantages(name, chosen)
    prompted = dataclasses.replace(
        again, rows=tuple(row + 100 for row in again.rows), prompt_length_K=again.prompt_length_K + 9
    )
    for other in (again_result, ALGORITHMS[name].advantages(prompted, again_scores, 7)):
        np.testing.assert_array_equal(result.token_M, other.token_M)
        assert result.coefficients == other.coefficients
    assert published(ALGORITHMS[name], batch, scores, 7) == published(ALGORITHMS[name], again, again_scores, 7)
    np.testing.assert_array_equal(losses(name, batch, scores), losses(name, prompted, again_scores))


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in BY_OUTCOME])
@holds(chosen=episodes)
def test_a_group_without_variance_says_nothing_about_reward(name, chosen):
    """All attempts valid and equally good: then it does not matter whether they are all good or all bad."""
    outcomes = []
    for reward in (0.0, 10.0):
        for episode in chosen:
            episode["reward"] = reward
            for one in episode["turns"]:
                one["valid"] = True
        # A group of one compares with nothing, but under the released statistics its reward stands as it is.
        twice = chosen + chosen
        outcomes.append(advantages(name, twice)[2].token_M)
    close(*outcomes)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.startswith("opsa")])
@holds(chosen=episodes)
def test_a_teacher_that_agrees_teaches_nothing(name, chosen):
    _, scores, result = advantages(name, chosen, agree=True)
    grpo = name if name.startswith("grpo") else "grpo-released" if name.endswith("released") else "grpo-paper"
    batch, _, reward_only = advantages(grpo, chosen)
    coefficient = result.coefficients.get("rl_coef", getattr(ALGORITHMS[name], "grpo_coef", 1.0))
    expected = np.zeros(batch.n_tokens) if result.reward_M is None else coefficient * reward_only.token_M
    close(result.token_M, expected)
    assert not losses(name, batch, scores)[0].any()


@pytest.mark.parametrize("name", PLAIN)
@holds(chosen=episodes, place=st.floats(0, 1), which=st.integers(0, 5))
def test_an_empty_response_changes_nothing_for_the_others(name, chosen, place, which):
    _, _, before = advantages(name, chosen)
    turns = chosen[which % len(chosen)]["turns"]
    turns.insert(round(place * len(turns)), {"student_logp": [], "teacher_logp": [], "mask": [], "valid": True})
    _, _, after = advantages(name, chosen)
    close(before.token_M, after.token_M)


@holds(chosen=episodes, step=st.integers(1, 300))
def test_weights_stay_in_their_bounds(chosen, step):
    for name in ("atod-paper", "atod-released", "atod-token", "atod-none"):
        weight_K = advantages(name, chosen, step)[2].turn_weight_K
        assert (weight_K >= 0).all() and (weight_K <= 1).all()
    batch, _, result = advantages("sod-paper", chosen, step)
    assert (result.turn_weight_K > 0).all() and (result.turn_weight_K <= 1.2).all()
    first = [np.flatnonzero((batch.trajectory_K == n) & (batch.n_K > 0))[:1] for n in range(len(chosen))]
    assert (result.turn_weight_K[np.concatenate(first)] == 1).all()
    mean_K = advantages("atod-mean", chosen, step)[2].turn_weight_K[batch.n_K > 0]
    assert (mean_K > 0.2).all() and (mean_K <= 4 + 1e-6).all()


@holds(chosen=episodes)
def test_one_turn_is_as_the_equations_say(chosen):
    """No turn to compare with: T-DUR gives 0.75 (or, as released, 1), SOD 1."""
    for episode in chosen:
        episode["turns"] = episode["turns"][:1]
    if not spoken(chosen):
        return
    for name, weight in (("atod-paper", 0.75), ("atod-released", 1.0), ("sod-paper", 1.0)):
        batch, _, result = advantages(name, chosen)
        assert (result.turn_weight_K[batch.n_K > 0] == weight).all()


@holds(chosen=episodes)
def test_sdar_pushes_every_sampled_token_up(chosen):
    batch, scores = scored(chosen)
    _, gradient_M = losses("sdar-paper", batch, scores)
    assert (gradient_M <= 0).all() and (gradient_M >= -0.01).all()
    gap_M = scores.privileged_M - scores.student_M
    order = np.argsort(gap_M)
    assert (np.diff(-gradient_M[order]) >= -1e-12).all()  # the more the skills speak for a token, the more


@holds(step=st.integers(1, 2000), length=st.integers(1, 200), start=st.floats(0.2, 3), end=st.floats(0.1, 3))
def test_schedules_stay_between_their_ends(step, length, start, end):
    floor = min(start, end)
    algorithm = ATOD(coef_anneal_steps=length, kappa_init=start, kappa_min=floor, rho_init=start, rho_max=end)
    batch, scores = one_token_a_turn([0.1], [0.2])
    now, then = (algorithm.advantages(batch, scores, s).coefficients for s in (step, step + 1))
    assert floor - 1e-12 <= then["kl_coef"] <= now["kl_coef"] <= start + 1e-12
    assert min(start, end) - 1e-12 <= now["rl_coef"] <= max(start, end) + 1e-12
    assert now["anneal_progress"] <= then["anneal_progress"] <= 1.0


@holds(step=st.integers(1, 2000), start=st.integers(1, 5), every=st.integers(1, 9), origin=st.integers(0, 1))
def test_the_students_part_starts_small_and_only_grows(step, start, every, origin):
    for curriculum, part in (
        ("front_to_back", lambda own: own.max_turns),
        ("back_to_front", lambda own: own.who.leaves),
    ):
        algorithm = TCOD(curriculum=curriculum, turns_start=start, turns_every=every, count_from=origin)
        now, then = (part(algorithm.limits(s)) for s in (step, step + 1))
        assert start <= now <= then <= now + 1
