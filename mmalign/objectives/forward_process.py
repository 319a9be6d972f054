"""What objectives share that learn from finished images by noising them again, without trajectories.

A finished image x with its noise e and time t is the state `x_t = (1 - t) x + t e`, whose velocity towards the image is
`u = e - x`. A loss compares the current velocity v with u, and with the velocity of the policy that drew the images,
v_old. Any solver may draw the images, and nothing of the sampling is stored.

Images of one prompt may share their noises and times (V-GRPO, arXiv 2604.23380): what is equal in all of them then
cancels in the group, whose advantages sum to about 0.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.flow.sample import chunks
from mmalign.learn.loss import Grid, Map, pool
from mmalign.objectives.flow_matching import noise_like, noised, times
from mmalign.objectives.objective import AT_ONCE, Draws, Finished, Lag, OnImages, Run, TrainBatch
from mmalign.policy.protocol import Trainable
from mmalign.types import Latents, Rows

Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Noised(Rows):
    """Images at one noise and time a row, with the advantage of each cell. `old` is the velocity of the policy that
    drew the images, None where it is the one in training; `base` that of the model without adapter, None where nothing
    asks for it; `index` the row of the prompt, `step` the stretch of time."""

    x: Latents
    noise: Latents
    t: Float[Tensor, "M"]
    advantage: Grid
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]
    old: Latents | None = None
    base: Latents | None = None

    @property
    def target(self) -> Latents:
        return self.noise - self.x

    @property
    def state(self) -> Latents:
        return noised(self.x, self.noise, self.t)


@dataclass(frozen=True)
class ForwardProcess(OnImages):
    """`draws`: times and noises of each image, one time in each of so many equal stretches of `span`, a part of the
    model's schedule from 0 (noise) to 1 (image). `shared`: all images of a prompt take the same ones.

    Advantages of `bound` and more count as that; `pull` is the weight of `mean (v - v_base)^2`, which keeps the policy
    near the model without adapter; `lag` lets the policy that draws the images follow slowly.
    """

    draws: Draws = 1
    span: tuple[Share, Share] = (0.0, 0.6)
    shared: bool = True
    bound: Annotated[float, Ge(1e-3)] = 5.0
    pull: Annotated[float, Ge(0)] = 0.1
    lag: Lag = AT_ONCE
    uses = frozenset({"advantage", "region"})
    siblings: ClassVar[int] = 2
    fewer = "replay_forwards, transitions: fewer where an image has no score or an advantage is 0"

    def __post_init__(self):
        if not self.span[0] < self.span[1]:
            raise ValueError(f"span {list(self.span)} must rise")

    def prepared(self, updates: int) -> int:
        return self.compares(updates) + (self.pull > 0)

    def stored(self, updates: int) -> int:
        """An image, its noise, and the velocities it is compared with."""
        return 2 + self.prepared(updates)

    def compares(self, updates: int) -> bool:
        """Whether the policy that drew the images differs from the one in training at some update."""
        return self.lag.most > 0 or updates > 1

    def loss(self, v: Latents, old: Latents, rows: Noised, share: Grid) -> tuple[Grid, dict[str, Grid]]:
        """The loss of each cell at velocity `v`, and statistics; `share` is the advantage over `bound`, in [-1, 1]."""
        raise NotImplementedError

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Noised:
        count = len(images)
        groups = min(count, 1) if self.shared else count
        noise = noise_like(images.x[:groups].repeat_interleave(self.draws, 0), generator)
        t = times(policy, self.draws, groups, generator, self.span).flatten().to(noise)
        if self.shared and groups:
            noise, t = noise.repeat(count, 1, 1, 1), t.repeat(count)
        columns = {"x": images.x, "advantage": images.advantage.to(noise), "index": images.prompt}
        columns = {name: value.repeat_interleave(self.draws, 0) for name, value in columns.items()}
        return Noised(noise=noise, t=t, step=torch.arange(self.draws, device=t.device).repeat(count), **columns)

    def batch_of(self, run: Run, cond: Any, rows: Noised) -> TrainBatch:
        """The rows with the velocities that they are compared with. On policy, a row of advantage 0 moves nothing."""
        c = run.config
        compared = self.compares(c.epochs * c.minibatches)
        if compared:
            rows = replace(rows, old=velocities(run, cond, rows))
        if self.pull:
            with run.policy.reference():
                rows = replace(rows, base=velocities(run, cond, rows))
        needed = None if compared or self.pull else rows.advantage.abs().amax((1, 2)) > 0
        return TrainBatch(rows, partial(self.replay, run.policy, cond), needed)

    def replay(self, policy: Trainable, cond: Any, rows: Noised) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        v = policy.velocity(rows.state, rows.t, cond, rows.index).float()
        old = v.detach() if rows.old is None else rows.old
        value, columns = self.loss(v, old, rows, (rows.advantage / self.bound).clamp(-1, 1))
        statistics = {name: cell.detach().mean((1, 2)) for name, cell in columns.items()}
        statistics["error"] = squares(v.detach() - rows.target).mean((1, 2))
        statistics["moved"] = squares(v.detach() - old).mean((1, 2))
        loss = value.mean((1, 2))
        if rows.base is not None:
            drift = squares(v - rows.base).mean((1, 2))
            loss = loss + self.pull * drift
            statistics["drift"] = drift.detach()
        return loss, statistics | {"loss": loss.detach()}


@torch.no_grad()
def velocities(run: Run, cond: Any, rows: Noised) -> Latents:
    """The velocities of the present policy at each row's state."""

    def work(size: int) -> Latents:
        parts = [rows[part] for part in chunks(len(rows), size)]
        return torch.cat([run.policy.velocity(part.state, part.t, cond, part.index).float() for part in parts])

    return run.fits["batch"](work) if len(rows) else torch.zeros_like(rows.x)


def squares(values: Latents) -> Map:
    """Mean square over C."""
    return (values**2).mean(1)


def cells(values: Latents, rows: Noised) -> Grid:
    """Mean square in each cell of the advantage's grid."""
    return pool(squares(values), rows.advantage.shape[1:])


def size(values: Latents) -> Float[Tensor, "M 1 1"]:
    """Mean absolute value of each row, at least 1e-5, without gradient."""
    return values.detach().abs().double().mean((1, 2, 3)).clamp(min=1e-5).to(values.dtype)[:, None, None]
