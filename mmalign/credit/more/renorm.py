"""ReNorm credit (PPR, by our reading): the value of a step and the outcome, each less one half, without a group mean.

A step is credited only for being good in a good image. Under a group mean the two halves would cancel.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.gain import Gain, values
from mmalign.credit.groups import GRPO, Credit, Units, as_grid
from mmalign.types import Judgement, Plan, Tree, over


@dataclass(frozen=True)
class Renorm(Credit):
    """`A = (s - 1/2) + (R - 1/2)` within [-1, 1], where `s` is the value after the step and `R` the reward of the
    finished image, both on a scale where `low` is 0 and `high` is 1. A step without a value has advantage 0."""

    low: float = 0.0
    high: float = 1.0
    type, dense, normalises = "renorm", True, False

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} must be below high: {self.high:g}")

    def completions(self, plan: Plan) -> tuple[list[int], int | tuple[int, ...] | None]:
        return sorted({k + 1 for k in plan.stochastic}), None

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        _, after = values(tree, judged)
        both = (after - self.low) / (self.high - self.low) + (judged.reward[:, -1:] - self.low) / (self.high - self.low)
        advantage = (both - 1).clamp(-1, 1).nan_to_num(0.0)
        return as_grid(torch.where(over(tree.std > 0, advantage), advantage, 0.0))

    def statistics(self, tree: Tree, judged: Judgement) -> dict[str, float]:
        return Gain().statistics(tree, judged)
