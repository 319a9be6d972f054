"""The embedded world of things: small pictures of everyday nouns on plain or two-tone grounds, with captions in the
categories of GenEval. They can be drawn, captioned and verified exactly, on any machine and without downloads.

    one_object   an owl                      counting    three apples · two red keys
    two_objects  a cat and a boat            position    a cat left of a boat · a red cat above a blue boat
    colors       a green camel               color_attr  a red cat and a blue boat
    style        a flat drawing of a cat · a shaded drawing of a red cat

A thing without a colour has its natural ones; with one it is tinted: shades of that colour. All things of a picture
have one style, `flat` (Fluent emoji) or `shaded` (Noto emoji): a taste that preferences can be about. Pairs of nouns
that the validation and test captions have together are in no training caption, so that composition is tested.

The sprites are those of `assets/things`. Row 0 is the top; a picture is square, 64 pixels a side unless another number
is asked for, and lengths are in pixels of such a picture.
"""

import random
import re
import zlib
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from reward_models import files, worlds
from reward_models.shipped import folder
from reward_models.worlds import COUNTS, RELATIONS, Words, caption, meaning, plural, thing

FOLDER = folder("reward_models") / "assets/things"
SIDE = 64
GROUNDS = {  # hardly any part of a sprite has such a colour
    "lime": (0.70, 0.95, 0.58),
    "aqua": (0.55, 0.95, 0.85),
    "lavender": (0.72, 0.58, 0.95),
    "orchid": (0.95, 0.62, 0.95),
}
COLOURS = {  # of the brightest parts of a tinted thing
    "red": (1.00, 0.16, 0.14),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.95, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.15, 0.35, 1.00),
    "purple": (0.70, 0.20, 0.85),
}
NATURAL = "natural"  # the colour of a thing that is not tinted
NUMBERS = {word: count for word, count in COUNTS.items() if count <= 3}
TAGS = ("one_object", "two_objects", "colors", "counting", "position", "color_attr", "style")
SIZES = {1: (18, 28), 2: (16, 25), 3: (14, 19)}  # px, of the longer side of each of so many things
GAP = 4  # px between bounding boxes
MIN_OFFSET = 8.0  # px between centres along a relation's axis
DARKEST = 0.3  # brightness of the darkest parts of a tinted thing


# ----------------------------------------------------------------------------------------------------- sprites


@cache
def _index() -> dict[str, Any]:
    return files.parsed(files.text(FOLDER / "index.json"))


NOUNS, STYLES = tuple(_index()["nouns"]), tuple(_index()["styles"])
WORDS = Words(NOUNS, {"color": (NATURAL, *COLOURS), "style": STYLES})


@cache
def _sheet(style: str) -> Float[np.ndarray, "H W 4"]:
    with Image.open(FOLDER / f"{style}.png") as picture:
        return np.asarray(picture.convert("RGBA"), np.float32) / 255


@cache
def sprite(noun: str, style: str, colour: str, side: int) -> Float[np.ndarray, "4 S S"]:
    """A thing `side` pixels long in the middle of a square: red, green and blue times alpha, and alpha."""
    length, columns, k = _index()["side"], _index()["columns"], NOUNS.index(noun)
    row, column = k // columns * length, k % columns * length
    pixels = _sheet(style)[row : row + length, column : column + length]
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    if colour != NATURAL:
        light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
        low, high = np.percentile(light[alpha[..., 0] > 0.5], (2, 98))
        shade = DARKEST + (1 - DARKEST) * ((light - low) / max(high - low, 0.1)).clip(0, 1)
        rgb = shade[..., None] * np.array(COLOURS[colour], np.float32)
    planes = np.concatenate([rgb * alpha, alpha], -1).transpose(2, 0, 1)
    scaled = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(scaled)


