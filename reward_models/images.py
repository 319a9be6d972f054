"""Read image files, convert between [0, 1] tensors, 8-bit pixels and PIL images, and resize. All of the project's
images are decoded here.

Tensors are rounded to the nearest of 256 levels, so that 8-bit images survive a round trip exactly.

A file becomes the picture that a viewer shows on a white page: rotated by its EXIF orientation, composited over white
where it is transparent, the first frame or page, 16-bit grey rounded to 8 bits, and the upper 8 bits of deeper colours.
Colour profiles are not applied. Refused are pixels that viewers do not agree on (floating-point and 32-bit), truncated
or damaged files, and pictures of more than `limits.PIXELS` pixels by their header.
"""

import base64
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from reward_models import files, limits
from reward_models.prompt import Prompt
from reward_models.types import Images

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")  # no EPS: it starts Ghostscript
BROWSERS = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP"}  # formats that browsers show in the same way
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation: the transposition that undoes it
BITS, PHOTOMETRIC = 258, 262  # TIFF's tags: bits per sample, and whether 0 is white
SHOWN = 512  # px, the longer side of a picture within a page
PNG = "data:image/png;base64,"  # how such a picture begins
# the first is refused here anyway, and broken EXIF is ignored
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")


def to_uint8(images: Images) -> UInt8[Tensor, "N 3 H W"]:
    """Levels 0..255 of images in [0, 1]; values outside are clipped. ValueError for a non-finite value."""
    if not torch.isfinite(images).all():
        raise ValueError("an image holds values that are not finite; it has no 8-bit form")
    return images.float().clamp(0, 1).mul_(255).round_().to(torch.uint8)  # one copy: clamp makes it


def rounded(images: Images) -> Images:
    """The nearest images that a PNG can hold; values outside [0, 1] are clipped. Contiguous, because the last digits of
    a network's output depend on the memory layout of its input."""
    images = images.float().contiguous()
    low, high = images.aminmax() if images.numel() else (0, 1)
    images = images if low >= 0 and high <= 1 else images.clamp(0, 1)
    return images.mul(255).round_().div_(255)


def to_pil(images: Images) -> list[Image.Image]:
    """One RGB image of the same size for each."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()]


def from_pil(images: Sequence[Image.Image]) -> Images:
    """[N, 3, H, W] float32 in [0, 1], of pictures in any mode. ValueError if their sizes differ, and for pixels whose
    white level is not defined."""
    pictures = [upright(image) for image in images]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) != 1:
        raise ValueError(f"images of one size (width, height) are needed, got {sizes or 'none'}")
    # numpy, because torch would start threads of its own in each thread that reads files
    out = np.empty((len(pictures), 3, *reversed(sizes[0])), np.float32)
    for row, picture in zip(out, pictures, strict=True):
        np.divide(np.asarray(picture).transpose(2, 0, 1), np.float32(255), out=row)
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------------ files to images


def from_file(path: str | Path, most: int = limits.PIXELS) -> Images:
    """The picture in a file, [1, 3, H, W], of at most `most` pixels. ValueError, in one line, if it cannot be read."""
    with _reading(), files.opened(path) as file:
        return from_pil([decoded(file, most)])


def from_bytes(data: bytes) -> Images:
    """The picture in the bytes of a file, [1, 3, H, W]. ValueError, in one line, if it cannot be read."""
    with _reading():
        return from_pil([decoded(BytesIO(data))])


def levels(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """The 8-bit pixels of the picture in a file. ValueError, in one line, if it cannot be read."""
    with _reading(), files.opened(path) as file:
        return np.asarray(decoded(file))


def size_of(path: str | Path) -> tuple[int, int]:
    """Height and width of the picture that `from_file` returns, without decoding it. ValueError, in one line, if it
    cannot be read or its checksums are wrong."""
    with _reading(), files.opened(path) as file:
        picture = _header(file, limits.PIXELS, FORMATS)
        width, height = picture.size
        return (width, height) if _orientation(picture) in (5, 6, 7, 8) else (height, width)


ANIMATED = ("GIF", "PNG", "WEBP")  # formats of animations; TIFF and MPO hold pages and views instead


def promised(path: str | Path | None, data: bytes | None = None) -> int:
    """The number of pixels by the header of a file, or of its bytes; 0 if the header cannot be read."""
    try:
        with _reading(), BytesIO(data) if path is None else files.opened(path) as file:
            picture = Image.open(file, formats=FORMATS)
            return picture.width * picture.height
    except ValueError:
        return 0


def animated(path: str | Path | None, data: bytes | None = None) -> bool:
    """Whether a file, or its bytes, holds frames after the first, which are ignored."""
    try:
        with _reading(), BytesIO(data) if path is None else files.opened(path) as file:
            picture = Image.open(file, formats=FORMATS)
            return picture.format in ANIMATED and picture.is_animated
    except ValueError:
        return False


def from_base64(text: str, most: int, formats: Sequence[str] = ("PNG",)) -> Image.Image:
    """The RGB picture in a file of one of `formats`, in base64. ValueError, in one line, if it cannot be read."""
    with _reading():
        return decoded(BytesIO(base64.b64decode(text, validate=True)), most, formats)


def decoded(file: BufferedIOBase, most: int = limits.PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The picture in a file, RGB, upright. ValueError for more than `most` pixels, before any is decoded; for a broken
    file also any exception of Pillow."""
    return upright(_header(file, most, formats))


