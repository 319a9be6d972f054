"""Step-wise credit (DenseGRPO, arXiv 2601.20218): a step is credited with how much it raised the value of the state.

The value of a state is the reward of the image that completes it by ODE. Since that of the state before the step does
not depend on the noise the step drew, subtracting it is a control variate: it removes the variance due to the initial
noise. The gains of a trajectory add up to its reward less the value of its first completed state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, MinLen
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, normalise
from mmalign.credit.more.density import of_states
from mmalign.types import Judgement, Plan, Tree, over
from reward_models.combine import alive, mean_and_std

Length = Annotated[int, Ge(1), Le(1000)]


def values(tree: Tree, judged: Judgement) -> tuple[Float[Tensor, "N T *cells"], Float[Tensor, "N T *cells"]]:
    """The value before and after each step.

    Steps between two completed states form one stretch and share its values. Before the first of them the value counts
    as 0, so that with the finished image alone every step gains the reward itself. NaN where a score failed.
    """
    known, reward = over(tree.final >= 0, judged.reward), judged.reward
    before, after = [], []
    value = torch.zeros_like(reward[:, 0])
    for k in range(tree.steps):
        value = torch.where(known[:, k], reward[:, k], value)
        before.append(value)
    value = torch.full_like(reward[:, 0], torch.nan)
    for k in reversed(range(tree.steps)):
        value = torch.where(known[:, k + 1], reward[:, k + 1], value)
        after.append(value)
    return torch.stack(before, 1), torch.stack(after[::-1], 1)


def gains(tree: Tree, judged: Judgement) -> Float[Tensor, "N T *cells"]:
    """Value after less value before, for each step. NaN where a score failed."""
    before, after = values(tree, judged)
    return after - before


def fitted(before: Float[Tensor, "M"], after: Float[Tensor, "M"], group: Int[Tensor, "M"]) -> float:
    """The share of the value before that is worth subtracting: the slope of after on before within groups, in [0, 1].

    Subtracting all of it lowers the variance only while the two correlate by more than a half. A step with much noise
    decides again, and then the difference of two independent values is noisier than the one.
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


