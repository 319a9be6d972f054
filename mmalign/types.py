"""The records that cross module borders, and the legend of letters.

`P` prompts · `S` seeds (members) per prompt · `R` routes per seed · `G = S R` siblings per prompt · `N = P G` images ·
`T` transitions · `C h w` latent · `H W` pixels · `K` reward components · `a b` credit grid (1x1 = whole image ... h x
w) · `M` rows of a minibatch.

Time runs from 1 (noise) to 0 (image): `x_t = (1 - t) x_0 + t e`, the velocity is `v = e - x_0`, and a step goes from
`t` to `s < t`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter

Latents = Float[Tensor, "M C h w"]
Velocity = Callable[[Latents, Float[Tensor, "M"], Any, Int[Tensor, "M"]], Latents]  # (x, t, cond, index) -> v


@dataclass(frozen=True)
class Plan:
    """How each starting noise is walked to an image: one row per route, one column per step.

    `t [T+1]` falls from its start to 0. `noise [R, T]` is the kernel's own parameter at each step (0 = an ODE step).
    `draw [R, T]` numbers the noise sample a stochastic step uses: routes that have taken the same draws so far are in
    the same state, which is computed once. `t_max` bounds the noise of `flow_sde` near t = 1.
    """

    kernel: str
    t: Float[Tensor, "states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    t_max: float

    def __post_init__(self):
        routes, steps = self.noise.shape
        if len(self.t) != steps + 1:
            raise ValueError(f"{len(self.t)} times for {steps} steps; {steps + 1} are needed")
        if not bool((self.t[1:] < self.t[:-1]).all()):
            raise ValueError(f"times must fall from noise to image, got {[round(x, 4) for x in self.t.tolist()]}")
        if bool((self.draw[self.noise == 0] != 0).any()):
            raise ValueError("a deterministic step cannot fan out: its draw must be 0")
        if (
            len({tuple(zip(*pair, strict=True)) for pair in zip(self.noise.tolist(), self.draw.tolist(), strict=True)})
            < routes
        ):
            raise ValueError("two routes are the same; every route needs a draw of its own somewhere")

    @property
    def steps(self) -> int:
        return self.noise.shape[1]

    @property
    def routes(self) -> int:
        return self.noise.shape[0]


@dataclass(frozen=True)
class Trajectories:
    """`N` walks from noise to latent image.

    `x [N, T+1, C, h, w]` are the states, fp32, rounded to the storage type before their density was taken.
    `logp [N, T, h, w]` is the log-density of each transition in nats per latent element: the mean over C, so that its
    mean over h, w is the field's usual mean over all elements. It is 0 where the step was deterministic (`std` 0).
    `node [N, T+1]`: equal numbers in a column mean the same state; a tree needs no tree class.
    `prompt [N]` is the row of each walk's prompt in the batch, `member [N]` the starting noise it came from.
    `noise`, `std [N, T]` are the kernel's parameter and the standard deviation of each step.
    """

    plan: Plan
    x: Float[Tensor, "N states C h w"]
    logp: Float[Tensor, "N T h w"]
    node: Int[Tensor, "N states"]
    prompt: Int[Tensor, "N"]
    member: Int[Tensor, "N"]
    noise: Float[Tensor, "N T"]
    std: Float[Tensor, "N T"]


@dataclass(frozen=True)
class Judgement:
    """What the reward models saw. `reward [N, T+1]`: the reward of each state's image, NaN where it was not shown;
    the last column is the finished image. `parts` holds each component's raw score of the finished image."""

    reward: Float[Tensor, "N states"]
    parts: dict[str, Float[Tensor, "N"]]
    regions: Float[Tensor, "N a b"] | None = None
    critiques: tuple[str, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Transitions:
    """Steps to learn from, one a row: state, next state, their times, old log-density, advantage, weight.

    `index [M]` is the row of the prompt in the conditioning; `step [M]` the column in the plan.
    """

    x: Latents
    y: Latents
    t: Float[Tensor, "M"]
    s: Float[Tensor, "M"]
    noise: Float[Tensor, "M"]
    logp: Float[Tensor, "M h w"]
    advantage: Float[Tensor, "M a b"]
    weight: Float[Tensor, "M"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows) -> "Transitions":
        return Transitions(**{name: value[rows] for name, value in vars(self).items()})


@runtime_checkable
class Policy(Protocol):
    """A text-to-image flow model with a trainable adapter; one file per model family under `mmalign/policy/`.

    `encode` gives the conditioning of P texts, of which `velocity` takes one row per latent (`index [M]`).
    `times(steps)` are the model's own. `reference()` switches the adapter off for a while. `spent` counts forwards
    and decodes.
    """

    latent_shape: tuple[int, int, int]
    spent: Counter[str]

    def encode(self, texts: Sequence[str]) -> Any: ...

    def times(self, steps: int) -> Float[Tensor, "states"]: ...

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]) -> Latents: ...

    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]: ...

    def parameters(self) -> list[Parameter]: ...

    def reference(self) -> AbstractContextManager: ...
