"""The only place that converts between [0, 1] tensors, 8-bit pixels and PIL images.

Rounding is to the nearest of 256 levels, so 8-bit images survive the way there and back exactly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from reward_models.types import Images


def to_uint8(images: Images) -> UInt8[Tensor, "N 3 H W"]:
    """Levels 0..255 of images in [0, 1]; values outside are clipped. ValueError if a value is not finite."""
    if not torch.isfinite(images).all():
        raise ValueError("an image holds values that are not finite; it has no 8-bit form")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(images: Images) -> list[Image.Image]:
    """One RGB image each, of the same size in pixels."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()]


def from_pil(images: Sequence[Image.Image]) -> Images:
    """[N, 3, H, W] float32 in [0, 1]; other modes are converted to RGB. ValueError unless all have one size."""
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images of one size (width, height) are needed, got {sizes or 'none'}")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
