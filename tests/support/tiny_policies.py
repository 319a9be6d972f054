"""Policies of the tiny random pipelines, and what they draw."""

import torch
from tiny_pipelines import FAMILIES, STEPS

from mmalign import policy as policies
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.seeds import gaussian

TEXTS = ["a red circle", "three green squares", "a cross"]
CASES = [(name, guidance) for name, family in FAMILIES.items() for guidance in family.guidances]


def opened(folders, name, guidance, size=None):
    return policies.load(folders(name), guidance=guidance, size=size or FAMILIES[name].sizes[0])


def latents(policy, batch=64):
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(len(TEXTS))])
    cond, index = policy.encode(TEXTS), torch.arange(len(TEXTS))
    return sample(policy.velocity, start, cond, index, plans.ode(policy.times(STEPS)), batch=batch).finals


def moved(policy, scale=0.05):
    """A LoRA that does something."""
    policy.attach_lora(4, 8.0, None, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy
