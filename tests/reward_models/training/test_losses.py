"""Losses of preferences against closed forms."""

import math

import pytest
import torch

from reward_models.training.losses import LOSSES, bradley_terry, davidson, rao_kupper, thurstone, weighted_mean

D = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0], dtype=torch.float64)
NONE = torch.zeros_like(D)
A, TIE = torch.ones_like(D), torch.full_like(D, 0.5)


def chance(loss, preference):
    return loss(D, preference).neg().exp()


def test_bradley_terry_is_the_logarithm_of_the_logistic_function():
    torch.testing.assert_close(chance(bradley_terry, A), 1 / (1 + (-D).exp()))
    torch.testing.assert_close(bradley_terry(D, TIE), (bradley_terry(D, A) + bradley_terry(D, NONE)) / 2)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("margin", [0.0, 1.5])
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_pair_from_both_sides_has_the_same_loss(name, p, margin):
    loss, generator = LOSSES[name], torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, loss.outputs, generator=generator, dtype=torch.float64)
    p, margin = torch.full((6,), p, dtype=torch.float64), torch.full((6,), margin, dtype=torch.float64)
    torch.testing.assert_close(loss(a, b, p, margin, 0.3), loss(b, a, 1 - p, margin, 0.3))
    torch.testing.assert_close(loss.preferred(a, b), 1 - loss.preferred(b, a))


@pytest.mark.parametrize("of", [rao_kupper, davidson])
def test_win_tie_and_loss_sum_to_one(of):
    total = sum(chance(lambda d, p: of(d, p, 0.0, 0.8), p) for p in (A, TIE, NONE))
    torch.testing.assert_close(total, A)


@pytest.mark.parametrize("of", [rao_kupper, davidson])
@pytest.mark.parametrize("preference", [A, NONE])
def test_without_ties_a_width_of_zero_is_bradley_terry(of, preference):
    torch.testing.assert_close(of(D, preference, 0.7, 0.0), bradley_terry(D, preference, 0.7))


def test_ties_of_equal_images_are_as_frequent_as_the_models_say():
    assert rao_kupper(D[2:3], TIE[2:3], 0.0, 0.8).neg().exp() == pytest.approx(math.tanh(0.4))
    assert davidson(D[2:3], TIE[2:3], 0.0, 0.8).neg().exp() == pytest.approx(0.8 / 2.8)


def test_a_margin_is_subtracted_from_the_lead_of_the_preferred_image():
    torch.testing.assert_close(bradley_terry(D, A, 2.0), bradley_terry(D - 2, A))
    torch.testing.assert_close(bradley_terry(D, NONE, 2.0), bradley_terry(D + 2, NONE))
    torch.testing.assert_close(bradley_terry(D, A, 0.0), bradley_terry(D, A))


def test_thurstone_is_the_normal_distribution_of_the_difference():
    torch.testing.assert_close(
        chance(lambda d, p: thurstone(d, p, 0.0, 3.0, 4.0), A), torch.special.ndtr(D / 5), rtol=1e-6, atol=0
    )
    assert thurstone(torch.tensor([-60.0]), torch.ones(1), 0.0, 1.0, 1.0).isfinite()


def test_pairs_without_weight_change_nothing():
    losses = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    assert weighted_mean(losses, torch.tensor([1.0, 0.0, 3.0, 0.0])) == 2.5
    assert weighted_mean(losses, torch.zeros(4)) == 0
