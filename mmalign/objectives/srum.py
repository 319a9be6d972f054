"""SRUM (arXiv 2510.12784): flow matching on the model's own images, weighted by a judge's score of each region.

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
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from mmalign.learn.loss import Grid, pool
from mmalign.objectives.flow_matching import Examples, error, examples
from mmalign.objectives.objective import Draws, Finished, OnImages
from mmalign.policy.protocol import Trainable


@dataclass(frozen=True)
class Srum(OnImages):
    """`draws`: noises and times of each image. `alpha`: rewards of the whole image that make its weight 0 and 1.
    `background`: credit of positions without an opinion. `anchor`: weight of the plain flow-matching error. `margin`:
    the error up to which bad positions are pushed away; 0 leaves them out."""

    draws: Draws = 2
    alpha: tuple[float, float] = (0.0, 1.0)
    background: Annotated[float, Ge(-1), Le(1)] = 0.0
    anchor: Annotated[float, Ge(0)] = 0.5
    margin: Annotated[float, Ge(0)] = 0.0
    type = "srum"
    uses = frozenset({"region", "records"})
    needs = frozenset({"region"})

    def __post_init__(self):
        if not self.alpha[0] < self.alpha[1]:
            raise ValueError(f"alpha {list(self.alpha)} must rise")

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Examples:
        weight = weights(images, *self.alpha, self.background)
        return examples(policy, images.x, images.prompt, weight, self.draws, generator)

    def replay(self, policy: Trainable, cond: Any, rows: Examples) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        err = error(policy, rows.x, rows.noise, rows.t, cond, rows.index)
        value, plain = loss(err, rows.weight, self.anchor, self.margin), pool(err, rows.weight.shape[1:]).detach()
        repelled = (rows.weight < 0) & (plain < self.margin)
        return value, {
            "loss": value.detach(),
            "error": plain.mean((1, 2)),
            "attracted": (rows.weight > 0).float().mean((1, 2)),
            "repelled": repelled.float().mean((1, 2)),
        }


def gate(reward: Float[Tensor, "N"], low: int | float, high: int | float) -> Float[Tensor, "N"]:
    """`alpha`: the reward's place between `low` and `high`, in [0, 1]. Never negative, so that a bad image does not
    turn its bad regions into good ones."""
    return ((reward - low) / (high - low)).clamp(0, 1)


def weights(
    images: Finished, low: int | float = 0.0, high: int | float = 1.0, background: int | float = 0.0
) -> Float[Tensor, "N a b"]:
    """`alpha R`; a position without an opinion counts as `background`."""
    return gate(images.reward, low, high)[:, None, None] * images.places.nan_to_num(background)


def loss(err: Float[Tensor, "M h w"], weight: Grid, anchor: float = 0.5, margin: float = 0.0) -> Float[Tensor, "M"]:
    """The loss of each row; see the module's head."""
    err = pool(err, weight.shape[1:])
    pull, push = weight.clamp(min=0) * err, (-weight).clamp(min=0) * (margin - err).clamp(min=0)
    return (pull + push + anchor * err).mean((1, 2))
