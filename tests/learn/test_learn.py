"""The surrogate, the replay and the update: known gradients, and a bandit that must improve."""

from contextlib import nullcontext
from dataclasses import replace

import gradient_variance
import pytest
import torch
from trajectories import judged, plan_by_hand

from mmalign.credit import CREDITS, Renorm
from mmalign.credit.groups import Units
from mmalign.flow import kernels, plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import LOSSES, Clipped, Step, by_credit, pool
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import KERNELS, FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.drift import from_reference
from mmalign.training.microbatch import AdaptiveBatch

LEVELS = {"flow_sde": 0.7, "dance_sde": 0.5, "cps": 0.8, "ddim": 1.0, "scheduled": 0.8}
KINDS = {kind.type: kind for kind in KERNELS}
LOSS = {kind.type: kind for kind in LOSSES}
CREDIT = {kind.type: kind() for kind in CREDITS} | {"renorm": Renorm(-2.5, 0.0)}
KERNEL, CLIPPED = FlowSde(0.7), Clipped(1e-4)
SETTINGS = dict(epochs=1, minibatches=1, micro_batch=AdaptiveBatch(64), max_grad_norm=1e9)


def rollout(flow, plan, starts, iteration=0):
    start = torch.stack([gaussian(flow.latent_shape, seed_of("start", iteration, i)) for i in range(starts)])
    draw = lambda *key: gaussian(flow.latent_shape, seed_of("draw", iteration, *key))  # noqa: E731
    return sample(flow.velocity, start, flow.encode(["0.0"]), torch.zeros(starts, dtype=torch.long), plan, draw)


def advance(flow, optimizer, paths, advantage, loss=CLIPPED, beta=0.0, ratio="cell", **changed):
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, loss, beta, ratio)
    generator, batch = torch.Generator().manual_seed(0), transitions(paths, advantage)
    return update(flow.parameters(), optimizer, batch, replay, generator=generator, **SETTINGS | changed)


def surrogate(name, log_ratio, advantage, bound=1e-4, divergence=None, std=None, h=None):
    """A loss on rows of unit standard deviation and unit step."""
    rows = torch.ones(len(log_ratio))
    divergence = torch.zeros_like(log_ratio) if divergence is None else divergence
    step = Step(log_ratio, divergence, advantage, rows if std is None else std, rows if h is None else h)
    loss = LOSS[name](bound)(step)
    return loss.value, loss.statistics


@pytest.mark.parametrize("loss", ["clipped", "guard"])
@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"), [(1, 1.2, False), (-1, 0.8, False), (1, 0.8, True), (-1, 1.2, True)]
)
def test_pessimism(loss, advantage, ratio, moves):
    """A ratio already past the bound in the direction the advantage pulls gets no gradient; the other two quadrants
    do."""
    log_ratio = torch.full((1, 2, 2), ratio).log().requires_grad_()
    value, statistics = surrogate(loss, log_ratio, torch.full((1, 1, 1), float(advantage)), 0.1)
    value.sum().backward()
    assert bool(log_ratio.grad.abs().sum() > 0) == moves
    assert float(statistics["clipped_low"] + statistics["clipped_high"]) == float(not moves)


@pytest.mark.parametrize(("advantage", "ratio"), [(1, 1.2), (-1, 0.8), (1, 0.8), (-1, 1.2)])
@pytest.mark.parametrize("far", [True, False])
def test_the_mask_takes_the_same_quadrants_but_only_far_from_the_old_policy(advantage, ratio, far):
    log_ratio = torch.full((1, 2, 2), ratio).log().requires_grad_()
    divergence = torch.full((1, 2, 2), 0.2 if far else 0.05)
    value, _ = surrogate("masked", log_ratio, torch.full((1, 1, 1), float(advantage)), 0.1, divergence)
    value.sum().backward()
    assert bool(log_ratio.grad.abs().sum() > 0) == (not far or (ratio - 1) * advantage < 0)


