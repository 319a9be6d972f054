"""Tests of reading images: every picture has one known answer in every file format."""

import base64
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from corpus import pictures
from hypothesis import given, settings, strategies as st
from PIL import Image

from reward_models import images, limits
from reward_models.images import from_pil, to_pil, to_uint8
from reward_models.tools import gallery


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    shown = levels.float() / 255
    assert torch.equal(to_uint8(shown), levels)
    assert torch.equal(from_pil(to_pil(shown)), shown)


def test_rounds_to_nearest_and_clips():
    values = torch.tensor([0.4, 0.6, 254.4, 254.6, -9.0, 300.0]) / 255
    assert to_uint8(values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6))[0, 0, 0].tolist() == [0, 1, 254, 255, 0, 255]


def test_channels_and_axes_keep_their_order():
    red = torch.zeros(1, 3, 2, 5)
    red[0, 0, 1, 4] = 1  # bottom right
    (picture,) = to_pil(red)
    assert picture.size == (5, 2)
    assert picture.mode == "RGB"
    assert picture.getpixel((4, 1)) == (255, 0, 0)


def test_other_modes_become_rgb():
    assert torch.equal(from_pil([Image.new("L", (3, 2), 51)]), torch.full((1, 3, 2, 3), 0.2))


@pytest.mark.parametrize("sizes", [[(3, 2), (2, 3)], []])
def test_one_size_is_required(sizes):
    with pytest.raises(ValueError, match="one size"):
        from_pil([Image.new("RGB", size) for size in sizes])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))


# ------------------------------------------------------------------------------------------------------ files to images

RNG = np.random.default_rng(0)
GREYS = {1: 255, 2: 85, 4: 17, 8: 1}  # what a level of so many bits is worth in levels of 8


def read(folder, data: bytes) -> np.ndarray:
    """The levels [H, W, 3] of a file of these bytes, which every reader must agree on."""
    path = folder / "picture"
    path.write_bytes(data)
    pixels = to_uint8(images.from_file(path))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, images.levels(path))
    assert images.size_of(path) == pixels.shape[:2]
    return pixels


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Levels [H, W, 3] under alpha [H, W, 1], laid over white; to the nearest level."""
    colour, alpha = colour.astype(float), alpha.astype(float)
    return np.floor((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5)


def nearest(samples: np.ndarray) -> np.ndarray:
    return np.floor(samples / 257 + 0.5)


@st.composite
def pngs(draw):
    """A PNG of any kind and depth, and the levels [H, W, 3] that it must be read as."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind, depth = draw(st.sampled_from(
        [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16),
         (6, 8), (6, 16)]
    ))  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = rng.integers(0, 2**depth, (height, width, pictures.CHANNELS[kind]))
    before, clear = [], draw(st.booleans())
    upper = samples >> 8 if depth == 16 else samples
    if kind == 0:
        levels = nearest(samples) if depth == 16 else samples * GREYS[depth]
        alpha = np.full_like(samples, 255)
        if clear:
            key = int(samples[0, 0, 0])
            before, alpha = [(b"tRNS", key.to_bytes(2, "big"))], np.where(samples == key, 0, 255)
    elif kind == 2:
        levels, alpha = upper, np.full_like(samples[..., :1], 255)
        if clear:
            before = [(b"tRNS", b"".join(int(sample).to_bytes(2, "big") for sample in samples[0, 0]))]
            alpha = np.where((upper == upper[0, 0]).all(-1, keepdims=True), 0, 255)
    elif kind == 3:
        palette, alphas = rng.integers(0, 256, (2**depth, 3)), np.full(2**depth, 255)
        before = [(b"PLTE", palette.astype(np.uint8).tobytes())]
        if clear:
            given_alphas = rng.integers(0, 256, draw(st.integers(1, 2**depth)))
            alphas[: len(given_alphas)] = given_alphas
            before.append((b"tRNS", given_alphas.astype(np.uint8).tobytes()))
        levels, alpha = palette[samples[..., 0]], alphas[samples]
    else:
        levels, alpha = upper[..., :-1], upper[..., -1:]
    shown = over_white(np.broadcast_to(levels, (height, width, 3)), alpha)
    orientation = draw(st.integers(1, 8))
    stored = pictures.oriented(samples, orientation)
    return pictures.png(stored, depth, kind, [*before, (b"eXIf", pictures.exif(orientation))]), shown


@given(pngs())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_png_is_read_as_it_is_shown_on_white(tmp_path_factory, drawn):
    data, shown = drawn
    assert np.array_equal(read(tmp_path_factory.getbasetemp(), data), shown)
    sent = images.from_base64(base64.b64encode(data).decode(), 81)
    assert np.array_equal(np.asarray(sent), shown)  # a service reads it the same


