"""From several scores to one reward: what a component weighs, and what a missing one does.

`values [N, K]` are raw scores of N images by K components, NaN where there is none; `group [N]` numbers the prompt of
each; `weights [K]`. Rules that add or multiply raw scores give NaN where any component with a weight is missing: a sum
with a part left out would not compare with its siblings'. Rules that compare within groups first count a missing
component as the group's mean, which is no opinion, and give NaN where all are missing.

A component is *dead* in a group where it spreads by no more than `floor`, or by no more than `ROUNDING` times its
largest value there: it tells nothing, and rounding errors are not made into preferences. A floor of 0 leaves the second
rule alone, which holds at any scale: 1e-8 beside 2e-8 is a difference, 21.700001 beside 21.7 is none. Means and
deviations are taken in float64, where G equal float32 numbers have exactly their own value as their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import cos, pi
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Values = Float[Tensor, "N K"]
Groups = Int[Tensor, "N"]
Weights = Float[Tensor, "K"]
ROUNDING = torch.finfo(torch.float32).eps  # scores are float32 numbers, which lie so far apart in units of their size


def mean_and_std(
    values: Float[Tensor, "N *rest"], group: Groups
) -> tuple[Float[Tensor, "N *rest"], Float[Tensor, "N *rest"]]:
    """Mean and (population) standard deviation of the valid values of each one's group, column by column, computed in
    float64 and given in the values' own type; NaN where a group has none."""
    _, number = group.unique(return_inverse=True)
    exact, valid = values.double(), ~values.isnan()

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(int(number.max()) + 1, *x.shape[1:]).index_add_(0, number, x)[number]

    count = total(valid.double())
    centre = total(exact.nan_to_num(0.0)) / count
    spread = (total(((exact - centre) ** 2).nan_to_num(0.0)) / count).sqrt()
    return centre.to(values.dtype), spread.to(values.dtype)


def alive(
    values: Float[Tensor, "N *rest"],
    group: Groups,
    floor: float = 0.0,
    size: Float[Tensor, "N *rest"] | None = None,
) -> Bool[Tensor, "N *rest"]:
    """Whether the values of each one's group differ at all: their standard deviation is above `floor` and above
    `ROUNDING` times the largest `size` in the group, by default the values' own. Give `size` where values are
    differences of larger numbers, whose rounding they carry. A group without two valid values is dead."""
    _, number = group.unique(return_inverse=True)
    sizes = (values if size is None else size).double().abs().nan_to_num(0.0)
    place = number.view(-1, *[1] * (sizes.ndim - 1)).expand_as(sizes)
    largest = sizes.new_zeros(int(number.max()) + 1, *sizes.shape[1:]).scatter_reduce_(0, place, sizes, "amax")[number]
    return mean_and_std(values.double(), group)[1] > (ROUNDING * largest).clamp(min=floor)


def weighted(values: Values, weights: Weights) -> Float[Tensor, "N"]:
    """Sum of weight x score (Flow-GRPO). The widest range decides, whatever the weights look like."""
    used = weights != 0
    return (values[:, used] * weights[used]).sum(1)


def product(values: Values, weights: Weights) -> Float[Tensor, "N"]:
    """Product of score ^ weight: weights 0.5 and 0.5 give the geometric mean (VIEScore, arXiv 2312.14867). All must be
    good; one at 0 takes everything. ValueError for a negative score, which has no root."""
    used = weights != 0
    _not_below_0("a product of rewards needs scores of at least 0", values[:, used])
    return (values[:, used] ** weights[used]).prod(1)


def gated(values: Values, weights: Weights, gate: int) -> Float[Tensor, "N"]:
    """Score of component `gate` x (1 + sum of weight x the others): the others count only as far as it is met
    (Search-R2's rule for process rewards). The gate's own weight is not looked at. ValueError where a factor is below
    0, for it would turn the other round: the better the one, the lower the reward."""
    others = weights.clone()
    others[gate] = 0
    factor = 1 + weighted(values, others)
    _not_below_0("a gate needs scores of at least 0", values[:, gate])
    _not_below_0("behind a gate 1 + the weighted sum of the others must be at least 0", factor)
    return values[:, gate] * factor


