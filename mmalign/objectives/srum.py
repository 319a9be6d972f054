"""SRUM (arXiv 2510.12784): flow matching on the model's own images, weighted by what a judge thinks of each place.

    L = mean_yx( alpha R err ) + anchor mean_yx( err )

with `err` the flow-matching error, `alpha` in [0, 1] from the score of the whole image, `R` in [-1, 1] from its
regions, and the anchor holding the model to what it makes already. Where `alpha R` is negative the squared error would
be unbounded below: it counts as `|alpha R| max(0, margin - err)`, which pushes away until the error has reached
`margin` and then stops; margin 0 leaves such places out.

Left out: judging with the model itself, and the weights of the released code, which are not the paper's: a place
weighs `max(0.5, (R + 1) / 2)`, one without an opinion 0.5, all times `(g + 1) / 2` of the global score g, so that
nothing repels and a bad place pulls like the background. No setting here gives that: with `margin: 0` and `background:
0.5` a bad place pulls by the anchor alone, and one of R below 0.5 less than the background.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.learn.loss import Grid, pool
from mmalign.objectives.flow_matching import Finished, error, noise_like, times
from mmalign.types import Latents, Policy, Rows


@dataclass(frozen=True)
class Examples(Rows):
    """Noised images, one a row: clean latent, noise, time, weight of each cell, row of the prompt, stretch of time."""

    x: Latents
    noise: Latents
    t: Float[Tensor, "M"]
    weight: Grid
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]


def gate(reward: Float[Tensor, "N"], low: int | float, high: int | float) -> Float[Tensor, "N"]:
    """`alpha`: the reward's place between `low` and `high`, in [0, 1]. Never negative, so that a bad image does not
    turn a bad place of it into a good one."""
    return ((reward - low) / (high - low)).clamp(0, 1)


def weights(
    seen: Finished, low: int | float = 0.0, high: int | float = 1.0, background: int | float = 0.0
) -> Float[Tensor, "N a b"]:
    """`alpha R`; a place without an opinion counts as `background`."""
    return gate(seen.reward, low, high)[:, None, None] * seen.places.nan_to_num(background)


def loss(err: Float[Tensor, "M h w"], weight: Grid, anchor: float = 0.5, margin: float = 0.0) -> Float[Tensor, "M"]:
    """The loss of each row; see the module's head."""
    err = pool(err, weight.shape[1:])
    pull, push = weight.clamp(min=0) * err, (-weight).clamp(min=0) * (margin - err).clamp(min=0)
    return (pull + push + anchor * err).mean((1, 2))


def examples(
    policy: Policy, seen: Finished, weight: Float[Tensor, "N a b"], draws: int, generator: torch.Generator
) -> Examples:
    """Each image at `draws` times, with fresh noise for each."""
    x = seen.x.repeat_interleave(draws, 0)
    return Examples(
        x,
        noise_like(x, generator),
        times(policy, draws, len(seen.x), generator).flatten().to(x),
        weight.to(x).repeat_interleave(draws, 0),
        seen.prompt.repeat_interleave(draws),
        torch.arange(draws, device=x.device).repeat(len(seen.x)),
    )


def replay(policy: Policy, cond, anchor: float, margin: float):
    """What `mmalign.learn.update.update` replays examples with."""
    return partial(_replay, policy, cond, anchor, margin)


def _replay(policy, cond, anchor, margin, rows: Examples) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
    err = error(policy, rows.x, rows.noise, rows.t, cond, rows.index)
    found, plain = loss(err, rows.weight, anchor, margin), pool(err, rows.weight.shape[1:]).detach()
    repelled = (rows.weight < 0) & (plain < margin)
    return found, {
        "loss": found.detach(),
        "error": plain.mean((1, 2)),
        "attracted": (rows.weight > 0).float().mean((1, 2)),
        "repelled": repelled.float().mean((1, 2)),
    }
