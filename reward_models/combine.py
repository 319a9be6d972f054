"""Combine several scores into one reward: weights, combination rules and missing scores.

`values [N, K]` are raw scores of N images by K components, NaN where missing; `group [N]` is the prompt index of each
image; `weights [K]`. Rules that add or multiply raw scores give NaN if any component with a weight is missing, because
a partial sum would not be comparable with its siblings'. Rules that normalise within groups replace a missing component
by the group's mean, which prefers no image, and give NaN if all are missing.

A component is *dead* in a group if its spread is at most `floor`, or at most `ROUNDING` times its largest value there:
it carries no information, and rounding errors must not become preferences. With a floor of 0 only the second rule
applies, which holds at any scale: 1e-8 and 2e-8 differ, 21.700001 and 21.7 do not. Means and deviations are computed in
float64, in which the mean of G equal float32 numbers is exactly their value.
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
ROUNDING = torch.finfo(torch.float32).eps  # relative spacing of float32 scores


def group_sum(values: Float[Tensor, "N *rest"], group: Groups) -> Float[Tensor, "N *rest"]:
    """For each row the sum of the rows of its group, in the dtype of `values`; it carries gradients."""
    groups, number = group.unique(return_inverse=True)
    return values.new_zeros(len(groups), *values.shape[1:]).index_add(0, number, values)[number]


def mean_and_std(
    values: Float[Tensor, "N *rest"], group: Groups
) -> tuple[Float[Tensor, "N *rest"], Float[Tensor, "N *rest"]]:
    """For each row the mean and the (population) standard deviation of the valid values of its group, per column,
    computed in float64 and returned in the dtype of `values`; NaN for a group without valid values."""
    exact = values.double()
    count = group_sum((~values.isnan()).double(), group)
    mean = group_sum(exact.nan_to_num(0.0), group) / count
    std = (group_sum(((exact - mean) ** 2).nan_to_num(0.0), group) / count).sqrt()
    return mean.to(values.dtype), std.to(values.dtype)


def alive(
    values: Float[Tensor, "N *rest"],
    group: Groups,
    floor: float = 0.0,
    size: Float[Tensor, "N *rest"] | None = None,
) -> Bool[Tensor, "N *rest"]:
    """For each row whether the values of its group differ: their standard deviation exceeds `floor` and `ROUNDING`
    times the largest `size` in the group, by default the absolute values. Pass `size` if the values are differences of
    larger numbers, whose rounding error they have. A group without two valid values is dead."""
    groups, number = group.unique(return_inverse=True)
    sizes = (values if size is None else size).double().abs().nan_to_num(0.0)
    index = number.view(-1, *[1] * (sizes.ndim - 1)).expand_as(sizes)
    largest = sizes.new_zeros(len(groups), *sizes.shape[1:]).scatter_reduce_(0, index, sizes, "amax")[number]
    return mean_and_std(values.double(), group)[1] > (ROUNDING * largest).clamp(min=floor)


def weighted(values: Values, weights: Weights) -> Float[Tensor, "N"]:
    """Sum of weight x score (Flow-GRPO). The component with the widest range dominates, whatever the weights."""
    used = weights != 0
    return (values[:, used] * weights[used]).sum(1)


def product(values: Values, weights: Weights) -> Float[Tensor, "N"]:
    """Product of score ^ weight: weights 0.5 and 0.5 give the geometric mean (VIEScore, arXiv 2312.14867). One score
    of 0 makes the reward 0. ValueError for a negative score, which has no root."""
    used = weights != 0
    _not_below_0("a product of rewards needs scores of at least 0", values[:, used])
    return (values[:, used] ** weights[used]).prod(1)


def gated(values: Values, weights: Weights, gate: int) -> Float[Tensor, "N"]:
    """Score of component `gate` x (1 + sum of weight x the others): the others count in proportion to the gate
    (Search-R2's rule for process rewards). The gate's own weight is ignored. ValueError for a negative factor, which
    would reverse the order of the other: the better the score, the lower the reward."""
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
    component counts by its weight, whatever its range; a dead one counts 0."""
    mean, std = mean_and_std(values.double(), group)
    z = torch.where(alive(values, group, floor), (values - mean) / std, 0.0)
    used = weights != 0
    opinion = ~values[:, used].isnan().all(1) | ~used.any()
    return torch.where(opinion, (z.nan_to_num(0.0) * weights).sum(1), torch.nan).to(values.dtype)


def whitened(values: Values, group: Groups, weights: Weights, floor: float = 0.0) -> Float[Tensor, "N"]:
    """`normalised`, then divided by its standard deviation over the batch (GDPO, arXiv 2601.05242): the scale does
    not change when a component is added. The mean of each group is 0 already. All 0 if nothing differs."""
    z = normalised(values, group, weights, floor)
    batch = torch.zeros_like(group)
    return torch.where(alive(z, batch), z / mean_and_std(z, batch)[1], z * 0)


def referenced(values: Values, mean: Weights, std: Weights) -> Values:
    """Scores in standard deviations above a frozen reference, measured once on images of the base model: their mean
    is the progress since then, in one unit for all components (Quark). ValueError unless each `std` is above 0."""
    if not bool((std > 0).all()):
        raise ValueError(f"reference standard deviations must be above 0, got {std.tolist()}")
    return (values - mean) / std


def multiplier(now: float, bound: int | float, mean: float, rate: float) -> float:
    """Next multiplier of the constraint `mean score >= bound`: max(0, now + rate x (bound - mean)), dual ascent on
    the Lagrangian. It does not change without a score (NaN)."""
    return now if mean != mean else max(0.0, now + rate * (bound - mean))


@dataclass(frozen=True)
class Ramp:
    """A weight that moves from `start` to `end` over the run, linearly or along half a cosine."""

    start: int | float
    end: int | float
    over: Literal["linear", "cosine"] = "linear"

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid"}  # in a config, `true` is not a number

    def at(self, progress: int | float) -> float:
        """The weight at `progress`, from 0 at the beginning to 1 at the end; clipped to [0, 1]."""
        share = min(1.0, max(0.0, progress))
        share = share if self.over == "linear" else (1 - cos(pi * share)) / 2
        return float(self.start + (self.end - self.start) * share)


def health(values: Values, names: Sequence[str], group: Groups, floor: float = 0.0) -> dict[str, float]:
    """Per component: `spread/` the mean standard deviation within groups, `missing/` the share of images without a
    score, `dead/` the share of images in dead groups. Per pair: `correlation/one~two` (Pearson, over the images with
    both scores), unless one of them is constant."""
    spread, informative = mean_and_std(values, group)[1], alive(values, group, floor)
    statistics = {}
    for k, name in enumerate(names):
        statistics |= {
            f"spread/{name}": float(spread[:, k].nanmean()),
            f"missing/{name}": float(values[:, k].isnan().float().mean()),
            f"dead/{name}": float((~informative[:, k]).float().mean()),
        }
    for one, two in combinations(range(len(names)), 2):
        both = values[~values[:, [one, two]].isnan().any(1)][:, [one, two]].double()
        if len(both) > 1 and bool(alive(both, torch.zeros(len(both), dtype=torch.long), floor).all()):
            statistics[f"correlation/{names[one]}~{names[two]}"] = float(torch.corrcoef(both.T)[0, 1])
    return statistics
