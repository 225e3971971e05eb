"""The maths of reward models: numbers derived by hand, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from rlhf_accel.algorithm.calibration import (
    accuracy,
    agreement,
    fit_temperature,
    negative_log_likelihood,
    preference_logits,
    preference_loss,
    reliability,
)

NONE = np.zeros((0, 2)), np.zeros(0, dtype=int)


def test_preference_loss_by_hand():
    # Differences less margins: 2 - 1 - 0 = 1 and 0 - 1 - 1 = -2; -log sigmoid(x) = log(1 + exp(-x)).
    loss = preference_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


def test_preference_loss_knows_differences_only():
    chosen, rejected, margins = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).abs()
    torch.testing.assert_close(
        preference_loss(chosen + 5, rejected + 5, margins), preference_loss(chosen, rejected, margins)
    )
    assert preference_loss(chosen, rejected, margins) > preference_loss(chosen, rejected, torch.zeros(16))


def test_likelihood_and_accuracy_by_hand():
    # softmax of (log 3, 0) is (3/4, 1/4); a tie is no right answer.
    logits = np.array([[math.log(3), 0.0], [math.log(3), 0.0], [1.0, 1.0]])
    classes = np.array([0, 1, 0])
    assert negative_log_likelihood(logits, classes) == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 4) - math.log(2)) / 3
    )
    assert accuracy(logits, classes) == pytest.approx(1 / 3)
    assert math.isnan(accuracy(*NONE)) and math.isnan(negative_log_likelihood(*NONE))


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert negative_log_likelihood(logits, np.array([0, 1])) == pytest.approx(0)
    assert reliability(logits, np.array([0, 1])).error == pytest.approx(0)


def test_temperature_by_hand():
    # Differences of +1 three times out of four are right: the likeliest probability of an answer is 3/4, so that
    # 1 / T = log(3 / 1).
    logits = np.array([[1.0, 0.0]] * 4)
    assert fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(1 / math.log(3))


def test_temperature_against_scipy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 4)) * 3
    classes = (logits / 2.5 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    by_scipy = optimize.minimize_scalar(
        lambda t: negative_log_likelihood(logits / t, classes),
        bounds=(0.1, 20),
        method="bounded",
        options={"xatol": 1e-9},
    ).x
    assert fit_temperature(logits, classes) == pytest.approx(by_scipy, rel=1e-5)
    assert by_scipy == pytest.approx(2.5, rel=0.2)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_temperature_is_in_units_of_the_logits(factor):
    logits = np.array([[1.0, 0.0]] * 4) * factor
    assert fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(factor / math.log(3))


def test_there_is_no_temperature_where_none_is_likeliest():
    right = np.array([[1.0, 0.0]] * 4)
    for classes in ([0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]):  # all right, worse than chance, chance
        assert math.isnan(fit_temperature(right, np.array(classes)))
    assert math.isnan(fit_temperature(np.zeros((4, 2)), np.array([0, 0, 0, 1])))
    assert math.isnan(fit_temperature(*NONE))
    assert math.isnan(reliability(right, np.zeros(4, dtype=int), temperature=math.nan).error)
    assert math.isnan(reliability(*NONE).error)


def test_expected_calibration_error_by_hand():
    # Probabilities 0.6, 0.7, 0.8, 0.9, of which the first and the third are right; bins (0.6, 0.7) and (0.8, 0.9):
    # |0.65 - 0.5| / 2 + |0.85 - 0.5| / 2 = 0.25.
    probabilities = np.array([0.8, 0.6, 0.9, 0.7])
    logits = np.stack([np.log(probabilities), np.log(1 - probabilities)], axis=1)
    found = reliability(logits, np.array([0, 0, 1, 1]), bins=2)
    np.testing.assert_allclose(found.confidence, [0.65, 0.85])
    np.testing.assert_allclose(found.accuracy, [0.5, 0.5])
    assert found.count.tolist() == [2, 2]
    assert found.error == pytest.approx(0.25)
    # Twice as hot, log-odds are halved: 0.6 becomes sqrt(0.6) / (sqrt(0.6) + sqrt(0.4)).
    hot = [math.sqrt(p) / (math.sqrt(p) + math.sqrt(1 - p)) for p in (0.6, 0.7, 0.8, 0.9)]
    np.testing.assert_allclose(
        reliability(logits, np.array([0, 0, 1, 1]), temperature=2.0, bins=2).confidence,
        [sum(hot[:2]) / 2, sum(hot[2:]) / 2],
    )


def test_bins_have_equal_mass_and_few_rows_have_few_bins():
    logits = np.random.default_rng(0).normal(size=(103, 2))
    assert sorted(reliability(logits, np.zeros(103, dtype=int)).count.tolist()) == [10] * 7 + [11] * 3
    assert reliability(logits[:3], np.zeros(3, dtype=int)).count.tolist() == [1, 1, 1]


def test_a_temperature_mends_what_is_overconfident():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=4000)
    classes = (rng.random(4000) > 1 / (1 + np.exp(-truth))).astype(int)
    logits = np.stack([4 * truth, np.zeros(4000)], axis=1)
    temperature = fit_temperature(logits[:2000], classes[:2000])
    assert temperature == pytest.approx(4, rel=0.15)
    rest = logits[2000:], classes[2000:]
    assert reliability(*rest).error > 0.15
    assert reliability(*rest, temperature).error < 0.04


def test_preference_logits_are_of_the_preferred_text_first():
    logits = preference_logits(np.array([1.0, 2.0, 3.0]), np.array([[2, 0], [0, 1]]))
    np.testing.assert_array_equal(logits, [[3.0, 1.0], [1.0, 2.0]])


def test_agreement_by_hand():
    # Signs: right, wrong, left out (rated 0), wrong: 1 of 3. Pairs more than 0.5 apart, as (higher, lower):
    # (2, 0.3) (2, 0) (2, -1) (0.3, -1) (0, -1); 0.3 and 0 are too close. Predicted 1 > -1, 1 > 0.5, 1 = 1 (a tie counts
    # as wrong), -1 < 1, 0.5 < 1: 2 of 5.
    targets = np.array([2.0, 0.3, 0.0, -1.0])
    found = agreement(np.array([1.0, -1.0, 0.5, 1.0]), targets)
    assert found["reward/accuracy"] == pytest.approx(1 / 3)
    assert found["reward/pairwise_agreement"] == pytest.approx(2 / 5)
    assert found["reward/mse"] == pytest.approx((1 + 1.69 + 0.25 + 4) / 4)


def test_agreement_against_scipy():
    rng = np.random.default_rng(0)
    # Ratings at least 1 apart: then every pair counts, and the share of ordered pairs is (tau + 1) / 2.
    targets = rng.permutation(40).astype(float) - 20.5
    predictions = targets + rng.normal(0, 10, size=40)
    found = agreement(predictions, targets)
    assert found["reward/pairwise_agreement"] == pytest.approx((stats.kendalltau(predictions, targets)[0] + 1) / 2)
    assert found["reward/pearson"] == pytest.approx(stats.pearsonr(predictions, targets)[0])


def test_agreement_is_nan_where_nothing_can_tell():
    found = agreement(np.array([1.0, 1.0]), np.array([0.0, 0.0]))
    assert [name for name, value in found.items() if math.isnan(value)] == [
        "reward/accuracy",
        "reward/pairwise_agreement",
        "reward/pearson",
    ]
