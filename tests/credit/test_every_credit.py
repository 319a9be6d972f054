"""What holds for every credit of the table: the order of trajectories, missing scores, and groups that say nothing."""

from dataclasses import replace

import pytest
import torch
from trajectories import judged as judged_by, sampled

from mmalign.credit import CREDITS, Branch, Mix, Renorm
from mmalign.credit.groups import Units
from mmalign.flow import plan as plans
from mmalign.sampling.kernels import FlowSde

T = 4
TIMES = torch.linspace(1, 0, T + 1)
SDE = plans.complete(plans.sde(TIMES, FlowSde(0.7)), range(T))
CREDIT = {kind.type: kind() for kind in CREDITS} | {"branch": Branch("prompt"), "renorm": Renorm(-5.0, 5.0)}
CREDIT["sum"] = Mix(tuple(CREDIT.values()), tuple(0.5 + k for k in range(len(CREDIT))))
COMPARING = [name for name, credit in CREDIT.items() if name != "sum" and credit.normalises]
ROWS = ("t", "noise", "std", "node", "prompt", "member", "final")
SCALES = ["group", "none"]


def measured(prompts=3, plan=SDE, starts=12):
    """Trajectories with all that a credit may read: rewards of states, log-ratios, values, rewards of steps."""
    paths = sampled(plan, starts, prompts)
    generator, tree = torch.Generator().manual_seed(0), paths.tree
    ratio, values, process = torch.randn(3, *tree.std.shape, generator=generator)
    noisy = tree.std > 0
    report = judged_by(paths, lambda x: (x.flatten(1)[:, :5] ** 2).sum(1).sin())
    return tree, replace(
        report, log_ratio=ratio * noisy, values=values, process=(process * noisy)[:, :, None, None]
    )  # fmt: skip


def some(tree, report, rows):
    """Some of the trajectories, in this order."""
    columns = {name: getattr(report, name)[rows] for name in ("reward", "log_ratio", "values", "process")}
    return replace(tree, **{name: getattr(tree, name)[rows] for name in ROWS}), replace(report, **columns)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CREDIT)
def test_the_order_of_trajectories_changes_nothing(name, scale):
    tree, report = measured()
    order, units = torch.randperm(12, generator=torch.Generator().manual_seed(1)), Units(scale)
    whole = CREDIT[name](tree, report, units)
    assert whole.shape == (12, T, 1, 1)
    torch.testing.assert_close(CREDIT[name](*some(tree, report, order), units), whole[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CREDIT)
def test_an_image_without_a_score_is_as_one_that_was_not_drawn(name, scale):
    """It has no advantage; its siblings have those of a group without it, and other prompts what they had."""
    tree, report = measured()
    missing = replace(report, reward=report.reward.clone())
    missing.reward[1] = torch.nan
    units, rest = Units(scale), torch.tensor([0, *range(2, 12)])
    result = CREDIT[name](tree, missing, units)
    assert result[1].eq(0).all()
    torch.testing.assert_close(result[rest], CREDIT[name](*some(tree, report, rest), units), atol=1e-5, rtol=1e-5)
    assert torch.equal(result[4:], CREDIT[name](tree, report, units)[4:])


@pytest.mark.parametrize("name", COMPARING)
def test_a_group_of_one_and_equal_rewards_say_nothing(name):
    alone = CREDIT[name](*measured(prompts=12))
    assert alone.eq(0).all()
    tree, report = measured()
    equal = replace(
        report, reward=torch.full_like(report.reward, 0.3), log_ratio=torch.zeros(12, T),
        process=torch.zeros(12, T, 1, 1),
    )  # fmt: skip
    assert CREDIT[name](tree, equal).eq(0).all()


@pytest.mark.parametrize("name", CREDIT)
def test_trajectories_without_noise_have_nothing_to_learn_and_are_no_error(name):
    tree, report = measured(plan=plans.complete(plans.ode(TIMES), range(T)))
    assert not (tree.std > 0).any()
    assert CREDIT[name](tree, report).isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CREDIT)
def test_prompts_with_different_plans_are_credited_as_apart(name, scale):
    """One has noise at the steps 0 and 1, the other at 1 and 2."""
    windows = [plans.complete(plans.window(TIMES, FlowSde(0.7), k, k + 2), range(T)) for k in (0, 1)]
    tree, report = measured(prompts=2, plan=[windows[0]] * 6 + [windows[1]] * 6)
    assert [(tree.std[row] > 0).tolist() for row in (0, 6)] == [[True, True, False, False], [False, True, True, False]]
    units, noisy = Units(scale), (tree.std > 0)[:, :, None, None]
    whole = CREDIT[name](tree, report, units)
    assert (whole * noisy).abs().sum() > 1
    for rows in (torch.arange(6), torch.arange(6, 12)):
        alone = CREDIT[name](*some(tree, report, rows), units)
        torch.testing.assert_close(whole[rows] * noisy[rows], alone * noisy[rows], atol=1e-5, rtol=1e-5)
