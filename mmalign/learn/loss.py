"""Surrogate losses, at the advantage's own resolution.

Log-densities come as maps `[M, h, w]` in nats per latent element; both are pooled to the advantage's grid `[M, a, b]`
by averaging, subtracted and exponentiated. With a 1x1 grid the ratio is `exp(mean_{C,h,w} (log p_new - log p_old))`,
the reduction Flow-GRPO's clip ranges refer to; with h x w it is a ratio per latent position. At ratio 1 a uniform map
gives the gradient of the 1x1 grid.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def pool(logp: Float[Tensor, "M h w"], grid: tuple[int, int]) -> Float[Tensor, "M a b"]:
    """Mean over the cells of an `a x b` grid; `h, w` must be multiples of it, so that every position counts once."""
    h, w = logp.shape[1:]
    if h % grid[0] or w % grid[1]:
        raise ValueError(f"a credit grid of {grid[0]}x{grid[1]} does not divide the latent's {h}x{w}")
    return F.avg_pool2d(logp[:, None], (h // grid[0], w // grid[1]))[:, 0]


def clipped(
    logp: Float[Tensor, "M h w"],
    old: Float[Tensor, "M h w"],
    advantage: Float[Tensor, "M a b"],
    clip: float,
) -> tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), one loss per row, with its statistics per row.

    `clip` bounds the ratio to [1 - clip, 1 + clip]. `clipped_low` and `clipped_high` are the shares of cells whose
    gradient the bound removed: ratio below it with a negative advantage, above it with a positive one.
    """
    grid = advantage.shape[1:]
    log_ratio = pool(logp, grid) - pool(old, grid)
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean((1, 2))
    with torch.no_grad():
        statistics = {
            "ratio": ratio.mean((1, 2)),
            "log_ratio": log_ratio.mean((1, 2)),
            "clipped_low": ((ratio < 1 - clip) & (advantage < 0)).float().mean((1, 2)),
            "clipped_high": ((ratio > 1 + clip) & (advantage > 0)).float().mean((1, 2)),
        }
    return loss, statistics
