"""The embedded world: coloured shapes and letters on 32x32 pixels, with GenEval-like captions.

Its pictures can be drawn, captioned and verified exactly, on any machine and without downloads.
A request is written in the layout of GenEval's metadata (`tag`, `include`, ...), extended by `size` and `text`.

    one_object   a circle · a large cross          counting   three green squares
    two_objects  a circle and a square             position   a blue triangle left of a yellow circle
    colors       a red circle · a small red circle color_attr a red square and a blue cross
    text         the text "O H"

Row 0 is the top; coordinates are (x, y) in pixels with pixel centres at .5.
"""

import zlib
from functools import cache
from itertools import permutations, product

import numpy as np
from jaxtyping import Float

from reward_models import worlds
from reward_models.types import Prompt
from reward_models.worlds import COUNTS, RELATIONS, Words, caption, meaning, thing

SIDE = 32
BACKGROUND = (0.85, 0.85, 0.85)
COLOURS = {
    "red": (0.86, 0.08, 0.10),
    "green": (0.05, 0.55, 0.12),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.98, 0.88, 0.05),
    "purple": (0.55, 0.10, 0.70),
    "black": (0.03, 0.03, 0.03),
    "orange": (1.00, 0.50, 0.00),
    "cyan": (0.00, 0.80, 0.90),
}
SHAPES = ("circle", "square", "triangle", "cross")
MIN_OFFSET = 6.0  # px between centres along a relation's axis
SMALL_MAX, LARGE_MIN = 10.5, 14.0  # px, larger side of the bounding box
GLYPHS = {  # 5x7
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
WORDS = Words(SHAPES, {"color": tuple(COLOURS), "size": ("small", "large")}, tuple(GLYPHS))
KINDS = ("object", "attribute", "relation", "count")  # of what a caption asks for
TAGS = ("one_object", "two_objects", "colors", "counting", "position", "color_attr", "text")


# ---------------------------------------------------------------------------------------------------- captions


def requests() -> list[dict]:
    """Every request of the world, in a fixed order. Two objects never share a shape or a colour."""
    out = []

    def add(tag, *include, **extra):
        out.append({"tag": tag, "include": list(include), **extra})

    shape_pairs, colour_pairs = list(permutations(SHAPES, 2)), list(permutations(COLOURS, 2))
    for shape in SHAPES:
        for size in (None, "small", "large"):
            add("one_object", thing(shape, size=size))
            for colour in COLOURS:
                add("colors", thing(shape, colour, size=size))
        for n, colour in product(COUNTS.values(), (None, *COLOURS)):
            add("counting", thing(shape, colour, n))
    for one, two in shape_pairs:
        add("two_objects", thing(one), thing(two))
        for colour in COLOURS:
            add("two_objects", thing(one, colour), thing(two))
            add("two_objects", thing(one), thing(two, colour))
        for first, second in colour_pairs:
            add("color_attr", thing(one, first), thing(two, second))
        for relation, (first, second) in product(RELATIONS, [(None, None), *colour_pairs]):
            add("position", thing(one, first) | {"position": [relation, 1]}, thing(two, second))
    for letters in (*GLYPHS, *map("".join, permutations(GLYPHS, 2))):
        add("text", text=letters)
    return out


@cache
def _captions() -> dict[str, dict]:
    return {caption(wants): wants for wants in requests()}


def understood(text: str) -> dict:
    """The request of a caption of the world, empty for any other text."""
    return _captions().get(text, {})


def changed(wants: dict, kind: str, rng: np.random.Generator) -> dict | None:
    """The request with one thing of a kind of `KINDS` changed (`worlds.changed`), None if it has none of this kind."""
    return worlds.changed(wants, kind, rng, SHAPES, WORDS.values, [*COUNTS.values()])


def split(held_out: dict[str, int]) -> tuple[list[Prompt], list[Prompt]]:
    """All captions as (training, held-out), with at least `held_out[tag]` of each tag held out.

    Membership depends on a hash of the meaning alone. A caption with the meaning of a held-out one is held out
    too, or dropped if that would exceed the count, so that no training caption leaks a held-out one.
    """
    by_tag: dict[str, list[Prompt]] = {tag: [] for tag in TAGS}
    for number, wants in enumerate(requests()):
        by_tag[wants["tag"]].append(Prompt(caption(wants), wants, number))
    train, held = [], []
    for tag, prompts in by_tag.items():
        ranked = sorted(prompts, key=lambda p: (zlib.crc32(meaning(p.wants).encode()), p.id))
        chosen = ranked[: held_out[tag]]
        leaking = {meaning(p.wants) for p in chosen}
        held += chosen
        train += [p for p in ranked[held_out[tag] :] if meaning(p.wants) not in leaking]
    return sorted(train, key=lambda p: p.id), sorted(held, key=lambda p: p.id)


# ----------------------------------------------------------------------------------------------------- drawing


def coverage(name: str, rx: float, ry: float, dx: Float[np.ndarray, "h w"], dy: Float[np.ndarray, "h w"]):
    """How much of each pixel a shape or letter covers, in [0, 1], antialiased over one pixel.

    `dx, dy` are offsets from its centre in px, `rx, ry` its half extents in px.
    """
    if name in GLYPHS:
        rows = np.array([[int(bit) for bit in row] for row in GLYPHS[name].split()], float)
        col = np.clip(np.floor((dx / rx + 1) * 2.5), 0, 4).astype(int)
        row = np.clip(np.floor((dy / ry + 1) * 3.5), 0, 6).astype(int)
        return rows[row, col] * ((np.abs(dx) < rx) & (np.abs(dy) < ry))
    r, x, y = min(rx, ry), dx * min(rx, ry) / rx, dy * min(rx, ry) / ry
    if name == "circle":
        distance = np.hypot(x, y) - r
    elif name == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - r
    elif name == "triangle":  # apex up; sides have slope 2
        distance = np.maximum(y - r, (2 * np.abs(x) - y - r) / np.sqrt(5))
    elif name == "cross":
        arm = r / 3
        distance = np.minimum(np.maximum(np.abs(x) - r, np.abs(y) - arm), np.maximum(np.abs(y) - r, np.abs(x) - arm))
    else:
        raise ValueError(f"no shape called {name!r}; known: {', '.join((*SHAPES, *GLYPHS))}")
    return np.clip(0.5 - distance, 0, 1)


def _sizes(wants: dict, entities: list[dict], rng: np.random.Generator) -> list[float]:
    crowded = len(entities) > 2
    ranges = {None: (8.5, 10.5) if crowded else (9, 13.5), "small": (8, 9.5), "large": (15.5, 19)}
    return [rng.uniform(*ranges[entity.get("size")]) / 2 for entity in entities]


def draw(wants: dict, rng: np.random.Generator) -> Float[np.ndarray, "3 H W"]:
    """A clean picture of a request, RGB in [0, 1]; attributes that the request leaves open (position, size,
    colour) are random."""
    image = np.empty((3, SIDE, SIDE), np.float32)
    image[:] = np.array(BACKGROUND)[:, None, None]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5

    def paint(name, colour, cx, cy, rx, ry):
        alpha = coverage(name, rx, ry, x - cx, y - cy)
        image[:] = image * (1 - alpha) + np.array(COLOURS[colour])[:, None, None] * alpha

    if wants["tag"] == "text":
        width = 10 * len(wants["text"]) + 4 * (len(wants["text"]) - 1)
        left, top = rng.integers(1, SIDE - width), rng.integers(1, SIDE - 14)
        for i, letter in enumerate(wants["text"]):
            paint(letter, "black", left + 14 * i + 5, top + 7, 5.0, 7.0)
        return image
    free = iter(rng.permutation([c for c in COLOURS if c not in {i.get("color") for i in wants["include"]}]))
    items = [item if "color" in item else item | {"color": next(free)} for item in wants["include"]]
    entities = [item for item in items for _ in range(item["count"])]
    radii = _sizes(wants, entities, rng)
    relation = wants["include"][0]["position"][0] if wants["tag"] == "position" else None
    centres = worlds.centres(radii, rng, SIDE, 2.5, relation, MIN_OFFSET + 1, 2)
    for entity, r, (cx, cy) in zip(entities, radii, centres, strict=True):
        paint(entity["class"], entity["color"], cx, cy, r, r)
    return image
