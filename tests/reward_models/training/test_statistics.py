"""Figures of pairs, counted by hand and from known distributions."""

import numpy as np
import pytest

from reward_models.training.statistics import (
    accuracies,
    agreement,
    calibration,
    errors,
    errors_of,
    mcnemar,
    same_verdicts,
    share,
    sums,
    temperature,
    thirds,
)

NAN = np.nan


def test_agreement_and_both_conventions_of_ties():
    difference = np.array([2.0, -1.0, 0.0, 3.0, NAN, 1.0])
    preference = np.array([1.0, 1.0, 0.0, 0.5, 1.0, 0.8])
    np.testing.assert_array_equal(agreement(difference, preference), [1, 0, 0.5, 0.5, NAN, 1])
    row = accuracies(difference, preference, np.arange(6))
    assert (row["accuracy"]["mean"], row["accuracy"]["pairs"]) == (pytest.approx(2 / 3), 3)
    assert (row["with_ties"]["mean"], row["with_ties"]["pairs"], row["missing"]) == (pytest.approx(0.6), 5, 1)


def test_an_interval_is_wilsons_for_independent_pairs_and_wider_for_repeated_ones():
    values = np.array([1.0] * 70 + [0.0] * 30)
    alone = share(values, np.arange(100))
    assert (alone.low, alone.high) == (pytest.approx(0.603, abs=2e-3), pytest.approx(0.782, abs=2e-3))
    four_times = share(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert (four_times.low, four_times.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert four_times.prompts == 100
    independent = share(np.repeat(values, 4), np.arange(400))
    assert independent.high - independent.low < 0.55 * (alone.high - alone.low)


def test_an_interval_covers_the_truth_at_its_level():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        of_prompt = rng.beta(4, 1, size=60)  # mean 0.8
        cluster = np.repeat(np.arange(60), 3)
        one = share((rng.random(180) < of_prompt[cluster]).astype(float), cluster)
        covered += one.low <= 0.8 <= one.high
    assert 0.92 <= covered / 400 <= 0.98


def test_an_interval_of_perfect_agreement_is_not_a_point():
    one = share(np.ones(20), np.repeat(np.arange(10), 2))
    assert (one.mean, one.high) == (1, 1)
    assert 0.6 < one.low < 0.9
    assert share(np.ones(3), np.zeros(3, int)).low is None
    assert share(np.ones(0), np.ones(0, int)).mean is None


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ():
    one = np.array([1.0] * 5 + [0.0, 1.0, 0.0, 0.5, NAN])
    other = np.array([0.0] * 5 + [1.0, 1.0, 0.0, 1.0, 0.0])
    assert mcnemar(one, other) == {"pairs": 8, "only_one": 5, "only_other": 1, "p": pytest.approx(2 * 7 / 64)}
    assert mcnemar(one, one)["p"] == 1


def test_calibrated_probabilities_have_temperature_one():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 20_000)
    truth = (rng.random(20_000) < 1 / (1 + np.exp(-log_odds))).astype(float)
    assert temperature(log_odds, truth) == pytest.approx(1, abs=0.05)
    assert temperature(3 * log_odds, truth) == pytest.approx(3, abs=0.15)
    good, bold = (calibration(1 / (1 + np.exp(-k * log_odds)), truth) for k in (1, 3))
    assert good["ece"] < 0.02 < 0.05 < bold["ece"]
    assert good["brier"] < bold["brier"]


def test_calibration_by_hand():
    row = calibration(np.array([0.9, 0.9, 0.2, NAN, 0.7]), np.array([1.0, 0.0, 0.0, 1.0, 0.5]))
    assert row["pairs"] == 3
    assert row["brier"] == pytest.approx((0.01 + 0.81 + 0.04) / 3)
    assert row["ece"] == pytest.approx((2 * 0.4 + 0.2) / 3)
    assert calibration(np.array([NAN]), np.array([1.0])) == {"pairs": 0}


def test_errors_of_prompts_drawn_twice_are_those_of_their_pairs_twice():
    rng = np.random.default_rng(0)
    chosen, truth, number = rng.random(90), (rng.random(90) < 0.5).astype(float), np.repeat(np.arange(30), 3)
    times = rng.integers(3, size=30)
    rows = np.repeat(np.arange(90), times[number])
    assert errors_of(times @ sums(chosen, truth, number)) == pytest.approx(errors(chosen[rows], truth[rows]))


def test_verdicts_in_both_orders_and_thirds_by_hand():
    one, other = np.array([1.0, -2.0, 0.0, 1.0, NAN]), np.array([3.0, -1.0, 0.0, -1.0, 1.0])
    assert same_verdicts(one, other, np.arange(5))["mean"] == 0.75
    parts = thirds(np.array([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, NAN]))
    assert {name: np.flatnonzero(rows).tolist() for name, rows in parts.items()} == {
        "low": [1, 2], "middle": [3, 4], "high": [0, 5],
    }  # fmt: skip
