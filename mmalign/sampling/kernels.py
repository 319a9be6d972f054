"""The kernels of `mmalign.flow.kernels` with the noise of a run: what a config can name.

Add one: a frozen dataclass with `noise` and `step`, and its name in `KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from mmalign.flow import kernels
from mmalign.flow.kernels import Scalars, Step

Latents = Float[Tensor, "N C h w"]
Noise = Annotated[float, Gt(0)] | tuple[Annotated[float, Ge(0)], ...]  # one for all steps, or one for each
Share = Annotated[float, Gt(0), Le(1)] | tuple[Annotated[float, Ge(0), Le(1)], ...]


@dataclass(frozen=True)
class Plain:
    """A kernel whose step needs no bound near t = 1: `transition` is the function."""

    noise: Noise = 0.7
    transition: ClassVar[Callable[..., Step]]

    def step(self, x: Latents, v: Latents, t: Scalars, s: Scalars, noise: Scalars, t_max: float) -> Step:
        return self.transition(x, v, t, s, noise)


@dataclass(frozen=True)
class FlowSde:
    """Flow-GRPO (arXiv 2505.05470); `noise` is its a."""

    noise: Noise = 0.7
    type = "flow_sde"

    def step(self, x: Latents, v: Latents, t: Scalars, s: Scalars, noise: Scalars, t_max: float) -> Step:
        return kernels.flow_sde(x, v, t, s, noise, t_max)


class DanceSde(Plain):
    """DanceGRPO (arXiv 2505.07818); `noise` is its eta."""

    type, transition = "dance_sde", staticmethod(kernels.dance_sde)


@dataclass(frozen=True)
class Cps(Plain):
    """Flow-CPS (arXiv 2509.05952); `noise` is its eta."""

    noise: Share = 0.7
    type, transition = "cps", staticmethod(kernels.cps)


@dataclass(frozen=True)
class Ddim(Plain):
    """Stochastic DDIM (DiffusionNFT, arXiv 2509.16117, appendix); `noise` is its eta."""

    noise: Share = 0.7
    type, transition = "ddim", staticmethod(kernels.ddim)


@dataclass(frozen=True)
class Scheduled(Plain):
    """A free noise level `noise` = g, mostly one for each step, or the file in which `mmalign calibrate` wrote them."""

    noise: Noise | str = 0.7
    type, transition = "scheduled", staticmethod(kernels.scheduled)


KERNELS = (FlowSde, DanceSde, Cps, Ddim, Scheduled)
