"""The plans of all starts, one under the other: the table that is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Kernel, Plan


@dataclass(frozen=True)
class Routes:
    """The plans of all starts, one under the other: a row per (start, route). `trained` are the rows trained on."""

    kernel: Kernel
    t_max: float
    t: Float[Tensor, "R states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    node: Int[Tensor, "R states"]
    start: Int[Tensor, "R"]
    trained: Int[Tensor, "N"]
    finished_by: Int[Tensor, "N states"]

    @property
    def of_start(self) -> list[slice]:
        """The rows of each start."""
        ends = [0, *self.start.bincount().cumsum(0).tolist()]
        return [slice(a, b) for a, b in pairwise(ends)]

    def path(self, row: int, k: int) -> tuple[int, int, tuple[int, ...]]:
        """The key of the noise that `row` takes at step k."""
        taken = torch.where(self.noise[row, : k + 1] > 0, self.draw[row, : k + 1], -1)
        return int(self.start[row]), k, tuple(taken.tolist())


def stacked(plans: Sequence[Plan]) -> Routes:
    """The routes of the plans of all starts. ValueError unless they agree in kernel, t_max and number of steps."""
    first = plans[0]
    for p in plans:
        if (p.kernel, p.t_max, p.steps) != (first.kernel, first.t_max, first.steps):
            raise ValueError(
                "plans sampled together must agree in kernel, t_max and number of steps, got "
                f"{(first.kernel, first.t_max, first.steps)} and {(p.kernel, p.t_max, p.steps)}"
            )
    routes = torch.tensor([p.routes for p in plans])
    offset = (routes.cumsum(0) - routes).tolist()  # above every state and route number of the plans before
    columns = {
        "t": [p.t for p in plans],
        "noise": [p.noise for p in plans],
        "draw": [p.draw for p in plans],
        "node": [p.state + o for p, o in zip(plans, offset, strict=True)],
        "start": [torch.full((p.routes,), b) for b, p in enumerate(plans)],
        "trained": [torch.arange(p.trained) + o for p, o in zip(plans, offset, strict=True)],
        "finished_by": [
            torch.where(p.finished_by < 0, -1, p.finished_by + o) for p, o in zip(plans, offset, strict=True)
        ],
    }
    columns = {name: torch.cat(parts) for name, parts in columns.items()}
    return Routes(first.kernel, first.t_max, **columns)