def test_what_lies_under_alpha_0_is_white(tmp_path):
    samples = np.zeros((2, 3, 4), int)
    samples[0, 0] = 9, 8, 7, 255
    expected = np.full((2, 3, 3), 255)
    expected[0, 0] = 9, 8, 7
    assert np.array_equal(read(tmp_path, pictures.png(samples, 8, 6)), expected)


@pytest.mark.parametrize("shift", [0, 8])
def test_sixteen_bits_are_eight(tmp_path, shift):
    """Whichever way 8 bits were made 16: by 257, or by 256."""
    levels = np.arange(256).reshape(16, 16, 1)
    deep = levels * 257 if not shift else (levels << 8) + (levels >> 1)
    assert np.array_equal(read(tmp_path, pictures.png(deep, 16, 0))[..., :1], levels)
    assert np.array_equal(read(tmp_path, pictures.png(deep.repeat(3, 2), 16, 2)), levels.repeat(3, 2))


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_camera_was_held(tmp_path, form, orientation):
    levels = np.zeros((16, 24, 3), np.uint8)
    levels[:8, :8] = 255, 0, 0  # red, top left
    levels[8:, 16:] = 0, 0, 255  # blue, bottom right
    stored = Image.fromarray(np.ascontiguousarray(pictures.oriented(levels, orientation)))
    tags = Image.Exif()
    tags[0x0112] = orientation
    more = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    pixels = read(tmp_path, pictures.saved(stored, form, exif=tags, **more))
    assert pixels.shape == levels.shape
    assert np.abs(pixels.astype(int) - levels).max() <= (3 if form == "JPEG" else 0)
    with Image.open(tmp_path / "picture") as opened:  # however it gets here, it is turned once
        assert np.array_equal(to_uint8(from_pil([opened]))[0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("broken", [b"", b"Exif\0\0", b"MM\0*\xff\xff\xff\xff", pictures.exif(0), pictures.exif(9)])
def test_exif_that_says_nothing_turns_nothing(tmp_path, broken):
    samples = RNG.integers(0, 256, (2, 3, 3))
    assert np.array_equal(read(tmp_path, pictures.png(samples, 8, 2, [(b"eXIf", broken)])), samples)


@pytest.mark.parametrize("kind", ["GIF", "APNG", "WebP", "TIFF of two pages"])
def test_of_several_pictures_the_first_is_read(tmp_path, kind):
    first = np.zeros((8, 8, 3), np.uint8)
    first[:4] = 200, 100, 0
    pixels = read(tmp_path, pictures.animations(first)[kind])
    assert np.array_equal(pixels, first)
    assert images.for_page(tmp_path / "picture").startswith("data:image/png;base64,")


COLOURS = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [20, 180, 60], [128, 128, 128]]], np.uint8)


def test_colours_of_print_become_light(tmp_path):
    ink = RNG.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    cyan, black = ink[..., :3].astype(float), ink[..., 3:].astype(float)
    expected = (255 - black) * (255 - cyan) / 255
    pixels = read(tmp_path, pictures.saved(Image.fromarray(ink, "CMYK"), "TIFF"))
    assert np.abs(pixels - expected).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 200, 255, 30))
    pixels = read(tmp_path, pictures.saved(flat, "JPEG", quality=100))
    assert np.abs(pixels - np.array([225, 225 * 55 / 255, 0])).max() <= 4


def test_lightness_and_opponent_colours_become_rgb(tmp_path):
    """Black, white, sRGB's red and a grey, whose L, a, b under D50 are published; a and b are rounded to whole numbers,
    which is worth up to 5 levels of red."""
    lab = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0], [138, 81, 70], [136, 0, 0]]], np.uint8), "LAB")
    pixels = read(tmp_path, pictures.saved(lab, "TIFF")).astype(int)
    expected = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [127, 127, 127]]
    assert np.abs(pixels[0] - expected).max() <= 5


def test_brightness_and_two_colour_differences_become_rgb(tmp_path):
    picture = Image.fromarray(COLOURS).convert("YCbCr")
    assert np.abs(read(tmp_path, pictures.saved(picture, "TIFF")).astype(int) - COLOURS).max() <= 2


