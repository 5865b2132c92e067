import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import REPOSITORY

from atod_algos.evaluate.statistics import bootstrap, mcnemar, paired, t_interval, welch
from atod_algos.study.claims import CLAIMS


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(3, 12) == mcnemar(12, 3)
    assert 0 < mcnemar(0, 2000) < 1e-300 or mcnemar(0, 2000) == 0.0


def test_bootstrap_covers_like_the_normal_interval_for_independent_tasks():
    values = np.array([1.0] * 60 + [0.0] * 40)
    low, high = bootstrap(values, np.ones(100))
    half = 1.96 * math.sqrt(0.24 / 100)
    assert low == pytest.approx(0.6 - half, abs=0.02) and high == pytest.approx(0.6 + half, abs=0.02)
    assert bootstrap(values, np.ones(100)) == (low, high)


def test_repeating_episodes_of_a_task_does_not_narrow_the_interval():
    values = np.array([1.0] * 60 + [0.0] * 40)
    assert bootstrap(values * 8, np.full(100, 8.0)) == pytest.approx(bootstrap(values, np.ones(100)))


def test_paired_comparison_sees_what_unpaired_intervals_cannot():
    base = np.array([1.0] * 100 + [0.0] * 100)
    better = base.copy()
    better[100:112] = 1.0
    result = paired(better, base)
    assert result.difference == pytest.approx(0.06) and result.low > 0 and result.p_value < 0.002
    assert paired(base, base).p_value == 1.0
    assert paired(base, base - 0.5).points == "-" and result.points.startswith("+") and " to +" in result.points
    with pytest.raises(ValueError, match="same tasks"):
        paired(base, base[:-1])


def test_the_sign_flip_test_holds_its_level():
    rng = np.random.default_rng(0)
    small = sum(paired(rng.integers(2, size=40), rng.integers(2, size=40)).p_value < 0.05 for _ in range(60))
    assert small <= 8


def test_student_t_against_tables():
    low, high = t_interval([0.5, 0.6, 0.7])
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert t_interval([0.5]) == (-math.inf, math.inf)


def test_welch_known_value():
    # Worked by hand: means 2 and 5, both variances 1, n = 3: t = 3 / sqrt(2/3) = 3.674, 4 degrees of freedom.
    assert welch([1, 2, 3], [4, 5, 6]) == pytest.approx(0.0213, abs=2e-4)
    assert welch([1, 2], [1]) == 1.0 and welch([1, 1], [2, 2]) == 0.0


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_a_probability(a, b):
    assert 0 < mcnemar(a, b) <= 1


@pytest.mark.parametrize(("results", "least"), [(".", 15), ("laptop-150", 20)])
def test_the_published_p_values_over_training_seeds_come_out_again(results, least):
    study = json.loads((REPOSITORY / "docs" / "study" / results / "study-results.json").read_text())
    methods = {claim: (ahead, behind) for claim, ahead, behind in CLAIMS}
    success = {(cell["world"], cell["method"], cell["seed"]): cell["last"]["success"] for cell in study["cells"]}
    everywhere = sorted({world for world, _, _ in success})
    compared = 0
    for part, claims in study["claims"].items():
        worlds = everywhere if part == "together" else [part]
        for claim in claims:
            if claim["claim"] not in methods:
                continue  # the first against the runner-up: which two these are is not a fixed claim
            sides = [
                [np.mean([success[world, method, seed] for world in worlds]) for seed in claim["seeds"]]
                for method in methods[claim["claim"]]
            ]
            assert welch(*sides) == pytest.approx(claim["p_seeds"], rel=1e-4)
            compared += 1
    assert compared >= least
