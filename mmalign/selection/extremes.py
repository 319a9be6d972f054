"""The most contrastive images of a prompt: those whose rewards have the largest variance (Pro-GRPO's optimal variance
filtering, arXiv 2512.15347)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.selection.selection import Selection


@dataclass(frozen=True)
class Extremes(Selection):
    """Learn from the `keep` images of each prompt whose rewards have the largest variance: some of the best and some of
    the worst.

    `compare`: advantages are measured against all images of the "group", which are scored anyway, or against the
    "selected" alone (Pro-GRPO). With "group" each advantage is the one it has without selection, so that what is left
    out are the smaller terms of the same gradient; the selected alone have another mean where rewards are skewed, and
    a larger standard deviation always.
    """

    keep: Annotated[int, Ge(2)] = 8
    compare: Literal["group", "selected"] = "group"
    type = "extremes"

    def __call__(self, reward: Float[Tensor, "N"], prompt: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        return extremes(reward, prompt, self.keep)


def extremes(values: Float[Tensor, "N"], group: Int[Tensor, "N"], keep: int) -> Bool[Tensor, "N"]:
    """The `keep` rows of each group whose values have the largest variance; all valid rows of a smaller group, and none
    with NaN. Of equal values those of earlier rows count as smaller; of equal variances the one with fewer small values
    is taken."""
    selected = torch.zeros_like(group, dtype=torch.bool)
    for number in group.unique():
        rows = ((group == number) & ~values.isnan()).nonzero()[:, 0]
        rows = rows[values[rows].argsort(stable=True)]
        low = low_count(values[rows].double(), keep)
        selected[rows[:low]] = True
        selected[rows[len(rows) - min(keep, len(rows)) + low :]] = True
    return selected


def low_count(values: Float[Tensor, "n"], keep: int) -> int:
    """How many of the smallest of sorted float64 `values` belong to the `keep` of them with the largest variance; the
    others are the largest.

    The variance is convex in each member, so that a member between two that are left out could be exchanged for one of
    them without lowering it: the best subset is a prefix and a suffix, of which there are `keep` + 1.
    """
    keep = min(keep, len(values))
    if keep == 0:
        return 0
    values = values - values.mean()
    ends = [torch.cat([values[:low], values[len(values) - keep + low :]]) for low in range(keep + 1)]
    return int(torch.stack([end.var(correction=0) for end in ends]).argmax())
