"""Step-wise credit (DenseGRPO, arXiv 2601.20218): a step is credited with how much it raised the value of the state.

The value of a state is the reward of the image that completes it by ODE. Since that of the state before the step does
not depend on the noise the step drew, subtracting it is a control variate: it takes the luck of the starting noise out
of the credit. Gains of a walk add up to its reward less the value of its first shown state.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.groups import GRPO, Units, as_grid, normalise
from mmalign.types import Judgement, Trajectories, over
from reward_models.combine import alive, mean_and_std


def values(paths: Trajectories, judged: Judgement) -> tuple[Float[Tensor, "N T *cells"], Float[Tensor, "N T *cells"]]:
    """The value before and after each step.

    Steps between two shown states form one stretch and share its values. Before the first shown state the value counts
    as 0, so that with the finished image alone every step gains the reward itself. NaN where a score failed.
    """
    shown, reward = over(paths.shown >= 0, judged.reward), judged.reward
    before, after = [], []
    value = torch.zeros_like(reward[:, 0])
    for k in range(paths.steps):
        value = torch.where(shown[:, k], reward[:, k], value)
        before.append(value)
    value = torch.full_like(reward[:, 0], torch.nan)
    for k in reversed(range(paths.steps)):
        value = torch.where(shown[:, k + 1], reward[:, k + 1], value)
        after.append(value)
    return torch.stack(before, 1), torch.stack(after[::-1], 1)


def gains(paths: Trajectories, judged: Judgement) -> Float[Tensor, "N T *cells"]:
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
    one, two = (
        torch.where(alive(x, group), x - mean_and_std(x, group)[0], 0.0) for x in (before.double(), after.double())
    )
    spread = float((one**2).sum())
    return min(1.0, max(0.0, float((one * two).sum()) / spread)) if spread > 0 else 1.0


def gain(
    paths: Trajectories,
    judged: Judgement,
    units: Units = GRPO,
    compare: str = "step",
    control: float | str = 1.0,
) -> Float[Tensor, "N T a b"]:
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
        own, share = paths.std[:, k] > 0, control
        if control == "fit":
            places = paths.prompt[own].repeat_interleave(before[0, 0].numel())
            share = fitted(before[own, k].flatten(), after[own, k].flatten(), places)
        value[:, k] = after[:, k] - share * before[:, k]
    if compare == "step":
        group = group * paths.steps + torch.arange(paths.steps, device=group.device)
    stochastic, advantage, size = paths.std > 0, torch.zeros_like(value), torch.maximum(before.abs(), after.abs())
    advantage[stochastic] = normalise(value[stochastic], group[stochastic], units, size[stochastic])
    return as_grid(advantage)


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
