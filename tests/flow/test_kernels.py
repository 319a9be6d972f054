"""Transition kernels against reference numbers, torch.distributions and closed forms."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from mmalign.flow import kernels as k
from mmalign.sampling.kernels import KERNELS as TABLE

T_MAX = 0.999
KERNELS = {kernel.type: kernel() for kernel in TABLE}
LEVELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 1.0, "scheduled": 0.5}
X, V, Y = 0.37, -1.2, 0.5

# (t, s), kernel, noise, m, q, mean, log-density of Y: computed by hand from the definitions
REFERENCE = [
    ((0.9, 0.8), "flow_sde", 0.0, 0.8, 0.0, 0.490000, None),
    ((0.9, 0.8), "flow_sde", 0.7, 0.555000, 0.664078, 0.428750, -0.515339),
    ((0.9, 0.8), "dance_sde", 0.3, 0.795000, 0.094868, 0.488750, 1.429296),
    ((0.9, 0.8), "cps", 0.8, 0.247214, 0.760845, 0.351803, -0.664583),
    ((0.9, 0.8), "ddim", 1.0, 0.355556, 0.716645, 0.378889, -0.600044),
    ((0.5, 0.3), "flow_sde", 0.0, 0.3, 0.0, 0.610000, None),
    ((0.5, 0.3), "flow_sde", 0.7, 0.202000, 0.313050, 0.632540, 0.152829),
    ((0.5, 0.3), "dance_sde", 0.3, 0.282000, 0.134164, 0.614140, 0.727866),
    ((0.5, 0.3), "cps", 0.8, 0.092705, 0.285317, 0.657678, 0.182510),
    ((0.5, 0.3), "ddim", 1.0, 0.128571, 0.271052, 0.649429, 0.234544),
]


def full(value: float, n: int = 1) -> torch.Tensor:
    return torch.full((n, 2, 3, 3), value)


def step(name, x, v, t, s, noise):
    return KERNELS[name].step(x, v, t, s, noise, T_MAX)


@pytest.mark.parametrize(("times", "name", "noise", "m", "q", "mean", "logp"), REFERENCE)
def test_reference_vectors(times, name, noise, m, q, mean, logp):
    got, std = step(name, full(X), full(V), *times, noise)
    assert got.mean().item() == pytest.approx(mean, abs=1e-5)
    assert std.item() == pytest.approx(q, abs=1e-5)
    t, s = times
    clean, noise_hat = X - t * V, X + (1 - t) * V
    assert (got.mean().item() - (1 - s) * clean) / noise_hat == pytest.approx(m, abs=1e-5)
    if logp is not None:
        assert k.log_density(full(Y), got, std).mean().item() == pytest.approx(logp, abs=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_zero_noise_is_the_stock_euler_step_to_the_bit(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    for i in range(10):
        t, s = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        mean, std = step(name, x, v, t, s, 0.0)
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
        assert torch.equal(mean, x)
        assert std.eq(0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_a_deterministic_step_has_no_density(name):
    mean, std = step(name, full(X), full(V), 0.5, 0.3, 0.0)
    with pytest.raises(ValueError, match="no log-density"):
        k.log_density(full(Y), mean, std)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("t", "s"), [(0.95, 0.9), (0.6, 0.45), (0.278, 0.0089)])
def test_coefficients_with_exact_velocity(name, t, s):
    """From x = (1-t) x0 + t e with v = e - x0, the clean latent keeps weight 1 - s and the noise variance is known."""
    noise = LEVELS[name]
    x0, e = torch.tensor(1.7), torch.tensor(-0.6)
    mean, std = step(name, full(0) + (1 - t) * x0 + t * e, full(0) + e - x0, t, s, noise)
    m = (mean.mean() - (1 - s) * x0) / e
    variance = float(m**2 + std**2)
    if name in ("cps", "ddim"):
        assert variance == pytest.approx(s**2, abs=1e-6)
    else:
        g = {"flow_sde": noise * math.sqrt(t / (1 - t))}.get(name, noise)
        h = t - s
        assert variance == pytest.approx(s**2 + h**2 * (g**2 / t + g**4 / (4 * t**2)), rel=1e-4, abs=1e-6)


def test_density_is_the_gaussian_averaged_over_channels():
    torch.manual_seed(1)
    mean, y, std = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.tensor([0.2, 0.7, 1.3])
    exact = Normal(mean, std[:, None, None, None].expand_as(mean)).log_prob(y)
    logp = k.log_density(y, mean, std)
    assert torch.allclose(logp, exact.mean(1), atol=1e-6)
    elements = y[0].numel()
    assert torch.allclose(logp.mean((1, 2)) * elements, exact.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_draws_have_the_stated_moments(name):
    mean, std = step(name, full(X), full(V), 0.8, 0.6, LEVELS[name])
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    draws = mean.mean() + std * z
    assert draws.mean().item() == pytest.approx(mean.mean().item(), abs=4 * float(std) / 300)
    assert draws.std().item() == pytest.approx(float(std), rel=0.01)


@pytest.mark.parametrize("name", KERNELS)
def test_times_per_sample_equal_looping_and_stay_finite_at_the_start(name):
    torch.manual_seed(2)
    x, v = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    t, s = torch.tensor([1.0, 0.9, 0.5, 0.278]), torch.tensor([0.96, 0.8, 0.3, 0.0089])
    noise = torch.tensor([0.7, 0.5, 0.3, 0.7])
    mean, std = KERNELS[name].step(x, v, t, s, noise, 0.96)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(std).all()
    for i in range(4):
        one, q = KERNELS[name].step(x[i : i + 1], v[i : i + 1], float(t[i]), float(s[i]), float(noise[i]), 0.96)
        assert torch.equal(one[0], mean[i])
        assert torch.equal(q[0], std[i])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("t", "s"), [(0.3, 0.5), (0.4, 0.4)])
def test_time_must_fall(name, t, s):
    with pytest.raises(ValueError, match="smaller s"):
        step(name, full(X), full(V), t, s, LEVELS[name])


def test_flow_sde_bound_is_the_published_clamp():
    """At t = 1 with t_max = the second time, g = a sqrt(1 / (1 - sigma_1)): 3.506 and q = 0.700 on SD3.5's ten
    steps."""
    _, std = k.flow_sde(full(X), full(V), 1.0, 0.9601, 0.7, t_max=0.9601)
    assert std.item() == pytest.approx(0.7, abs=1e-3)
    assert std.item() / math.sqrt(1 - 0.9601) == pytest.approx(3.506, abs=3e-3)


def test_kl_is_that_of_the_gaussians():
    torch.manual_seed(3)
    p, q, std = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    wide = std[:, None, None, None].expand_as(p)
    kl = k.gaussian_kl(p, q, std)
    assert torch.allclose(kl, kl_divergence(Normal(p, wide), Normal(q, wide)).mean(1), atol=1e-5)
    assert k.gaussian_kl(p, p, std).eq(0).all()
    assert (kl >= 0).all()


def test_kl_is_the_expected_log_ratio():
    p, q, std = full(0.2), full(0.5), torch.tensor([0.4])
    z = torch.randn(20_000, 2, 3, 3, generator=torch.Generator().manual_seed(4))
    y = p + std * z
    many = std.expand(len(y))
    ratio = k.log_density(y, p.expand_as(y), many) - k.log_density(y, q.expand_as(y), many)
    assert ratio.mean().item() == pytest.approx(k.gaussian_kl(p, q, std).mean().item(), rel=0.01)


def test_kl_in_velocity():
    """For Flow-SDE: KL = h (1-t) (1 + a^2/2)^2 / (2 a^2 t) |dv|^2."""
    t, s, a, dv = 0.6, 0.45, 0.7, 0.3
    mean, std = k.flow_sde(full(X), full(V), t, s, a, T_MAX)
    other, _ = k.flow_sde(full(X), full(V + dv), t, s, a, T_MAX)
    expected = (t - s) * (1 - t) * (1 + a**2 / 2) ** 2 / (2 * a**2 * t) * dv**2
    assert k.gaussian_kl(mean, other, std).mean().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_density_gradient_in_velocity(name):
    """d log p / d v = (z / q) (-|d mean / d v|), with |d mean / d v| = (1-s) t - m (1-t)."""
    t, s, noise, z = 0.7, 0.5, LEVELS[name], 0.8
    v = full(V).double().requires_grad_()
    mean, std = step(name, full(X), v, t, s, noise)
    y = (mean + std * z).detach()
    k.log_density(y, mean, std).sum().backward()
    clean, noise_hat = X - t * V, X + (1 - t) * V
    m = (mean.detach().mean() - (1 - s) * clean) / noise_hat
    expected = -z / float(std) * float((1 - s) * t - m * (1 - t)) / v.shape[1]
    assert torch.allclose(v.grad, torch.full_like(v, expected), rtol=1e-3)


def test_density_does_not_depend_on_size():
    """Doubling the latent with the same content leaves the mean over elements, and so the meaning of a clip range."""
    torch.manual_seed(5)
    mean, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    tile = (1, 1, 2, 2)
    small = k.log_density(y, mean, 0.5).mean()
    assert torch.allclose(k.log_density(y.repeat(tile), mean.repeat(tile), 0.5).mean(), small, atol=1e-6)


def test_clean_latent():
    x0, e, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    at = t[:, None, None, None]
    assert torch.allclose(k.clean((1 - at) * x0 + at * e, e - x0, t), x0, atol=1e-6)
