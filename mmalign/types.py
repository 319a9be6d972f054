"""The records that cross module borders, and the legend of letters.

`P` prompts · `S` seeds (members) per prompt · `R` routes per seed, of which `L` are learnt from · `G = S L` siblings
per prompt · `N = P G` walks · `E` finished images · `T` transitions · `C h w` latent · `H W` pixels · `K` reward
components · `a b` credit grid (1x1 = whole image ... h x w) · `M` rows of a minibatch.

Time runs from 1 (noise) to 0 (image): `x_t = (1 - t) x_0 + t e`, the velocity is `v = e - x_0`, and a step goes from
`t` to `s < t`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import Parameter

Latents = Float[Tensor, "M C h w"]
Velocity = Callable[[Latents, Float[Tensor, "M"], Any, Int[Tensor, "M"]], Latents]  # (x, t, cond, index) -> v


@dataclass(frozen=True)
class Plan:
    """How one starting noise is walked to images: a row per route, a column per step.

    `t [R, T+1]` falls from its start to 0 and stays there once the route is finished. `noise [R, T]` is the kernel's
    own parameter at each step (0 = an ODE step). `draw [R, T]` numbers the noise sample a stochastic step uses: routes
    with the same times and draws so far are in the same state, which is computed once. `t_max` bounds the noise of
    `flow_sde` near t = 1.

    `shown [L, T+1]`: the first L routes are learnt from; of each of their states it names the route that completes it
    by ODE, whose image stands for the state (-1: none). The other routes are there for nothing else.
    """

    kernel: str
    t: Float[Tensor, "R states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    t_max: float
    shown: Int[Tensor, "L states"]

    def __post_init__(self):
        routes, steps = self.noise.shape
        if self.t.shape[1] != steps + 1:
            raise ValueError(f"{self.t.shape[1]} times for {steps} steps; {steps + 1} are needed")
        falling = (self.t[:, 1:] < self.t[:, :-1]) | ((self.t[:, 1:] == 0) & (self.t[:, :-1] == 0))
        if not bool(falling.all()) or bool(self.t[:, -1].any()):
            row = self.t[int((~falling).any(1).int().argmax())].tolist()
            raise ValueError(f"times must fall from noise to image at 0, got {[round(x, 4) for x in row]}")
        if bool((self.draw[self.noise == 0] != 0).any()):
            raise ValueError("a deterministic step cannot fan out: its draw must be 0")
        if bool(((self.noise > 0) & (self.t[:, 1:] == 0)).any()):
            raise ValueError("a step that ends at t = 0, where the image is finished, must be deterministic")
        if len(self.state[:, -1].unique()) < routes:
            raise ValueError("two routes are the same; every route needs a time or a draw of its own somewhere")
        for row, column in (self.shown >= 0).nonzero().tolist():
            by = int(self.shown[row, column])
            if self.state[by, column] != self.state[row, column] or bool(self.noise[by, column:].any()):
                raise ValueError(f"route {by} does not complete state {column} of route {row}")

    @cached_property
    def state(self) -> Int[Tensor, "R states"]:
        """Equal numbers in a column mean the same state."""
        columns = [torch.zeros_like(self.draw[:, 0])]
        for k in range(self.steps):
            step = (columns[-1], self.t[:, k].double(), self.t[:, k + 1].double(), self.noise[:, k], self.draw[:, k])
            columns.append(torch.stack([c.double() for c in step], 1).unique(dim=0, return_inverse=True)[1])
        return torch.stack(columns, 1)

    @property
    def steps(self) -> int:
        return self.noise.shape[1]

    @property
    def routes(self) -> int:
        return self.noise.shape[0]

    @property
    def learnt(self) -> int:
        return self.shown.shape[0]

    @cached_property
    def cost(self) -> tuple[int, int, int]:
        """What one start costs: network evaluations, finished images, distinct stochastic steps to learn from."""
        moving = [self.state[self.t[:, k] > 0, k].unique().numel() for k in range(self.steps)]
        rows, cols = (self.noise[: self.learnt] > 0).nonzero(as_tuple=True)
        learnt = torch.stack([cols, self.state[rows, cols + 1]], 1).unique(dim=0)
        return sum(moving), self.routes, len(learnt)


@dataclass(frozen=True)
class Trajectories:
    """`N` walks from noise to latent image, and the finished images that stand for their states.

    `x [N, T+1, C, h, w]` are the states, fp32, rounded to the storage type before anything is computed from them;
    `mean [N, T, C, h, w]` and `std [N, T]` the Gaussian each next state was drawn from (`std` 0: a deterministic step).
    Means instead of log-densities, because a ratio of nearly equal densities is exact in the difference of their means
    and mostly rounding in the difference of their logarithms.
    `node [N, T+1]`: equal numbers in a column mean the same state; a tree needs no tree class.
    `prompt [N]` is the row of each walk's prompt in the batch, `member [N]` the starting noise it came from; `t`,
    `noise` its times and the kernel's parameter.
    `ends [E, C, h, w]` are the distinct finished latents, `owner [E]` the row of each one's prompt, and
    `shown [N, T+1]` the end that stands for each state (-1: none; in the last column, the walk's own).
    """

    kernel: str
    t_max: float
    x: Float[Tensor, "N states C h w"]
    mean: Float[Tensor, "N T C h w"]
    std: Float[Tensor, "N T"]
    t: Float[Tensor, "N states"]
    noise: Float[Tensor, "N T"]
    node: Int[Tensor, "N states"]
    prompt: Int[Tensor, "N"]
    member: Int[Tensor, "N"]
    ends: Float[Tensor, "E C h w"]
    owner: Int[Tensor, "E"]
    shown: Int[Tensor, "N states"]

    @property
    def steps(self) -> int:
        return self.std.shape[1]

    def at_states(self, values: Float[Tensor, "E *cells"]) -> Float[Tensor, "N states *cells"]:
        """A number or map of each end, at the states it stands for; NaN where none does."""
        found = values.to(self.shown.device)[self.shown.clamp(min=0)]
        return torch.where(over(self.shown < 0, found), torch.nan, found)


def over(mask: Shaped[Tensor, "*rows"], values: Shaped[Tensor, "*rows_and_cells"]) -> Shaped[Tensor, "*rows_and_ones"]:
    """The mask with as many dimensions as `values`, which it then masks whole cells of."""
    return mask.view(*mask.shape, *(1 for _ in range(values.ndim - mask.ndim)))


@dataclass(frozen=True)
class Judgement:
    """What the reward models saw. `reward [N, T+1]`: the reward of the image that stands for each state, NaN where none
    does or scoring failed; the last column is the finished image. It may be a map, `[N, T+1, a, b]`: a reward at each
    place, NaN where there is no opinion. `parts` holds each component's raw score of the finished images; `regions`
    the credit in [-1, 1] at places of the image of each end, `marks` the regions behind it. `failures`: reasons by
    end."""

    reward: Float[Tensor, "N states *cells"]
    parts: dict[str, Float[Tensor, "N"]]
    regions: Float[Tensor, "E a b"] | None = None
    marks: "Marks | None" = None
    failures: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """A record whose fields have a row each for the same things, which are picked by number."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, rows) -> "Rows":
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Marks(Rows):
    """Up to `R` regions in each of `N` images: the share of each cell they cover, their credit in [-1, 1] (NaN: there
    is no such region), and whether the column means the same thing in all images of a prompt."""

    share: Float[Tensor, "N R a b"]
    credit: Float[Tensor, "N R"]
    named: Bool[Tensor, "N R"]


@dataclass(frozen=True)
class Transitions(Rows):
    """Steps to learn from, one a row: state, next state, the old mean it was drawn around, times, advantage, weight.

    `index [M]` is the row of the prompt in the conditioning; `step [M]` the column in the plan.
    """

    x: Latents
    y: Latents
    mean: Latents
    t: Float[Tensor, "M"]
    s: Float[Tensor, "M"]
    noise: Float[Tensor, "M"]
    advantage: Float[Tensor, "M a b"]
    weight: Float[Tensor, "M"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]


@runtime_checkable
class Policy(Protocol):
    """A text-to-image flow model with a trainable adapter; one file per model family under `mmalign/policy/`.

    `encode` gives the conditioning of P texts, of which `velocity` takes one row per latent (`index [M]`).
    `times(steps)` are the model's own. `prompt_effect` is the distance of the velocity from that of the empty prompt.
    `reference()` switches the adapter off for a while. `counts` holds forwards and decodes. `image_size` is (H, W).
    """

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    counts: Counter[str]

    def encode(self, texts: Sequence[str]) -> Any: ...

    def times(self, steps: int) -> Float[Tensor, "states"]: ...

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]) -> Latents: ...

    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]: ...

    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]: ...

    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents: ...

    def parameters(self) -> list[Parameter]: ...

    def reference(self) -> AbstractContextManager: ...
