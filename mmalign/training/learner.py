"""The learner: the optimiser, its schedule, and the averaged adapter."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.distributed.deepspeed import ZeroOptimizer
from mmalign.distributed.processes import Ranks
from mmalign.errors import BadInput
from mmalign.learn.update import update
from mmalign.objectives.objective import TrainBatch
from mmalign.policy.protocol import Trainable
from mmalign.seeds import seed_of
from mmalign.training.finite import Skips
from mmalign.training.microbatch import AdaptiveBatch


@dataclass(frozen=True)
class Learner:
    """Steps the adapter of `policy`, on all ranks. `ema` is the averaged adapter by name, `old` that of the policy
    which draws the images, where it lags behind; `micro_batch` the forwards taken at once, `skips` the
    optimiser steps left out."""

    config: Config
    policy: Trainable
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    old: dict[str, Tensor] | None
    micro_batch: AdaptiveBatch
    skips: Skips
    ranks: Ranks

    def set_rate(self, iteration: int) -> None:
        """The learning rate of an iteration: linear warm-up and cool-down."""
        c = self.config
        up = (iteration + 1) / c.warmup if c.warmup else 1.0
        down = (c.iterations - iteration) / c.cooldown if c.cooldown else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * min(1.0, up, down)

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def update(self, batch: TrainBatch, prompts: Sequence[Any], iteration: int) -> dict[str, int | float]:
        """Take the optimiser steps of this batch, and move the averaged adapter; returns a row of statistics.
        `prompts` are those that the batch's `index` points to."""
        c, ranks = self.config, self.ranks
        local, peers, micro_batch = ranks.local_rows(batch.rows.index, "rows to train on"), ranks, self.micro_batch
        if batch.at_once:
            micro_batch = AdaptiveBatch(len(local), fixed=True)
        if isinstance(self.optimizer, ZeroOptimizer):
            peers, micro_batch = self.optimizer, self.optimizer.summing(micro_batch)
        statistics = update(
            self.policy.parameters(), self.optimizer, batch.rows, batch.replay, needed=batch.needed, epochs=c.epochs,
            minibatches=c.minibatches, micro_batch=micro_batch, max_grad_norm=c.max_grad_norm,
            generator=torch.Generator().manual_seed(seed_of(c.seed, "shuffle", iteration)), local=local, peers=peers,
            may_step=partial(self.skips.may_step, iteration, prompts),
        )  # fmt: skip
        if not self.skips.reasons:
            self.average(iteration)
        return {"transitions": len(local)} | statistics

    def average(self, iteration: int) -> None:
        """Move the averaged and the old adapter towards the one in training."""
        moving = [(self.ema, self.config.ema)]
        moving += [] if self.old is None else [(self.old, self.config.objective.lag.at(iteration))]
        adapter = self.policy.adapter()
        for tensors, decay in moving:
            torch._foreach_lerp_([tensors[name] for name in adapter], [*adapter.values()], 1 - decay)

    def averaged(self) -> AbstractContextManager:
        """The policy with its averaged adapter, for a while."""
        return self._with(self.ema)

    def acting(self) -> AbstractContextManager:
        """The policy that draws the images, for a while."""
        return nullcontext() if self.old is None else self._with(self.old)

    @contextmanager
    def _with(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        adapter = self.policy.adapter()
        self.policy.load_adapter(tensors)
        try:
            yield
        finally:
            self.policy.load_adapter(adapter)


def optimizer_class(c: Config) -> type[torch.optim.Optimizer]:
    """The class of a config's optimiser. BadInput where its package is missing."""
    if c.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInput(f"optimizer: adamw8bit: {error}; pip install 'mmalign[gpu]'") from None
    return AdamW8bit
