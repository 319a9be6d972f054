"""Where in an image a score holds: boxes to a grid laid over it. Row 0 is at the top."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A box (left, top, right, bottom) in pixels of the scored image, and its credit in [-1, 1]."""

    box: tuple[int | float, int | float, int | float, int | float]
    credit: int | float
    label: str = ""
    reason: str = ""

    def __post_init__(self):
        left, top, right, bottom = self.box
        if not (left < right and top < bottom):
            raise ValueError(f"box {self.box} is empty; (left, top, right, bottom) in pixels is needed")
        if not -1 <= self.credit <= 1:  # also for NaN
            raise ValueError(f"credit {self.credit} is outside [-1, 1]")


def covered(start: int | float, stop: int | float, cells: int, size: int) -> Float[np.ndarray, "cells"]:
    """The share of each of `cells` equal cells of [0, size] that [start, stop] covers."""
    edges = np.arange(cells + 1) * size / cells
    overlap = np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1])
    return overlap.clip(0) * cells / size


def paint(regions: Sequence[Region], size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "a b"]:
    """The grid `[a, b]` over an image of `size` (height, width): in each cell the mean credit of the regions there,
    weighted by the area each covers of it; NaN where there is none. Credit is not thinned by what is left bare."""
    area, sum_ = np.zeros(grid), np.zeros(grid)
    for region in regions:
        left, top, right, bottom = region.box
        share = np.outer(covered(top, bottom, grid[0], size[0]), covered(left, right, grid[1], size[1]))
        area += share
        sum_ += share * region.credit
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.where(area > 0, sum_ / area, np.nan)).float()


def resampled(maps: Float[Tensor, "N a b"], grid: tuple[int, int]) -> Float[Tensor, "N c d"]:
    """The maps on another grid over the same images: in each new cell the mean of the old ones it covers, weighted by
    area, those without an opinion (NaN) left out; NaN where there is none. Sums over area are kept where all cells have
    an opinion."""
    rows, columns = (_overlaps(new, old) for new, old in zip(grid, maps.shape[1:], strict=True))
    valid = (~maps.isnan()).to(maps.dtype)
    area = torch.einsum("ya,nab,xb->nyx", rows, valid, columns)
    sums = torch.einsum("ya,nab,xb->nyx", rows, maps.nan_to_num(0.0), columns)
    return torch.where(area > 1e-6, sums / area, torch.nan)


def _overlaps(new: int, old: int) -> Float[Tensor, "new old"]:
    """The share of each of `new` equal parts of a side that each of `old` equal parts covers."""
    return torch.from_numpy(np.stack([covered(k / old, (k + 1) / old, new, 1) for k in range(old)], 1)).float()
