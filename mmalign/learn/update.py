"""One update: replay a batch in shuffled minibatches and step the optimiser."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Parameter

from mmalign.flow.sample import by_state, distinct
from mmalign.types import Rows

Bounded = Callable[[Callable[[int], Any]], Any]  # calls work(rows) with as many rows as memory allows
Replay = Callable[[Any], tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]]  # loss and statistics per row


@runtime_checkable
class Peers(Protocol):
    """The other data-parallel ranks, which hold the rest of the batch. `add_gradients` sums the gradients of all ranks
    and reports whether there are any; `clip` bounds the norm of the sum and returns what it was; `padded` is how many
    forwards this rank must take, because a sharded network needs as many on every rank."""

    def add_gradients(self, parameters: Sequence[Parameter]) -> bool: ...

    def clip(self, parameters: Sequence[Parameter], bound: float) -> Any: ...

    def padded(self, forwards: int) -> int: ...

    def all_gather_object(self, value: Any, what: str) -> list[Any]: ...


class Alone:
    """No other ranks."""

    def add_gradients(self, parameters: Sequence[Parameter]) -> bool:
        return any(p.grad is not None for p in parameters)

    def clip(self, parameters: Sequence[Parameter], bound: float) -> Any:
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    def padded(self, forwards: int) -> int:
        return forwards

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        return [value]


ALONE = Alone()


def update(
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Any,
    replay: Replay,
    *,
    needed: Bool[Tensor, "M"] | None = None,
    epochs: int,
    minibatches: int,
    micro_batch: Bounded,
    max_grad_norm: float,
    generator: torch.Generator,
    local: Bool[Tensor, "B"] | None = None,
    peers: Peers = ALONE,
    may_step: Callable[[Rows, list[float], float], bool] = lambda rows, losses, norm: True,
) -> dict[str, float]:
    """Replay `batch`, rows with a `step` each, for `epochs` shuffled passes, each in `minibatches` optimiser steps.

    The loss is the mean of `replay`'s over a minibatch. Rows that share a forward are replayed together; how many
    forwards `micro_batch` allows at once changes nothing. Rows that are not `needed`, because their gradient is zero,
    cost no forward but count in the mean. Order, minibatches and means are those of the global batch: `local [B]` marks
    its rows on this rank (None: all), and `peers` hold the rest. Where `may_step(rows, their losses, gradient's norm)`
    is false nothing is stepped. Returns means over the rows (`name/k`: of step k); `grad_norm` is before clipping.
    """
    local = torch.ones_like(batch.step, dtype=torch.bool) if local is None else local
    row_of = local.cumsum(0) - 1  # from a row of the global batch to its row in `batch`
    means = _Means()
    for part in _minibatches(len(local), epochs, minibatches, generator):
        part = part.to(local.device)
        rows = row_of[part[local[part]]]
        rows = rows if needed is None else rows[needed[rows]]
        same, first = distinct(batch.forward.to(rows.device)[rows])
        earliest, order = first[same].sort(stable=True)  # rows stay in order, but for those that share a forward
        rows, padding = rows[order], peers.padded(len(first)) - len(first)
        statistics = micro_batch(partial(_gradients, optimizer, batch, rows, earliest, padding, len(part), replay))
        for name, value, k in statistics:
            means.add(name, value, k)
        if peers.add_gradients(parameters):
            norm = float(peers.clip(parameters, max_grad_norm))
            losses = [value for name, value, _ in statistics if name == "loss"]
            if may_step(batch[rows], losses, norm):
                optimizer.step()
                means.add("grad_norm", norm)
    return means.over(peers)


def _minibatches(total: int, epochs: int, count: int, generator: torch.Generator) -> Iterator[Int[Tensor, "B"]]:
    """The rows of each optimiser step: every epoch is a fresh shuffle, cut into `count` parts."""
    for _ in range(epochs):
        order = torch.randperm(total, generator=generator)
        yield from order.tensor_split(min(count, total)) if total else ()


class _Means:
    """Running means by name, and by `name/step`; NaN does not count."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float, step: int | None = None) -> None:
        for key in (name,) if step is None else (name, f"{name}/{step}"):
            if value == value:
                self.sums[key] += value
                self.counts[key] += 1

    def over(self, peers: Peers) -> dict[str, float]:
        """The means over the rows of all ranks."""
        ranks = peers.all_gather_object([self.sums, self.counts], "statistics of the update")
        names = dict.fromkeys(name for sums, _ in ranks for name in sums)
        return {n: sum(s.get(n, 0.0) for s, _ in ranks) / sum(c.get(n, 0.0) for _, c in ranks) for n in names}


def _gradients(
    optimizer: torch.optim.Optimizer, batch: Any, rows: Int[Tensor, "A"], forward: Int[Tensor, "A"], padding: int,
    total: int, replay: Replay, size: int,
) -> list[tuple[str, float, int]]:  # fmt: skip
    """Leave the gradient of these `rows` of a minibatch of `total`, `size` forwards at once; statistics as (name,
    value, step). `padding` rows are replayed as well, in a forward each, and count for nothing."""
    statistics = []
    optimizer.zero_grad()
    replayed = torch.cat([rows, rows.new_zeros(padding)])
    forward = torch.cat([forward, len(rows) + torch.arange(padding, device=rows.device)])
    for _, part, _ in by_state(forward, size):
        micro, counted = batch[replayed[part]], int((part < len(rows)).sum())
        losses, columns = replay(micro)
        (losses[:counted].sum() / total).backward()
        steps = micro.step[:counted].tolist()
        for name, values in columns.items():
            statistics += [(name, value, k) for value, k in zip(values[:counted].tolist(), steps, strict=True)]
    return statistics
