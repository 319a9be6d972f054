"""NFT, AWM and AdvantageFlow: known gradients and minima, shared noise, and the optimum of each on a Gaussian flow."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmalign.learn.update import update
from mmalign.objectives.advantage_flow import AdvantageFlow
from mmalign.objectives.awm import Awm
from mmalign.objectives.forward_process import Noised
from mmalign.objectives.nft import Nft
from mmalign.objectives.objective import Finished, Lag
from mmalign.policy.gaussian import GaussianFlow
from mmalign.training.microbatch import AdaptiveBatch

FREE = {"draws": 2, "span": (0.0, 1.0), "pull": 0.0}  # nothing but the method's loss, at all times
ALL = (
    Nft(**FREE), Awm(**FREE), Awm(**FREE, weight="error"), Awm(**FREE, weight="huber"), AdvantageFlow(**FREE),
    AdvantageFlow(**FREE, normalised=False),
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def noised(advantage, seed=0, shape=(2, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    count = len(advantage)
    x, noise = torch.randn(2, count, *shape, generator=generator)
    t = torch.rand(count, generator=generator) * 0.9 + 0.05
    grid = torch.tensor(advantage)[:, None, None]
    return Noised(x, noise, t, grid, torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long))


def gradient(objective, v, old, rows):
    """The gradient of the rows' losses by the velocity."""
    v = v.clone().requires_grad_()
    loss, _ = objective.loss(v, old, rows, (rows.advantage / objective.bound).clamp(-1, 1))
    return torch.autograd.grad(loss.sum(), v)[0]


def weighted_matching(v, rows, size=1.0):
    """The gradient of `A |v - u|^2` over its size, mean over elements."""
    elements = v[0].numel()
    return rows.advantage[..., None] * 2 * (v - rows.target) / elements / size


def mean_size(v, rows):
    return (v - rows.target).abs().mean((1, 2, 3), keepdim=True)


def test_nft_has_no_gradient_at_advantage_0_and_flips_sign_across_it():
    rows, (v,) = noised([0.0, 2.0, -2.0]), torch.randn(1, 3, 2, 4, 4)
    same = replace(
        rows, x=rows.x[:1].repeat(3, 1, 1, 1), noise=rows.noise[:1].repeat(3, 1, 1, 1), t=rows.t[:1].repeat(3)
    )
    v = v[:1].repeat(3, 1, 1, 1)
    none, good, bad = gradient(Nft(), v, v, same)
    assert float(none.abs().max()) < 1e-7
    torch.testing.assert_close(good, -bad)
    assert float((good * (v - same.target)[1]).sum()) > 0  # descent moves v towards the good image's velocity


def test_nft_of_a_wholly_good_image_is_flow_matching():
    rows, v, old = noised([5.0, 7.0]), torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    value, _ = Nft(bound=5.0).loss(v, old, rows, (rows.advantage / 5).clamp(-1, 1))
    x0 = rows.state - rows.t[:, None, None, None] * v
    expected = 5 * ((x0 - rows.x) ** 2).mean((1, 2, 3)) / (x0 - rows.x).abs().mean((1, 2, 3))
    torch.testing.assert_close(value[:, 0, 0], expected)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_nfts_branches_are_the_papers(strength):
    """Equation 5 in images instead of velocities."""
    rows, v, old = noised([1.0, -3.0]), torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    t, r = rows.t[:, None, None, None], (rows.advantage[:, 0, 0] / 5 + 1) / 2
    good = rows.state - t * (strength * v + (1 - strength) * old)
    bad = rows.state - t * ((1 + strength) * old - strength * v)
    terms = [((image - rows.x) ** 2).mean((1, 2, 3)) / (image - rows.x).abs().mean((1, 2, 3)) for image in (good, bad)]
    expected = 5 / strength * (r * terms[0] + (1 - r) * terms[1])
    value, _ = Nft(strength=strength).loss(v, old, rows, rows.advantage / 5)
    torch.testing.assert_close(value[:, 0, 0], expected)


