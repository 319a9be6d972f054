"""Replay stochastic steps under the current policy: the policy gradient of GRPO."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import group_mean
from mmalign.flow.kernels import gaussian_kl, log_ratio
from mmalign.flow.sample import distinct
from mmalign.learn.loss import Loss, Step, by_credit, chosen
from mmalign.policy.protocol import Trainable
from mmalign.types import Kernel, Latents, Trajectories, Transitions


def transitions(
    paths: Trajectories,
    advantage: Float[Tensor, "N T a b"],
    weighting: Literal["none", "noise"] = "none",
    mean: Callable[[Tensor], Tensor] = torch.mean,
    forwards: Any = None,
) -> Transitions:
    """Every distinct stochastic step, in order; routes that share one give one row, with the mean of their advantages.

    `weighting` "noise" weighs each by its standard deviation over the `mean` of all (TempFlow-GRPO,
    arXiv 2508.04324), which evens out gradients that grow towards low noise; "none" by 1. With the `forwards` of the
    rollout (`mmalign.training.reuse`) rows have their velocities.
    """
    tree = paths.tree
    rows, cols = (tree.std > 0).nonzero(as_tuple=True)
    shared, first = distinct(torch.stack([cols, tree.node[rows, cols + 1]], 1))
    credit = advantage[rows, cols]
    if len(first) < len(rows):
        credit = group_mean(credit, shared)
    first = first.sort().values
    rows, cols = rows[first], cols[first]
    std = tree.std[rows, cols]
    return Transitions(
        x=paths.state(rows, cols),
        y=paths.state(rows, cols + 1),
        mean=paths.mean_of(rows, cols),
        t=tree.t[rows, cols],
        s=tree.t[rows, cols + 1],
        noise=tree.noise[rows, cols],
        advantage=credit[first],
        weight=std / mean(std) if weighting == "noise" else torch.ones_like(std),
        index=tree.prompt[rows],
        step=cols,
        node=distinct(torch.stack([tree.prompt[rows], cols, tree.node[rows, cols]], 1))[0],
        off=None if paths.off is None else paths.off[rows],
        v=None if forwards is None else forwards.of(paths.features[rows, cols, 0]),
    ).to(paths.x.device)


@dataclass(frozen=True)
class Surrogate:
    """The loss of transitions under the current policy: `loss`, plus `beta` times the exact KL divergence to the
    reference, which `measure` reports even with `beta` 0. Ratios are per `cell` of the advantage's grid, or per
    `credit`: one for all cells with the same advantage (`mmalign.learn.loss.by_credit`). Steps drawn under another text
    take the loss `off`: their ratio is not 1 at first, and the bound of the others would leave them out."""

    policy: Trainable
    cond: Any
    kernel: Kernel
    t_max: float
    loss: Callable[[Step], Loss]
    beta: float = 0.0
    ratio: Literal["cell", "credit"] = "cell"
    measure: bool = False
    off: Callable[[Step], Loss] | None = None

    def __call__(self, batch: Transitions) -> tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]:
        mean, std = self._step(batch, batch.v)
        change, moved = log_ratio(batch.y, mean, batch.mean, std), gaussian_kl(mean, batch.mean, std)
        if self.ratio == "credit":
            change, moved = by_credit(change, batch.advantage), by_credit(moved, batch.advantage)
        step = Step(change, moved, batch.advantage, std, batch.t - batch.s)
        result = self.loss(step)
        if self.off is not None and batch.off is not None:
            result = chosen(batch.off, self.off(step), result)
        loss = batch.weight * result.value
        averages = {"log_ratio": change.detach().mean((1, 2)), "divergence": moved.detach().mean((1, 2))}
        statistics = result.statistics | averages
        if self.beta or self.measure:
            with torch.no_grad(), self.policy.reference():
                anchor, _ = self._step(batch)
            kl = gaussian_kl(mean, anchor, std).mean((1, 2))
            loss = loss + self.beta * kl if self.beta else loss
            statistics["kl"] = kl.detach()
        return loss, statistics | {"loss": loss.detach()}

    def _step(self, batch: Transitions, v: Latents | None = None) -> tuple[Tensor, Tensor]:
        if v is None:
            _, place, count = batch.node.unique_consecutive(return_inverse=True, return_counts=True)
            first = count.cumsum(0) - count
            v = self.policy.velocity(batch.x[first], batch.t[first], self.cond, batch.index[first]).float()[place]
        return self.kernel.step(batch.x, v, batch.t, batch.s, batch.noise, self.t_max)
