"""The subset with the largest variance, against all subsets; and the rewards that advantages are measured by."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings as effort, strategies as st
from trajectories import judged_as, sampled

from mmalign.credit.terminal import Terminal
from mmalign.flow import plan as plans
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.selection.extremes import Extremes, extremes
from mmalign.selection.selection import compared

NAN = float("nan")
VALUE = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 0.5, 1.0, NAN]))


def best_variance(values: torch.Tensor, keep: int) -> float:
    """Of all subsets of that size."""
    return max(float(values[list(rows)].var(correction=0)) for rows in combinations(range(len(values)), keep))


@effort(max_examples=300, deadline=None)
@given(values=st.lists(VALUE, min_size=1, max_size=9), keep=st.integers(1, 9))
def test_no_other_subset_varies_more(values, keep):
    values = torch.tensor(values, dtype=torch.float64)
    valid = values[~values.isnan()]
    selected = extremes(values, torch.zeros(len(values), dtype=torch.long), keep)
    assert int(selected.sum()) == min(keep, len(valid))
    assert not bool(values[selected].isnan().any())
    if len(valid) > keep:
        best = best_variance(valid, keep)
        assert float(values[selected].var(correction=0)) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "keep", "selected"),
    [
        ([5.0, 1.0, 2.0, 4.0, 3.0], 2, [0, 1]),
        ([5.0, 1.0, 2.0, 4.0, 3.0], 4, [0, 1, 2, 3]),
        ([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], 3, [3, 4, 5]),  # one is right: it and the last two others
        ([10.0, 11.0, 12.0, 0.0], 3, [1, 2, 3]),  # a skewed group: one at the low end, two at the high
        ([NAN, 1.0, NAN, 2.0], 3, [1, 3]),
        ([NAN, NAN], 2, []),
        ([0.5, 0.5, 0.5], 2, [1, 2]),
    ],
)
def test_by_hand(values, keep, selected):
    result = extremes(torch.tensor(values), torch.zeros(len(values), dtype=torch.long), keep)
    assert result.nonzero()[:, 0].tolist() == selected


def test_large_rewards_that_differ_little_are_told_apart():
    values = torch.tensor([1e6, 1e6 + 0.5, 1e6 + 1.0, 1e6 + 1.5])
    assert extremes(values, torch.zeros(4, dtype=torch.long), 2).tolist() == [True, False, False, True]


def test_each_prompt_has_its_extremes():
    values, prompt = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0]), torch.tensor([0, 1, 0, 1, 0, 1])
    assert Extremes(keep=2)(values, prompt).tolist() == [True, True, False, False, True, True]


def test_advantages_against_the_group_or_the_selected_alone():
    """Rewards 0, 1, 2, 9: by hand, mean 3 and variance 12.5; of the extremes 0 and 9 mean 4.5 and deviation 4.5."""
    tree = sampled(plans.sde(GaussianFlow().times(3), FlowSde()), 4).tree
    judged = judged_as(tree, torch.tensor([0.0, 1.0, 2.0, 9.0]))

    def advantage(rule):
        selected = rule(judged.reward[:, -1], tree.prompt)
        assert selected.tolist() == [True, False, False, True]
        return Terminal()(tree, compared(judged, rule, selected))[selected, 0, 0, 0]

    assert torch.allclose(advantage(Extremes(2)), torch.tensor([-3.0, 6.0]) / 12.5**0.5)
    assert torch.allclose(advantage(Extremes(2, "selected")), torch.tensor([-1.0, 1.0]))
