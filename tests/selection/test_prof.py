"""Consistent images, by hand and against a search; and the signals of the process."""

from itertools import combinations

import pytest
import torch
from trajectories import judged as judged_by, sampled

from mmalign.config import load as configs
from mmalign.credit.gain import gains
from mmalign.errors import BadInput
from mmalign.flow import plan as plans
from mmalign.sampling.kernels import FlowSde
from mmalign.selection.prof import Prof, consistent, mean_value, rising
from mmalign.selection.selection import compared
from mmalign.types import Judgement

nan = torch.nan
ONE = torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("reward", "process", "keep", "selected"),
    [
        ([1, 1, 1, 0, 0, 0], [0.1, 0.9, 0.5, 0.1, 0.9, 0.5], 2, [1, 3]),
        ([1, 1, 1, 0, 0, 0], [0.1, 0.9, 0.5, 0.1, 0.9, 0.5], 4, [1, 2, 3, 5]),
        ([1, 1, 1, 0, 0, 0], [0.1, 0.9, 0.5, 0.1, 0.9, 0.5], 3, [1, 2, 3]),  # the larger half is above
        ([9, 0, 0, 0, 0, 0], [0.1, 0.1, 0.2, 0.3, 0.4, 0.5], 4, [0, 1, 2, 3]),  # one is right: all of the others
        ([1, 1, 1, 1, 1, 1], [0.1, 0.9, 0.5, 0.1, 0.9, 0.5], 4, []),  # one sign is missing
        ([1, 1, 1, 0, nan, nan], [0.1, nan, 0.5, 0.1, 0.0, 0.0], 2, [2, 3]),
        ([2, 2, 1, 1, 0, 0], [0.5] * 6, 4, [0, 1, 4, 5]),  # those at the mean are left out
    ],
)
def test_by_hand(reward, process, keep, selected):
    result = consistent(torch.tensor(reward).float(), torch.tensor(process).float(), ONE, keep)
    assert result.nonzero()[:, 0].tolist() == selected


@pytest.mark.parametrize("keep", [2, 3, 4, 5])
def test_no_other_balanced_subset_is_more_consistent(keep):
    generator = torch.Generator().manual_seed(keep)
    for _ in range(20):
        reward, process = torch.randn(2, 7, generator=generator)
        sign = (reward - reward.mean()).sign()
        rows = consistent(reward, process, torch.zeros(7, dtype=torch.long), keep)
        above, total = int((sign[rows] > 0).sum()), float((sign * process)[rows].sum())
        for other in map(list, combinations(range(7), keep)):
            high = int((sign[other] > 0).sum())
            assert high * (keep - high) <= above * (keep - above)
            if high == above:
                assert float((sign * process)[other].sum()) <= total + 1e-6


def test_to_keep_all_is_to_select_nothing():
    """With all images selected the rewards that advantages are measured by are the same to the bit."""
    generator = torch.Generator().manual_seed(0)
    reward, process = torch.randn(2, 12, generator=generator)
    for keep in (6, 9):
        assert consistent(reward, process, torch.arange(12) % 2, keep).all()
    judged = Judgement(reward[:, None], {})
    everything = torch.ones(12, dtype=torch.bool)
    for compare in ("group", "selected"):
        assert torch.equal(compared(judged, Prof(6, compare=compare), everything).reward, judged.reward)


def test_an_order_of_rows_and_other_prompts_change_nothing():
    generator = torch.Generator().manual_seed(0)
    reward, process = torch.randn(2, 12, generator=generator)
    group, order = torch.arange(12) % 2, torch.randperm(12, generator=generator)
    whole = consistent(reward, process, group, 3)
    assert torch.equal(consistent(reward[order], process[order], group[order], 3), whole[order])
    one = consistent(reward[group == 1], process[group == 1], ONE, 3)
    assert torch.equal(whole[group == 1], one)


def test_a_process_without_meaning_leaves_the_planned_share_of_each_sign():
    reward, process = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    group = torch.arange(4000) % 500
    selected = consistent((reward > 0.5).float(), process, group, 4)
    good = (reward > 0.5) & selected
    share = float(good.sum() / selected.sum())
    assert share == pytest.approx(0.5, abs=0.02)


def test_the_signals_of_the_process():
    """Three stochastic steps; values of the states 0 to 2, and of the finished image, by hand."""
    tree = sampled(plans.complete(plans.sde(torch.linspace(1, 0, 5), FlowSde(0.7)), range(3)), 3).tree
    table = torch.tensor([[0.1, 0.2, 0.3, nan, 0.2], [0.5, 0.5, 0.4, nan, 0.9], [0.0, nan, 0.0, nan, 1.0]])
    report = Judgement(table, {})
    torch.testing.assert_close(rising(tree, report)[:2], torch.tensor([2 / 3, 0.5]))
    torch.testing.assert_close(mean_value(tree, report)[:2], torch.tensor([0.2, 1.4 / 3]))
    assert rising(tree, report)[2].isnan()
    assert mean_value(tree, report)[2].isnan()
    choice = Prof(2, "mean").choose(tree, Judgement(torch.cat([table[:2], table[1:2] - 1.0]), {}))
    assert choice.tolist() == [False, True, True]


def test_the_mean_gain_agrees_with_the_outcome_and_the_share_of_rising_steps_need_not():
    """Gains add up to the reward less the value of the start, which siblings of one noise share: by their mean, images
    are ordered as by their rewards."""
    plan = plans.complete(plans.window(torch.linspace(1, 0, 6), FlowSde(0.7), 0, 4, 6), range(5))
    paths = sampled(plan, 1)
    report = judged_by(paths, lambda x: x.mean((1, 2, 3)).sin())
    mean, reward = gains(paths.tree, report).mean(1), report.reward[:, -1]
    torch.testing.assert_close(mean, (reward - report.reward[:, 0]) / 5)
    assert torch.equal(mean.argsort(), reward.argsort())
    one = sampled(plans.complete(plans.sde(torch.linspace(1, 0, 6), FlowSde(0.7)), range(5)), 1).tree
    values = torch.tensor([[0.0, 0.1, 0.2, 0.3, -1.0, -1.0]])  # rises three times of four, and is worse in the end
    assert float(rising(one, Judgement(values, {}))) == 0.75


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"credit": "terminal"}, "prof needs a credit that completes at least two states"),
        ({"credit": {"type": "gain", "states": [0]}}, "at least two states"),
        ({"plan": "ode", "objective": "rft", "credit": None}, "prof needs a credit that completes states"),
        ({"select": {"type": "prof", "keep": 4, "process": "gain"}}, "process"),
    ],
)
def test_what_cannot_act_is_refused(changed, says):
    settings = {"plan": "sde", "seeds": 8, "credit": "gain", "select": {"type": "prof", "keep": 4}}
    with pytest.raises(BadInput, match=says):
        configs.build(settings | changed, "test")
