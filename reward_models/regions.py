"""Regions of an image with scores, and painting boxes and masks onto a grid. Row 0 is at the top."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A box (left, top, right, bottom) in pixels of the scored image, and its credit in [-1, 1].

    `label` names the part of the request that is judged there ("" for none) and is the same in all images of a prompt,
    so that regions with equal labels can be compared. `reason` is for people.
    """

    box: tuple[int | float, int | float, int | float, int | float]
    credit: int | float
    label: str = ""
    reason: str = ""

    def __post_init__(self):
        left, top, right, bottom = self.box
        if not (left < right and top < bottom):
            raise ValueError(f"box {self.box} is empty; (left, top, right, bottom) in pixels is needed")
        if not -1 <= self.credit <= 1:  # true for NaN as well
            raise ValueError(f"credit {self.credit} is outside [-1, 1]")


def inside(regions: Sequence[Region], size: tuple[int, int]) -> None:
    """ValueError with the first box that is not inside an image of `size` (height, width)."""
    for region in regions:
        left, top, right, bottom = region.box
        if left < 0 or top < 0 or right > size[1] or bottom > size[0]:
            raise ValueError(f"box {region.box} lies outside the image of {size[1]} x {size[0]} pixels")


def covered(start: int | float, stop: int | float, cells: int, size: int) -> Float[np.ndarray, "cells"]:
    """The share of each of `cells` equal cells of [0, size] that [start, stop] covers."""
    edges = np.arange(cells + 1) * size / cells
    overlap = np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1])
    return overlap.clip(0) * cells / size


def box_shares(regions: Sequence[Region], size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "R a b"]:
    """The share of each cell of a grid over an image of `size` (height, width) that each region's box covers."""
    shares = np.zeros((len(regions), *grid))
    for share, region in zip(shares, regions, strict=True):
        left, top, right, bottom = region.box
        share[:] = np.outer(covered(top, bottom, grid[0], size[0]), covered(left, right, grid[1], size[1]))
    return torch.from_numpy(shares).float()


def mask_shares(masks: Bool[Tensor, "R H W"], grid: tuple[int, int]) -> Float[Tensor, "R a b"]:
    """The share of each cell of a grid over the image that each mask covers."""
    return resampled(masks.float(), grid)


def blend(shares: Float[Tensor, "R a b"], credits: Float[Tensor, "R"], overlap: str = "mean") -> Float[Tensor, "a b"]:
    """The credit of each cell from the regions that cover part of it: their mean weighted by covered area, their
    maximum or minimum, or the last in order; NaN in cells without a region. The uncovered part of a cell has no
    influence."""
    covers, credit = shares > 0, credits[:, None, None].expand_as(shares)
    empty = ~covers.any(0)
    if overlap == "mean":
        blended = (shares * credit).sum(0) / shares.sum(0)
    elif overlap == "max":
        blended = torch.where(covers, credit, -torch.inf).amax(0) if len(shares) else torch.zeros(shares.shape[1:])
    elif overlap == "min":
        blended = torch.where(covers, credit, torch.inf).amin(0) if len(shares) else torch.zeros(shares.shape[1:])
    elif overlap == "last":
        blended = torch.zeros(shares.shape[1:])
        for mask, value in zip(covers, credit, strict=True):
            blended = torch.where(mask, value, blended)
    else:
        raise ValueError(f"no overlap rule called {overlap!r}; known: mean, max, min, last")
    return torch.where(empty, torch.nan, blended)


def paint(
    regions: Sequence[Region], size: tuple[int, int], grid: tuple[int, int], overlap: str = "mean"
) -> Float[Tensor, "a b"]:
    """`blend` of the regions' boxes on a grid over an image of `size` (height, width)."""
    credits = torch.tensor([float(region.credit) for region in regions])
    return blend(box_shares(regions, size, grid), credits, overlap)


def resampled(maps: Float[Tensor, "N a b"], grid: tuple[int, int]) -> Float[Tensor, "N c d"]:
    """The maps on another grid over the same images: each new cell is the mean of the old cells it covers, weighted by
    area, ignoring NaN (no opinion); NaN if all are. The integral is preserved if no cell is NaN."""
    rows, columns = (_overlaps(new, old) for new, old in zip(grid, maps.shape[1:], strict=True))
    valid = (~maps.isnan()).to(maps.dtype)
    area = torch.einsum("ya,nab,xb->nyx", rows, valid, columns)
    sums = torch.einsum("ya,nab,xb->nyx", rows, maps.nan_to_num(0.0), columns)
    return torch.where(area > 1e-6, sums / area, torch.nan)


def _overlaps(new: int, old: int) -> Float[Tensor, "new old"]:
    """The share of each of `new` equal parts of a side that is covered by each of `old` equal parts."""
    return torch.from_numpy(np.stack([covered(k / old, (k + 1) / old, new, 1) for k in range(old)], 1)).float()
