"""Step-wise credit (DenseGRPO, arXiv 2601.20218): a step is credited with how much it raised the value of the state.

The value of a state is the reward of the image that completes it by ODE. Since that of the state before the step does
not depend on the noise the step drew, subtracting it is a control variate: it takes the luck of the starting noise out
of the credit. Gains of a walk add up to its reward less the value of its first shown state.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Units, normalise
from mmalign.types import Judgement, Trajectories


def gains(paths: Trajectories, judged: Judgement) -> Float[Tensor, "N T"]:
    """Value after less value before, for each step.

    Steps between two shown states form one stretch and share its gain. Before the first shown state the value counts
    as 0, so that with the finished image alone every step has the reward itself. NaN where a score failed.
    """
    shown = paths.shown >= 0
    before, after = torch.zeros_like(paths.std), torch.zeros_like(paths.std)
    value = torch.zeros_like(judged.reward[:, 0])
    for k in range(paths.steps):
        value = torch.where(shown[:, k], judged.reward[:, k], value)
        before[:, k] = value
    for k in reversed(range(paths.steps)):
        value = torch.where(shown[:, k + 1], judged.reward[:, k + 1], value if k + 1 < paths.steps else torch.nan)
        after[:, k] = value
    return after - before


def gain(
    paths: Trajectories, judged: Judgement, units: Units = GRPO, compare: str = "step"
) -> Float[Tensor, "N T 1 1"]:
    """Advantages per step over the images of the same prompt, 0 where the step was deterministic.

    `compare`: "step" holds each gain against its siblings' at the same step (DenseGRPO); "walk" against those of all
    steps (Stepwise-Flow-GRPO's joint normalisation), which does not inflate late steps where gains hardly differ.
    """
    if compare not in ("step", "walk"):
        raise ValueError(f"no comparison called {compare!r}; known: step, walk")
    rows, cols = (paths.std > 0).nonzero(as_tuple=True)
    value = gains(paths, judged)[rows, cols]
    group = paths.prompt[rows] * (paths.steps if compare == "step" else 1) + (cols if compare == "step" else 0)
    advantage = torch.zeros_like(paths.std)
    advantage[rows, cols] = normalise(value, group, units)
    return advantage[:, :, None, None]


def balance(paths: Trajectories, judged: Judgement) -> dict[str, float]:
    """Per stochastic step k over all walks: `gain/k` mean, `gain_std/k`, and `balance/k`, the share of positive less
    the share of negative gains, in [-1, 1]: far below 0 the step adds more noise than the later ones can undo."""
    statistics, all_gains = {}, gains(paths, judged)
    for k in range(paths.steps):
        own = all_gains[paths.std[:, k] > 0, k]
        own = own[~own.isnan()]
        if len(own):
            statistics |= {
                f"gain/{k}": float(own.mean()),
                f"gain_std/{k}": float(own.std(correction=0)),
                f"balance/{k}": float(own.sign().mean()),
            }
    return statistics
