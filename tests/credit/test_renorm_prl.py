"""Credits without a group mean, and with log-ratios: corners, equalities and a gradient in closed form."""

import pytest
import torch
from trajectories import judged as judged_by, judged_as, sampled

from mmalign.credit import Gain, Prl, Renorm, Terminal
from mmalign.credit.groups import Units, group_mean
from mmalign.flow import plan as plans
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.training.drift import from_reference
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Judgement

T = 4
SDE = plans.sde(torch.linspace(1, 0, T + 1), FlowSde(0.7))
NONE = Units("none")


def reward(x):
    return (x.flatten(1)[:, :5] ** 2).sum(1).sin()


def drift(flow, paths, batch=10_000):
    return from_reference(flow, paths, flow.encode(["0.0"]), batch)


@pytest.mark.parametrize(("value", "outcome", "advantage"), [(1, 1, 1), (0, 0, -1), (1, 0, 0), (0, 1, 0), (3, 1, 1)])
def test_the_corners_of_renorm(value, outcome, advantage):
    tree = sampled(plans.complete(SDE, [1]), 2).tree
    report = judged_as(tree, torch.tensor(outcome * 10.0))
    report.reward[:, 1] = value * 10.0
    assert Renorm(high=10.0)(tree, report)[:, 0].flatten().tolist() == [advantage] * 2


def test_renorm_less_its_group_mean_is_a_sum_of_gain_and_terminal():
    paths = sampled(plans.complete(SDE, *Renorm().completions(SDE)), 6, 2)
    tree, report = paths.tree, judged_by(paths, reward)
    result = Renorm(-5.0, 5.0)(tree, report)[:, :-1] * 10
    centred = result - group_mean(result, tree.prompt)
    both = Gain(control=0.0)(tree, report, NONE) + Terminal()(tree, report, NONE)
    torch.testing.assert_close(centred, both[:, :-1], atol=1e-5, rtol=1e-5)
    assert Renorm()(tree, report)[:, -1].eq(0).all()  # deterministic


def test_renorm_teaches_a_group_of_equal_images():
    tree = sampled(SDE, 3).tree
    assert Renorm()(tree, judged_as(tree, torch.ones(3)))[:, :-1].eq(1).all()
    nothing = judged_as(tree, torch.tensor([torch.nan, 1.0, 1.0]))
    assert Renorm()(tree, nothing)[0].eq(0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_prl_without_beta_is_terminal_credit(scale):
    paths = sampled(SDE, 6, 2)
    report = judged_by(paths, reward)
    report = Judgement(report.reward, {}, log_ratio=torch.randn(6, T, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(Prl(0.0)(paths.tree, report, Units(scale)), Terminal()(paths.tree, report, Units(scale)))


def test_prl_by_hand():
    tree = sampled(SDE, 2).tree
    ratios = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    report = Judgement(judged_as(tree, torch.tensor([5.0, 1.0])).reward, {}, log_ratio=ratios)
    result = Prl(0.5)(tree, report, NONE)[:, :, 0, 0]  # 5 - 3, 5 - 2.5, 5 - 1.5, 5 against 1 - .5, 1 - .5, 1 - .5, 1
    torch.testing.assert_close(result[0], torch.tensor([0.75, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(result[1], -result[0])


def test_log_ratios_are_0_at_the_start_and_sum_to_the_divergence():
    flow = GaussianFlow()
    assert drift(flow, sampled(SDE, 3, flow=flow)).eq(0).all()
    with torch.no_grad():
        flow.shift.fill_(0.3)
    plan = plans.branch(torch.linspace(1, 0, T + 1), FlowSde(0.7), [0, 1], 3)
    paths = sampled(plan, 200, flow=flow)
    before = flow.counts["forwards"]
    ratios = drift(flow, paths, 100)
    assert flow.counts["forwards"] - before == 200 * plan.cost[2]
    assert ratios[paths.tree.std == 0].eq(0).all()
    rows = transitions(paths, torch.zeros(*paths.tree.std.shape, 1, 1))
    with flow.reference():
        v = flow.velocity(rows.x, rows.t, flow.encode(["0.0"]), rows.index)
    anchor, std = paths.kernel.step(rows.x, v, rows.t, rows.s, rows.noise, paths.t_max)
    exact = ((rows.mean - anchor) ** 2 / (2 * std[:, None, None, None] ** 2)).mean((1, 2, 3))
    for k in (0, 1):  # the mean of the log-ratio over draws is the divergence
        noisy = ratios[:, k][paths.tree.std[:, k] > 0]
        assert float(noisy.mean()) == pytest.approx(float(exact[rows.step == k].mean()), rel=0.15)


def gradient(flow, paths, advantage, beta):
    optimizer = torch.optim.SGD(flow.parameters(), 0.0)
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, Clipped(10.0), beta)
    update(
        flow.parameters(), optimizer, transitions(paths, advantage), replay, epochs=1, minibatches=1,
        micro_batch=AdaptiveBatch(10**5), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return flow.shift.grad.clone().flatten()


def test_its_gradient_is_that_of_the_reward_less_the_divergence():
    """Of many trajectories that have left the reference. `beta` in the loss is per element of the surrogate, which has
    a mean over the D of them in both terms, and so beta D of the credit."""
    flow, beta = GaussianFlow((2, 2, 2)), 0.5
    with torch.no_grad():
        flow.shift.copy_(torch.linspace(-0.5, 1.5, 8).view(2, 2, 2))
    paths = sampled(SDE, 3_000, flow=flow)
    report = judged_by(paths, lambda x: x.flatten(1)[:, 0])
    report = Judgement(report.reward, {}, log_ratio=drift(flow, paths))
    credited = gradient(flow, paths, Prl(beta * 8)(paths.tree, report, NONE), 0.0)
    penalised = gradient(flow, paths, Terminal()(paths.tree, report, NONE), beta)
    plain = gradient(flow, paths, Terminal()(paths.tree, report, NONE), 0.0)
    assert torch.cosine_similarity(credited, penalised, dim=0) > 0.99
    assert torch.cosine_similarity(plain, penalised, dim=0) < 0.9
    assert float(credited.norm() / penalised.norm()) == pytest.approx(1, abs=0.1)
