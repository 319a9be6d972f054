"""Ways from a differentiable reward back to the velocity: which steps of a trajectory carry a gradient.

A trajectory `x_{i+1} = a_i x_i + b_i v(x_i, t_i) + q_i e_i` ends in the clean latent `x_T`. A step of the ODE has
`a = 1`, `b = t_{i+1} - t_i = h_i < 0` and `q = 0`; a stochastic one has those of its kernel, whose mean is linear in
state and velocity, and the noise that the rollout drew, which is held fixed. With sg(y) for y without gradient, the
latents that are decoded and scored are

    sparse         x_T + sum over S of c b_i (v(sg x_i) - sg v(sg x_i))      K steps S, drawn; c near W_all / W_S
    last           the last K steps again, from sg x_{T-K}
    jump           x_k - t_k v(sg x_k)                                       k drawn in the later part
    low_variance   the same at the last state k, and n copies of it with new noise

Sparse is FlowBP-Sparse (arXiv 2606.11075): no Jacobian of a step is multiplied by that of another, and memory is that
of K velocities. Last is DRaFT-K, low_variance DRaFT-LV (arXiv 2309.17400), jump ReFL (arXiv 2304.05977).

A way picks what a row holds (`picked`) and returns the latents of rows in a graph with the velocities on the way
(`latents`). `width`: velocities of a row; `images`: its latents; `again`: of the velocities, those whose state has a
gradient. Add one: a frozen dataclass here, and its name in `WAYS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Latents, Rows, Trajectories

Count = Annotated[int, Ge(1), Le(1000)]
Velocity = Callable[[Latents, Float[Tensor, "M"], Int[Tensor, "M"]], Latents]  # (x, t, index) -> v
Visited = list[tuple[Latents, Float[Tensor, "M"], Latents]]  # (x, t, v): one velocity of each row


@dataclass(frozen=True)
class Picked(Rows):
    """`k` states of each trajectory with their times and the a and b of their steps, and its finished latent. `weight`
    is c; `noise` that of copies; `drawn` what a step added to its mean, None where nothing did or it is not asked for;
    `index` the row of the prompt, `step` that of the trajectory's first picked step."""

    x: Float[Tensor, "M k C h w"]
    t: Float[Tensor, "M k"]
    a: Float[Tensor, "M k"]
    b: Float[Tensor, "M k"]
    end: Latents
    weight: Float[Tensor, "M"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]
    noise: Float[Tensor, "M n C h w"] | None = None
    drawn: Float[Tensor, "M k C h w"] | None = None


class Way:
    """Defaults of what a way says of itself. `walks`: whether it takes the picked steps again, one after the other."""

    images: int = 1
    again: int = 0
    copies: int = 0
    walks: ClassVar[bool] = False

    @property
    def width(self) -> int:
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """ValueError unless trajectories of so many steps suit it."""

    def chosen(self, t: Float[Tensor, "M states"], generator: torch.Generator) -> Int[Tensor, "M k"]:
        """The steps of each trajectory whose states a row holds."""
        raise NotImplementedError

    def weights(self, t: Float[Tensor, "M states"], steps: Int[Tensor, "M k"]) -> Float[Tensor, "M"]:
        return torch.ones(len(t))

    def latents(self, velocity: Velocity, rows: Picked) -> tuple[Float[Tensor, "M images C h w"], Visited]:
        raise NotImplementedError

    def picked(self, paths: Trajectories, which: Int[Tensor, "M"], count: int, generator: torch.Generator) -> Picked:
        """The rows of these trajectories, of `count` steps each."""
        tree, device = paths.tree, paths.x.device
        t, noise, drawn = tree.t[which, : count + 1], None, None
        steps = self.chosen(t, generator)
        at = which[:, None].expand_as(steps)
        if self.copies:
            noise = torch.randn(len(which), self.copies, *paths.x.shape[2:], generator=generator)
        if self.walks and bool((tree.noise > 0).any()):
            drawn = paths.state(at, steps + 1) - paths.mean_of(at, steps)
        a, b = linear(paths, tree.t[at, steps], tree.t[at, steps + 1], tree.noise[at, steps])
        rows = Picked(
            paths.state(at, steps), tree.t[at, steps], a, b, paths.state(which, torch.full_like(which, count)),
            self.weights(t, steps), tree.prompt[which], steps.amin(1), noise, drawn,
        )  # fmt: skip
        return rows.to(device)


