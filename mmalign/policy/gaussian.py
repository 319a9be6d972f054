"""A flow with a known solution: Gaussian data, exact velocity, one learnable shift of the mean.

For data `x_0 ~ N(mean + shift, spread^2)` in every element, the state at `t` has variance
`V = (1 - t)^2 spread^2 + t^2` and the velocity is `E[e - x_0 | x] = -m + (t - (1 - t) spread^2) / V * (x - (1 - t) m)`
with `m = mean + shift`. Samplers can be held to the data's mean and variance, and a reward's gradient to a closed form.
`mmalign train` trains it as `model: mmalign.policy.gaussian:GaussianFlow`, on prompts that are numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.policy.gradients import clamped
from mmalign.types import Latents
from reward_models.weights import fingerprint


class GaussianFlow:
    """`mean` is one number per prompt text, parsed from it ("0.5"); the adapter is `shift [C, h, w]`, 0 at first, and
    so is every other one that is attached by name."""

    def __init__(self, shape: tuple[int, int, int] = (3, 4, 4), spread: float = 1.0):
        self.latent_shape, self.image_size, self.spread = shape, shape[1:], spread
        self.device = torch.device("cpu")
        self.shifts = {"default": torch.nn.Parameter(torch.zeros(shape))}
        self.acts: str | None = "default"
        self.counts: Counter[str] = Counter()
        self.last: Latents | None = None  # the latents of the last velocity

    @property
    def shift(self) -> torch.nn.Parameter:
        return self.shifts["default"]

    @classmethod
    def load(cls, model: str, **settings: Any) -> "GaussianFlow":
        """The flow itself, whatever the settings of a pipeline are: float32 on the CPU, without guidance."""
        return cls()

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "P"]:
        return torch.tensor([float(text) for text in texts])

    def times(self, steps: int) -> Float[Tensor, "states"]:
        return torch.linspace(1, 0, steps + 1)

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Float[Tensor, "P"], index: Int[Tensor, "M"]) -> Latents:
        self.counts["forwards"] += len(x)
        self.last = x.detach()
        t = t[:, None, None, None]
        shift = torch.zeros_like(self.shift) if self.acts is None else self.shifts[self.acts]
        mean = cond[index][:, None, None, None] + shift
        variance = (1 - t) ** 2 * self.spread**2 + t**2
        return (t - (1 - t) * self.spread**2) / variance * (x - (1 - t) * mean) - mean

    def decode(self, x: Latents) -> Latents:
        """Pixels in [0, 1]: eight standard units of the latent, centred on grey."""
        self.counts["decodes"] += len(x)
        return (x / 8 + 0.5).clamp(0, 1)

    def decode_in_graph(self, x: Latents, recompute: bool = False) -> Latents:
        self.counts["decodes"] += len(x)
        return clamped(x / 8 + 0.5)

    def encode_images(self, images: Latents) -> Latents:
        return (images - 0.5) * 8

    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Float[Tensor, "P"], index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]:
        """The empty prompt stands for a mean of 0; a prompt moves all positions by the same amount."""
        empty, wanted = self.velocities(x, t, cond, index)
        return (wanted - empty).norm(dim=1)

    def velocities(
        self, x: Latents, t: Float[Tensor, "M"], cond: Float[Tensor, "P"], index: Int[Tensor, "M"]
    ) -> tuple[Latents, Latents]:
        return self.velocity(x, t, torch.zeros_like(cond), index), self.velocity(x, t, cond, index)

    @contextmanager
    def observed(self, blocks: Sequence[int] | None = None) -> Iterator[Callable[[int], Float[Tensor, "M F"]]]:
        """There are no blocks: the features are the latents themselves."""
        yield lambda rows: self.last[-rows:].flatten(1)

    def fingerprint(self) -> str:
        return fingerprint({"shape": torch.tensor(self.latent_shape), "spread": torch.tensor(self.spread)}, digits=16)

    def attach_lora(
        self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int, name: str = "default"
    ) -> None:
        """A shift is an adapter, and is the identity at first."""
        self.shifts.setdefault(name, torch.nn.Parameter(torch.zeros(self.latent_shape)))

    def adapters(self) -> list[str]:
        return [*self.shifts]

    def adapter(self, name: str = "default") -> dict[str, Tensor]:
        return {"shift": self.shifts[name].detach().clone()}

    def load_adapter(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        with torch.no_grad():
            self.shifts[name].copy_(tensors["shift"])

    def parameters(self, name: str = "default") -> list[torch.nn.Parameter]:
        return [self.shifts[name]]

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        before, self.acts = self.acts, name
        try:
            yield
        finally:
            self.acts = before

    def reference(self) -> AbstractContextManager:
        return self.acting(None)
