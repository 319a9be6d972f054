"""From advantages to a changed adapter: collect transitions, replay them, step the optimiser."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.flow.kernels import gaussian_kl, log_ratio, step
from mmalign.flow.sample import chunks, distinct
from mmalign.learn.loss import LOSSES, alike
from mmalign.types import Policy, Rows, Trajectories, Transitions

Bounded = Callable[
    [Callable[[int], Any]], Any
]  # does work(rows) with as many rows as memory allows (`mmalign.training.microbatch`)
Replay = Callable[[Any], tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]]  # loss and statistics per row


@dataclass(frozen=True)
class Peers:
    """Those in other processes who learn from the rest of a batch; by default there are none.

    `own [B]` says of each row of the whole batch, in its order, whether it is here (None: all are). `add(parameters)`
    sums up everybody's gradients and says whether there are any, `clip(parameters, bound)` bounds the norm of the sum
    and says what it was; `tell(value)` gives everybody's values; `replayed(n)` is how many rows are replayed here, of
    which the first n count."""

    own: Bool[Tensor, "B"] | None = None
    add: Callable[[Sequence[torch.nn.Parameter]], bool] = lambda parameters: any(p.grad is not None for p in parameters)
    tell: Callable[[Any], list[Any]] = lambda value: [value]
    replayed: Callable[[int], int] = lambda rows: rows
    clip: Callable[[Sequence[torch.nn.Parameter], float], Any] = torch.nn.utils.clip_grad_norm_


def transitions(
    paths: Trajectories,
    advantage: Float[Tensor, "N T a b"],
    weighting: str = "none",
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Transitions:
    """Every distinct stochastic step, in order; routes that share one give one row.

    `weighting` "noise" weighs each by its standard deviation over the `mean` of all (TempFlow-GRPO,
    arXiv 2508.04324), which evens out gradients that grow towards low noise; "none" by 1.
    """
    rows, cols = (paths.std > 0).nonzero(as_tuple=True)
    _, first = distinct(torch.stack([cols, paths.node[rows, cols + 1]], 1))
    first = first.sort().values
    rows, cols = rows[first], cols[first]
    if weighting not in ("none", "noise"):
        raise ValueError(f"no weighting called {weighting!r}; known: none, noise")
    std = paths.std[rows, cols]
    return Transitions(
        x=paths.x[rows, cols],
        y=paths.x[rows, cols + 1],
        mean=paths.mean[rows, cols],
        t=paths.t[rows, cols],
        s=paths.t[rows, cols + 1],
        noise=paths.noise[rows, cols],
        advantage=advantage[rows, cols],
        weight=std / mean(std) if weighting == "noise" else torch.ones_like(std),
        index=paths.prompt[rows],
        step=cols,
    )


def surrogate(
    policy: Policy, cond, *, kernel: str, t_max: float, loss: str, clip: float, beta: float, over: str = "cell",
    measure: bool = False,
) -> Replay:  # fmt: skip
    """The replay of GRPO: the surrogate named `loss`, bounded by `clip`, plus `beta` times the exact KL divergence to
    the reference, which `measure` tells even with `beta` 0. Ratios are `over` each "cell" of the advantage's grid, or
    "credit": all that are credited alike."""
    return partial(_replay, policy, cond, kernel, t_max, partial(LOSSES[loss], bound=clip), beta, over, measure)


def update(
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Rows,
    replay: Replay,
    *,
    needed: Bool[Tensor, "M"] | None = None,
    epochs: int,
    minibatches: int,
    micro_batch: Bounded,
    max_grad_norm: float,
    generator: torch.Generator,
    peers: Peers = Peers(),
    may_step: Callable[[Rows, list[float], float], bool] = lambda rows, losses, norm: True,
) -> dict[str, float]:
    """Replay `batch` for `epochs` shuffled passes, each in `minibatches` optimiser steps, and return what happened.

    The loss is the mean of `replay`'s over a minibatch. `micro_batch` bounds the rows of one forward and backward;
    gradients add up, so it changes nothing else, and where memory does not suffice the minibatch is begun again with
    fewer. Rows that are not `needed`, for nothing would come of them, cost no forward but count in the mean. Order,
    minibatches and means are those of the whole batch, of which `peers` have the rest.

    Where `may_step(rows, their losses, gradient's norm)` says no, parameters and optimiser stay as they are.

    Statistics are means over all rows replayed, `name/k` over those whose `step` is k; `grad_norm` is before clipping.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    own = torch.ones_like(batch.step, dtype=torch.bool) if peers.own is None else peers.own
    row = own.cumsum(0) - 1
    for _ in range(epochs):
        order = torch.randperm(len(own), generator=generator).to(own.device)
        for part in order.tensor_split(min(minibatches, len(own))) if len(own) else ():
            alive = row[part[own[part]]]
            alive = alive if needed is None else alive[needed[alive]]
            idle = alive.new_zeros(peers.replayed(len(alive)) - len(alive))
            found = micro_batch(partial(_gradients, optimizer, batch, alive, idle, len(part), replay))
            for name, value, k in found:
                if value == value:
                    for key in (name, f"{name}/{k}"):
                        sums[key] += value
                        counts[key] += 1
            if peers.add(parameters):
                norm = float(peers.clip(parameters, max_grad_norm))
                if may_step(batch[alive], [value for name, value, _ in found if name == "loss"], norm):
                    sums["grad_norm"] += norm
                    counts["grad_norm"] += 1
                    optimizer.step()
    told = peers.tell([sums, counts])
    names = dict.fromkeys(name for everybodys, _ in told for name in everybodys)
    return {name: sum(s.get(name, 0.0) for s, _ in told) / sum(n.get(name, 0.0) for _, n in told) for name in names}