def upright(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, rotated by its EXIF orientation, composited over white. ValueError for pixels whose
    white level is not defined."""
    turn, clear = TURNS.get(_orientation(picture)), _clear(picture)
    picture.load()
    if picture.mode[0] in "IF":
        picture = _shallow(picture, clear)
    elif clear is not None:
        picture = picture.copy()
        picture.info["transparency"] = clear
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    elif picture.has_transparency_data:
        colours = picture.convert("RGBA")
        picture = Image.new("RGB", picture.size, "white")
        picture.paste(colours, mask=colours.getchannel("A"))
    elif picture.mode != "RGB":
        picture = picture.convert("RGB")
    if turn is not None:
        picture = picture.transpose(turn)
        picture.info.pop("exif", None)  # it must not be rotated again
    return picture


def _header(file: BufferedIOBase, most: int, formats: Sequence[str]) -> Image.Image:
    """The picture in a file before its pixels are decoded, after checks of its size and its checksums."""
    size = file.seek(0, os.SEEK_END)
    if size > limits.PICTURE:
        raise ValueError(f"{size} bytes, more than the {limits.PICTURE} allowed")
    for last in (False, True):
        file.seek(0)
        picture = Image.open(file, formats=formats)
        if picture.width * picture.height > most:
            raise ValueError(f"{picture.width} x {picture.height} pixels, more than the {most} allowed")
        if not last and picture.format == "PNG":
            picture.verify()  # after this Pillow cannot decode it, so it is opened again
        else:
            break
    return picture


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, if it comes before the pixels; 1 if there is none or it cannot be read, as in
    browsers. Pillow itself applies the orientation of TIFF."""
    if picture.format == "TIFF" or "exif" not in picture.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(picture.info["exif"])
        return int(exif.get(ORIENTATION, 1))
    except Exception:  # broken EXIF raises almost anything
        return 1


def _clear(picture: Image.Image) -> int | tuple[int, ...] | None:
    """The grey or the colour that is transparent in a PNG, on the scale of its decoded pixels; None if there is none,
    or if Pillow already handles it correctly."""
    key, raw = picture.info.get("transparency"), picture.tile[0].args if getattr(picture, "tile", None) else ""
    if picture.format != "PNG" or key is None:
        return None
    if raw in ("L;2", "L;4"):
        return key * (85 if raw == "L;2" else 17)
    if raw == "RGB;16B":
        return tuple(level >> 8 for level in key)
    return key if raw == "I;16B" else None


def _shallow(picture: Image.Image, clear: int | None) -> Image.Image:
    """Grey of 12 or 16 bits as grey of 8 bits, with alpha if one grey is transparent."""
    if not (picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))):
        raise ValueError(
            f"pixels of mode {picture.mode} have no agreed white level; save the picture with 8 or 16 bits"
        )
    tags, pixels = getattr(picture, "tag_v2", {}), np.asarray(picture)
    top = 2 ** tags.get(BITS, (16,))[0] - 1
    nearest = ((np.arange(top + 1) * 510 + top) // (2 * top)).astype(np.uint8)
    grey = Image.fromarray((nearest[::-1] if tags.get(PHOTOMETRIC) == 0 else nearest)[pixels])
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == clear, np.uint8(0), np.uint8(255))))
    return grey


