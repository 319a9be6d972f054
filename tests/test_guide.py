"""Regional guidance: exact at its ends, nothing outside the mask."""

import pytest
import torch

from mmalign import policy as policies
from mmalign.flow.plan import ode
from mmalign.flow.sample import sample
from mmalign.policy.gaussian import GaussianFlow
from mmalign.refinement.velocity import regional_guidance, soft, towards
from mmalign.seeds import gaussian


def walked(flow, velocity, starts=3):
    start = torch.stack([gaussian(flow.latent_shape, i) for i in range(starts)])
    index = torch.zeros(starts, dtype=torch.long)
    return sample(velocity, start, flow.encode(["0.5"]), index, ode(flow.times(6))).finals


def moved(flow):
    with torch.no_grad():
        flow.shift.add_(torch.randn(flow.shift.shape, generator=torch.Generator().manual_seed(3)))
    return flow


def test_ends_and_outside_are_exact():
    flow = moved(GaussianFlow())
    mask = torch.zeros(4, 4)
    mask[1:3, 1:] = 1
    with flow.reference():
        base = walked(flow, flow.velocity)
    plain = walked(flow, flow.velocity)
    assert torch.equal(walked(flow, regional_guidance(flow, mask, 0.0)), base)
    assert torch.equal(walked(flow, regional_guidance(flow, torch.ones(4, 4), 1.0)), plain)
    assert torch.equal(walked(flow, regional_guidance(flow, 0 * mask, 3.0)), base)
    far = walked(flow, regional_guidance(flow, mask, 2.0))
    inside = mask.bool()
    assert torch.equal(far[..., ~inside], base[..., ~inside])
    torch.testing.assert_close(
        far[..., inside] - base[..., inside], 2 * (plain - base)[..., inside], atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_of_a_real_model_the_velocity_outside_is_the_bases_to_the_bit(random_model, guidance):
    policy = policies.load(random_model, guidance=guidance)
    policy.attach_lora(4, 8.0, None, 0)
    for p in policy.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    c, h, w = policy.latent_shape
    mask = torch.zeros(h, w)
    mask[: h // 2] = 1
    cond, index = policy.encode(["a red circle", "a blue square"]), torch.arange(2)
    x, t = torch.randn(2, c, h, w, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        plain = policy.velocity(x, t, cond, index)
        with policy.reference():
            base = policy.velocity(x, t, cond, index)
        policy.counts.clear()
        result = regional_guidance(policy, mask, 1.5)(x, t, cond, index)
        assert policy.counts["forwards"] == (4 if guidance == 1 else 8)
        assert torch.equal(regional_guidance(policy, torch.ones(h, w), 0.0)(x, t, cond, index), base)
        assert torch.equal(regional_guidance(policy, torch.ones(h, w), 1.0)(x, t, cond, index), plain)
    assert not torch.allclose(plain, base, atol=1e-3)
    assert torch.equal(result[:, :, h // 2 :], base[:, :, h // 2 :])
    torch.testing.assert_close(
        result[:, :, : h // 2], (base + 1.5 * (plain - base))[:, :, : h // 2], atol=1e-5, rtol=1e-4
    )


def test_a_mask_for_each_image():
    base, plain = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    weight = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 1.5)])
    assert towards(base, plain, weight).flatten(1).tolist() == [[0] * 12, [1.5] * 12]


def test_a_soft_edge_keeps_the_inside_and_falls_off():
    mask = torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    assert torch.equal(soft(mask, 0.0), mask)
    result = soft(mask, 1.0)
    assert result[7, 7] > 0.99
    assert result[7, 15] < 0.01
    assert 0.2 < result[7, 12] < result[7, 11] < 0.9
    assert result.sum().item() == pytest.approx(64, rel=1e-3)
