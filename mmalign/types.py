"""The records that cross module borders, and the legend of letters.

`P` prompts · `S` seeds (starting noises) per prompt · `R` routes per start, the first `L` of which are trained on ·
`G = S L` siblings per prompt · `N = P G` trajectories · `E` finished images · `T` steps · `C h w` latent · `H W`
pixels · `K` reward components · `a b` credit grid (1x1 = whole image ... h x w) · `M` rows of a minibatch.

Time runs from 1 (noise) to 0 (image): `x_t = (1 - t) x_0 + t e`, the velocity is `v = e - x_0`, and a step goes from
`t` to `s < t`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mmalign.latents import Columns, places_of

Latents = Float[Tensor, "M C h w"]
Velocity = Callable[[Latents, Float[Tensor, "M"], Any, Int[Tensor, "M"]], Latents]  # (x, t, cond, index) -> v


@runtime_checkable
class Kernel(Protocol):
    """A Gaussian step. `noise` is its level, one for all steps or one each; `step` takes the level of each row (0 is
    the ODE step) and the schedule's second time `t_max`, and returns mean and standard deviation."""

    noise: Any

    def step(self, x: Latents, v: Latents, t: Any, s: Any, noise: Any, t_max: float) -> tuple[Latents, Tensor]: ...


@dataclass(frozen=True)
class Plan:
    """How one starting noise becomes images: a row per route, a column per step.

    `t [R, T+1]` falls from its start to 0 and stays there once the route is finished. `noise [R, T]` is the kernel's
    level at each step (0 = an ODE step). `draw [R, T]` numbers the noise sample of a stochastic step: routes with the
    same times and draws so far are in the same state, which is computed once. `t_max` is the schedule's second time.

    `finished_by [L, T+1]`: for each state of the L trained routes, the route that completes it by ODE and whose image
    stands for the state (-1: none). The other routes exist only to complete states.
    """

    kernel: Kernel
    t: Float[Tensor, "R states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    t_max: float
    finished_by: Int[Tensor, "L states"]

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
            raise ValueError("two routes are the same; each needs a time or a draw that no other has")
        for row, column in (self.finished_by >= 0).nonzero().tolist():
            by = int(self.finished_by[row, column])
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
    def trained(self) -> int:
        return self.finished_by.shape[0]

    @property
    def stochastic(self) -> list[int]:
        """The steps at which a trained route draws noise."""
        return (self.noise[: self.trained] > 0).any(0).nonzero()[:, 0].tolist()

    @cached_property
    def cost(self) -> tuple[int, int, int, int]:
        """Of one start: forwards, finished images, distinct stochastic steps to train on, states they start from."""
        moving = [self.state[self.t[:, k] > 0, k].unique().numel() for k in range(self.steps)]
        rows, cols = (self.noise[: self.trained] > 0).nonzero(as_tuple=True)
        trained, starts = (torch.stack([cols, self.state[rows, cols + k]], 1).unique(dim=0) for k in (1, 0))
        return sum(moving), self.routes, len(trained), len(starts)


@dataclass(frozen=True)
class Tree:
    """Who is whose sibling, which step was stochastic, which finished image stands for which state: all that credit
    reads of `N` trajectories. It is small, lies on the CPU, where scores are too, and is gathered from all ranks.

    `t [N, T+1]` are the times, `noise [N, T]` the kernel's level and `std [N, T]` the standard deviation of each step
    (0: deterministic). `node [N, T+1]`: equal numbers in a column mean the same state. `prompt [N]` is the row of each
    trajectory's prompt in the batch, `member [N]` the starting noise it came from. `owner [E]` is the row of each
    finished image's prompt, `final [N, T+1]` the finished image that stands for each state (-1: none; in the last
    column, the trajectory's own).
    """

    t: Float[Tensor, "N states"]
    noise: Float[Tensor, "N T"]
    std: Float[Tensor, "N T"]
    node: Int[Tensor, "N states"]
    prompt: Int[Tensor, "N"]
    member: Int[Tensor, "N"]
    owner: Int[Tensor, "E"]
    final: Int[Tensor, "N states"]

    @property
    def steps(self) -> int:
        return self.std.shape[1]

    def at_states(self, values: Float[Tensor, "E *cells"]) -> Float[Tensor, "N states *cells"]:
        """A number or map of each finished image, at the states it stands for; NaN elsewhere."""
        each = values[self.final.clamp(min=0)]
        return torch.where(over(self.final < 0, each), torch.nan, each)


@dataclass(frozen=True)
class Trajectories:
    """The latents of a `Tree`: what the learner replays. They never leave their rank.

    `x [N, states, C, h, w]` are the states of `columns`, fp32, rounded to the storage type before anything is computed
    from them; `mean [N, means, C, h, w]` the means of the Gaussians that states after the kept steps were drawn from;
    `state` and `mean_of` find them by column. `finals [E, C, h, w]` are the finished latents. `features [N, T, F]`, on
    the CPU, are what the network made of each state but the last, where they were asked for; 0 once a trajectory is
    finished.
    Means instead of log-densities, because a ratio of nearly equal densities is exact in the
    difference of their means and mostly rounding in the difference of their logarithms.

    `off [N]`: drawn under another text than that of its prompt (None: none is). Its `mean` is that of whoever drew it,
    so that its ratio is the importance weight.
    """

    tree: Tree
    kernel: Kernel
    t_max: float
    x: Float[Tensor, "N states C h w"]
    mean: Float[Tensor, "N means C h w"]
    finals: Float[Tensor, "E C h w"]
    columns: Columns
    off: Bool[Tensor, "N"] | None = None
    features: Float[Tensor, "N T F"] | None = None

    def state(self, rows: Int[Tensor, "*M"], columns: Int[Tensor, "*M"]) -> Float[Tensor, "*M C h w"]:
        """The states of these trajectories at these columns, each one kept."""
        return self.x[rows, places_of(self.columns.states, columns, "state")]

    def mean_of(self, rows: Int[Tensor, "*M"], columns: Int[Tensor, "*M"]) -> Float[Tensor, "*M C h w"]:
        """The means of these trajectories' steps at these columns, each one kept."""
        return self.mean[rows, places_of(self.columns.means, columns, "mean of step")]


def over(mask: Shaped[Tensor, "*rows"], values: Shaped[Tensor, "*rows_and_cells"]) -> Shaped[Tensor, "*rows_and_ones"]:
    """The mask with as many dimensions as `values`, so that it masks all cells of a row."""
    return mask.view(*mask.shape, *(1 for _ in range(values.ndim - mask.ndim)))


@dataclass(frozen=True)
class Judgement:
    """The rewards of a batch. `reward [N, T+1]`: the reward of the image that stands for each state, NaN where none
    does or scoring failed; the last column is the finished image. It may be a map, `[N, T+1, a, b]`: a reward per
    position, NaN without an opinion. `parts` holds each component's raw score of the finished images; `regions [E, a,
    b]` the credit in [-1, 1] per position of each image, `marks` the regions behind it. `failures`: reasons by image.
    `ends`: the finished image's reward in two parts, before their sum is rounded: that of scorers which are shown other
    states too, and that of those which are not; None where all are. `log_ratio [N, T]`: log of the density of each
    stochastic step that was drawn, less that of the model without adapter, in nats per latent element; 0 at
    deterministic steps, None unless the credit needs it. `values`: what a value head expects of each state but the
    last, as a difference from the mean reward of its group; NaN at steps where it is not to be trusted. `process`:
    rewards of the steps themselves, 0 at deterministic ones, where a credit learns them."""

    reward: Float[Tensor, "N states *cells"]
    parts: dict[str, Float[Tensor, "N"]]
    regions: Float[Tensor, "E a b"] | None = None
    marks: "Marks | None" = None
    failures: Mapping[int, str] = field(default_factory=dict)
    ends: Float[Tensor, "N 2"] | None = None
    log_ratio: Float[Tensor, "N T"] | None = None
    values: Float[Tensor, "N T"] | None = None
    process: Float[Tensor, "N T a b"] | None = None


@dataclass(frozen=True)
class Rows:
    """A record of columns: every field has one row per thing, and rows are picked by number. A field may be None."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, rows: Any) -> "Rows":
        return type(self)(**{name: None if value is None else value[rows] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> "Rows":
        """The record on a device."""
        return type(self)(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})

    @property
    def forward(self) -> Int[Tensor, "M"]:
        """Rows with the same number share a forward of the network: those of one `node`, where there are nodes."""
        return vars(self).get("node", torch.arange(len(self)))


@dataclass(frozen=True)
class Marks(Rows):
    """Up to `R` regions in each of `N` images: the share of each cell they cover, their credit in [-1, 1] (NaN: no
    such region), and whether the column means the same thing in all images of a prompt."""

    share: Float[Tensor, "N R a b"]
    credit: Float[Tensor, "N R"]
    named: Bool[Tensor, "N R"]


@dataclass(frozen=True)
class Transitions(Rows):
    """Steps to train on, one a row: state, next state, the old mean it was drawn around, times, advantage, weight.

    `index [M]` is the row of the prompt in the conditioning; `step [M]` the column in the plan; `node [M]` numbers the
    states; `off [M]` is whether another text was drawn under (None: nowhere); `v` are the rollout's velocities in their
    graph, if they were kept.
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
    node: Int[Tensor, "M"]
    off: Bool[Tensor, "M"] | None = None
    v: Latents | None = None
