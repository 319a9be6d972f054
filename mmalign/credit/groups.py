"""Group statistics, in one place: who is compared with whom, and on what scale.

Only valid (non-NaN) values enter a mean or a spread. A value without an opinion gets advantage 0, and so does every
member of a group with fewer than two valid values or no spread: such a group is *dead*, it cannot teach anything.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scale = Literal["group", "batch", "none"]
FLOOR = 1e-6  # a smaller spread is rounding, not preference


def group_mean(values: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The mean of the valid values of each one's group; NaN where a group has none."""
    valid = ~values.isnan()
    _, number = group.unique(return_inverse=True)
    total = torch.zeros(int(number.max()) + 1, device=values.device).index_add_(0, number, values.nan_to_num(0.0))
    count = torch.zeros_like(total).index_add_(0, number, valid.float())
    return (total / count)[number]


def group_std(values: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The (population) standard deviation of the valid values of each one's group."""
    return group_mean((values - group_mean(values, group)) ** 2, group).sqrt()


def dead(values: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """1 for members of a group that has no spread, else 0."""
    return (~(group_std(values, group) > FLOOR)).float()


def normalise(
    values: Float[Tensor, "N"], group: Int[Tensor, "N"], scale: Scale = "group", limit: float = 5.0
) -> Float[Tensor, "N"]:
    """Advantages: each value less its group's mean, divided by a standard deviation, clamped to `[-limit, limit]`.

    `scale` names the divisor: the value's own group (GRPO), the root mean of all groups' variances ("batch", which does
    not blow up groups that hardly differ), or nothing (GARDO reports less reward hacking).
    """
    centred = values - group_mean(values, group)
    spread = group_std(values, group)
    if scale == "group":
        centred = centred / spread
    elif scale == "batch":
        centred = centred / (spread**2).nanmean().sqrt()
    elif scale != "none":
        raise ValueError(f"no scale called {scale!r}; known: group, batch, none")
    return torch.where((spread > FLOOR) & ~values.isnan(), centred, 0.0).clamp(-limit, limit)
