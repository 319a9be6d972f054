"""DiffusionNFT (arXiv 2509.16117, eq. 5): a good and a bad velocity on either side of the old one.

    v+ = v_old + b (v - v_old),  v- = v_old - b (v - v_old),  r = (A / bound + 1) / 2
    loss = bound / b  (r |x+ - x|^2 / |x+ - x|_1 + (1 - r) |x- - x|^2 / |x- - x|_1),  x+- = x_t - t v+-

with norms as means over elements and the denominators without gradient. Good images pull v towards them, bad ones push
it to the other side of v_old. On policy, with v = v_old, the gradient is that of flow matching, weighted by A over the
error; at r = 1/2 it is 0.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from mmalign.learn.loss import Grid
from mmalign.objectives.forward_process import ForwardProcess, Noised, cells, size
from mmalign.types import Latents


@dataclass(frozen=True)
class Nft(ForwardProcess):
    """`strength`: b, how far v+ and v- are from the old velocity, in units of `v - v_old`."""

    strength: Annotated[float, Gt(0)] = 1.0
    type = "nft"

    def loss(self, v: Latents, old: Latents, rows: Noised, share: Grid) -> tuple[Grid, dict[str, Grid]]:
        r, change, t = (share + 1) / 2, self.strength * (v - old), rows.t[:, None, None]
        good, bad = old + change - rows.target, old - change - rows.target
        loss = r * cells(good, rows) / size(good) + (1 - r) * cells(bad, rows) / size(bad)
        return self.bound / self.strength * t * loss, {"quality": r}
