"""Surrogate losses, at the advantage's own resolution.

A loss takes a `Step`, what the current policy makes of transitions, and returns a `Loss`: one number and statistics per
row. Maps are in nats per latent element (means over C) and are pooled to the advantage's grid by averaging. With a 1x1
grid the ratio is `exp(mean_{C,h,w} log_ratio)`, the reduction that Flow-GRPO's clip ranges refer to, at its number of
elements: the D-th root of the true ratio of D of them. With h x w it is a ratio per latent position. At ratio 1 a
uniform map of advantages gives the gradient of the 1x1 grid.

Add one: a dataclass whose call takes a `Step`, and its name in `LOSSES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Map = Float[Tensor, "M h w"]
Grid = Float[Tensor, "M a b"]


@dataclass(frozen=True)
class Step:
    """Replayed transitions, with d the new mean less the old, q the step's standard deviation, z the noise it took.

    `log_ratio`: log of new to old density of the step that was taken, `mean_C (d z) / q - d^2 / 2q^2`.
    `divergence`: KL from the old to the new step, `mean_C d^2 / 2q^2`. `std [M]` is q, `h [M]` the length in time.
    """

    log_ratio: Map
    divergence: Map
    advantage: Grid
    std: Float[Tensor, "M"]
    h: Float[Tensor, "M"]


@dataclass(frozen=True)
class Loss:
    """`value [M]` to minimise. `statistics`: `ratio`, and the shares of cells that the bound took the gradient from,
    `clipped_low` with a negative and `clipped_high` with a positive advantage."""

    value: Float[Tensor, "M"]
    statistics: dict[str, Float[Tensor, "M"]]


def pool(values: Map, grid: Sequence[int]) -> Grid:
    """Mean over the cells of an `a x b` grid; `h, w` must be multiples of it, so that every position counts once."""
    h, w = values.shape[1:]
    if h % grid[0] or w % grid[1]:
        raise ValueError(f"a credit grid of {grid[0]}x{grid[1]} does not divide the latent's {h}x{w}")
    return F.avg_pool2d(values[:, None], (h // grid[0], w // grid[1]))[:, 0]


def by_credit(values: Map, advantage: Grid) -> Map:
    """Each position's value replaced by the mean over all positions of its row with the same advantage (to 1e-5).

    Ratios of such maps are geometric means over regions with the same credit, as those of Rank-GRPO
    (arXiv 2510.20150) are over a rank. How far off policy a cell is then depends neither on a region's size nor on the
    grid, and a map of one value is the whole image at any ratio.
    """
    (rows, h, w), (_, a, b) = values.shape, advantage.shape
    credit = (advantage * 1e5).round().repeat_interleave(h // a, 1).repeat_interleave(w // b, 2).flatten(1)
    row = torch.arange(rows, device=values.device)[:, None].expand_as(credit)
    keys = torch.stack([row.to(credit), credit], -1).flatten(0, 1)
    _, unit, count = keys.unique(dim=0, return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), device=values.device).index_add(0, unit, values.flatten())
    return (total / count)[unit].view_as(values)


def _pessimistic(ratio: Grid, advantage: Grid, bound: float) -> Loss:
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - bound, 1 + bound) * advantage).mean((1, 2))
    low, high = (ratio < 1 - bound) & (advantage < 0), (ratio > 1 + bound) & (advantage > 0)
    return Loss(loss, _statistics(ratio, low, high))


def _statistics(ratio: Grid, low: Tensor, high: Tensor) -> dict[str, Float[Tensor, "M"]]:
    shares = {"ratio": ratio.detach(), "clipped_low": low.float(), "clipped_high": high.float()}
    return {name: value.mean((1, 2)) for name, value in shares.items()}


def chosen(where: Bool[Tensor, "M"], one: Loss, other: Loss) -> Loss:
    """The loss `one` of some rows and the `other` of the rest."""
    statistics = {name: torch.where(where, one.statistics[name], value) for name, value in other.statistics.items()}
    return Loss(torch.where(where, one.value, other.value), statistics)


Clip = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7); `clip` keeps the ratio within [1 - clip, 1 + clip]."""

    clip: Clip = 1e-4
    type = "clipped"

    def __call__(self, step: Step) -> Loss:
        return _pessimistic(pool(step.log_ratio, step.advantage.shape[1:]).exp(), step.advantage, self.clip)


@dataclass(frozen=True)
class Guard:
    """GRPO-Guard (arXiv 2510.22319): clip `exp(mean d z)` instead, and weigh steps by 1 / h.

    `q (log_ratio + divergence)` is exactly `mean d z`. It is centred on 0 at every step, where the plain log-ratio
    leans to -divergence, so that with many elements (65,536, not 256) the lower bound acts and the upper hardly does;
    and 1 / h evens out the gradient's scale over steps for `flow_sde`, whose mean moves by a constant times h per unit
    of velocity.
    """

    clip: Clip = 1e-4
    type = "guard"

    def __call__(self, step: Step) -> Loss:
        centred = step.std[:, None, None] * (step.log_ratio + step.divergence)
        loss = _pessimistic(pool(centred, step.advantage.shape[1:]).exp(), step.advantage, self.clip)
        return Loss(loss.value / step.h, loss.statistics)


@dataclass(frozen=True)
class Masked:
    """Flow-DPPO (arXiv 2606.11025): no clipping; a cell whose divergence has passed `clip` and whose ratio already
    leans the way its advantage pulls gives no gradient."""

    clip: Clip = 1e-4
    type = "masked"

    def __call__(self, step: Step) -> Loss:
        grid, advantage = step.advantage.shape[1:], step.advantage
        ratio, far = pool(step.log_ratio, grid).exp(), pool(step.divergence.detach(), grid) > self.clip
        low, high = far & (advantage < 0) & (ratio < 1), far & (advantage > 0) & (ratio > 1)
        loss = -((ratio * advantage) * ~(low | high)).mean((1, 2))
        return Loss(loss, _statistics(ratio, low, high))


LOSSES = (Clipped, Guard, Masked)
