"""Branch credit (TempFlow-GRPO, arXiv 2508.04324): a stochastic step is credited with what became of the states it
led to.

The value of a state is the mean reward of the images below it. A step's return is the value of the state it reached; it
is compared with the other stochastic steps taken at the same time, for the same prompt or from the very same state.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Units, as_grid, group_mean, normalise
from mmalign.types import Judgement, Trajectories


def branch(
    paths: Trajectories, judged: Judgement, units: Units = GRPO, baseline: str = "state"
) -> Float[Tensor, "N T a b"]:
    """Advantages per step, 0 where the step was deterministic.

    `baseline`: "state" compares children of one state (its mean is the value before the step; TempFlow's seed groups),
    "prompt" compares all that branched at that step for the prompt. Where no state has two children, only "prompt" has
    anything to compare.
    """
    if baseline not in ("state", "prompt"):
        raise ValueError(f"no baseline called {baseline!r}; known: state, prompt")
    reward = judged.reward[:, -1]
    advantage = torch.zeros(*paths.std.shape, *reward.shape[1:], device=reward.device)
    for k in range(paths.steps):
        rows = (paths.std[:, k] > 0).nonzero()[:, 0]
        if len(rows):
            value = group_mean(reward[rows], paths.node[rows, k + 1])
            group = paths.node[rows, k] if baseline == "state" else paths.prompt[rows]
            advantage[rows, k] = normalise(value, group, units)
    return as_grid(advantage)