def test_nfts_branches_agree_where_nothing_has_moved():
    rows, v = noised([3.0]), torch.randn(1, 2, 4, 4)
    values = [Nft().loss(v, v, rows, torch.full((1, 1, 1), share))[0] for share in (-1.0, 0.2, 1.0)]
    torch.testing.assert_close(values[0], values[1])  # r and 1 - r round
    torch.testing.assert_close(values[1], values[2])


@pytest.mark.parametrize("advantage", [-5.0, -0.5, 0.5, 5.0])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_where_nft_ends(advantage, strength):
    """1 / strength of the way from the old velocity to the image's, or as far away from it."""
    rows, old = noised([advantage]), torch.randn(1, 2, 4, 4)
    way = (rows.target - old) / strength * (1 if advantage > 0 else -1)
    for part, ahead in ((0.5, 1), (0.99, 1), (1.01, -1), (2.0, -1)):
        descent = -gradient(Nft(strength=strength), old + part * way, old, rows)
        assert float((descent * way).sum()) * ahead > 0


def test_on_policy_all_are_weighted_flow_matching():
    rows, v = noised([1.5, -2.0, 0.5]), torch.randn(3, 2, 4, 4)
    size, t = mean_size(v, rows), rows.t[:, None, None, None]
    for objective in (Awm(), AdvantageFlow(normalised=False)):
        torch.testing.assert_close(gradient(objective, v, v, rows), weighted_matching(v, rows))
    for objective in (Nft(), Awm(weight="error"), AdvantageFlow()):
        torch.testing.assert_close(gradient(objective, v, v, rows), weighted_matching(v, rows, size / t))


def test_huber_weighs_an_error_by_its_power():
    rows, v = noised([1.0, -1.0]), torch.randn(2, 2, 4, 4)
    error = ((v - rows.target) ** 2).mean((1, 2, 3), keepdim=True)
    expected = weighted_matching(v, rows) * rows.t[:, None, None, None] * (error + 1e-10) ** -0.75
    torch.testing.assert_close(gradient(Awm(weight="huber"), v, v, rows), expected)


def test_awm_bounds_the_ratio():
    """A gradient is left where the ratio has passed the bound against its advantage alone."""
    rows = noised([1.0, 1.0, -1.0, -1.0])
    far, near = rows.target + 3, rows.target + 0.1
    v = torch.stack([near[0], far[1], near[2], far[3]])
    old = torch.stack([far[0], near[1], far[2], near[3]])
    moved = gradient(Awm(clip=0.2), v, old, rows).abs().amax((1, 2, 3)) > 0
    assert moved.tolist() == [False, True, True, False]


