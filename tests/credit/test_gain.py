"""Step-wise gains: what they add up to, what they do not depend on, and where they equal terminal credit."""

import pytest
import torch
from trajectories import judged as judged_by, sampled

from mmalign.config.schema import Config
from mmalign.credit import Gain, Terminal
from mmalign.credit.gain import balance, fitted, gains, values
from mmalign.credit.groups import Units
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.types import Judgement

T = 6
TIMES = torch.linspace(1, 0, T + 1)
KERNEL = FlowSde(0.7)


def reward(x):
    """Something that is not linear in the latent."""
    return (x.flatten(1)[:, :5] ** 2).sum(1).sin() + x.mean((1, 2, 3))


def judged(paths):
    return judged_by(paths, reward)


def dense(starts=6, length=None, states=range(T), prompts=2, plan=None):
    return sampled(plans.complete(plan or plans.sde(TIMES, KERNEL), states, length), starts, prompts)


@pytest.mark.parametrize("length", [None, 1, 2, 9])
@pytest.mark.parametrize("states", [range(T), [0, 2, 5], [0]])
def test_gains_add_up_to_the_reward_less_the_value_of_the_start(length, states):
    paths = dense(length=length, states=states)
    report = judged(paths)
    starts = sorted(states)
    item = gains(paths.tree, report)[:, starts]  # one per stretch
    assert torch.allclose(item.sum(1), report.reward[:, -1] - report.reward[:, 0], atol=1e-5)


def test_each_value_is_the_reward_of_the_state_completed_alone():
    flow, paths = GaussianFlow(), dense()
    report = judged(paths)
    for k in range(T):
        start = paths.x[:, k]
        alone = sample(flow.velocity, start, flow.encode(["0.0"]), paths.tree.prompt * 0, plans.ode(TIMES[k:]))
        assert torch.allclose(report.reward[:, k], reward(alone.finals), atol=1e-5)


def test_without_noise_every_gain_is_exactly_zero():
    paths = sampled(plans.complete(plans.ode(TIMES), range(T)), 4)
    assert len(paths.finals) == 4
    assert gains(paths.tree, judged(paths)).eq(0).all()
    one = sampled(plans.complete(plans.ode(TIMES), range(T), 1), 4)
    assert gains(one.tree, judged(one))[:, :-1].ne(0).any()  # the jump to the clean latent is biased


def test_with_hardly_any_noise_gains_hardly_differ_from_zero():
    paths = sampled(plans.complete(plans.sde(TIMES, FlowSde(1e-4)), range(T)), 4)
    assert gains(paths.tree, judged(paths)).abs().max() < 5e-3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_with_the_finished_image_alone_it_is_terminal_credit(scale):
    paths = sampled(plans.sde(TIMES, KERNEL), 6, 2)
    report, units = judged(paths), Units(scale)
    stochastic = paths.tree.std[:, :, None, None] > 0
    terminal = Terminal()(paths.tree, report, units)
    assert torch.allclose(Gain()(paths.tree, report, units), terminal * stochastic, atol=1e-6)


def test_a_window_over_all_steps_is_flow_grpo():
    whole = sampled(plans.window(TIMES, KERNEL, 0, T - 1), 4)
    plain = sampled(plans.sde(TIMES, KERNEL), 4)
    assert torch.equal(whole.x, plain.x)
    assert torch.equal(whole.mean, plain.mean)
    same = [Terminal()(paths.tree, judged(paths)) for paths in (whole, plain)]
    assert torch.equal(*same)


def test_gains_depend_on_the_noise_up_to_their_step_alone():
    flow = GaussianFlow()
    start = torch.stack([gaussian(flow.latent_shape, i) for i in range(3)])
    plan = plans.complete(plans.sde(TIMES, KERNEL), range(T))

    def changed(changed_from):
        draw = lambda b, k, path: gaussian(flow.latent_shape, seed_of(b, k, k >= changed_from))  # noqa: E731
        paths = sample(flow.velocity, start, flow.encode(["0.0"]), torch.zeros(3, dtype=torch.long), plan, draw)
        return gains(paths.tree, judged(paths))

    one, two = changed(9), changed(3)
    assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6)
    assert (one[:, 3:5] - two[:, 3:5]).abs().min() > 1e-4


def test_advantages_are_normalised_at_each_step_or_over_the_sampled():
    paths = dense(starts=16, prompts=2)
    report = judged(paths)
    step = Gain()(paths.tree, report)[:, : T - 1, 0, 0].reshape(2, 8, T - 1)
    assert torch.allclose(step.mean(1), torch.zeros(2, T - 1), atol=1e-5)
    assert torch.allclose(step.std(1, correction=0), torch.ones(2, T - 1), atol=1e-4)
    joint = Gain(compare="trajectory")(paths.tree, report)[:, : T - 1, 0, 0].reshape(2, 8 * (T - 1))
    item = gains(paths.tree, report)[:, : T - 1].reshape(2, 8 * (T - 1))
    assert torch.allclose(joint, (item - item.mean(1, True)) / item.std(1, correction=0, keepdim=True), atol=1e-4)
    assert Gain()(paths.tree, report)[:, -1].eq(0).all()  # the last step is deterministic


def test_the_share_of_the_value_before_is_the_slope_within_groups():
    g = torch.Generator().manual_seed(0)
    group, luck = torch.arange(2000) % 4, 10 * torch.arange(4.0)[torch.arange(2000) % 4]
    before = torch.randn(2000, generator=g) + luck  # groups differ in both: between them the slope would be 1
    noise = torch.randn(2000, generator=g)
    assert fitted(before, 0.3 * (before - luck) + noise + luck, group) == pytest.approx(0.3, abs=0.07)
    assert fitted(before, before, group) == pytest.approx(1, abs=1e-5)
    assert fitted(before, -(before - luck) + luck, group) == 0
    assert fitted(luck, noise, group) == 1  # the start is shared: nothing to fit


