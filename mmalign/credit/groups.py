"""Group statistics, in one place: who is compared with whom, and on what scale.

Only valid (non-NaN) values enter a mean or a spread. A value without an opinion gets advantage 0, and so does every
member of a group with fewer than two valid values or too little spread: such a group is *dead*, it teaches nothing. The
rule is that of `reward_models.combine`: no more spread than rounding makes in numbers of that size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_models.combine import alive, mean_and_std

Scale = Literal["group", "batch", "none"]


def group_mean(values: Float[Tensor, "N *cells"], group: Int[Tensor, "N"]) -> Float[Tensor, "N *cells"]:
    """The mean of the valid values of each one's group, of maps cell by cell; NaN where a group has none."""
    return mean_and_std(values, group)[0]


def group_std(values: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The (population) standard deviation of the valid values of each one's group."""
    return mean_and_std(values, group)[1]


def dead(values: Float[Tensor, "N"], group: Int[Tensor, "N"], spread: float = 0.0) -> Float[Tensor, "N"]:
    """1 for members of a group whose standard deviation is at most `spread`, or no more than rounding, else 0."""
    return (~alive(values, group, spread)).float()


@dataclass(frozen=True)
class Units:
    """How advantages are measured: in units of `scale`, which never counts as less than `floor` (in the reward's own
    unit), and within `[-limit, limit]`.

    `scale` "group" is the standard deviation of the value's own group (GRPO); "batch" the root mean variance within all
    groups, which does not blow up groups that hardly differ; "none" the reward's own unit (GARDO, arXiv 2512.24138,
    reports less reward hacking), which the limit does not touch. The noise of the reward model is a good `floor`.
    A group whose standard deviation is at most `dead` is; with 0, one that differs by rounding alone.
    """

    scale: Scale = "group"
    floor: float = 0.0
    limit: float = 5.0
    dead: float = 0.0


GRPO = Units()


def as_grid(advantage: Float[Tensor, "N T *cells"]) -> Float[Tensor, "N T a b"]:
    """1x1 for a reward that is one number."""
    return advantage if advantage.ndim == 4 else advantage[:, :, None, None]


def normalise(
    values: Float[Tensor, "N *cells"],
    group: Int[Tensor, "N"],
    units: Units = GRPO,
    size: Float[Tensor, "N *cells"] | None = None,
) -> Float[Tensor, "N *cells"]:
    """Advantages: each value less its group's mean, in `units`. Of maps, all valid cells of a group's members are
    compared with one another, wherever they lie: a map that was only centred within its own image would push every
    sibling the same way. `size`: of the numbers that the values are differences of, whose rounding they carry."""
    if values.ndim > 1:
        cells, sizes = values[0].numel(), None if size is None else size.flatten()
        return normalise(values.flatten(), group.repeat_interleave(cells), units, sizes).view_as(values)
    valid = ~values.isnan()
    mean, spread = mean_and_std(values.double(), group)
    centred = values - mean
    if units.scale not in ("group", "batch", "none"):
        raise ValueError(f"no scale called {units.scale!r}; known: group, batch, none")
    if units.scale != "none":
        unit = spread if units.scale == "group" else (spread[valid] ** 2).mean().sqrt()
        centred = (centred / unit.clamp(min=units.floor)).clamp(-units.limit, units.limit)
    return torch.where(valid & alive(values, group, units.dead, size), centred, 0.0).to(values.dtype)