@dataclass(frozen=True)
class Sparse(Way):
    """`steps`: K, how many steps of a trajectory are drawn, step i with weight `(i + 1)^power`, without replacement.
    `correct`: g in `c = 1 + g (W_all / W_S - 1)`, with W the sum of |h| over all steps and over those drawn; 1 makes up
    for the other steps, 0 does not."""

    type: Literal["sparse"] = "sparse"
    steps: Count = 4
    power: Annotated[float, Ge(0), Le(10)] = 1.0
    correct: Annotated[float, Ge(0), Le(1)] = 0.5

    @property
    def width(self) -> int:
        return self.steps

    def check(self, steps: int) -> None:
        at_most(self.steps, steps)

    def chosen(self, t: Float[Tensor, "M states"], generator: torch.Generator) -> Int[Tensor, "M k"]:
        return drawn(len(t), t.shape[1] - 1, self.steps, self.power, generator)

    def weights(self, t: Float[Tensor, "M states"], steps: Int[Tensor, "M k"]) -> Float[Tensor, "M"]:
        return correction(t, steps, self.correct)

    def latents(self, velocity: Velocity, rows: Picked) -> tuple[Float[Tensor, "M 1 C h w"], Visited]:
        count = rows.x.shape[1]
        x, t = rows.x.flatten(0, 1), rows.t.flatten()
        v = velocity(x, t, rows.index.repeat_interleave(count)).unflatten(0, (-1, count))
        share = (rows.weight[:, None] * rows.b)[:, :, None, None, None]
        moved = (share * (v - v.detach())).sum(1)
        return (rows.end + moved)[:, None], [(rows.x[:, i], rows.t[:, i], v[:, i]) for i in range(count)]


@dataclass(frozen=True)
class Last(Way):
    """`steps`: K, the last steps of a trajectory, through which the gradient goes; all of them is back-propagation
    through the sampler. Memory is that of K velocities, or of one with gradient checkpointing."""

    type: Literal["last"] = "last"
    steps: Count = 1
    walks = True

    @property
    def width(self) -> int:
        return self.steps

    @property
    def again(self) -> int:
        return self.steps - 1

    def check(self, steps: int) -> None:
        at_most(self.steps, steps)

    def chosen(self, t: Float[Tensor, "M states"], generator: torch.Generator) -> Int[Tensor, "M k"]:
        steps = t.shape[1] - 1
        return torch.arange(steps - self.steps, steps).expand(len(t), -1)

    def latents(self, velocity: Velocity, rows: Picked) -> tuple[Float[Tensor, "M 1 C h w"], Visited]:
        x, visited = rows.x[:, 0], []
        for k, t in enumerate(rows.t.unbind(1)):
            v = velocity(x, t, rows.index)
            visited.append((x, t, v))
            a, b = rows.a[:, k, None, None, None], rows.b[:, k, None, None, None]
            x = a * x + b * v
            x = x if rows.drawn is None else x + rows.drawn[:, k]
        return x[:, None], visited


@dataclass(frozen=True)
class Jump(Way):
    """`after`: the share of a trajectory's steps after which the one is drawn that jumps to the clean latent."""

    type: Literal["jump"] = "jump"
    after: Annotated[float, Ge(0), Lt(1)] = 0.5
    width = 1

    def chosen(self, t: Float[Tensor, "M states"], generator: torch.Generator) -> Int[Tensor, "M 1"]:
        steps = t.shape[1] - 1
        return torch.randint(int(self.after * steps), steps, (len(t), 1), generator=generator)

    def latents(self, velocity: Velocity, rows: Picked) -> tuple[Float[Tensor, "M 1 C h w"], Visited]:
        x, t = rows.x[:, 0], rows.t[:, 0]
        v = velocity(x, t, rows.index)
        return clean(x, t, v)[:, None], [(x, t, v)]


