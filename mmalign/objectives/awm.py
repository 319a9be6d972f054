"""Advantage-weighted matching (AWM, arXiv 2509.25050), with the options of V-GRPO (arXiv 2604.23380).

The negative error of flow matching, `l = -|v - u|^2`, stands for an image's log-likelihood, and GRPO's clipped ratio is
taken of it at the same noise and time: `ratio = exp(l - l_old)`. On policy the gradient is that of flow matching,
weighted by the advantage.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt

from mmalign.learn.loss import Grid
from mmalign.objectives.forward_process import ForwardProcess, Noised, cells, size
from mmalign.types import Latents


@dataclass(frozen=True)
class Awm(ForwardProcess):
    """`clip` bounds the ratio to `1 - clip` to `1 + clip`. `weight` of an error: "none"; "error", t over its own mean
    absolute size, as NFT's; "huber", `t ((e + 1e-10)^p - 1e-10^p) / p` with p = 1/4, which counts large errors less."""

    clip: Annotated[float, Gt(0)] = 1.0
    weight: Literal["none", "error", "huber"] = "none"
    type = "awm"

    def loss(self, v: Latents, old: Latents, rows: Noised, share: Grid) -> tuple[Grid, dict[str, Grid]]:
        new, before = (self.likelihood(velocity - rows.target, old - rows.target, rows) for velocity in (v, old))
        advantage, ratio = share * self.bound, (new - before.detach()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        low, high = (ratio < 1 - self.clip) & (share < 0), (ratio > 1 + self.clip) & (share > 0)
        return loss, {"ratio": ratio, "clipped_low": low.float(), "clipped_high": high.float()}

    def likelihood(self, miss: Latents, unit: Latents, rows: Noised) -> Grid:
        """What stands for the log-likelihood of each cell, of `v - u`; `unit` is the miss whose size divides it."""
        error, t = cells(miss, rows), rows.t[:, None, None]
        if self.weight == "error":
            return -t * error / size(unit)
        if self.weight == "huber":
            return -t * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
        return -error