@pytest.mark.parametrize("advantage", [-5.0, -1.0, 0.0, 2.0, 9.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_minimum_of_advantage_flow(advantage, normalised):
    rows, old = noised([advantage]), torch.randn(1, 2, 4, 4)
    objective = AdvantageFlow(hold=1.5, normalised=normalised)
    a, hold = min(advantage, 5.0), 1.5 * 5.0
    best = old + a / (a + hold) * (rows.target - old)
    assert float(gradient(objective, best, old, rows).abs().max()) < 1e-5
    share = (rows.advantage / 5).clamp(-1, 1)
    for other in (best + 0.1, best - 0.1, old):
        least, value = (float(objective.loss(v, old, rows, share)[0]) for v in (best, other))
        assert value >= least - 1e-6


@pytest.mark.parametrize("objective", [o for o in ALL if getattr(o, "weight", "") != "huber"], ids=repr)
def test_a_grid_of_equal_advantages_is_the_whole_image_on_policy(objective):
    one = noised([1.0, -2.0])
    grid = replace(one, advantage=one.advantage.repeat(1, 2, 2))
    v = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(gradient(objective, v, v, grid) / 4, gradient(objective, v, v, one))


# ----------------------------------------------------------------------------------------------------- Gaussian flow


def images_of(flow, count, seed, reward):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=generator) + flow.shift.detach()
    value = reward(x)
    advantage = (value - value.mean()) / value.std()
    return Finished(x, torch.zeros(count, dtype=torch.long), value, advantage=advantage[:, None, None])


def run_of(flow, epochs=1):
    config = SimpleNamespace(seed=0, epochs=epochs, minibatches=1)
    return SimpleNamespace(config=config, policy=flow, ranks=None, fits={"batch": AdaptiveBatch(64)}, rewards=None)


def learn(flow, objective, images, iteration, rate, epochs=1):
    run, cond = run_of(flow, epochs), flow.encode(["0.0"])
    batch = objective.of_images(run, [SimpleNamespace(id=0)], cond, images, iteration)
    optimizer = torch.optim.SGD(flow.parameters(), rate)
    return update(
        flow.parameters(), optimizer, batch.rows, batch.replay, needed=batch.needed, epochs=epochs, minibatches=1,
        micro_batch=AdaptiveBatch(64), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_each_moves_the_mean_to_the_best_one(objective):
    """The reward of an image is highest at a mean of 0.4; by symmetry no weighting is left there."""
    flow = GaussianFlow()
    for i in range(60):
        images = images_of(flow, 32, i, lambda x: -((x.mean((1, 2, 3)) - 0.4) ** 2))
        learn(flow, objective, images, i, rate=6.0 if getattr(objective, "weight", "") != "huber" else 12.0)
    assert float(flow.shift.detach().mean()) == pytest.approx(0.4, abs=0.06)


def test_the_pull_to_the_base_decides_where_the_mean_ends():
    """A linear reward has no best mean; with the pull the mean ends where both forces are equal."""
    ends = []
    for pull in (0.5, 2.0):
        flow, objective = GaussianFlow(), Awm(**FREE | {"pull": pull})
        for i in range(80):
            learn(flow, objective, images_of(flow, 64, i, lambda x: x.mean((1, 2, 3))), i, rate=4.0)
        ends.append(float(flow.shift.detach().mean()))
    assert ends[0] / ends[1] == pytest.approx(4.0, rel=0.15)  # the force of the reward does not depend on the mean


@pytest.mark.parametrize("normalised", [False, True])
def test_many_updates_of_one_rollout_end_at_the_weighted_least_squares(normalised):
    """Off policy the convex form has one minimum: of a velocity that is linear in the shift it is known."""
    flow = GaussianFlow()
    objective = AdvantageFlow(**FREE | {"draws": 4}, normalised=normalised)
    images = images_of(flow, 8, 0, lambda x: x.mean((1, 2, 3)))
    rows = objective.of_images(run_of(flow, 200), [SimpleNamespace(id=0)], flow.encode(["0.0"]), images, 0).rows
    t, a = rows.t[:, None, None, None], rows.advantage[..., None]
    slope = -((t - (1 - t)) * (1 - t) / ((1 - t) ** 2 + t**2) + 1)  # of the velocity by the shift
    weight = t / (rows.old - rows.target).abs().mean((1, 2, 3), keepdim=True) if normalised else torch.ones_like(t)
    hold = objective.hold * objective.bound
    expected = (weight * a * slope * (rows.target - rows.old)).sum(0) / (weight * (a + hold) * slope**2).sum(0)
    learn(flow, objective, images, 0, rate=0.5, epochs=200)
    torch.testing.assert_close(flow.shift.detach(), expected, rtol=1e-3, atol=1e-4)


def group_gradients(objective, count=100):
    """The gradient of one group of images at different noises and times."""
    flow, gradients = GaussianFlow(), []
    images = images_of(flow, 8, 0, lambda x: x.mean((1, 2, 3)))
    for i in range(count):
        flow.shift.grad = None
        learn(flow, objective, images, i, rate=0.0)
        gradients.append(flow.shift.grad.clone())
    return torch.stack(gradients)


@pytest.mark.parametrize(("objective", "share"), [(Awm(), 1e-6), (Nft(), 0.1), (AdvantageFlow(), 0.1)], ids=repr)
def test_shared_noise_lowers_the_variance_of_a_groups_gradient(objective, share):
    """At one time. The error of a linear flow has its noise in common with its siblings', whose advantages sum to 0: it
    cancels, but for the weight of each by its own error."""
    settings = {"draws": 1, "span": (0.5, 0.501), "pull": 0.0}
    shared, each = (group_gradients(replace(objective, shared=shared, **settings)) for shared in (True, False))
    torch.testing.assert_close(shared.mean(), each.mean(), rtol=0.1, atol=0.0)  # the same in the mean
    assert float(shared.var(0).mean()) < share * float(each.var(0).mean())


# ---------------------------------------------------------------------------------------------- rows and what they cost


def test_images_of_a_prompt_share_noise_and_times_and_those_of_others_do_not():
    flow = GaussianFlow()
    images = Finished(
        torch.randn(5, 3, 4, 4), torch.tensor([0, 0, 0, 1, 1]), torch.rand(5), advantage=torch.ones(5, 1, 1)
    )
    prompts = [SimpleNamespace(id=0), SimpleNamespace(id=1)]
    rows = Nft(**FREE | {"draws": 3}).of_images(run_of(flow), prompts, torch.zeros(2), images, 0).rows
    noise, t = rows.noise.view(5, 3, -1), rows.t.view(5, 3)
    for first, other in ((0, 1), (0, 2), (3, 4)):
        assert torch.equal(noise[first], noise[other])
        assert torch.equal(t[first], t[other])
    assert not torch.equal(noise[0], noise[3])
    apart = Nft(**FREE | {"draws": 3}, shared=False).of_images(run_of(flow), prompts, torch.zeros(2), images, 0).rows
    assert len(apart.noise.flatten(1).unique(dim=0)) == len(apart.t.unique()) == 15


def test_times_lie_one_in_each_stretch_of_the_span():
    rows = Nft(draws=4, span=(0.0, 0.4)).examples(
        GaussianFlow(), images_of(GaussianFlow(), 6, 0, lambda x: x.sum((1, 2, 3))), torch.Generator().manual_seed(0)
    )
    t = rows.t.view(6, 4)
    for k in range(4):
        assert bool(((t[:, k] <= 1 - 0.1 * k + 1e-3) & (t[:, k] >= 1 - 0.1 * (k + 1) - 1e-3)).all())


def test_what_is_compared_is_computed_once_and_only_where_it_is_needed():
    flow = GaussianFlow()
    images = images_of(flow, 4, 0, lambda x: x.sum((1, 2, 3)))
    for objective, epochs, old, base in (
        (Nft(**FREE), 1, False, False),
        (Nft(**FREE), 2, True, False),
        (Nft(**FREE, lag=Lag(0.5)), 1, True, False),
        (Nft(**FREE | {"pull": 0.1}), 1, False, True),
    ):
        flow.counts.clear()
        batch = objective.of_images(run_of(flow, epochs), [SimpleNamespace(id=0)], torch.zeros(1), images, 0)
        assert ((batch.rows.old is not None), (batch.rows.base is not None)) == (old, base)
        assert flow.counts["forwards"] == objective.prepared(epochs) * len(batch.rows)
        assert (batch.needed is None) == (old or base)


def test_on_policy_computed_or_not_is_the_same():
    """The velocity of the rollout's policy, computed beside, gives the gradient of the one that is detached."""
    for objective in ALL:
        rows = noised([1.0, -1.0], shape=(3, 4, 4))
        flow, grads = GaussianFlow(), []
        with torch.no_grad():
            old = flow.velocity(rows.state, rows.t, torch.zeros(1), rows.index)
        for columns in (rows, replace(rows, old=old)):
            flow.shift.grad = None
            objective.replay(flow, torch.zeros(1), columns)[0].sum().backward()
            grads.append(flow.shift.grad.clone())
        assert torch.equal(*grads)


def test_a_lag_rises_and_stays():
    lag = Lag(most=0.5, rate=0.2, flat=1)
    assert [lag.at(i) for i in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.5, 0.5])
    assert Lag().at(1000) == 0.0