@pytest.mark.parametrize("control", [0.0, 0.4, 1.0])
def test_control_subtracts_its_share(control):
    paths = dense(starts=16, prompts=2)
    report = judged(paths)
    before, after = values(paths.tree, report)
    expected = (after - control * before)[:, : T - 1].view(2, 8, T - 1)
    result = Gain(control=control)(paths.tree, report, Units("none"))[:, : T - 1, 0, 0].reshape(2, 8, T - 1)
    assert torch.allclose(result, expected - expected.mean(1, keepdim=True), atol=1e-5)
    fit = Gain(control="fit")(paths.tree, report, Units("none"))[:, : T - 1, 0, 0].reshape(2, 8, T - 1)
    assert (fit.square().sum((0, 1)) <= result.square().sum((0, 1)) + 1e-5).all()  # no share does better at any step


def test_a_floor_keeps_small_spreads_small():
    paths = dense(starts=16, prompts=2)
    report = judged(paths)
    spread = gains(paths.tree, report)[:8].std(0, correction=0)[: T - 1]
    floor = float(spread.sort().values[2:4].mean())
    floored = Gain()(paths.tree, report, Units("group", floor))[:8, : T - 1, 0, 0].std(0, correction=0)
    assert torch.allclose(floored, (spread / floor).clamp(max=1), atol=1e-4)


def test_a_failed_state_silences_its_two_steps_and_nothing_else():
    paths = dense(starts=4, prompts=1)
    report = judged(paths)
    whole = gains(paths.tree, report)
    report.reward[1, 2] = torch.nan
    holed = gains(paths.tree, report)
    missing = torch.zeros_like(whole, dtype=torch.bool)
    missing[1, 1:3] = True
    assert torch.equal(holed.isnan(), missing)
    assert torch.equal(holed[~missing], whole[~missing])
    advantage = Gain()(paths.tree, report)[:, :, 0, 0]
    assert not advantage.isnan().any()
    assert advantage[1, 1:3].eq(0).all()


def test_on_a_branch_plan_gains_are_child_less_trunk():
    plan = plans.complete(plans.branch(TIMES, KERNEL, [0, 2], 4), [0, 2])
    paths = sampled(plan, 2)
    report = judged(paths)
    trunk = reward(sampled(plans.ode(TIMES), 2).finals)
    rows, cols = (paths.tree.std > 0).nonzero(as_tuple=True)
    expected = report.reward[rows, -1] - trunk[paths.tree.member[rows]]
    assert torch.allclose(gains(paths.tree, report)[rows, cols], expected, atol=1e-5)


def test_balance_of_signs_by_hand():
    paths = sampled(plans.complete(plans.window(TIMES, KERNEL, 1, 3), [1, 2, 3]), 4)
    table = torch.full(paths.tree.node.shape, torch.nan)
    table[:, 1], table[:, 2] = 1.0, torch.tensor([2.0, 2.0, 0.0, 1.0])
    table[:, 3] = table[:, 2] - 1
    table[:, -1] = 0.0
    result = balance(paths.tree, Judgement(table, {}))
    assert result["gain/1"] == 0.25
    assert result["balance/1"] == 0.25
    assert result["balance/2"] == -1
    assert result["gain_std/2"] == 0
    assert set(result) == {f"{name}/{k}" for name in ("gain", "gain_std", "balance") for k in (1, 2)}


def test_unknown_comparisons_are_named():
    with pytest.raises(ValueError, match="compare: Input should be 'step' or 'trajectory', got \"group\""):
        Config(credit={"type": "gain", "compare": "group"})


def test_returns_to_go_are_the_reward_less_the_value_of_the_state():
    paths = dense(states=[0, 2])
    report, units = judged(paths), Units("none")
    to_go = Gain(returns="to_go")(paths.tree, report, units)[:, :, 0, 0]
    for k, shown in enumerate([0, 0, 2, 2, 2]):
        value = report.reward[:, -1] - report.reward[:, shown]
        expected = value - value.view(2, 3).mean(1).repeat_interleave(3)
        torch.testing.assert_close(to_go[:, k], expected, atol=1e-5, rtol=1e-5)


def test_gains_above_saturation_count_less_and_drops_as_they_are():
    tree = sampled(plans.complete(plans.sde(TIMES, KERNEL), range(T)), 2).tree
    table = torch.tensor([[0.0, 0.8, 0.95, 0.99, 0.5, 0.5, 0.5], [0.0] * 7])
    damped = Gain(saturate=0.9, damping=0.25)(tree, Judgement(table, {}), Units("none"))[:, :, 0, 0]
    by_hand = torch.tensor([0.8, 0.15, 0.01, -0.49, 0.0, 0.0])
    torch.testing.assert_close(damped[0], by_hand / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(damped[1], -by_hand / 2, atol=1e-6, rtol=1e-5)


def test_a_saturation_above_all_values_changes_nothing_to_the_bit():
    paths = dense()
    report = judged(paths)
    assert report.reward.max() < 9
    whole, damped = (Gain(**given)(paths.tree, report) for given in ({}, {"saturate": 9.0, "damping": 0.25}))
    assert torch.equal(whole, damped)
    assert not torch.equal(Gain(saturate=-9.0, damping=0.25)(paths.tree, report), whole)
