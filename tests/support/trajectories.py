"""Trajectories of the closed-form flow, hand-made plans and judgements, for the tests of every package."""

import torch

from mmalign.flow.sample import sample
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.types import Judgement, Plan


def sampled(plan, starts, prompts=1, seed=0, flow=None, **options):
    """Trajectories from fixed noise; each prompt has a block of the `starts`."""
    flow = flow or GaussianFlow()
    index = torch.arange(starts) * prompts // starts
    start = torch.stack([gaussian(flow.latent_shape, seed_of(seed, i)) for i in range(starts)])
    draw = lambda *key: gaussian(flow.latent_shape, seed_of(seed, *key))  # noqa: E731
    return sample(flow.velocity, start, flow.encode(["0.0"] * prompts), index, plan, draw, **options)


def plan_by_hand(t, noise, draw):
    """One schedule; every route is trained on and has its own image alone."""
    finished_by = torch.full((len(noise), len(t)), -1)
    finished_by[:, -1] = torch.arange(len(noise))
    return Plan(FlowSde(0.7), t.repeat(len(noise), 1), noise, draw, 0.9, finished_by)


def judged(paths, reward):
    """Every completed state by a function of latents."""
    return Judgement(paths.tree.at_states(reward(paths.finals)), {})


def judged_as(tree, values):
    """The finished images by given numbers."""
    table = torch.full(tree.node.shape, torch.nan)
    table[:, -1] = values
    return Judgement(table, {})
