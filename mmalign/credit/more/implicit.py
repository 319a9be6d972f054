"""Implicit rewards of steps (PRIME, arXiv 2502.01456): credit that an adapter learns from outcomes alone.

A second adapter phi on the network learns to tell the better images of a prompt from the worse. Its score of a
trajectory is the sum over stochastic steps, x to y, of its log-density ratio to the model without adapter,

    r_k = scale mean [ log N(y; mean_phi, q^2) - log N(y; mean_ref, q^2) ]
        = scale mean [ (y - mean_ref)^2 - (y - mean_phi)^2 ] / 2 q^2

and its loss the cross-entropy of `sigmoid(sum_k r_k)` with the outcome o. No step has a label; the ratio of a step is
then its reward. Each iteration phi is trained first, and then

    advantage_k = process A(r_k + r_{k+1} + ...) + outcome A(R)

with A the advantage over the siblings of a prompt. PRIME's baseline leaves a trajectory's own value out, which
multiplies A by a constant that dividing by the spread removes. The mean is over the elements of a latent (PRIME sums
over tokens): a sum over thousands of elements saturates the sigmoid.

`mmalign.training.step_rewards` trains phi and computes r; this file says what it learns, and what becomes of it.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, group_mean, normalise
from mmalign.types import Judgement, Tree, over


@dataclass(frozen=True)
class Implicit(Credit):
    """`scale`: beta, in units of a nat per latent element. `rate`: learning rate of phi; `updates`: its optimiser steps
    an iteration, each on all trajectories. `form` "outcome" is the cross-entropy, "preference" the loss of a group,
    `-log sigmoid(mean_i A_i sum_k r_ik)` (TDM-R1, arXiv 2603.07700). `label`: a component that is the outcome, which
    counts within [0, 1]; null: whether an image beats more of its siblings than beat it. `process` and `outcome` weigh
    the two advantages. `grid`: cells of a map of rewards, whose mean is r; null: one number a step."""

    scale: Annotated[float, Gt(0)] = 100.0
    rate: Annotated[float, Gt(0)] = 1e-3
    updates: Annotated[int, Ge(1), Le(1000)] = 1
    form: Literal["outcome", "preference"] = "outcome"
    label: str | None = None
    process: Annotated[float, Ge(0)] = 1.0
    outcome: Annotated[float, Ge(0)] = 1.0
    grid: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None = None
    type = "implicit"

    def __post_init__(self):
        if self.label is not None and self.form == "preference":
            raise ValueError(f"label: {self.label}: form: preference compares rewards within a group; remove one")
        if not self.process:
            raise ValueError("process: 0: the adapter would be trained for nothing; use credit: terminal")

    @property
    def learner(self) -> "Implicit":
        return self

    @property
    def forwards(self) -> int:
        """The model without adapter, phi before and in each update, and phi after the last."""
        return 2 + 2 * self.updates

    def loss(self, score: Float[Tensor, "N"], tree: Tree, judged: Judgement) -> Float[Tensor, "N"]:
        """The loss of each trajectory at the scores of phi, 0 for one without an outcome."""
        reward = judged.reward[:, -1]
        if self.form == "preference":
            advantage = normalise(reward, tree.prompt)
            return -F.logsigmoid(group_mean(advantage * score, tree.prompt))
        label = self.outcomes(tree, judged)
        loss = F.binary_cross_entropy_with_logits(score, label.nan_to_num(0.5), reduction="none")
        return torch.where(label.isnan(), 0.0, loss)

    def outcomes(self, tree: Tree, judged: Judgement) -> Float[Tensor, "N"]:
        """What phi learns of each trajectory, in [0, 1]; NaN: nothing."""
        reward = judged.reward[:, -1]
        if self.label is None:
            return ahead(reward, tree.prompt)
        return torch.where(reward.isnan(), torch.nan, judged.parts[self.label].clamp(0, 1))

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        if judged.process is None:
            raise ValueError("credit implicit needs the rewards of steps that an adapter gives, and there are none")
        reward, process = judged.reward[:, -1], judged.process
        process = torch.where(over(reward.isnan(), process), torch.nan, process)
        to_go = process.flip(1).cumsum(1).flip(1)
        advantage = torch.zeros_like(process)
        for k in range(tree.steps):
            rows = (tree.std[:, k] > 0).nonzero()[:, 0]
            if len(rows):
                value = group_mean(to_go[rows, k], tree.node[rows, k + 1])  # of routes that share the step
                bare = replace(units, floor=0.0, dead=0.0)  # those of the reward do not apply
                advantage[rows, k] = normalise(value, tree.prompt[rows], bare)
        outcome = torch.stack([normalise(reward, tree.prompt, units)] * tree.steps, 1)
        return self.outcome * as_grid(outcome) + self.process * advantage


def ahead(reward: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """1 for a member that beats more of its group than beat it, 0 for one that beats fewer; NaN for as many, and
    without a reward. The upper and the lower half of a group, however many rewards are equal."""
    label = torch.full_like(reward, torch.nan)
    for g in group.unique():
        rows = ((group == g) & ~reward.isnan()).nonzero()[:, 0]
        wins = (reward[rows, None] - reward[None, rows]).sign().sum(1)
        label[rows] = torch.where(wins == 0, torch.nan, (wins > 0).to(reward))
    return label
