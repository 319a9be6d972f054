"""Images whose process and outcome agree (PROF): good ones that came about well, bad ones that came about badly."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.credit.gain import gains
from mmalign.credit.groups import group_mean
from mmalign.credit.more.density import of_states
from mmalign.selection.selection import Selection
from mmalign.types import Judgement, Tree


@dataclass(frozen=True)
class Prof(Selection):
    """Learn from the `keep` images of each prompt that are most consistent, half of them above the mean reward of the
    prompt and half below, as far as there are so many.

    Above the mean an image is the more consistent the higher its `process`, below the mean the lower. "rising" is the
    share of stochastic steps with a gain above 0, "mean" the mean value of the states before the last one. The mean
    gain would not do: gains add up to the reward less the value of the start, and agree with the outcome by
    construction. Images at the mean, and those without a reward or a process, are left out, and all images of a prompt
    where one sign is missing. `compare` as in `extremes`.
    """

    keep: Annotated[int, Ge(2)] = 8
    process: Literal["rising", "mean"] = "rising"
    compare: Literal["group", "selected"] = "group"
    type, dense = "prof", True

    def choose(self, tree: Tree, judged: Judgement) -> Bool[Tensor, "N"]:
        process = rising(tree, judged) if self.process == "rising" else mean_value(tree, judged)
        return consistent(judged.reward[:, -1], process, tree.prompt, self.keep)


def rising(tree: Tree, judged: Judgement) -> Float[Tensor, "N"]:
    """The share of stochastic steps that raise the value, one half of a step without a change; NaN where a value is
    missing."""
    noisy = tree.std > 0
    gain = gains(tree, of_states(judged))
    share = torch.where(gain.isnan(), torch.nan, (gain.sign() + 1) / 2)  # the sign of NaN is 0
    return torch.where(noisy, share, 0.0).sum(1) / noisy.sum(1)


def mean_value(tree: Tree, judged: Judgement) -> Float[Tensor, "N"]:
    """The mean value of the states that have another image than the finished one; NaN where one is missing."""
    shown = (tree.final >= 0) & (tree.final != tree.final[:, -1:])
    return torch.where(shown, judged.reward, 0.0).sum(1) / shown.sum(1)


def consistent(
    reward: Float[Tensor, "N"], process: Float[Tensor, "N"], group: Int[Tensor, "N"], keep: int
) -> Bool[Tensor, "N"]:
    """The `keep` rows of each group whose process agrees most with the sign of the reward above its group's mean, equal
    numbers of both signs as far as there are so many; of an odd number the larger half is above. Of equal rows those
    that come first are taken."""
    missing = reward.isnan() | process.isnan()
    sign = torch.where(missing, 0.0, (reward - group_mean(reward, group)).sign())
    selected = torch.zeros_like(group, dtype=torch.bool)
    for number in group.unique():
        above, below = (((group == number) & (sign == s)).nonzero()[:, 0] for s in (1, -1))
        if not len(above) or not len(below):
            continue
        high = min(len(above), max(keep - keep // 2, keep - len(below)))
        low = min(len(below), keep - high)
        selected[above[process[above].argsort(descending=True, stable=True)[:high]]] = True
        selected[below[process[below].argsort(stable=True)[:low]]] = True
    return selected
