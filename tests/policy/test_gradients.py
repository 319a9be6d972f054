"""Images in a graph: those of `decode`, and their gradients at the latents."""

import pytest
import torch
from tiny_pipelines import FAMILIES

from mmalign.policy import load
from mmalign.policy.gaussian import GaussianFlow
from mmalign.policy.gradients import clamped


def test_a_clamped_value_keeps_its_gradient():
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    value = clamped(x)
    assert value.tolist() == [0, 0.5, 1]
    value.sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


def test_the_gaussian_decodes_in_a_graph():
    flow, x = GaussianFlow(), torch.randn(2, 3, 4, 4, requires_grad=True)
    images = flow.decode_in_graph(x)
    assert torch.equal(images, flow.decode(x.detach()))
    images.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1 / 8))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_decodes_in_a_graph(family, recompute, folders):
    policy = load(folders(family), size=(64, 64))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = policy.decode_in_graph(x, recompute)
    parts = x.detach().split(1) if recompute else [x.detach()]  # another batch takes other kernels
    torch.testing.assert_close(images, torch.cat([policy.decode(part) for part in parts]), rtol=0, atol=1e-5)
    images[0].sum().backward()
    assert x.grad[0].abs().sum() > 0
    assert x.grad[1].eq(0).all()
    assert all(p.grad is None for p in policy.pipe.vae.parameters())
