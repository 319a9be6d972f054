"""Credit by a value head: a step is credited with how much it raised what a small network expects of the state.

The head reads features that the rollout's forwards compute anyway (`mmalign.training.values`), so that step-wise credit
takes no image more than terminal credit; `gain` completes and scores every state for it. As DiNa-LRM (arXiv 2602.11146)
and the explicit critic (arXiv 2605.27736) read the denoiser, with AC-Flow's warm-up (arXiv 2510.18072). With u the
expected difference from the group's mean reward, and R that difference for the finished image:

    gain_k = u(x_{k+1}) - u(x_k), the last one R - u(x_{T-1}); A_k = sum_{j >= k} trace^(j - k) gain_j

With `trace` 0 a step has its gain, whose sum over a trajectory is R - u(x_0); with 1 it has R - u(x_k), the image's
reward less a baseline (generalised advantage estimation, arXiv 1506.02438). A wrong critic would mislead: a step has
this credit only where the head has shown that it explains rewards in the state that the step reaches, and terminal
credit elsewhere.

Left out: pooling by attention with learnt queries, and adapters of the network that learn with the head.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, dead, group_mean, normalise
from mmalign.credit.terminal import Terminal
from mmalign.types import Judgement, Tree

TERMINAL = Terminal()


@dataclass(frozen=True)
class Value(Credit):
    """Advantages per step over the images of the same prompt, by a head that is used after `warmup` iterations, and at
    states where the variance of rewards that it explained so far exceeds `floor`; it costs no forward and no image.
    A map of rewards has terminal credit.

    The head reads `blocks` of the network (null: the middle one) through one hidden layer of `width`. After an
    iteration it is fitted to the states of that one and of the `replay` ones before it, `passes` times, at
    `learning_rate`.
    """

    trace: Annotated[float, Ge(0), Le(1)] = 0.0
    floor: Annotated[float, Ge(0), Lt(1)] = 0.1
    warmup: Annotated[int, Ge(1)] = 10
    blocks: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None
    width: Annotated[int, Ge(1), Le(4096)] = 64
    replay: Annotated[int, Ge(0), Le(1000)] = 8
    passes: Annotated[int, Ge(1), Le(1000)] = 1
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    type = "value"

    @property
    def observer(self) -> "Value":
        return self

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        terminal = TERMINAL(tree, judged, units)
        if judged.values is None or judged.reward.ndim > 2:
            return terminal
        reward = judged.reward[:, -1]
        alive = dead(reward, tree.prompt, units.dead) == 0
        credit, valued = traced(tree, judged, self.trace)
        advantage = torch.zeros_like(credit)
        for k in range(tree.steps):
            rows = (tree.std[:, k] > 0) & alive
            if not bool(rows.any()):
                continue
            advantage[rows, k] = normalise(credit[rows, k], tree.prompt[rows], units.of(rows.nonzero()[:, 0]))
        return torch.where(valued[:, :, None, None], as_grid(advantage), terminal)


def traced(tree: Tree, judged: Judgement, trace: float) -> tuple[Float[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """The credit of each step by the values of a judgement, NaN where the image has no reward; and whether the value of
    the state it reaches is trusted (of the finished image: of the state before). A value that is not counts as 0, the
    mean of the group."""
    reward = judged.reward[:, -1:]
    final, moving = reward - group_mean(reward, tree.prompt), tree.t > 0
    known = torch.full_like(tree.std, torch.nan) if judged.values is None else judged.values
    values = torch.cat([known, torch.full_like(final, torch.nan)], 1)
    known = ~values.isnan()
    values = torch.where(moving, values.nan_to_num(0.0), final)
    gain = values[:, 1:] - values[:, :-1]
    credit, ahead = torch.empty_like(gain), torch.zeros_like(gain[:, 0])
    for k in reversed(range(tree.steps)):
        ahead = gain[:, k] + trace * ahead
        credit[:, k] = ahead
    credit = torch.where(reward.isnan(), torch.nan, credit)
    return credit, torch.where(moving[:, 1:], known[:, 1:], known[:, :-1])
