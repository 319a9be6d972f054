"""Regional reward guidance (GlyphPrinter, arXiv 2603.15616): how much of the adapter acts, and where.

A step drawn from `p_reference^(1-w) p_policy^w`, two Gaussians of one spread, is Gaussian again, its mean that of the
reference plus w times the difference of the two. For velocities, with a mask M over the latent's positions,

    v = v_reference + w M (v_policy - v_reference)

w = 0 is the model without adapter, w = 1 the policy, w > 1 goes beyond it. Costs the forwards of both models. What a
transformer computes outside the mask looks at what was made inside, so that from the second step on images differ there
too; the velocity itself does not. The equation is our reading: the paper was not at hand.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from mmalign.types import Latents, Policy, Velocity
from reward_models.regions import Region, box_shares, inside

Box = tuple[int | float, int | float, int | float, int | float]


def towards(
    base: Float[Tensor, "M C h w"], own: Float[Tensor, "M C h w"], weight: Float[Tensor, "*M h w"]
) -> Float[Tensor, "M C h w"]:
    """`base + weight (own - base)` at each position; to the bit `base` at weight 0 and `own` at weight 1."""
    weight = weight[..., None, :, :].to(base).expand_as(base)
    return torch.where(weight == 0, base, torch.lerp(base, own, weight))


def soft(mask: Float[Tensor, "h w"], edge: float) -> Float[Tensor, "h w"]:
    """The mask with its edge blurred by a Gaussian of `edge` positions; 0 leaves it."""
    if edge == 0:
        return mask
    reach = min(int(3 * edge) + 1, min(mask.shape) - 1)
    return gaussian_blur(mask[None], 2 * reach + 1, edge)[0]


def guided(policy: Policy, mask: Float[Tensor, "*M h w"], strength: float) -> Velocity:
    """The velocity of the policy at `strength` within the mask, of the model without adapter outside it."""
    weight = strength * mask

    def velocity(x, t, cond, index):
        with policy.reference():
            base = policy.velocity(x, t, cond, index).float()
        if not bool(weight.any()):
            return base
        return towards(base, policy.velocity(x, t, cond, index).float(), weight)

    return velocity


def masked(boxes: Sequence[Box], size: tuple[int, int], latent: tuple[int, int], edge: float) -> Float[Tensor, "h w"]:
    """Where boxes (left, top, right, bottom) in pixels of an image of `size` (height, width) lie on its latent, with an
    edge of `edge` pixels. ValueError names a box that is empty or outside."""
    regions = [Region(box, 1.0) for box in boxes]
    inside(regions, size)
    return soft(box_shares(regions, size, latent).amax(0), edge * latent[0] / size[0])


SOFTEST = 1e-3  # of a mask; a smaller share of a latent position is none


def keeping(velocity: Velocity, known: Latents, mask: Float[Tensor, "M h w"]) -> Velocity:
    """`velocity` where the mask is 1, that of the straight line to `known` where it is 0, row i of them for index i."""

    def kept(x, t, cond, index):
        free = mask[index][:, None]
        line = (x.float() - known[index]) / t[:, None, None, None]
        return torch.where(free > SOFTEST, torch.lerp(line, velocity(x, t, cond, index).float(), free), line)

    return kept
