"""Pictures as files, each by a name, with what must come of it. Most bytes are built here, so that what reads them is
not what wrote them."""

import os
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types: grey, colour, palette, grey and colour with alpha


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))


def png(
    samples: np.ndarray, depth: int, kind: int, before: Sequence[tuple[bytes, bytes]] = (), after: bytes = b""
) -> bytes:
    """A PNG of whole-number samples [H, W, channels] of `depth` bits; chunks `before` and bytes `after` its pixels."""
    samples = np.ascontiguousarray(samples)
    height, width, channels = samples.shape
    assert channels == CHANNELS[kind]
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    elif depth == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    more = b"".join(chunk(name, content) for name, content in before)
    return header(width, height, depth, kind) + more + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    """EXIF that says how a camera was held."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def saved(picture: Image.Image, form: str, **settings) -> bytes:
    file = BytesIO()
    picture.save(file, form, **settings)
    return file.getvalue()


def oriented(levels: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera held in this way stores the picture `levels` [H, W, ...]: EXIF's table, by its rows and columns."""
    flips = {1: levels, 2: levels[:, ::-1], 3: levels[::-1, ::-1], 4: levels[::-1]}
    if orientation in flips:
        return flips[orientation]
    turned = levels.swapaxes(0, 1)
    return {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}[orientation]


def animations(first: np.ndarray) -> dict[str, bytes]:
    """Of two pictures: the first [H, W, 3] is the one; the second is its opposite."""
    one, two = Image.fromarray(first), Image.fromarray(255 - first)
    together = {"save_all": True, "append_images": [two], "duration": 100}
    return {
        "GIF": saved(one.quantize(256), "GIF", save_all=True, append_images=[two.quantize(256)], duration=100),
        "APNG": saved(one, "PNG", **together),
        "WebP": saved(one, "WEBP", lossless=True, **together),
        "TIFF of two pages": saved(one, "TIFF", save_all=True, append_images=[two]),
    }


# --------------------------------------------------------------------------------------------------- what is refused


def flat(width: int, height: int, depth: int = 1, kind: int = 0) -> bytes:
    """A whole PNG of noughts, small as a file however large its picture."""
    row = bytes(1 + (width * depth * CHANNELS[kind] + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return header(width, height, depth, kind) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refused() -> dict[str, tuple[bytes, str]]:
    """Files that are no picture, by name, each with a pattern of the reason it must be refused for."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    whole = {form: saved(Image.fromarray(noise), form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")}
    pixels = png(noise, 8, 2)
    floats = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    return {
        "nothing": (b"", "cannot identify"),
        "text": (b"no picture", "cannot identify"),
        "a web page": (b"<!doctype html><html></html>", "cannot identify"),
        "PostScript, which would start a program": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "cannot identify",
        ),
        "a head alone": (header(8, 8), "cannot identify"),
        "no pixels": (header(8, 8) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "broken|truncated|not enough"),
        "pixels that are no zlib": (header(8, 8) + chunk(b"IDAT", b"x" * 99) + chunk(b"IEND", b""), "broken|truncated"),
        "a byte changed": (pixels[:200] + bytes([pixels[200] ^ 1]) + pixels[201:], "broken|checksum"),
        "a size of nought": (header(0, 0) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "."),
        "a bomb by its head": (flat(20_000, 20_000), "20000 x 20000 pixels, more than the|decompression bomb"),
        "a bomb of one row": (flat(2**26, 1), "67108864 x 1 pixels, more than the"),
        "two heads, the second larger": (
            header(8, 8) + header(40_000, 8)[8:] + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""), ".",
        ),
        "floating-point TIFF": (saved(floats, "TIFF"), "no agreed white"),
        "whole numbers of 32 bits": (saved(floats.convert("I"), "TIFF"), "no agreed white"),
        **{f"half a {form}": (data[: len(data) // 2], ".") for form, data in whole.items()},
        **{f"a {form} without its last bytes": (data[:-20], ".") for form, data in whole.items()},
    }  # fmt: skip


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is no regular file, each with a pattern of the reason; none may be waited for."""
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    return {
        "a FIFO": (folder / "fifo.png", "not a regular file"),
        "a device": (Path("/dev/zero"), "not a regular file"),
        "a folder": (folder / "folder.png", "directory"),
        "a link in a circle": (folder / "loop.png", "symbolic links"),
        "nothing": (folder / "none.png", "No such file"),
        "NUL": (Path("a\0b.png"), "null"),
    }