def for_page(path: str | Path) -> str | None:
    """A small PNG, as a data URI, of a picture that a browser would show differently from what is read here: animated,
    rotated by EXIF in a format other than JPEG, in CMYK or LAB colours, or in a format that browsers may not support.
    None for all others, and if the picture cannot be read."""
    try:
        with _reading(), files.opened(path) as file:
            picture = _header(file, limits.PIXELS, FORMATS)
            still = picture.format == "MPO" or not getattr(picture, "is_animated", False)
            level = picture.format in ("JPEG", "MPO") or _orientation(picture) == 1
            if still and level and picture.format in BROWSERS and picture.mode not in ("CMYK", "LAB"):
                return None
            picture = decoded(file)
    except ValueError:
        return None
    picture.thumbnail((SHOWN, SHOWN))
    return PNG + png(picture)


def embedded(path: str | Path) -> str:
    """The picture in a file as a data URI of a PNG, at most `SHOWN` pixels a side; the file itself if it is such a PNG.
    ValueError, in one line, if it cannot be read."""
    with _reading(), files.opened(path) as file:
        picture = _header(file, limits.PIXELS, FORMATS)
        if picture.format == "PNG" and max(picture.size) <= SHOWN:
            file.seek(0)
            return PNG + base64.b64encode(file.read()).decode()
        picture = decoded(file)
    picture.thumbnail((SHOWN, SHOWN))
    return PNG + png(picture)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"cannot be read: cannot identify image file; known are {', '.join(FORMATS)}") from None
    except Exception as error:  # broken files raise almost anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot be read: {reason}") from None


def png(picture: Image.Image) -> str:
    """The picture as a PNG file, in base64."""
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


PICTURES = ("source", "reference")  # keys of a prompt's ground truth that name a picture


def beside(wants: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The ground truth with its picture names resolved from `folder`, the folder of the file that it came from."""
    resolved = {key: str(folder / wants[key]) for key in PICTURES if isinstance(wants.get(key), str)}
    return {**wants, **resolved}


def named_picture(prompt: Prompt, keys: Sequence[str] = PICTURES) -> Images:
    """[1, 3, H, W], the picture in the file that the ground truth names under the first of `keys` that is there.
    ValueError if it names none, or the file cannot be read."""
    key = next((key for key in keys if isinstance(prompt.wants.get(key), str)), None)
    if key is None:
        raise ValueError(
            f"the prompt names no picture: {' or '.join(map(repr, keys))} in its ground truth, a file, is needed "
            "(a reward service opens no files for its callers)"
        )
    try:
        return from_file(prompt.wants[key])
    except ValueError as error:
        raise ValueError(f"{key} {prompt.wants[key]}: {error}") from None


def unopened(wants: Mapping[str, Any]) -> dict[str, Any]:
    """The ground truth of a stranger, whose picture names must not open files here: they are None."""
    return {key: None if key in PICTURES else value for key, value in wants.items()}


def resized(
    images: Images, size: tuple[int, int], mode: str, interpolation: str, fill: float = 0.0
) -> Float[Tensor, "N 3 h w"]:
    """Images resized to `size` (height, width) like in open_clip's evaluation transform: `mode` is `squash`, `shortest`
    (scale the shorter side, crop) or `longest` (scale the longer side, pad with `fill`). Sizes are rounded as there."""
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
