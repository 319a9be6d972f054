"""The error of flow matching, per position: how far the velocity is from the one that leads to a given image."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.policy.protocol import Policy
from mmalign.types import Latents, Rows


@dataclass(frozen=True)
class Examples(Rows):
    """Noised images, one a row: clean latent, noise, time, weight of each cell, row of the prompt, stretch of time."""

    x: Latents
    noise: Latents
    t: Float[Tensor, "M"]
    weight: Float[Tensor, "M a b"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]


def examples(
    policy: Policy,
    x: Float[Tensor, "N C h w"],
    prompt: Int[Tensor, "N"],
    weight: Float[Tensor, "N a b"],
    draws: int,
    generator: torch.Generator,
) -> Examples:
    """Each image at `draws` times, with fresh noise for each."""
    x = x.repeat_interleave(draws, 0)
    return Examples(
        x,
        noise_like(x, generator),
        times(policy, draws, len(prompt), generator).flatten().to(x),
        weight.to(x).repeat_interleave(draws, 0),
        prompt.repeat_interleave(draws),
        torch.arange(draws, device=x.device).repeat(len(prompt)),
    )


def times(
    policy: Policy, draws: int, count: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, "count draws"]:
    """Times in (0, 1], spread as the model's own schedule spreads its steps: one in each of `draws` equal stretches of
    it, or of a `span` of it, from 0 (noise) to 1 (image)."""
    schedule, (first, last) = policy.times(1000), span
    index = (torch.arange(draws) + torch.rand(count, draws, generator=generator)) / draws
    return schedule[((first + (last - first) * index) * 1000).long().clamp(max=999)]


def noised(x: Latents, noise: Latents, t: Float[Tensor, "M"]) -> Latents:
    """`(1 - t) x + t noise`."""
    share = t[:, None, None, None]
    return (1 - share) * x + share * noise


def noise_like(x: Latents, generator: torch.Generator) -> Latents:
    return torch.randn(x.shape, generator=generator).to(x)


def error(
    policy: Policy, x: Latents, noise: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]
) -> Float[Tensor, "M h w"]:
    """Squared distance of the velocity at `(1 - t) x + t noise` from `noise - x`, mean over C."""
    v = policy.velocity(noised(x, noise, t), t, cond, index).float()
    return ((v - (noise - x)) ** 2).mean(1)
