"""Advantage-weighted flow matching with a pull to the old velocity (our reading of AdvantageFlow, arXiv 2605.26013).

    loss = A |v - u|^2 + hold |v - v_old|^2

A negative advantage alone would push v away without end. With `hold > -A` the loss is convex, and its minimum,
`v_old + A / (A + hold) (u - v_old)`, is bounded. `hold` is at least 1.5 times the largest advantage.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from mmalign.learn.loss import Grid
from mmalign.objectives.forward_process import ForwardProcess, Noised, cells, size
from mmalign.types import Latents


@dataclass(frozen=True)
class AdvantageFlow(ForwardProcess):
    """`hold`: weight of the pull to the old velocity, in units of `bound`. `normalised`: both terms times t over the
    mean absolute error of the old velocity, as NFT's, so that all times count alike."""

    hold: Annotated[float, Ge(1.5)] = 1.5
    normalised: bool = True
    type = "advantage_flow"

    def loss(self, v: Latents, old: Latents, rows: Noised, share: Grid) -> tuple[Grid, dict[str, Grid]]:
        loss = self.bound * (share * cells(v - rows.target, rows) + self.hold * cells(v - old, rows))
        return (rows.t[:, None, None] / size(old - rows.target) * loss if self.normalised else loss), {}