@dataclass(frozen=True)
class LowVariance(Way):
    """`copies`: n, how often the finished latent is noised again to the time of the last step and cleaned by one more.
    `least`: the time of the last step is at least this; some schedules end in a step that is too short to learn
    from."""

    type: Literal["low_variance"] = "low_variance"
    copies: Annotated[int, Ge(1), Le(100)] = 2
    least: Annotated[float, Gt(0), Lt(1)] = 0.02

    @property
    def width(self) -> int:
        return 1 + self.copies

    @property
    def images(self) -> int:
        return 1 + self.copies

    def chosen(self, t: Float[Tensor, "M states"], generator: torch.Generator) -> Int[Tensor, "M 1"]:
        return ((t[:, :-1] >= self.least).sum(1, keepdim=True) - 1).clamp(min=0)

    def latents(self, velocity: Velocity, rows: Picked) -> tuple[Float[Tensor, "M n1 C h w"], Visited]:
        x, t = rows.x[:, 0], rows.t[:, 0]
        v = velocity(x, t, rows.index)
        image, visited = clean(x, t, v), [(x, t, v)]
        share, times, count = t[:, None, None, None, None], t.repeat_interleave(self.copies), self.copies
        noised = ((1 - share) * image.detach()[:, None] + share * rows.noise).flatten(0, 1)
        v = velocity(noised, times, rows.index.repeat_interleave(count))
        copies = clean(noised, times, v).unflatten(0, (-1, count))
        for part in zip(*(each.unflatten(0, (-1, count)).unbind(1) for each in (noised, times, v)), strict=True):
            visited.append(part)
        return torch.cat([image[:, None], copies], 1), visited


WAYS = (Sparse, Last, Jump, LowVariance)


def at_most(picked: int, steps: int) -> None:
    if picked > steps:
        raise ValueError(f"way: steps: {picked} of the {steps} steps of a trajectory; at most {steps} are there")


def linear(
    paths: Trajectories, t: Float[Tensor, "M k"], s: Float[Tensor, "M k"], noise: Float[Tensor, "M k"]
) -> tuple[Float[Tensor, "M k"], Float[Tensor, "M k"]]:
    """a and b of steps from t to s at these levels of noise: the mean of each is `a x + b v`."""
    one = torch.ones(t.numel(), 1, 1, 1)

    def mean(x: float, v: float) -> Tensor:
        step = paths.kernel.step(x * one, v * one, t.flatten(), s.flatten(), noise.flatten(), paths.t_max)
        return step[0].view_as(t)

    return mean(1.0, 0.0), mean(0.0, 1.0)


def clean(x: Latents, t: Float[Tensor, "M"], v: Latents) -> Latents:
    """The clean latent that velocity `v` at `x` leads to in one step."""
    return x - t[:, None, None, None] * v


def drawn(count: int, steps: int, picked: int, power: float, generator: torch.Generator) -> Int[Tensor, "count picked"]:
    """Different steps of each of `count` trajectories, in order, step i drawn with weight `(i + 1)^power`."""
    weights = torch.arange(1, steps + 1, dtype=torch.float64) ** power
    if not count:
        return torch.zeros(0, picked, dtype=torch.long)
    return torch.multinomial(weights.expand(count, -1), picked, generator=generator).sort(1).values


def correction(t: Float[Tensor, "M states"], steps: Int[Tensor, "M k"], share: float) -> Float[Tensor, "M"]:
    """`c = 1 + share (W_all / W_S - 1)`. With share 1, steps with the same velocity gradient give the gradient of all
    steps, whichever are drawn; in general it is without bias only for equal steps drawn with equal weights."""
    sizes = t[:, :-1] - t[:, 1:]
    return 1 + share * (sizes.sum(1) / sizes.gather(1, steps).sum(1) - 1)
