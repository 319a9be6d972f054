"""Step-wise credit (DenseGRPO, arXiv 2601.20218): a step is credited with how much it raised the value of the state.

The value of a state is the reward of the image that completes it by ODE. Since that of the state before the step does
not depend on the noise the step drew, subtracting it is a control variate: it takes the luck of the starting noise out
of the credit. Gains of a walk add up to its reward less the value of its first shown state.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.groups import FLOOR, GRPO, Units, group_mean, normalise
from mmalign.types import Judgement, Trajectories


def values(paths: Trajectories, judged: Judgement) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """The value before and after each step.

    Steps between two shown states form one stretch and share its values. Before the first shown state the value counts
    as 0, so that with the finished image alone every step gains the reward itself. NaN where a score failed.
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
    return before, after


def gains(paths: Trajectories, judged: Judgement) -> Float[Tensor, "N T"]:
    """Value after less value before, for each step. NaN where a score failed."""
    before, after = values(paths, judged)
    return after - before


def fitted(before: Float[Tensor, "M"], after: Float[Tensor, "M"], group: Int[Tensor, "M"]) -> float:
    """The share of the value before that is worth subtracting: the slope of after on before within groups, in [0, 1].

    Subtracting all of it lowers the variance only while the two correlate by more than a half. A step with much noise
    decides afresh, and then the difference of two independent values is noisier than the one.
    """
    valid = ~(before.isnan() | after.isnan())
    before, after, group = before[valid], after[valid], group[valid]
    if not len(group):
        return 1.0
    one, two = before - group_mean(before, group), after - group_mean(after, group)
    spread = float((one**2).sum())
    return min(1.0, max(0.0, float((one * two).sum()) / spread)) if spread > FLOOR else 1.0


def gain(
    paths: Trajectories,
    judged: Judgement,
    units: Units = GRPO,
    compare: str = "step",
    control: float | str = 1.0,
) -> Float[Tensor, "N T 1 1"]:
    """Advantages per step over the images of the same prompt, 0 where the step was deterministic.

    `compare`: "step" holds each gain against its siblings' at the same step (DenseGRPO); "walk" against those of all
    steps (Stepwise-Flow-GRPO's joint normalisation), which does not inflate late steps where gains hardly differ.
    `control`: how much of the value before is subtracted, 1 (DenseGRPO) to 0, or "fit" for each step's `fitted` share;
    a fixed share biases nothing, for the value before does not depend on the step's noise; a fitted one is estimated on
    the same walks, and nearly so.
    """
    if compare not in ("step", "walk"):
        raise ValueError(f"no comparison called {compare!r}; known: step, walk")
    before, after = values(paths, judged)
    value, group = torch.zeros_like(before), paths.prompt[:, None].repeat(1, paths.steps)
    for k in range(paths.steps):
        own = paths.std[:, k] > 0
        share = fitted(before[own, k], after[own, k], paths.prompt[own]) if control == "fit" else control
        value[:, k] = after[:, k] - share * before[:, k]
    if compare == "step":
        group = group * paths.steps + torch.arange(paths.steps, device=group.device)
    stochastic, advantage = paths.std > 0, torch.zeros_like(paths.std)
    advantage[stochastic] = normalise(value[stochastic], group[stochastic], units)
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
