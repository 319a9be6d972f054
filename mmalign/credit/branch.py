"""Branch credit (TempFlow-GRPO, arXiv 2508.04324): a step is credited with the mean reward of the images below it.

The value of a state is the mean reward of the images below it. A step's return is the value of the state it reached; it
is compared with the other stochastic steps taken at the same time, for the same prompt or from the very same state.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, group_mean, normalise
from mmalign.flow.sample import distinct
from mmalign.types import Judgement, Plan, Tree


@dataclass(frozen=True)
class Branch(Credit):
    """`baseline` "state" compares children of one state (its mean is the value before the step; TempFlow's seed
    groups), "prompt" all that branched at that step for the prompt. Where no state has two children, only "prompt" has
    anything to compare."""

    baseline: Literal["state", "prompt"] = "state"
    type = "branch"

    def __post_init__(self):
        if self.baseline not in ("state", "prompt"):
            raise ValueError(f"no baseline called {self.baseline!r}; known: state, prompt")

    def check(self, plan: Plan) -> None:
        widest = max((plan.draw[:, k][plan.noise[:, k] > 0].unique().numel() for k in plan.stochastic[:1]), default=0)
        if self.baseline == "state" and widest == 1:
            raise ValueError("credit branch compares the children of one state and there is one; set baseline: prompt")

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        reward = judged.reward[:, -1]
        advantage = torch.zeros(*tree.std.shape, *reward.shape[1:], device=reward.device)
        for k in range(tree.steps):
            rows = (tree.std[:, k] > 0).nonzero()[:, 0]
            if len(rows):
                value = group_mean(reward[rows], tree.node[rows, k + 1])
                child, first = distinct(tree.node[rows, k + 1])
                order = first.sort()  # each child counts once, however many images are below it
                once = rows[order.values]
                group = tree.node[once, k] if self.baseline == "state" else tree.prompt[once]
                each = normalise(value[order.values], group, units.of(once))
                advantage[rows, k] = each[order.indices.argsort()[child]]
        return as_grid(advantage)
