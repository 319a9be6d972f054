"""Trajectories of the closed-form flow, hand-made plans and judgements, for the tests of every part."""

import torch

from mmalign.flow import plan as plans
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.policy.gaussian import GaussianFlow
from mmalign.types import Judgement


def walk(plan, starts, prompts=1, seed=0, flow=None, **options):
    """Walk a plan from fixed noise; the `starts` are dealt to the prompts in blocks."""
    flow = flow or GaussianFlow()
    index = torch.arange(starts) * prompts // starts
    start = torch.stack([gaussian(flow.latent_shape, seed_of(seed, i)) for i in range(starts)])
    draw = lambda *key: gaussian(flow.latent_shape, seed_of(seed, *key))  # noqa: E731
    return sample(flow.velocity, start, flow.encode(["0.0"] * prompts), index, plan, draw, **options)


def tree(t, noise, draw):
    """A plan by hand: one schedule, every route learnt from and shown at its end."""
    shown = torch.full((len(noise), len(t)), -1)
    shown[:, -1] = torch.arange(len(noise))
    return plans.Plan("flow_sde", t.repeat(len(noise), 1), noise, draw, 0.9, shown)


def judged(paths, reward):
    """Every shown state by a function of latents."""
    return Judgement(paths.at_states(reward(paths.ends)), {})


def judged_as(paths, values):
    """The finished images by given numbers."""
    table = torch.full(paths.node.shape, torch.nan)
    table[:, -1] = values
    return Judgement(table, {})