def _not_below_0(rule: str, values: Float[Tensor, "*any"]) -> None:
    if bool((values < 0).any()):
        raise ValueError(f"{rule}, got {float(values.nan_to_num().min()):.3g}")


def normalised(values: Values, group: Groups, weights: Weights, floor: float = 0.0) -> Float[Tensor, "N"]:
    """Sum of weight x (score - group mean) / group standard deviation: normalise, then add (MRN; ReFine-RFT). Every
    component speaks with its weight, whatever its range; a dead one is silent."""
    centre, spread = mean_and_std(values.double(), group)
    z = torch.where(alive(values, group, floor), (values - centre) / spread, 0.0)
    used = weights != 0
    opinion = ~values[:, used].isnan().all(1) | ~used.any()
    return torch.where(opinion, (z.nan_to_num(0.0) * weights).sum(1), torch.nan).to(values.dtype)


def whitened(values: Values, group: Groups, weights: Weights, floor: float = 0.0) -> Float[Tensor, "N"]:
    """`normalised`, then divided by its standard deviation over the whole batch (GDPO, arXiv 2601.05242): the scale
    stays the same when a component is added. Its mean is 0 already, group by group. All 0 where nothing differs."""
    z = normalised(values, group, weights, floor)
    batch = torch.zeros_like(group)
    return torch.where(alive(z, batch), z / mean_and_std(z, batch)[1], z * 0)


def referenced(values: Values, mean: Weights, std: Weights) -> Values:
    """Scores in standard deviations above a frozen reference, measured once on images of the base model: their mean
    is the progress since, in one unit for all (Quark). ValueError unless each `std` is above 0."""
    if not bool((std > 0).all()):
        raise ValueError(f"reference standard deviations must be above 0, got {std.tolist()}")
    return (values - mean) / std


def multiplier(now: float, bound: int | float, mean: float, rate: float) -> float:
    """Next multiplier of the constraint `mean score >= bound`: max(0, now + rate x (bound - mean)), the dual ascent of
    the Lagrangian. A round without any score (NaN) leaves it."""
    return now if mean != mean else max(0.0, now + rate * (bound - mean))


@dataclass(frozen=True)
class Ramp:
    """A weight that moves from `start` to `end` over the run, linearly or along half a cosine."""

    start: int | float
    end: int | float
    over: Literal["linear", "cosine"] = "linear"

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid"}  # as part of a config: true is no number

    def at(self, progress: int | float) -> float:
        """The weight at `progress`, 0 at the beginning and 1 at the end; clipped to that."""
        share = min(1.0, max(0.0, progress))
        share = share if self.over == "linear" else (1 - cos(pi * share)) / 2
        return float(self.start + (self.end - self.start) * share)


def health(values: Values, names: Sequence[str], group: Groups, floor: float = 0.0) -> dict[str, float]:
    """By component: `spread/` the mean standard deviation within groups, `missing/` the share of images without a
    score, `dead/` the share of images in groups where it tells nothing; `correlation/one~two` (Pearson, over the images
    that have both) where there is something to correlate."""
    spread, tells = mean_and_std(values, group)[1], alive(values, group, floor)
    found = {}
    for k, name in enumerate(names):
        found |= {
            f"spread/{name}": float(spread[:, k].nanmean()),
            f"missing/{name}": float(values[:, k].isnan().float().mean()),
            f"dead/{name}": float((~tells[:, k]).float().mean()),
        }
    for one, two in combinations(range(len(names)), 2):
        both = values[~values[:, [one, two]].isnan().any(1)][:, [one, two]].double()
        if len(both) > 1 and bool(alive(both, torch.zeros(len(both), dtype=torch.long), floor).all()):
            found[f"correlation/{names[one]}~{names[two]}"] = float(torch.corrcoef(both.T)[0, 1])
    return found
