"""Lay the regions that a scorer reports on the credit grid."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.types import Marks
from reward_models.regions import Region, box_shares


def marked(
    boxes: Sequence[Sequence[Region]], owner: Sequence[int], size: tuple[int, int], grid: tuple[int, int]
) -> Marks:
    """The regions of each image of `size` (height, width) on a grid. Columns are labels, in the order the prompt's
    images bring them up; a region without a label, or with one that was there already, has a column of its own after
    them, which compares with nothing."""
    labels: dict[int, dict[str, int]] = {}
    for prompt, regions in zip(owner, boxes, strict=True):
        known = labels.setdefault(prompt, {})
        for region in regions:
            if region.label:
                known.setdefault(region.label, len(known))
    named_columns = max((len(known) for known in labels.values()), default=0)
    width = named_columns + max((len(regions) for regions in boxes), default=0)
    share, credit = torch.zeros(len(boxes), width, *grid), torch.full((len(boxes), width), torch.nan)
    for i, (prompt, regions) in enumerate(zip(owner, boxes, strict=True)):
        shares = box_shares(regions, size, grid)
        for k, region in enumerate(regions):
            column = labels[prompt].get(region.label, -1)
            if column < 0 or not credit[i, column].isnan():
                column = named_columns + k
            share[i, column], credit[i, column] = shares[k], float(region.credit)
    named = (torch.arange(width) < named_columns).expand_as(credit).clone()
    used = (~credit.isnan()).any(0)
    return Marks(share[:, used], credit[:, used], named[:, used])


def signs(places: Float[Tensor, "N a b"]) -> Marks:
    """Of a map without regions behind it: all that is right, and all that is wrong, in each image."""
    share = torch.stack([places > 0, places < 0], 1).float()
    credit = torch.tensor([1.0, -1.0]).expand(len(places), 2)
    credit = torch.where(share.any(-1).any(-1), credit, torch.nan)
    return Marks(share, credit, torch.zeros_like(credit, dtype=torch.bool))
