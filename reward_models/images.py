"""The only place that converts between [0, 1] tensors, 8-bit pixels and PIL images, and that resizes them.

Rounding is to the nearest of 256 levels, so 8-bit images survive the way there and back exactly.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from reward_models.types import Images


def to_uint8(images: Images) -> UInt8[Tensor, "N 3 H W"]:
    """Levels 0..255 of images in [0, 1]; values outside are clipped. ValueError if a value is not finite."""
    if not torch.isfinite(images).all():
        raise ValueError("an image holds values that are not finite; it has no 8-bit form")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def rounded(images: Images) -> Images:
    """The nearest images a PNG can hold; values outside [0, 1] are clipped. Contiguous: a network's last digits depend
    on the layout of its input in memory."""
    images = images.float().contiguous()
    low, high = images.aminmax() if images.numel() else (0, 1)
    images = images if low >= 0 and high <= 1 else images.clamp(0, 1)
    return images.mul(255).round_().div_(255)


def to_pil(images: Images) -> list[Image.Image]:
    """One RGB image each, of the same size in pixels."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()]


def from_pil(images: Sequence[Image.Image]) -> Images:
    """[N, 3, H, W] float32 in [0, 1]; other modes are converted to RGB. ValueError unless all have one size."""
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images of one size (width, height) are needed, got {sizes or 'none'}")
    # numpy, for torch would start its own threads in each thread that reads files
    pixels = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))


def from_file(place: str | Path) -> Images:
    """The picture in a file, [1, 3, H, W]. ValueError, in one line, if it cannot be read."""
    with _reading(), Image.open(place) as picture:
        return from_pil([picture])


def from_bytes(data: bytes) -> Images:
    """The picture that a file of these bytes holds, [1, 3, H, W]. ValueError, in one line, if there is none."""
    with _reading(), Image.open(BytesIO(data)) as picture:
        return from_pil([picture])


def size_of(place: str | Path) -> tuple[int, int]:
    """Height and width of the picture in a file whose checksums are right. ValueError, in one line, if they are not."""
    with _reading(), Image.open(place) as picture:
        picture.verify()
        return picture.height, picture.width


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"cannot be read: {why}") from None


def png(picture: Image.Image) -> str:
    """The picture as a PNG file, in base64."""
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


PICTURES = ("source", "reference")  # of a prompt's ground truth, those that name a picture


def beside(wants: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Ground truth whose pictures are named from `folder`, the place of the file it came from."""
    own = {key: str(folder / wants[key]) for key in PICTURES if isinstance(wants.get(key), str)}
    return {**wants, **own}


def resized(
    images: Images, size: tuple[int, int], mode: str, interpolation: str, fill: float = 0.0
) -> Float[Tensor, "N 3 h w"]:
    """Images of `size` (height, width), as open_clip's evaluation transform makes them: `mode` is `squash`, `shortest`
    (scale the shorter side, crop) or `longest` (scale the longer side, pad with `fill`). Sizes round as there."""
    high, wide = images.shape[2:]
    ratios = high / size[0], wide / size[1]
    if mode == "squash":
        scaled = size
    elif mode == "shortest" and size[0] == size[1]:
        scaled = (size[0], int(size[0] * wide / high)) if high <= wide else (int(size[0] * high / wide), size[0])
    else:
        ratio = max(ratios) if mode == "longest" else min(ratios)
        scaled = round(high / ratio), round(wide / ratio)
    if scaled != (high, wide):
        # an antialiased bicubic kernel overshoots; 8-bit pixels would clip here too
        images = F.interpolate(images, scaled, mode=interpolation, antialias=True).clamp(0, 1)
    return center_crop(images - fill, list(size)) + fill