def _gradients(
    optimizer: torch.optim.Optimizer, batch: Rows, alive: Int[Tensor, "A"], idle: Int[Tensor, "I"], total: int,
    replay: Replay, size: int,
) -> list[tuple[str, float, int]]:  # fmt: skip
    """Leave the gradient of the rows `alive` of a minibatch of `total`, `size` at once; statistics as (name, value,
    step). The rows `idle` are replayed as well and count for nothing."""
    found = []
    optimizer.zero_grad()
    replayed = torch.cat([alive, idle])
    for rows in chunks(len(replayed), size):
        micro, counted = batch[replayed[rows]], max(0, len(alive) - rows.start)
        losses, statistics = replay(micro)
        (losses[:counted].sum() / total).backward()
        steps = micro.step[:counted].tolist()
        for name, values in statistics.items():
            found += [(name, value, k) for value, k in zip(values[:counted].tolist(), steps, strict=True)]
    return found


def _replay(
    policy, cond, kernel, t_max, loss_of, beta, over, measure, micro: Transitions
) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
    """Loss per row and its statistics, from the network as it is now."""
    v = policy.velocity(micro.x, micro.t, cond, micro.index).float()
    mean, std = step(kernel, micro.x, v, micro.t, micro.s, micro.noise, t_max)
    change, moved = log_ratio(micro.y, mean, micro.mean, std), gaussian_kl(mean, micro.mean, std)
    if over == "credit":
        change, moved = alike(change, micro.advantage), alike(moved, micro.advantage)
    loss, statistics = loss_of(change, moved, micro.advantage, std, micro.t - micro.s)
    loss = micro.weight * loss
    statistics |= {"log_ratio": change.detach().mean((1, 2)), "divergence": moved.detach().mean((1, 2))}
    if beta or measure:
        with torch.no_grad(), policy.reference():
            v = policy.velocity(micro.x, micro.t, cond, micro.index).float()
            anchor, _ = step(kernel, micro.x, v, micro.t, micro.s, micro.noise, t_max)
        kl = gaussian_kl(mean, anchor, std).mean((1, 2))
        loss = loss + beta * kl if beta else loss
        statistics["kl"] = kl.detach()
    return loss, statistics | {"loss": loss.detach()}
