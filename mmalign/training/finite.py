"""What is not finite is caught before anything is learnt from it, and told with the prompts it is of.

The run then stops, or leaves the optimiser step out and goes on, up to `max_skips` times in a row. A reward that is NaN
for want of a score is no such value but a failed score, which `judge.stop_if_failing` counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmalign.errors import Failed, NonFinite, non_finite
from mmalign.types import Judgement, Rows, Trajectories
from reward_models import Prompt

T = TypeVar("T")


def _finite(what: str, prompts: Sequence[Prompt], values: Shaped[Tensor, "M *cells"], owner: Int[Tensor, "M"]) -> None:
    good = values.isfinite().flatten(1).all(1).cpu()
    if not bool(good.all()):
        raise non_finite(what, prompts, owner.cpu()[~good].tolist())


def walked(paths: Trajectories, images: Float[Tensor, "E 3 H W"], prompts: Sequence[Prompt]) -> None:
    """NonFinite where a walk's latents or an image are not."""
    _finite("latents", prompts, paths.x, paths.prompt)
    _finite("finished latents", prompts, paths.ends, paths.owner)
    _finite("decoded images", prompts, images, paths.owner)


def rewarded(judged: Judgement, paths: Trajectories, prompts: Sequence[Prompt]) -> None:
    """NonFinite where a reward is infinite, or NaN although every score it is made of was had."""
    reward, scored = judged.reward, torch.stack([*judged.parts.values()], 1).isfinite().all(1)
    bad = reward.isinf().any(1) | (reward[:, -1].isnan() & scored)
    if bool(bad.any()):
        raise non_finite("combined rewards", prompts, paths.prompt.cpu()[bad].tolist())


def together(tell: Callable, work: Callable[[], T]) -> T:
    """Work that each process does on its part: what is not finite for one is so for all."""
    done, said = None, None
    try:
        done = work()
    except NonFinite as error:
        said = str(error)
    found = next(filter(None, tell(said, "what is finite")), None)
    if found:
        raise NonFinite(found)
    return done


@dataclass
class Skips:
    """Optimiser steps left out: the `reasons` of this iteration's, how many in a row, and how many may be. `tell` lets
    all processes of a run know what each has found."""

    limit: int
    tell: Callable[[str | None], list[str | None]] = lambda found: [found]
    reasons: list[str] = field(default_factory=list)
    in_a_row: int = 0

    def leave_out(self, iteration: int, found: NonFinite) -> None:
        """Note it. Raises NonFinite where no more may be left out."""
        self.reasons.append(f"iteration {iteration + 1}: {found}")
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            before = f" ({self.limit} steps in a row left out before)" if self.limit else ""
            raise NonFinite(self.reasons[-1] + before)

    def may_step(
        self, iteration: int, prompts: Sequence[Prompt], rows: Rows, losses: Sequence[float], norm: float
    ) -> bool:
        """Whether to step along a minibatch's gradient, whose `norm` is given, and the loss of each row."""
        bad = [k for k, loss in zip(rows.index.tolist(), losses, strict=True) if not math.isfinite(loss)]
        sound = not bad and math.isfinite(norm)
        own = None if sound else str(non_finite("loss" if bad else "gradient", prompts, bad or rows.index.tolist()))
        found = next(filter(None, self.tell(own)), None)
        if found is None:
            self.in_a_row = 0
            return True
        self.leave_out(iteration, NonFinite(found))
        return False


@contextmanager
def failing() -> Iterator[None]:
    """Running out of memory becomes Failed, told in one line. What can be done in smaller parts has been by then."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        why = str(error).partition("\n")[0] or "the machine's"
        raise Failed(
            f"out of memory: {why}; gradient_checkpointing, offload, quantize, precision: bfloat16 or a smaller size "
            "need less"
        ) from error
