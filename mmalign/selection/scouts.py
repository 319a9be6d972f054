"""Scouts: cheap images of many starting noises, which choose the ones that are sampled in full (Sol-RL, arXiv
2604.06916).

A starting noise is a function of its number, so that the chosen ones are sampled again exactly. Left out: scouts in
fewer bits, which a policy would have to offer; fewer steps save as much on any.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le, MinLen
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.groups import group_mean
from mmalign.selection.extremes import extremes


@dataclass(frozen=True)
class Scouts:
    """Draw `ratio` x `seeds` starting noises of a prompt by `steps` ODE steps, score the images, and sample the `seeds`
    most contrastive in full: those whose scouts have the largest variance of rewards. `by` "value" takes the first
    `steps` forwards of the run's schedule instead, and what the value head of the run's credit expects of the last
    state that they see, without an image; the folder of a run with `credit: value` stands for the head of that run."""

    ratio: Annotated[int, Ge(2), Le(1000)] = 4
    steps: Annotated[int, Ge(1), Le(1000)] = 4
    by: Annotated[str, MinLen(1)] = field(default="reward", metadata={"later": True})

    def starts(self, seeds: int) -> int:
        """Scouts of one prompt."""
        return self.ratio * seeds

    def images(self, seeds: int) -> int:
        """Images of the scouts of one prompt."""
        return self.starts(seeds) if self.by == "reward" else 0


def chosen(reward: Float[Tensor, "B"], prompts: int, seeds: int) -> Int[Tensor, "P seeds"]:
    """The numbers of the `seeds` most contrastive starts of each prompt, rising; `reward` is that of each start's
    scout, prompt by prompt. Starts without a reward are taken only where too few have one, the first ones first."""
    each = reward.view(prompts, -1)
    selected = extremes(reward, torch.arange(prompts, device=reward.device).repeat_interleave(each.shape[1]), seeds)
    order = (~selected.view(each.shape)).int().argsort(dim=1, stable=True)
    return order[:, :seeds].sort(1).values


def correlation(scouted: Float[Tensor, "N"], reward: Float[Tensor, "N"], prompt: Int[Tensor, "N"]) -> float:
    """Pearson correlation within prompts of each trajectory's reward with that of its scout, over those that have both;
    NaN where one of them does not differ."""
    missing = scouted.isnan() | reward.isnan()
    both = (x.double().masked_fill(missing, torch.nan) for x in (scouted, reward))
    one, two = (x - group_mean(x, prompt) for x in both)
    return float((one * two).nansum() / ((one**2).nansum() * (two**2).nansum()).sqrt())