def draw(wants: dict, rng: np.random.Generator, side: int = SIDE) -> Float[np.ndarray, "3 S S"]:
    """A clean picture of a request, RGB in [0, 1]. Its places, sizes, ground, and unless requested its style, are
    random; things without a colour are not tinted."""
    scale = side / SIDE
    items = [item for item in wants["include"] for _ in range(item["count"])]
    image = np.empty((3, side, side), np.float32)
    upper, lower = (np.array([*GROUNDS.values()][k])[:, None, None] for k in rng.integers(len(GROUNDS), size=2))
    horizon = side if rng.random() < 0.5 else round(side * rng.uniform(0.3, 0.7))
    image[:, :horizon], image[:, horizon:] = upper, lower
    style = STYLES[rng.integers(len(STYLES))]
    low, high = SIZES[len(items)]
    sizes = [round(rng.uniform(low, high) * scale) for _ in items]
    relation = wants["include"][0]["position"][0] if wants["tag"] == "position" else None
    places = worlds.centres(
        [size / 2 for size in sizes], rng, side, GAP * scale, relation, (MIN_OFFSET + 3) * scale, 4 * scale
    )
    for item, size, (x, y) in zip(items, sizes, places, strict=True):
        top, left = round(y - size / 2), round(x - size / 2)
        *rgb, alpha = sprite(item["class"], item.get("style", style), item.get("color", NATURAL), size)
        part = image[:, top : top + size, left : left + size]
        part[:] = part * (1 - alpha) + rgb
    return image


# ---------------------------------------------------------------------------------------------------- captions


def request(tag: str, rng: random.Random) -> dict:
    """A random request of this kind. Two things never share a noun or a tint, and either both or none are tinted."""
    (one, two), (red, blue) = rng.sample(NOUNS, 2), rng.sample([*COLOURS], 2)
    coloured = rng.random() < 1 / 3
    either = red if coloured else None
    if tag == "position":
        first = thing(one, either) | {"position": [rng.choice([*RELATIONS]), 1]}
        return {"tag": tag, "include": [first, thing(two, blue if coloured else None)]}
    include = {
        "one_object": [thing(one)],
        "two_objects": [thing(one), thing(two)],
        "colors": [thing(one, red)],
        "color_attr": [thing(one, red), thing(two, blue)],
        "counting": [thing(one, either, rng.choice([*NUMBERS.values()]))],
        "style": [thing(one, either, style=rng.choice(STYLES))],
    }
    return {"tag": tag, "include": include[tag]}


def part(wants: dict) -> str:
    """The list that a request belongs to, "train", "validation" or "test" (10 % each): by its pair of nouns, whatever
    their order, colours and relation, or else by its meaning."""
    nouns = sorted(item["class"] for item in wants["include"])
    number = zlib.crc32((" and ".join(nouns) if len(nouns) == 2 else meaning(wants)).encode()) // 7 % 10
    return {0: "validation", 1: "test"}.get(number, "train")


def understood(text: str) -> dict:
    """The request of a caption of the world, empty for any other text."""
    drawing = re.fullmatch(rf"a ({'|'.join(STYLES)}) drawing of (.+)", text)
    style, rest = drawing.groups() if drawing else (None, text)
    words = re.fullmatch(rf"(.+?) (and|{'|'.join(RELATIONS)}) (.+)", rest)
    include = [_entry(phrase) for phrase in ((words[1], words[3]) if words else (rest,))]
    if None in include:
        return {}
    coloured, tag = any("color" in item for item in include), ""
    if style:
        tag, include[0]["style"] = "style", style
    elif words and words[2] != "and":
        tag, include[0]["position"] = "position", [words[2], 1]
    elif words:
        tag = "color_attr" if coloured else "two_objects"
    else:
        tag = "counting" if include[0]["count"] > 1 else "colors" if coloured else "one_object"
    wants = {"tag": tag, "include": include}
    return wants if caption(wants) == text and len({item["class"] for item in include}) == len(include) else {}


@cache
def _nouns() -> dict[tuple[str, int], str]:
    """The noun of each word and count."""
    counted = product(NOUNS, (1, *NUMBERS.values()))
    return {(noun if count == 1 else plural(noun), count): noun for noun, count in counted}


def _entry(phrase: str) -> dict | None:
    number, *colour, noun = phrase.split(" ") if phrase.count(" ") in (1, 2) else ("", "")
    count = NUMBERS.get(number, 1)
    if (noun, count) not in _nouns() or any(word not in COLOURS for word in colour):
        return None
    return thing(_nouns()[noun, count], *colour, count=count)


def changed(wants: dict, kind: str, rng: np.random.Generator) -> dict | None:
    """The request with one thing of a kind of `shapes_world.KINDS` changed (`worlds.changed`): a style is an attribute,
    too. None if it has none of this kind."""
    values = {"color": COLOURS, "size": (), "style": STYLES}
    return worlds.changed(wants, kind, rng, NOUNS, values, [*NUMBERS.values()])
