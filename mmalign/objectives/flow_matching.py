"""The error of flow matching, place by place: how far the velocity is from the one that leads to a given image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Latents, Marks, Policy, Rows


@dataclass(frozen=True)
class Finished(Rows):
    """`N` finished images to learn from by regression, whoever made them: clean latents, the row of each one's prompt,
    its reward, and what was found at places of it."""

    x: Float[Tensor, "N C h w"]
    prompt: Int[Tensor, "N"]
    reward: Float[Tensor, "N"]
    places: Float[Tensor, "N a b"]
    marks: Marks


def times(policy: Policy, draws: int, count: int, generator: torch.Generator) -> Float[Tensor, "count draws"]:
    """Times in (0, 1], spread as the model's own schedule spreads its steps: one in each of `draws` equal stretches of
    it, from noise to image."""
    schedule = policy.times(1000)
    place = (torch.arange(draws) + torch.rand(count, draws, generator=generator)) / draws
    return schedule[(place * 1000).long().clamp(max=999)]


def noise_like(x: Latents, generator: torch.Generator) -> Latents:
    return torch.randn(x.shape, generator=generator).to(x)


def error(
    policy: Policy, x: Latents, noise: Latents, t: Float[Tensor, "M"], cond, index: Int[Tensor, "M"]
) -> Float[Tensor, "M h w"]:
    """Squared distance of the velocity at `(1 - t) x + t noise` from `noise - x`, mean over C."""
    share = t[:, None, None, None]
    v = policy.velocity((1 - share) * x + share * noise, t, cond, index).float()
    return ((v - (noise - x)) ** 2).mean(1)
