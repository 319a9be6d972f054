"""Non-finite values are caught before they reach the optimiser, and reported with the prompts that caused them.

The run then stops, or leaves the optimiser step out and continues, up to `max_skips` times in a row. A reward that is
NaN because a score is missing is a failed score, which `judge.stop_if_failing` counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmalign.distributed.processes import Ranks
from mmalign.errors import Failed, NonFinite, non_finite
from mmalign.types import Judgement, Rows, Trajectories, Tree
from reward_models import Prompt

T = TypeVar("T")


AT_ONCE = 8  # rows looked at together: comparing takes as much memory again


def _finite(what: str, prompts: Sequence[Prompt], values: Shaped[Tensor, "M *cells"], owner: Int[Tensor, "M"]) -> None:
    good = torch.cat([rows.isfinite().flatten(1).all(1) for rows in values.split(AT_ONCE)]).cpu()
    if not bool(good.all()):
        raise non_finite(what, prompts, owner[~good].tolist())


def check_trajectories(paths: Trajectories, prompts: Sequence[Prompt]) -> None:
    """Raises NonFinite for the latents that are kept of a trajectory, and for finished ones."""
    _finite("latents", prompts, paths.x, paths.tree.prompt)
    _finite("finished latents", prompts, paths.finals, paths.tree.owner)


def check_images(images: Float[Tensor, "M 3 H W"], owner: Int[Tensor, "M"], prompts: Sequence[Prompt]) -> None:
    """Raises NonFinite for an image; `owner` is the row of each one's prompt."""
    _finite("decoded images", prompts, images, owner)


def check_rewards(judged: Judgement, tree: Tree, prompts: Sequence[Prompt]) -> None:
    """Raises NonFinite where a reward is infinite, or NaN although none of its component scores is missing."""
    reward, scored = judged.reward, torch.stack([*judged.parts.values()], 1).isfinite().all(1)
    bad = reward.isinf().any(1) | (reward[:, -1].isnan() & scored)
    if bool(bad.any()):
        raise non_finite("combined rewards", prompts, tree.prompt[bad].tolist())


def on_all_ranks(ranks: Ranks, work: Callable[[], T]) -> T:
    """The result of work that each rank does on its part. A NonFinite of one is raised on all."""
    result, reason = None, None
    try:
        result = work()
    except NonFinite as error:
        reason = str(error)
    first = next(filter(None, ranks.all_gather_object(reason, "what is finite")), None)
    if first:
        raise NonFinite(first)
    return result


@dataclass
class Skips:
    """Optimiser steps left out: the `reasons` of this iteration's, how many in a row, and how many may be. `gather`
    exchanges the reasons of all ranks."""

    limit: int
    gather: Callable[[str | None], list[str | None]] = lambda reason: [reason]
    reasons: list[str] = field(default_factory=list)
    in_a_row: int = 0

    def leave_out(self, iteration: int, error: NonFinite) -> None:
        """Record it. Raises NonFinite where no more may be left out."""
        self.reasons.append(f"iteration {iteration + 1}: {error}")
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            before = f" ({self.limit} steps in a row left out before)" if self.limit else ""
            raise NonFinite(self.reasons[-1] + before)

    def may_step(
        self, iteration: int, prompts: Sequence[Prompt], rows: Rows, losses: Sequence[float], norm: float
    ) -> bool:
        """Whether to step along a minibatch's gradient of this `norm`, with the loss of each row."""
        bad = [k for k, loss in zip(rows.index.tolist(), losses, strict=True) if not math.isfinite(loss)]
        finite = not bad and math.isfinite(norm)
        reason = None
        if not finite:
            reason = str(non_finite("loss" if bad else "gradient", prompts, bad or rows.index.tolist()))
        first = next(filter(None, self.gather(reason)), None)
        if first is None:
            self.in_a_row = 0
            return True
        self.leave_out(iteration, NonFinite(first))
        return False


@contextmanager
def oom_as_failed() -> Iterator[None]:
    """Turn running out of memory into Failed, in one line. What can be done in smaller batches has been by then."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or "the machine's"
        raise Failed(
            f"out of memory: {reason}; gradient_checkpointing, offload, quantize, precision: bfloat16 or a smaller "
            "size need less"
        ) from error