@dataclass(frozen=True)
class Gain(Credit):
    """Advantages per step over the images of the same prompt.

    `states`: the states to complete, "all" those before and after a stochastic step; `completion`: ODE steps of a
    completion at most, or of each of `states`, None for all that remain. `compare` "step" compares each gain with its
    siblings' at the same step (DenseGRPO), "trajectory" with those at all steps (Stepwise-Flow-GRPO's joint
    normalisation), which does not inflate late steps where gains hardly differ. `control`: how much of the value before
    is subtracted, 1 (DenseGRPO) to 0, or "fit" for each step's `fitted` share. A fixed share is unbiased, because the
    value before does not depend on the step's noise; a fitted one is estimated on the same trajectories, and nearly so.
    `returns` "own" credits a step with its gain, "to_go" with the sum of the gains from it on, the reward less the
    value before it. Where the value before a step exceeds `saturate`, a gain above 0 counts `damping` times, and a drop
    in full (SPAE).
    """

    states: Literal["all"] | Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] = "all"
    completion: Length | tuple[Length, ...] | None = None
    compare: Literal["step", "trajectory"] = "step"
    control: Annotated[float, Ge(0), Le(1)] | Literal["fit"] = 1.0
    returns: Literal["own", "to_go"] = field(default="own", metadata={"later": True})
    saturate: float | None = field(default=None, metadata={"later": True})
    damping: Annotated[float, Ge(0), Le(1)] = field(default=1.0, metadata={"later": True})
    type, dense = "gain", True

    def __post_init__(self):
        if self.states != "all" and len(set(self.states)) < len(self.states):
            raise ValueError(f"states: {list(self.states)}; a state is there twice")
        if self.compare not in ("step", "trajectory"):
            raise ValueError(f"no comparison called {self.compare!r}; known: step, trajectory")
        if isinstance(self.completion, tuple) and (self.states == "all" or len(self.completion) != len(self.states)):
            raise ValueError(f"completion: {list(self.completion)} needs as many states, got {self.states}")
        if self.returns not in ("own", "to_go"):
            raise ValueError(f"no returns called {self.returns!r}; known: own, to_go")
        if (self.saturate is None) != (self.damping == 1):
            raise ValueError(f"saturate: {self.saturate} and damping: {self.damping:g} act together; set both")
        if self.saturate is not None and (self.control != 1 or self.returns != "own"):
            raise ValueError("saturate acts on gains; it needs control: 1 and returns: own")

    def completions(self, plan: Plan) -> tuple[list[int], int | tuple[int, ...] | None]:
        if self.states != "all":
            return list(self.states), self.completion
        return sorted({*plan.stochastic, *(k + 1 for k in plan.stochastic)}), self.completion

    def thinner(self, plan: Plan | None, steps: int) -> Iterator["Gain"]:
        """Shorter completions, down to two steps (one is the jump to the predicted clean latent, which DenseGRPO found
        worse than no step-wise reward); then every second, third, ... state, always with the first."""
        if isinstance(self.completion, tuple):
            raise ValueError("a list of completion lengths leaves a budget no choice; give one number or none")
        some = [*self.states] if self.states != "all" else [] if plan is None else self.completions(plan)[0]
        for states in (self.states, *(tuple(some[::stride]) for stride in range(2, len(some) + 1))):
            for n in (self.completion, *range((self.completion or steps) - 1, 1, -1)):
                yield replace(self, states=states, completion=n)

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        before, after = values(self._shown(tree), judged)
        if self.returns == "to_go":
            after = judged.reward[:, -1:].expand_as(before)
        stochastic, group = tree.std > 0, tree.prompt[:, None].repeat(1, tree.steps)
        value = torch.stack([self._residual(tree, before, after, k) for k in range(tree.steps)], 1)
        if self.compare == "step":
            group = group * tree.steps + torch.arange(tree.steps, device=group.device)
        advantage, size = torch.zeros_like(value), torch.maximum(before.abs(), after.abs())
        units = units.of(stochastic.nonzero()[:, 0])
        advantage[stochastic] = normalise(value[stochastic], group[stochastic], units, size[stochastic])
        return as_grid(advantage)

    def _residual(self, tree: Tree, before: Tensor, after: Tensor, k: int) -> Float[Tensor, "N *cells"]:
        """The value after step k less the controlled share of the value before it."""
        share, rows = self.control, tree.std[:, k] > 0
        if share == "fit":
            group = tree.prompt[rows].repeat_interleave(before[0, 0].numel())
            share = fitted(before[rows, k].flatten(), after[rows, k].flatten(), group)
        residual = after[:, k] - share * before[:, k]
        if self.saturate is None:
            return residual
        return torch.where((before[:, k] > self.saturate) & (residual > 0), self.damping * residual, residual)

    def _shown(self, tree: Tree) -> Tree:
        """Without states that only another credit has completed."""
        if self.states == "all":
            return tree
        mine = torch.zeros_like(tree.final[0], dtype=torch.bool)
        mine[[*self.states]] = True
        return replace(tree, final=torch.where(mine | (tree.final == tree.final[:, -1:]), tree.final, -1))

    def statistics(self, tree: Tree, judged: Judgement) -> dict[str, float]:
        return balance(self._shown(tree), of_states(judged))


def balance(tree: Tree, judged: Judgement) -> dict[str, float]:
    """Per stochastic step k over all trajectories: `gain/k` mean, `gain_std/k`, and `balance/k`, the share of positive
    less the share of negative gains, in [-1, 1]: far below 0 the step adds more noise than later ones can undo."""
    statistics, all_gains = {}, gains(tree, judged)
    for k in range(tree.steps):
        gain = all_gains[tree.std[:, k] > 0, k]
        gain = gain[~gain.isnan()]
        if len(gain):
            statistics |= {
                f"gain/{k}": float(gain.mean()),
                f"gain_std/{k}": float(gain.std(correction=0)),
                f"balance/{k}": float(gain.sign().mean()),
            }
    return statistics
