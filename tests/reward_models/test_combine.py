"""Tests of combining scores: rules, missing scores, dead components, ramps and multipliers."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from reward_models.combine import (
    Ramp,
    gated,
    health,
    mean_and_std,
    multiplier,
    normalised,
    product,
    referenced,
    weighted,
    whitened,
)

nan = math.nan
GROUP = torch.tensor([7, 3, 7, 3, 7, 3])  # groups need be neither sorted nor dense
VALUES = torch.tensor([[1.0, 100], [2, 40], [3, 300], [4, 40], [5, 200], [9, 40]])


def draw(n=60, k=3, groups=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (n,), generator=generator)
    return torch.randn(n, k, generator=generator) * torch.tensor([0.01, 1, 100.0])[:k], group


def test_moments_are_those_of_each_group():
    mean, std = mean_and_std(VALUES, GROUP)
    for group in (3, 7):
        rows = group == GROUP
        torch.testing.assert_close(mean[rows], VALUES[rows].mean(0).expand(3, 2))
        torch.testing.assert_close(std[rows], VALUES[rows].std(0, correction=0).expand(3, 2))


def test_moments_leave_out_missing_scores():
    values = VALUES.clone()
    values[0, 0] = nan
    mean, std = mean_and_std(values, GROUP)
    assert mean[2, 0] == 4
    assert std[2, 0] == 1
    values[:, 1] = nan
    assert mean_and_std(values, GROUP)[0][:, 1].isnan().all()


def test_weighted_sum():
    rewards = weighted(VALUES, torch.tensor([2.0, 0.5]))
    assert rewards.tolist() == [52, 24, 156, 28, 110, 38]


@pytest.mark.parametrize("rule", [weighted, product])
def test_a_sum_is_missing_if_a_component_with_a_weight_is(rule):
    values = VALUES.clone()
    values[1, 1] = nan
    rewards = rule(values, torch.tensor([1.0, 1.0]))
    assert rewards.isnan().tolist() == [False, True, False, False, False, False]
    assert not rule(values, torch.tensor([1.0, 0.0])).isnan().any()


def test_product_with_halves_is_the_geometric_mean():
    rewards = product(VALUES, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(rewards, (VALUES[:, 0] * VALUES[:, 1]).sqrt())
    assert product(torch.tensor([[0.0, 9.0]]), torch.tensor([0.5, 0.5])).item() == 0
    with pytest.raises(ValueError, match=r"at least 0, got -2"):
        product(-VALUES[1:2], torch.tensor([1.0, 0.0]))


def test_the_gate_closes_for_all():
    values = torch.tensor([[0.0, 5.0, 1.0], [1.0, 5.0, 1.0], [0.5, 0.0, 0.0]])
    assert gated(values, torch.tensor([9.0, 0.1, 0.5]), 0).tolist() == pytest.approx([0, 2, 0.5])
    assert gated(torch.tensor([[1.0, nan]]), torch.tensor([1.0, 1.0]), 0).isnan().all()


@pytest.mark.parametrize("gate", [-1e-6, -0.5, -5.0])
def test_a_gate_below_0_is_refused_because_it_would_reverse_the_others(gate):
    values = torch.tensor([[1.0, 0.5], [gate, 0.7], [nan, 0.7]])
    with pytest.raises(ValueError, match=rf"a gate needs scores of at least 0, got {gate:.3g}"):
        gated(values, torch.tensor([1.0, 10.0]), 0)


@pytest.mark.parametrize("other", [-2.1, -40.0])
def test_others_that_would_reverse_the_gate_are_refused(other):
    with pytest.raises(ValueError, match=r"behind a gate .* at least 0, got -"):
        gated(torch.tensor([[1.0, other], [1.0, 3.0]]), torch.tensor([1.0, 0.5]), 0)


@given(
    st.lists(st.floats(0, 8, width=32), min_size=2, max_size=2),
    st.floats(-1, 8, width=32),
    st.floats(0, 8, width=32),
    st.floats(0, 1, width=32),
)
def test_behind_a_gate_better_is_never_lower(gates, other, better, weight):
    low, high = sorted(gates)
    values = torch.tensor([[low, other], [low, other + better], [high, other]])
    rewards = gated(values, torch.tensor([1.0, weight]), 0)
    assert rewards[0] <= rewards[1]
    assert rewards[0] <= rewards[2]


def test_normalised_rewards_do_not_depend_on_ranges():
    values, group = draw()
    weights = torch.tensor([1.0, 2.0, 0.5])
    rewards = normalised(values, group, weights)
    torch.testing.assert_close(
        rewards, normalised(values * torch.tensor([1e3, 1, 1e-2]) + 5, group, weights), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(mean_and_std(rewards[:, None], group)[0], torch.zeros(60, 1), atol=1e-5, rtol=0)
    one = normalised(values, group, torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(mean_and_std(one[:, None], group)[1], torch.full((60, 1), 2.0))


def test_a_dead_component_counts_nothing_in_its_group_only():
    rewards = normalised(VALUES, GROUP, torch.tensor([0.0, 1.0]))
    assert (rewards[GROUP == 3] == 0).all()
    assert (rewards[GROUP == 7] != 0).any()
    rounding = torch.tensor([[0.3], [0.3 + 3e-8], [0.3]])
    assert normalised(rounding, torch.zeros(3, dtype=torch.long), torch.tensor([1.0])).tolist() == [0, 0, 0]


def test_a_missing_component_is_the_groups_mean_and_a_row_without_any_is_missing():
    values = VALUES.clone()
    values[0, 0] = nan
    values[2] = nan
    rewards = normalised(values, GROUP, torch.tensor([1.0, 1.0]))
    assert rewards.isnan().tolist() == [False, False, True, False, False, False]
    alone = normalised(values, GROUP, torch.tensor([0.0, 1.0]))
    assert rewards[0] == alone[0]
    others = GROUP == 3
    assert torch.equal(rewards[others], normalised(VALUES, GROUP, torch.tensor([1.0, 1.0]))[others])


def test_whitened_rewards_have_unit_scale_whatever_the_number_of_components():
    for k in (1, 2, 3):
        values, group = draw(k=k)
        rewards = whitened(values, group, torch.ones(k))
        assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert rewards.mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened(torch.ones(4, 1), torch.tensor([0, 0, 1, 1]), torch.ones(1)).tolist() == [0, 0, 0, 0]
    assert whitened(torch.full((2, 1), nan), torch.tensor([0, 0]), torch.ones(1)).isnan().all()


def test_order_does_not_matter():
    values, group = draw()
    values[5, 1] = nan
    weights = torch.tensor([1.0, 2.0, 0.5])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for rule in (normalised, whitened):
        torch.testing.assert_close(rule(values, group, weights)[order], rule(values[order], group[order], weights))


def test_a_reference_is_the_unit_of_progress():
    base = draw()[0]
    mean, std = base.mean(0), base.std(0)
    torch.testing.assert_close(referenced(base, mean, std).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(referenced(base + 2 * std, mean, std).mean(0), torch.full((3,), 2.0), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="above 0"):
        referenced(base, mean, torch.zeros(3))


def test_the_multiplier_rises_until_the_bound_holds_and_is_never_negative():
    """On a problem with a known answer: maximise -(x - 2)^2 with x <= 1 (as -x >= -1): x = 1, multiplier 2."""
    u = 0.0
    for _ in range(400):
        x = 2 - u / 2
        u = multiplier(u, -1.0, -x, 0.1)
    assert (x, u) == (pytest.approx(1), pytest.approx(2))
    assert multiplier(0.1, 1.0, 5.0, 0.1) == 0
    assert multiplier(0.3, 1.0, nan, 0.1) == 0.3


def test_ramps():
    line, curve = Ramp(1.0, 3.0), Ramp(1.0, 3.0, "cosine")
    assert [line.at(p) for p in (-1, 0, 0.25, 1, 2)] == [1, 1, 1.5, 3, 3]
    assert [curve.at(p) for p in (0, 0.5, 1)] == [1, pytest.approx(2), 3]
    assert curve.at(0.25) == pytest.approx(2 - math.cos(math.pi / 4))


def test_health_reports_missing_dead_and_correlated_components():
    values = torch.tensor([[1.0, 2, 5], [2, 4, 5], [3, 6, 5], [nan, 8, 5]])
    report = health(values, ["a", "b", "c"], torch.tensor([0, 0, 1, 1]))
    assert report["missing/a"] == 0.25
    assert report["missing/b"] == 0
    assert report["correlation/a~b"] == pytest.approx(1)
    assert "correlation/a~c" not in report
    assert report["dead/c"] == 1
    assert report["dead/a"] == 0.5  # one valid score cannot be compared
    assert report["spread/b"] == pytest.approx(1)
