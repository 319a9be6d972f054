"""Velocities that act on a part of the image: regional reward guidance, and inpainting.

Regional reward guidance (GlyphPrinter, arXiv 2603.15616) sets how much of the adapter acts, and where. A step drawn
from `p_reference^(1-w) p_policy^w`, two Gaussians of one spread, is Gaussian again, with the mean of the reference plus
w times the difference of the two. For velocities, with a mask M over the latent's positions,

    v = v_reference + w M (v_policy - v_reference)

w = 0 is the model without adapter, w = 1 the policy, w > 1 extrapolates. It costs the forwards of both models. A
transformer's output outside the mask depends on the latent inside it, so from the second step on images differ there
too; the velocity itself does not. The equation is our reading; the paper was not available.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from mmalign.policy.protocol import Policy
from mmalign.types import Latents, Velocity
from reward_models.regions import Region, box_shares, inside

Box = tuple[int | float, int | float, int | float, int | float]
NEGLIGIBLE = 1e-3  # a mask below it counts as 0


def towards(
    base: Float[Tensor, "M C h w"], other: Float[Tensor, "M C h w"], weight: Float[Tensor, "*M h w"]
) -> Float[Tensor, "M C h w"]:
    """`base + weight (other - base)` at each position; to the bit `base` at weight 0 and `other` at weight 1."""
    weight = weight[..., None, :, :].to(base).expand_as(base)
    return torch.where(weight == 0, base, torch.lerp(base, other, weight))


def soft(mask: Float[Tensor, "h w"], edge: float) -> Float[Tensor, "h w"]:
    """The mask with its edge blurred by a Gaussian of `edge` positions; unchanged for 0."""
    if edge == 0:
        return mask
    reach = min(int(3 * edge) + 1, min(mask.shape) - 1)
    return gaussian_blur(mask[None], 2 * reach + 1, edge)[0]


def regional_guidance(policy: Policy, mask: Float[Tensor, "*M h w"], strength: float) -> Velocity:
    """The velocity of the policy at `strength` within the mask, of the model without adapter outside it."""
    weight = strength * mask

    def velocity(x, t, cond, index):
        with policy.reference():
            base = policy.velocity(x, t, cond, index).float()
        if not bool(weight.any()):
            return base
        return towards(base, policy.velocity(x, t, cond, index).float(), weight)

    return velocity


def guided_in_boxes(policy: Policy, strength: float, boxes: Sequence[Box] = (), edge: float = 0.0) -> Velocity | None:
    """`regional_guidance` within boxes (left, top, right, bottom) in pixels with a soft edge of `edge` pixels, or
    everywhere without boxes; None where that is the policy's own velocity. ValueError names a box that is empty or
    outside the image."""
    if strength == 1 and not boxes:
        return None
    latent = policy.latent_shape[1:]
    mask = box_mask(boxes, policy.image_size, latent, edge) if boxes else torch.ones(latent)
    return regional_guidance(policy, mask.to(policy.device), strength)


def box_mask(boxes: Sequence[Box], size: tuple[int, int], latent: tuple[int, int], edge: float) -> Float[Tensor, "h w"]:
    """The share of each latent position that boxes in pixels of an image of `size` (height, width) cover, with an edge
    of `edge` pixels. ValueError names a box that is empty or outside."""
    regions = [Region(box, 1.0) for box in boxes]
    inside(regions, size)
    return soft(box_shares(regions, size, latent).amax(0), edge * latent[0] / size[0])


def inpaint(velocity: Velocity, known: Latents, mask: Float[Tensor, "M h w"]) -> Velocity:
    """`velocity` where the mask is 1, that of the straight line to the latents `known` where it is 0. Rows of `known`
    and `mask` belong to the index of the velocity."""

    def inpainting(x, t, cond, index):
        free = mask[index][:, None]
        line = (x.float() - known[index]) / t[:, None, None, None]
        return torch.where(free > NEGLIGIBLE, torch.lerp(line, velocity(x, t, cond, index).float(), free), line)

    return inpainting
