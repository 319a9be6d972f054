"""A weighted sum of objectives that learn from one rollout, such as a policy gradient and a gradient of the reward.

With M_i the rows of part i over all ranks, and l the loss of a row,

    loss = sum_i  weight_i / M_i  sum over rows r of part i of  l_i(r)

The parts' rows are one batch, in the order of prompts. The update takes the mean over all M rows, so that a row of part
i counts `weight_i M / M_i`. With several minibatches each has its share of every part on average, not exactly.

Objectives on finished images that use advantages share them. Those of `grpo` are of steps, and so no other part may use
advantages beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import accumulate
from operator import or_
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.latents import Columns
from mmalign.objectives.objective import AT_ONCE, Finished, Lag, Objective, Rollout, Run, TrainBatch, name_of
from mmalign.types import Judgement, Plan, Rows

Weight = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class RowsOfParts(Rows):
    """Rows of several batches: the number of each one's batch, its row there, and the `scale` of its loss; `index` and
    `step` are those of that row. Rows of one `node` share a forward."""

    part: Int[Tensor, "M"]
    row: Int[Tensor, "M"]
    scale: Float[Tensor, "M"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]
    node: Int[Tensor, "M"]


@dataclass(frozen=True)
class Sum(Objective):
    """`parts`: objectives, each a name or {type: NAME, ...}, of different types. `weights`: one for each part; none
    given: 1. A part of weight 0 is left out and costs nothing."""

    parts: tuple[Any, ...] = field(default=(), metadata={"methods": True})
    weights: tuple[Weight, ...] = ()
    type = "sum"

    def check(self, c: Any) -> None:
        names, weights = [name_of(part) for part in self.parts], [*self.weights]
        if self.weights and len(self.weights) != len(self.parts):
            raise ValueError(f"objective: sum: weights: {weights} for {len(names)} parts; one for each is needed")
        if not self.summands:
            raise ValueError(f"objective: sum: parts {names}, weights {weights}: nothing to learn; a part is needed")
        if repeated := [name for k, name in enumerate(names) if name in names[:k]]:
            raise ValueError(f"objective: sum: parts: {repeated[0]} twice; each may be there once")
        using = [name_of(part) for part in self.summands if "advantage" in part.uses]
        for part in self.summands:
            if "credit" in part.uses and len(using) > 1:
                raise ValueError(
                    f"objective: sum: parts: {' and '.join(using)}: the advantages of {name_of(part)} are of steps, "
                    "and other parts cannot share them; use one of these alone"
                )
        if len(lags := self._lags()) > 1:
            raise ValueError(
                f"objective: sum: parts: {len(lags)} different settings `lag`; one policy draws the images"
            )
        for part in self.summands:
            part.check(c)

    @property
    def weighted(self) -> list[tuple[Any, float]]:
        """The parts with a weight above 0."""
        weights = self.weights or (1.0,) * len(self.parts)
        return [(part, weight) for part, weight in zip(self.parts, weights, strict=False) if weight > 0]

    @property
    def summands(self) -> tuple[Any, ...]:
        return tuple(part for part, _ in self.weighted)

    @property
    def uses(self) -> frozenset[str]:
        uses = frozenset().union(*(part.uses for part in self.summands))
        return uses if all("records" in part.uses for part in self.summands) else uses - {"records"}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.summands))

    @property
    def stochastic(self) -> bool:
        return any(part.stochastic for part in self.summands)

    @property
    def siblings(self) -> int:
        return max((part.siblings for part in self.summands), default=1)

    @property
    def width(self) -> int:
        return max((part.width for part in self.summands), default=1)

    @property
    def reference(self) -> bool:
        return any(part.reference for part in self.summands)

    @property
    def decoded(self) -> int:
        return max((part.decoded for part in self.summands), default=0)

    def reads(self, plan: Plan) -> Columns:
        return reduce(or_, (part.reads(plan) for part in self.summands), Columns())

    @property
    def guide(self) -> str | None:
        return next((part.guide for part in self.summands if part.guide is not None), None)

    @property
    def lag(self) -> Lag:
        return next(iter(self._lags()), AT_ONCE)

    def _lags(self) -> dict[Lag, None]:
        """The different settings of parts that have one."""
        return {part.lag: None for part in self.summands if "lag" in {each.name for each in fields(part)}}

    def batch(
        self, run: Run, rollout: Rollout, judged: Judgement, advantage: Tensor | None, iteration: int
    ) -> TrainBatch:
        return self._of([part.batch(run, rollout, judged, advantage, iteration) for part in self.summands], run)

    def of_images(self, run: Run, prompts: Sequence[Any], cond: Any, images: Finished, iteration: int) -> TrainBatch:
        return self._of([part.of_images(run, prompts, cond, images, iteration) for part in self.summands], run)

    def _of(self, batches: Sequence[TrainBatch], run: Run) -> TrainBatch:
        names = [name_of(part) for part in self.summands]
        counts = {name: len(batch.rows) for name, batch in zip(names, batches, strict=True)}
        every = run.ranks.all_reduce_sum(counts, "rows of each objective")
        total = sum(every.values())
        scales = [weight * total / max(1, every[name]) for name, (_, weight) in zip(names, self.weighted, strict=True)]
        before = accumulate(counts.values(), initial=0)
        parts = zip(batches, scales, before, strict=False)
        columns = [_columns(k, batch.rows, scale, first) for k, (batch, scale, first) in enumerate(parts)]
        rows = RowsOfParts(*(torch.cat(column) for column in zip(*columns, strict=True)))
        order = rows.index.argsort(stable=True)
        needed = None
        if any(batch.needed is not None for batch in batches):
            known = [torch.ones_like(b.rows.index, dtype=torch.bool) if b.needed is None else b.needed for b in batches]
            needed = torch.cat(known)[order]
        return TrainBatch(rows[order], Replayed(tuple(names), tuple(batches)), needed)


def _columns(part: int, rows: Any, scale: float, before: int) -> tuple[Tensor, ...]:
    """The columns of `RowsOfParts` for the rows of one part, after so many of the parts before."""
    index = rows.index
    numbers = torch.arange(len(rows), device=index.device)
    scales = torch.full_like(index, scale, dtype=torch.float32)
    return torch.full_like(index, part), numbers, scales, index, rows.step, rows.forward.to(index) + before


@dataclass(frozen=True)
class Replayed:
    """The loss of rows, each by its part. A statistic is NaN where a row's part does not have it; `loss` is that of the
    sum, `loss/NAME` that of one part."""

    names: tuple[str, ...]
    batches: tuple[TrainBatch, ...]

    def __call__(self, rows: RowsOfParts) -> tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]:
        places, losses, statistics = [], [], {}
        for k, (name, batch) in enumerate(zip(self.names, self.batches, strict=True)):
            at = (rows.part == k).nonzero()[:, 0]
            if not len(at):
                continue
            loss, columns = batch.replay(batch.rows[rows.row[at]])
            places.append(at)
            losses.append(rows.scale[at] * loss)
            for key, values in columns.items():
                key = f"loss/{name}" if key == "loss" else key
                blank = values.new_full((len(rows),), torch.nan, dtype=torch.float32)
                statistics.setdefault(key, blank)[at] = values.float()
        loss = torch.cat(losses)[torch.cat(places).argsort()]
        return loss, statistics | {"loss": loss.detach()}