def test_deep_greys_of_other_formats(tmp_path):
    deep = np.array([[0, 128, 129, 32768, 65535]])
    grey = Image.fromarray(deep.astype(np.uint16))
    expected = np.array([[0, 0, 1, 128, 255]])
    assert np.array_equal(read(tmp_path, pictures.saved(grey, "TIFF"))[..., 0], expected)
    assert np.array_equal(read(tmp_path, b"P5 5 1 65535\n" + deep.astype(">u2").tobytes())[..., 1], expected)
    upside_down = pictures.saved(grey, "TIFF", tiffinfo={262: 0})  # 0 is white
    assert np.array_equal(read(tmp_path, upside_down)[..., 2], 255 - expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
def test_a_white_picture_is_white_in_any_mode(mode):
    white = Image.new("RGB", (3, 2), "white")
    white = white.convert("RGBA" if mode == "RGBa" else mode).convert(mode)
    before = (white.mode, dict(white.info))
    assert torch.equal(from_pil([white]), torch.ones(1, 3, 2, 3))
    assert (white.mode, white.info) == before


@pytest.mark.parametrize("name", pictures.refused())
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, name):
    data, says = pictures.refused()[name]
    (tmp_path / "x.png").write_bytes(data)
    for reader in (images.from_file, images.levels):
        with pytest.raises(ValueError, match=f"^cannot be read: .*({says})") as error:
            reader(tmp_path / "x.png")
        assert "\n" not in str(error.value)
        assert " at 0x" not in str(error.value)
    assert images.for_page(tmp_path / "x.png") is None


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    for path, says in pictures.places(tmp_path).values():
        for reader in (images.from_file, images.levels, images.size_of):
            with pytest.raises(ValueError, match=f"^cannot be read: .*{says}"):
                reader(path)


def test_pixels_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(pictures.flat(13_000, 13_000))
    with pytest.raises(ValueError, match="13000 x 13000 pixels, more than the 33554432 allowed"):
        images.from_file(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(pictures.flat(40, 30))
    assert images.from_file(tmp_path / "x.png", 1200).shape == (1, 3, 30, 40)
    with pytest.raises(ValueError, match="40 x 30 pixels, more than the 1199 allowed"):
        images.from_file(tmp_path / "x.png", 1199)
    monkeypatch.setattr(limits, "PICTURE", 50)
    with pytest.raises(ValueError, match="bytes, more than the 50 allowed"):
        images.from_file(tmp_path / "x.png")


MEMORY = """
import re, sys
from reward_models import images
def most():
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
images.from_file(sys.argv[1])
before = most()
for path in sys.argv[2:]:
    try:
        images.from_file(path)
    except ValueError:
        pass
print((most() - before) // 1024)
"""


def test_the_largest_picture_takes_little_more_than_its_own_tensor(tmp_path):
    """384 MiB as float32; the file's own forms, before, 4 bytes a pixel each."""
    files = {"small": (8, 8), "bomb": (13_000, 13_000), "largest": (8192, 4096)}
    for name, size in files.items():
        (tmp_path / name).write_bytes(pictures.flat(*size))
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in files)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 300 < taken < 384 + 500


def test_pages_show_what_a_browser_shows_as_it_was_scored(tmp_path):
    levels = RNG.integers(0, 256, (30, 20, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    plain = {"a.png": {}, "a.jpg": {"exif": tags}, "a.bmp": {}, "a.webp": {}}
    for name, more in plain.items():
        Image.fromarray(levels).save(tmp_path / name, **more)
        assert images.for_page(tmp_path / name) is None
    odd = {"b.png": {"exif": tags}, "b.webp": {"exif": tags, "lossless": True}, "b.tif": {"exif": tags}}
    for name, more in odd.items():
        Image.fromarray(levels).save(tmp_path / name, **more)
        shown = images.for_page(tmp_path / name).removeprefix("data:image/png;base64,")
        assert np.array_equal(np.asarray(images.from_base64(shown, 600)), images.levels(tmp_path / name))
    Image.new("CMYK", (2000, 1000)).save(tmp_path / "print.jpg")
    shown = images.from_base64(images.for_page(tmp_path / "print.jpg").removeprefix("data:image/png;base64,"), 10**6)
    assert shown.size == (512, 256)


def test_a_gallery_shows_the_picture_that_was_scored(tmp_path):
    first = np.zeros((8, 8, 3), np.uint8)
    first[:4] = 200, 100, 0
    (tmp_path / "moving.gif").write_bytes(pictures.animations(first)["GIF"])
    (tmp_path / "still.png").write_bytes(pictures.png(first, 8, 2))
    rows = [
        {"image": name, "prompt": "", "id": 0, "scores": {"a.b": 1.0}, "failures": {}, "critiques": {}}
        for name in ("moving.gif", "still.png", "gone.png")
    ]
    gallery.write(rows, {"failed": 0, "scores": {"a.b": {"count": 3}}}, tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    shown = re.findall(r'src="([^"]*)"', page)
    assert shown[1:] == ["still.png", "gone.png"]
    copy = images.from_base64(shown[0].removeprefix("data:image/png;base64,"), 64)
    assert np.array_equal(np.asarray(copy), first)
    assert "background:#fff" in page.replace(": ", ":")  # what is transparent was scored on white