@pytest.mark.parametrize("loss", LOSS)
def test_gradient_at_ratio_one_is_minus_advantage_times_score(loss):
    """For GRPO-Guard times q / h: its ratio is the q-th power, its weight 1 / h."""
    log_ratio = torch.zeros(3, 4, 4).requires_grad_()
    advantage = torch.tensor([0.5, -2.0, 0.0])[:, None, None]
    std, h = torch.tensor([0.3, 0.5, 0.7]), torch.tensor([0.1, 0.2, 0.4])
    surrogate(loss, log_ratio, advantage, std=std, h=h)[0].sum().backward()
    factor = (std / h)[:, None, None] if loss == "guard" else 1
    assert torch.allclose(log_ratio.grad, (-advantage * factor / 16).expand_as(log_ratio))


def test_guard_clips_what_is_centred():
    """Whatever the step, exp(mean d z) is as likely above as below 1; the plain ratio leans below."""
    g = torch.Generator().manual_seed(0)
    z, d, q = torch.randn(4000, 4, 2, 2, generator=g), 0.5, torch.full((4000,), 0.3)
    old = torch.zeros_like(z)
    y, new = q[:, None, None, None] * z, old + d
    log_ratio, divergence = kernels.log_ratio(y, new, old, q), kernels.gaussian_kl(new, old, q)
    ones = torch.ones(4000, 1, 1)
    _, plain = surrogate("clipped", log_ratio, ones, 1e-2)
    _, guarded = surrogate("guard", log_ratio, ones, 1e-2, divergence, q)
    assert (plain["ratio"] > 1).float().mean() < 0.01
    assert (guarded["ratio"] > 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.allclose(guarded["ratio"].log(), d * z.mean((1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(("elements", "above"), [(256, 0.41), (65536, 0.0)])
def test_whether_the_upper_bound_acts_depends_on_the_number_of_elements(elements, above):
    """At divergence K, log r is Gaussian with mean -K and variance 2K/D. Here K is the published clip, 1e-4: P(log r >
    1e-4) is 0.41 at D = 256 and 1.3e-4 at 65,536, while the lower bound acts in half of the rows at both."""
    g = torch.Generator().manual_seed(0)
    rows, q, k = 500, 0.3, 1e-4
    d = q * (2 * k) ** 0.5
    z = torch.randn(rows, 1, elements, 1, generator=g)
    old, std = torch.zeros_like(z), torch.full((rows,), q)
    log_ratio = kernels.log_ratio(q * z, old + d, old, std)
    ones = torch.ones(rows, 1, 1)
    high = surrogate("clipped", log_ratio, ones, 1e-4)[1]["clipped_high"].mean().item()
    low = surrogate("clipped", log_ratio, -ones, 1e-4)[1]["clipped_low"].mean().item()
    assert high == pytest.approx(above, abs=0.06)
    assert low == pytest.approx(0.5, abs=0.07)


def test_without_h_the_same_beta_is_weaker():
    """KL is d^2 / 2 q^2 with q^2 = g^2 h; divided by 2 g^2 it is h times that, a tenth at ten steps."""
    h, g, d = 0.1, 0.7, torch.full((1, 1, 2, 2), 0.05)
    exact = kernels.gaussian_kl(d, d * 0, torch.tensor([g * h**0.5])).mean()
    assert (0.05**2 / (2 * g**2)) / exact.item() == pytest.approx(h, rel=1e-4)


def test_log_ratio_is_the_noise_times_the_shift_less_the_divergence():
    """log r = mean(d z) / q - KL with d = new mean - old mean, y = old mean + q z: its mean over z is -KL <= 0, and
    what GRPO-Guard clips instead, q (log r + KL) = mean(d z), is centred."""
    g = torch.Generator().manual_seed(0)
    old, d = torch.randn(4000, 2, 2, 2, generator=g), 0.1 * torch.randn(1, 2, 2, 2, generator=g)
    q, z = torch.full((4000,), 0.3), torch.randn(4000, 2, 2, 2, generator=g)
    y = old + 0.3 * z
    difference = kernels.log_density(y, old + d, q) - kernels.log_density(y, old, q)
    assert torch.allclose(kernels.log_ratio(y, old + d, old, q), difference, atol=1e-5)
    log_ratio = kernels.log_ratio(y, old + d, old, q).mean((1, 2))
    kl = kernels.gaussian_kl(old + d, old, q).mean((1, 2))
    assert torch.allclose(0.3 * (log_ratio + kl), (d * z).mean((1, 2, 3)), atol=1e-5)
    spread = float(d.square().mean().sqrt()) / 0.3 / 8**0.5  # standard deviation of log r over draws of z
    assert log_ratio.mean().item() == pytest.approx(-kl[0].item(), abs=4 * spread / 4000**0.5)


def test_the_rollout_graph_gives_the_gradient_of_the_replay():
    """At ratio 1, differentiating the rollout's own log-density (as LeanGRPO does) equals replaying it."""
    flow = GaussianFlow()
    paths = rollout(flow, plans.sde(flow.times(5), KERNEL), 3)
    advantage = torch.randn(3, 5, 1, 1)
    advance(flow, torch.optim.SGD(flow.parameters(), 0.0), paths, advantage)
    replayed = flow.shift.grad.clone()
    total, t = 0.0, paths.tree.t[0]
    for k in range(4):
        v = flow.velocity(paths.x[:, k], t[k].expand(3), flow.encode(["0.0"]), paths.tree.prompt)
        mean, std = KERNEL.step(paths.x[:, k], v, t[k], t[k + 1], 0.7, paths.t_max)
        total = (
            total - (advantage[:, k, 0, 0] * kernels.log_density(paths.x[:, k + 1], mean, std).mean((1, 2))).sum() / 12
        )
    (direct,) = torch.autograd.grad(total, flow.parameters())
    assert torch.allclose(direct, replayed, atol=1e-6)


def test_uniform_map_equals_the_scalar_and_zero_stays_zero():
    torch.manual_seed(0)
    gradients = []
    for grid in (1, 2, 4):
        logp = torch.zeros(1, 4, 4).requires_grad_()
        surrogate("clipped", logp, torch.full((1, grid, grid), 0.7))[0].sum().backward()
        gradients.append(logp.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-8)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-8)
    logp = torch.zeros(1, 4, 4).requires_grad_()
    surrogate("clipped", logp, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))[0].sum().backward()
    assert logp.grad[0, :2, :2].abs().min() > 0
    assert logp.grad.count_nonzero() == 4


@pytest.mark.parametrize("loss", LOSS)
def test_over_equal_credit_a_map_of_one_value_is_the_whole_image_at_any_ratio(loss):
    """Away from ratio 1 the clip of each cell is not that of the image; with one ratio for all cells of equal credit it
    is."""
    torch.manual_seed(0)
    values = 0.2 * torch.randn(6, 4, 4)
    advantage = torch.linspace(-1, 1, 6)[:, None, None]
    expected = surrogate(loss, values, advantage, 0.05, values.abs())
    for grid in ((2, 2), (4, 4)):
        place = advantage.expand(6, *grid)
        result = surrogate(loss, by_credit(values, place), place, 0.05, by_credit(values.abs(), place))
        torch.testing.assert_close(result, expected)
        assert not torch.allclose(surrogate(loss, values, place, 0.05, values.abs())[0], expected[0], atol=1e-4)


def test_the_ratio_of_a_region_is_the_geometric_mean_of_its_cells():
    values = torch.arange(16.0).view(1, 4, 4)
    advantage = torch.tensor([[[1.0, 0.3], [1.0, 0.0]]])
    result = by_credit(values, advantage)
    for rows, columns, place in (
        (slice(4), slice(2), 1.0),
        (slice(2), slice(2, 4), 0.3),
        (slice(2, 4), slice(2, 4), 0),
    ):
        assert (result[0, rows, columns] == values[0, rows, columns].mean()).all(), place
    two = by_credit(torch.cat([values, values + 7]), advantage.expand(2, -1, -1))  # rows keep to themselves
    torch.testing.assert_close(two, torch.cat([result, result + 7]))


def test_a_whole_update_over_equal_credit():
    """The option reaches the loss: off policy the first cell's clip differs from its region's."""
    shifts = []
    for ratio in ("cell", "credit"):
        flow = GaussianFlow()
        paths = rollout(flow, plans.sde(flow.times(5), KERNEL), 4)
        advantage = torch.ones(4, 5, 4, 4)
        advantage[..., :2] = -1
        optimizer = torch.optim.SGD(flow.parameters(), 5.0)
        advance(flow, optimizer, paths, advantage, loss=Clipped(1e-2), ratio=ratio, epochs=3)
        shifts.append(flow.shift.detach().clone())
    assert not torch.allclose(*shifts, atol=1e-3)


def test_pool_needs_a_grid_that_divides():
    assert pool(torch.arange(16.0).view(1, 4, 4), (1, 1)).item() == 7.5
    with pytest.raises(ValueError, match="3x3 does not divide the latent's 4x4"):
        pool(torch.zeros(1, 4, 4), (3, 3))


@pytest.mark.parametrize("name", KINDS)
def test_on_policy_ratio_is_one_for_every_step(name):
    flow = GaussianFlow()
    paths = rollout(flow, plans.sde(flow.times(6), KINDS[name](LEVELS[name])), 8)
    statistics = advance(flow, torch.optim.SGD(flow.parameters(), 0.0), paths, torch.randn(8, 6, 1, 1))
    for k in range(5):
        assert statistics[f"ratio/{k}"] == pytest.approx(1, abs=1e-6)
    assert statistics["clipped_low"] == statistics["clipped_high"] == 0
    assert "ratio/5" not in statistics


def test_shared_steps_are_learnt_once_and_deterministic_ones_never():
    flow = GaussianFlow()
    t = flow.times(4)
    noise = torch.zeros(4, 4)
    noise[:, :2] = 0.7
    draw = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    paths = rollout(flow, plan_by_hand(t, noise, draw), 2)
    batch = transitions(paths, torch.ones(8, 4, 1, 1))
    assert len(batch) == 2 * (2 + 4)
    assert batch.step.bincount().tolist() == [4, 8]


def test_noise_weights_have_mean_one_and_the_published_values():
    """SD3.5, ten steps of shift 3 applied twice, a = 0.7, nine trained steps: 2.25 q (TempFlow-GRPO's constant)."""
    t = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
    flow = GaussianFlow()
    paths = rollout(flow, plans.sde(t, KERNEL), 2)
    batch = transitions(paths, torch.ones(2, 10, 1, 1), "noise")
    assert batch.weight.mean().item() == pytest.approx(1, abs=1e-6)
    std = paths.tree.std[0, :9]
    assert torch.allclose(batch.weight[:9] / std[batch.step[:9]], torch.tensor(2.25), rtol=2e-3)


def test_micro_batches_and_dead_rows_change_nothing():
    results = []
    for micro in (1, 3, 64):
        flow = GaussianFlow()
        paths = rollout(flow, plans.sde(flow.times(5), KERNEL), 6)
        advantage = CREDIT["terminal"](paths.tree, judged(paths, lambda x: x.mean((1, 2, 3))))
        advantage[0] = 0
        optimizer = torch.optim.SGD(flow.parameters(), 1.0)
        advance(flow, optimizer, paths, advantage, micro_batch=AdaptiveBatch(micro))
        results.append(flow.shift.detach().clone())
    assert torch.allclose(results[0], results[2], atol=1e-6)
    assert torch.allclose(results[1], results[2], atol=1e-6)
    assert results[0].abs().max() > 0


def test_steps_from_one_state_share_its_forward():
    """Three children each of two states of a start: eight forwards instead of 24, the same gradient and statistics, in
    micro-batches that do not fit the states, of a shuffled half too."""
    flow, starts = GaussianFlow(), 4
    paths = rollout(flow, plans.branch(flow.times(5), KERNEL, [0, 1], 3), starts)
    batch = transitions(paths, torch.randn(len(paths.x), 5, 1, 1, generator=torch.Generator().manual_seed(0)))
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, CLIPPED)
    results = []
    for rows in (batch, replace(batch, node=torch.arange(len(batch)))):
        for minibatches in (1, 2):
            before, generator = flow.counts["forwards"], torch.Generator().manual_seed(0)
            settings = SETTINGS | {"micro_batch": AdaptiveBatch(3), "minibatches": minibatches}
            optimizer = torch.optim.SGD(flow.parameters(), 0.0)
            statistics = update(flow.parameters(), optimizer, rows, replay, generator=generator, **settings)
            gradient = torch.cat([p.grad.flatten() for p in flow.parameters()])
            results.append((gradient, statistics, flow.counts["forwards"] - before))
    once, halves, apart, halves_apart = results
    assert (once[2], apart[2], halves_apart[2]) == (2 * starts, 6 * starts, 6 * starts)
    assert 2 * starts < halves[2] <= 2 * 2 * starts
    for one, other in ((once, apart), (halves, halves_apart)):
        assert torch.allclose(one[0], other[0], rtol=1e-5, atol=1e-9)
        assert one[0].abs().max() > 0
        assert one[1] == pytest.approx(other[1], rel=1e-5, abs=1e-7)


def test_constant_reward_learns_nothing():
    flow = GaussianFlow()
    paths = rollout(flow, plans.sde(flow.times(5), KERNEL), 6)
    advantage = CREDIT["terminal"](paths.tree, judged(paths, lambda x: torch.ones(len(x))))
    statistics = advance(flow, torch.optim.AdamW(flow.parameters(), 0.1), paths, advantage)
    assert flow.shift.eq(0).all()
    assert all(value == value for value in statistics.values())


def test_kl_pulls_back_to_the_reference_only_when_away_from_it():
    flow = GaussianFlow()
    paths = rollout(flow, plans.sde(flow.times(5), KERNEL), 4)
    statistics = advance(flow, torch.optim.SGD(flow.parameters(), 1.0), paths, torch.zeros(4, 5, 1, 1), beta=1.0)
    assert statistics["kl"] == 0
    assert flow.shift.eq(0).all()
    with torch.no_grad():
        flow.shift.fill_(0.5)
    statistics = advance(flow, torch.optim.SGD(flow.parameters(), 0.1), paths, torch.zeros(4, 5, 1, 1), beta=1.0)
    assert statistics["kl"] > 0
    assert (flow.shift < 0.5).all()


TIMES = GaussianFlow(gradient_variance.SHAPE).times(gradient_variance.STEPS)


@pytest.mark.parametrize("name", gradient_variance.variants(TIMES))
def test_the_estimated_policy_gradient_is_the_exact_one(name):
    """Every credit estimates what it says it does, and its direction is that of reward backpropagation through the
    ODE (Stein's identity)."""
    plan, credit, starts, what = gradient_variance.variants(TIMES)[name]
    mean, _, _ = gradient_variance.measure(plan, credit, starts, repeats=60)
    for goal in (what, "ode"):
        assert torch.cosine_similarity(mean, gradient_variance.exact(goal, TIMES, 4000), dim=0) > 0.95


def test_each_level_of_a_tree_estimates_the_gradient_of_its_steps():
    """In direction and length: with n children a mean over siblings leaves 1 - 1/n of it, and a ratio per element 1/D.
    The exact one shifts the mean at step k alone, with noise at both branching steps."""
    shape, steps, children, starts = (2, 2, 2), (0, 2), 4, 1000
    flow, times = GaussianFlow(shape), GaussianFlow(shape).times(5)
    cond, index = flow.encode(["0.0"]), torch.zeros(starts, dtype=torch.long)
    paths = rollout(flow, plans.tree(times, KERNEL, steps, children), starts)
    advantage = CREDIT["branch"](paths.tree, judged(paths, gradient_variance.reward), Units("none"))
    batch = transitions(paths, advantage)
    for k in steps:
        rows = batch[batch.step == k]
        loss, _ = Surrogate(flow, cond, paths.kernel, paths.t_max, Clipped(0.5))(rows)
        estimated = -torch.autograd.grad(loss.mean(), flow.shift)[0].flatten()
        g, x = torch.Generator().manual_seed(1), torch.randn(starts, *shape, generator=torch.Generator().manual_seed(2))
        for j in range(5):
            with nullcontext() if j == k else flow.reference():
                v = flow.velocity(x, times[j].expand(starts), cond, index)
            mean, std = kernels.flow_sde(x, v, times[j], times[j + 1], 0.7 if j in steps else 0.0, float(times[1]))
            x = mean + std[:, None, None, None] * torch.randn(x.shape, generator=g)
        exact = torch.autograd.grad(gradient_variance.reward(x).mean(), flow.shift)[0].flatten()
        expected = exact * (1 - 1 / children) / 8
        assert torch.cosine_similarity(estimated, expected, dim=0) > 0.98
        assert float(estimated @ expected / expected.square().sum()) == pytest.approx(1, abs=0.08)


def test_shared_steps_have_the_mean_of_the_advantages_below_them():
    flow = GaussianFlow()
    paths = rollout(flow, plans.tree(flow.times(4), KERNEL, [0, 1], 2), 1)
    advantage = torch.tensor([1.0, 2.0, 5.0, -1.0])[:, None, None, None].expand(4, 4, 1, 1)
    batch = transitions(paths, advantage)
    assert batch.advantage.flatten().tolist() == [1.5, 1, 2, 2, 5, -1]


def test_step_wise_gains_take_the_luck_of_the_start_out():
    """With as many trajectories the estimate of the gain is less noisy than terminal credit's."""
    noise = {}
    for name in ("terminal", "gain, n = remaining"):
        plan, credit, starts, _ = gradient_variance.variants(TIMES)[name]
        noise[name] = gradient_variance.measure(plan, credit, starts, repeats=100)[1]
    assert noise["gain, n = remaining"] < 0.5 * noise["terminal"]


@pytest.mark.parametrize("credit", [name for name in CREDIT if CREDIT[name].learner is None])  # which needs a run
def test_bandit_improves(credit):
    """The mean reward of successive quarters of the run rises, each above the one before."""
    flow = GaussianFlow((2, 2, 2), spread=0.5)
    optimizer = torch.optim.AdamW(flow.parameters(), 0.025, weight_decay=0.0)
    t = flow.times(5)
    plan = plans.branch(t, KERNEL, [0, 1, 2], 4) if credit == "branch" else plans.sde(t, KERNEL)
    if credit in ("gain", "renorm"):
        plan = plans.complete(plan, range(5))
    rewards = []
    for iteration in range(40):
        paths = rollout(flow, plan, 48 // plan.trained, iteration)
        report = judged(paths, lambda x: -((x - 1) ** 2).mean((1, 2, 3)))
        rewards.append(float(report.reward[:, -1].mean()))
        report = replace(report, log_ratio=from_reference(flow, paths, flow.encode(["0.0"]), 64))
        advance(flow, optimizer, paths, CREDIT[credit](paths.tree, report))
    quarters = torch.tensor(rewards).view(4, 10).mean(1)
    assert (quarters.diff() > 0).all()
    assert quarters[3] > 0.5 * quarters[0]  # rewards are negative: less than half the loss is left
