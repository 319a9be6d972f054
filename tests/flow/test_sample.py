"""The sampling loop on a flow whose answer is known."""

import pytest
import torch
from trajectories import plan_by_hand

from mmalign.config.schema import Config
from mmalign.flow import kernels, plan as plans
from mmalign.flow.sample import sample
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import KERNELS, FlowSde
from mmalign.seeds import gaussian, seed_of

LEVELS = {"flow_sde": 0.7, "dance_sde": 0.5, "cps": 0.8, "ddim": 1.0, "scheduled": 0.8}
BY_NAME = {kind.type: kind for kind in KERNELS}
KERNEL = FlowSde(0.7)


def rollout(flow, plan, starts=4, prompts=2, batch=256, seed=0, **options):
    cond = flow.encode(["0.5", "-1.0"][:prompts])
    index = torch.arange(starts) % prompts
    start = torch.stack([gaussian(flow.latent_shape, seed_of(seed, i)) for i in range(starts)])
    return sample(
        flow.velocity,
        start,
        cond,
        index,
        plan,
        lambda *key: gaussian(flow.latent_shape, seed_of(seed, *key)),
        batch,
        **options,
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_steps_outside_the_window_are_the_ode(name):
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    plain = rollout(flow, plans.ode(t))
    mixed = rollout(flow, plans.window(t, BY_NAME[name](LEVELS[name]), 2, 4))
    assert torch.equal(mixed.x[:, :3], plain.x[:, :3])
    assert not torch.equal(mixed.x[:, 3], plain.x[:, 3])
    assert ((mixed.tree.std > 0) == torch.tensor([False, False, True, True, False, False])).all()
    assert torch.equal(mixed.mean[:, [0, 1, 4, 5]], mixed.x[:, [1, 2, 5, 6]])
    v = flow.velocity(mixed.x[:, 4], t[4].expand(4), flow.encode(["0.5", "-1.0"]), mixed.tree.prompt)
    assert torch.equal(mixed.x[:, 5], kernels.ode(mixed.x[:, 4], v, t[4], t[5])[0])


@pytest.mark.parametrize("name", BY_NAME)
def test_stored_means_are_those_of_the_stored_states(name):
    flow, t, kernel = GaussianFlow(), GaussianFlow().times(6), BY_NAME[name](LEVELS[name])
    paths = rollout(flow, plans.sde(t, kernel), storage=torch.bfloat16)
    assert torch.equal(paths.x, paths.x.bfloat16().float())
    cond = flow.encode(["0.5", "-1.0"])
    for k in range(5):
        v = flow.velocity(paths.x[:, k], t[k].expand(4), cond, paths.tree.prompt)
        mean, std = kernel.step(paths.x[:, k], v, t[k], t[k + 1], paths.tree.noise[:, k], paths.t_max)
        assert torch.equal(mean, paths.mean[:, k])
        assert torch.equal(std, paths.tree.std[:, k])


def test_batch_size_and_company_change_nothing():
    flow, plan = GaussianFlow(), plans.branch(GaussianFlow().times(5), KERNEL, [0, 2], 3)
    whole, single = rollout(flow, plan), rollout(flow, plan, batch=1)
    assert torch.allclose(whole.x, single.x, atol=1e-6)
    fewer = rollout(flow, plan, starts=2)
    assert torch.equal(fewer.x, whole.x[: 2 * plan.routes])


def test_branches_share_the_trunk_and_its_forwards():
    flow, t, children = GaussianFlow(), GaussianFlow().times(10), 6
    plan = plans.branch(t, KERNEL, range(9), children)
    paths = rollout(flow, plan, starts=4, prompts=1)
    assert flow.counts["forwards"] == 4 * (children * 10 * 9 // 2 + 9) == 1116
    assert len(paths.tree.node[:, -1].unique()) == 4 * children * 9 == 216
    trunk = rollout(GaussianFlow(), plans.ode(t), starts=4, prompts=1)
    for row in range(len(paths.x)):
        k = int(paths.tree.std[row].argmax())
        assert paths.tree.std[row].count_nonzero() == 1
        assert torch.equal(paths.x[row, : k + 1], trunk.x[paths.tree.member[row], : k + 1])
    same = paths.tree.node[:, 3, None] == paths.tree.node[None, :, 3]
    assert torch.equal(same, (paths.x[:, None, 3] == paths.x[None, :, 3]).flatten(2).all(2))


def test_branches_of_a_state_differ_by_their_noise_alone():
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    paths = rollout(flow, plans.branch(t, KERNEL, [1], 3), starts=1, prompts=1)
    assert torch.equal(paths.mean[0, 1], paths.mean[1, 1])
    z = [(paths.x[j, 2] - paths.mean[j, 1]) / paths.tree.std[j, 1] for j in range(3)]
    for j in range(3):
        assert torch.allclose(z[j], gaussian(flow.latent_shape, seed_of(0, 0, 1, (-1, j))), atol=1e-5)
    cond, index = flow.encode(["0.5"]), torch.zeros(1, dtype=torch.long)
    quiet = sample(
        flow.velocity, paths.x[:1, 0], cond, index, plans.branch(t, KERNEL, [1], 3),
        lambda *_: torch.zeros(flow.latent_shape),
    )  # fmt: skip
    assert torch.equal(quiet.finals[0], quiet.finals[1])
    assert torch.equal(quiet.finals[0], quiet.finals[2])


def test_one_child_is_a_plain_window():
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    one = rollout(flow, plans.branch(t, KERNEL, [2], 1))
    plain = rollout(flow, plans.window(t, KERNEL, 2, 3))
    assert torch.equal(one.x, plain.x)
    assert torch.equal(one.mean, plain.mean)


def test_adding_routes_leaves_the_others_alone():
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    few = rollout(flow, plans.branch(t, KERNEL, [1, 3], 2), starts=1)
    many = rollout(flow, plans.branch(t, KERNEL, [0, 1, 3], 4), starts=1)
    assert torch.equal(few.x, many.x[[4, 5, 8, 9]])


def test_times_and_fan_out_are_checked_when_the_plan_is_built():
    t = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="must fall"):
        plans.ode(t.flip(0))
    with pytest.raises(ValueError, match="last step must stay deterministic"):
        plans.window(t, KERNEL, 0, 2)
    with pytest.raises(ValueError, match="cannot fan out"):
        plan_by_hand(t, torch.zeros(2, 2), torch.tensor([[0, 0], [1, 0]]))
    with pytest.raises(ValueError, match="two routes are the same"):
        plan_by_hand(t, torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="no kernel called 'sde'"):
        Config(kernel="sde")
    with pytest.raises(ValueError, match=r"must be positive at a stochastic step, got 0\.0"):
        plans.sde(torch.linspace(1, 0, 5), FlowSde(0.0))


def final(name, noise, steps, spread):
    """Standard deviation of the samples over that of the data, and the error of their mean, from 32 trajectories of
    3,072 independent elements: standard errors 0.0023 and 0.0032 spread."""
    flow = GaussianFlow((12, 16, 16), spread)
    g = torch.Generator().manual_seed(7)
    start, index = torch.randn(32, *flow.latent_shape, generator=g), torch.zeros(32, dtype=torch.long)
    plan = plans.sde(flow.times(steps), BY_NAME[name](noise))
    cond = flow.encode(["0.5"])
    x = sample(flow.velocity, start, cond, index, plan, lambda *_: torch.randn(flow.latent_shape, generator=g)).x
    return float(x[:, -1].std()) / spread, float(x[:, -1].mean()) - 0.5


@pytest.mark.parametrize(("name", "noise"), [("flow_sde", 0.7), ("dance_sde", 0.5), ("scheduled", 0.8), ("ddim", 1.0)])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_stochastic_kernels_converge_to_the_data_law(name, noise, spread):
    """The error of the standard deviation is c/T: extrapolated from 40 and 160 steps it is gone, within four standard
    errors (0.015). The mean is right at any number of steps."""
    (coarse, _), (fine, shift) = (final(name, noise, steps, spread) for steps in (40, 160))
    assert (4 * fine - coarse) / 3 == pytest.approx(1, abs=0.015)
    assert abs(shift) < 0.015


def test_cps_does_not_and_we_say_so():
    """Under-dispersed at any number of steps: its noise does not shrink with the step."""
    ratio, _ = final("cps", 0.8, 160, 1.0)
    assert 0.76 < ratio < 0.84


@pytest.mark.parametrize("key", [(0, "rollout", 3, 7, 1), ("evaluation", 12, 0), ("refine", 5, 2)])
def test_of_a_seed_the_lower_32_bits_count(key):
    seed = seed_of(*key)
    assert 2**32 < seed < 2**63
    assert torch.equal(gaussian((4, 8, 8), seed), gaussian((4, 8, 8), seed % 2**32))
    assert not torch.equal(gaussian((4, 8, 8), seed), gaussian((4, 8, 8), seed ^ 1))
