"""A flow with a known solution: Gaussian data, exact velocity, one learnable shift of the mean.

For data `x_0 ~ N(mean + shift, spread^2)` in every element, the state at `t` has variance
`V = (1 - t)^2 spread^2 + t^2` and the velocity is `E[e - x_0 | x] = -m + (t - (1 - t) spread^2) / V * (x - (1 - t) m)`
with `m = mean + shift`. Tests compare samplers with the data's mean and variance, and gradients with closed forms.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Latents


class GaussianFlow:
    """`mean` is one number per prompt text, parsed from it ("0.5"); the adapter is `shift [C, h, w]`, 0 at first."""

    def __init__(self, shape: tuple[int, int, int] = (3, 4, 4), spread: float = 1.0):
        self.latent_shape, self.image_size, self.spread = shape, shape[1:], spread
        self.device = torch.device("cpu")
        self.shift = torch.nn.Parameter(torch.zeros(shape))
        self.enabled = True
        self.counts: Counter[str] = Counter()

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "P"]:
        return torch.tensor([float(text) for text in texts])

    def times(self, steps: int) -> Float[Tensor, "states"]:
        return torch.linspace(1, 0, steps + 1)

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Float[Tensor, "P"], index: Int[Tensor, "M"]) -> Latents:
        self.counts["forwards"] += len(x)
        t = t[:, None, None, None]
        mean = cond[index][:, None, None, None] + (self.shift if self.enabled else self.shift.detach() * 0)
        variance = (1 - t) ** 2 * self.spread**2 + t**2
        return (t - (1 - t) * self.spread**2) / variance * (x - (1 - t) * mean) - mean

    def decode(self, x: Latents) -> Latents:
        """The latent itself: rewards of this flow score latents."""
        self.counts["decodes"] += len(x)
        return x

    def encode_images(self, images: Latents) -> Latents:
        return images

    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Float[Tensor, "P"], index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]:
        """The empty prompt stands for a mean of 0; a prompt moves all positions equally."""
        empty = self.velocity(x, t, torch.zeros_like(cond), index)
        return (self.velocity(x, t, cond, index) - empty).norm(dim=1)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.shift]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True
