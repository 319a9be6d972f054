"""`things`: the exact verifier of the embedded world of things (`reward_models.things_world`).

It uses pixels only. The ground is the pair of the world's grounds and the horizon that explain most pixels; what
differs from it is cut into connected parts, and each is compared with the templates of all nouns, styles and tints at
several sizes. The request is read from `Prompt.wants`, never from the text.

Two scores per image, both in [0, 1], comparable across prompts, as those of `shapes`:

- `strict`: 1 if all requested things are present, nothing else is, and tints, style and relation are right; else 0.
- `partial`: the mean over the requested things of (present + each requested attribute right) / (1 + attributes), where
  the relation counts as one more thing, times requested / present if there are surplus things.

A part that no template fits is a "blob". What was not requested is free: a tint, a style. It ignores the ground,
texture and aesthetic quality, and reads a plain patch as the thing whose outline and colour are nearest.
Licence: this project's own; that of the sprites is in `assets/things`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from reward_models.scoring import each
from reward_models.things_world import COLOURS, GROUNDS, MIN_OFFSET, NATURAL, NOUNS, SIDE, STYLES, WORDS, sprite
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.verdicts import UNKNOWN, Blob, Verdict, exact_card, judge_objects

CELLS = 16  # a side of a template
CONTRAST = 0.16  # distance in RGB from the ground beyond which a pixel is part of a thing
MIN_AREA = 24  # px, of a part, in a picture of 64 x 64
MASK = 0.5  # weight of the outline beside the colours
WORST = 0.3  # mean squared error, beyond which no template fits
INSETS = (0, 0.5, 1)  # px: a blurred part is larger than the thing
LENGTHS = (14, 17, 21, 26)  # px, of the templates


def _contrast(images: Float[np.ndarray, "N 3 H W"]) -> Float[np.ndarray, "N H W"]:
    """The squared distance of each pixel from the ground; beside the horizon, which may be blurred, from any mixture of
    the two grounds."""
    grounds, height = np.array([*GROUNDS.values()], np.float32), images.shape[2]
    distances = ((images[:, None] - grounds[None, :, :, None, None]) ** 2).sum(2)  # [N, G, H, W]
    cost = np.minimum(distances, CONTRAST**2).sum(-1)
    above = cost.cumsum(-1)  # of rows up to and with this one
    total = above[:, :, None] + (above[..., -1:] - above)[:, None]  # [N, upper, lower, last row of the upper one]
    upper, lower, last = np.unravel_index(total.reshape(len(images), -1).argmin(1), total.shape[1:])
    n, row = np.arange(len(images)), np.arange(height)
    contrast = np.where((row <= last[:, None])[..., None], distances[n, upper], distances[n, lower])
    start, way = grounds[upper][:, :, None, None], (grounds[lower] - grounds[upper])[:, :, None, None]
    share = ((images - start) * way).sum(1) / np.maximum((way**2).sum(1), 1e-6)
    mixed = ((images - start - share.clip(0, 1)[:, None] * way) ** 2).sum(1)
    beside = np.abs(row - last[:, None] - 0.5) < 2
    return np.where(beside[..., None], mixed, contrast)


def _crops(
    images: Float[np.ndarray, "N 3 H W"],
    parts: Bool[np.ndarray, "M H W"],
    n: np.ndarray,
    boxes: np.ndarray,
) -> tuple[Float[np.ndarray, "M C C 3"], Float[np.ndarray, "M C C"]]:
    """Colours and mask of each part in the square around its box [M, 4], by 2 x 2 samples a cell."""
    left, top, right, bottom = boxes.T
    length, (height, width) = np.maximum(right - left, bottom - top), images.shape[2:]
    steps = (np.arange(2 * CELLS) + 0.5) / (2 * CELLS) - 0.5
    x = np.floor((left + right)[:, None] / 2 + steps * length[:, None]).astype(int)
    y = np.floor((top + bottom)[:, None] / 2 + steps * length[:, None]).astype(int)
    inside = ((x >= 0) & (x < width))[:, None, :] & ((y >= 0) & (y < height))[:, :, None]
    x, y = x.clip(0, width - 1)[:, None, :], y.clip(0, height - 1)[:, :, None]
    mask = parts[np.arange(len(n))[:, None, None], y, x] & inside
    colours = images.transpose(0, 2, 3, 1)[n[:, None, None], y, x]
    cells = (len(n), CELLS, 2, CELLS, 2)
    return colours.reshape(*cells, 3).mean((2, 4)), mask.reshape(cells).mean((2, 4), dtype=np.float32)


def _box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@cache
def _templates() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray, np.ndarray]:
    """Noun, tint and style of each of K templates, and its squared error against cells of a part as a linear function:
    factors of [colours, mask] (K, 4 a cell), factors of [squared length of the colour, squared mask] (K, 2 a cell), and
    a constant (K)."""
    names = [*product(NOUNS, (NATURAL, *COLOURS), STYLES, LENGTHS)]
    canvas = max(LENGTHS) + 2
    planes = np.zeros((len(names), 4, canvas, canvas), np.float32)
    for picture, (noun, colour, style, length) in zip(planes, names, strict=True):
        picture[:, 1 : 1 + length, 1 : 1 + length] = sprite(noun, style, colour, length)
    masks = planes[:, 3] > 0.4
    boxes = np.array([_box(mask) for mask in masks])
    rows = np.arange(len(names))
    colours, mask = _crops(planes[:, :3], masks, rows, boxes)
    alpha, _ = _crops(planes[:, 3:].repeat(3, 1), masks, rows, boxes)
    weight = np.where(alpha[..., 0] > 0.8, alpha[..., 0], 0)  # the edge, where the ground shines through, has none
    straight = colours / np.maximum(alpha, 0.05)
    area = np.maximum(weight.sum((1, 2)), 1)[:, None, None]
    weight, outline = weight / area, MASK / mask.sum((1, 2))[:, None, None]
    linear = -2 * np.concatenate([weight[..., None] * straight, (outline * mask)[..., None]], -1)
    squared = np.stack([weight, np.broadcast_to(outline, weight.shape)], -1)
    constant = (weight * (straight**2).sum(-1)).sum((1, 2)) + (outline * mask**2).sum((1, 2))
    flat = len(names), -1
    return [name[:3] for name in names], linear.reshape(flat), squared.reshape(flat), constant


def find_things(images: Float[np.ndarray, "N 3 H W"]) -> list[list[Blob]]:
    """All things in each image, in no particular order."""
    blobs: list[list[Blob]] = [[] for _ in images]
    scale = min(images.shape[2:]) / SIDE
    foreground = _contrast(images) > CONTRAST**2
    foreground &= ndimage.uniform_filter(foreground.astype(np.float32), (0, 3, 3), mode="constant") > 2.5 / 9
    near = ndimage.binary_dilation(foreground, np.ones((1, 3, 3), bool))
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = True
    labels, _ = ndimage.label(near, flat)
    labels = labels * foreground
    parts = []
    for number, where in enumerate(ndimage.find_objects(labels), 1):
        if where is None:
            continue
        part = labels[where[0].start] == number
        if part.sum() >= MIN_AREA * scale**2:
            parts.append((where[0].start, ndimage.binary_fill_holes(part)))
    if not parts:
        return blobs
    n, masks = np.array([k for k, _ in parts]), np.stack([part for _, part in parts])
    boxes = np.array([_box(mask) for mask in masks])
    names, linear, squared, constant = _templates()
    tried = np.concatenate([boxes + inset * np.array([1, 1, -1, -1]) for inset in INSETS])
    again = len(INSETS)
    colours, mask = _crops(images, np.tile(masks, (again, 1, 1)), np.tile(n, again), tried)
    cells = np.concatenate([colours, mask[..., None]], -1).reshape(len(tried), -1)
    squares = np.stack([(colours**2).sum(-1), mask**2], -1).reshape(len(tried), -1)
    error = cells @ linear.T + squares @ squared.T + constant
    error = error.reshape(again, len(n), -1).min(0)
    best = error.argmin(1)
    for k, template in enumerate(best):
        name, colour, style = names[template] if error[k, template] <= WORST else (UNKNOWN, NATURAL, "")
        blobs[n[k]].append(Blob(name, colour, tuple(map(int, boxes[k])), style))
    return blobs


def _checks(item: Mapping[str, Any], blob: Blob) -> list[bool]:
    right_noun = blob.name == item["class"]
    wanted = [(item[name], value) for name, value in (("color", blob.colour), ("style", blob.style)) if name in item]
    return [right_noun, *(right_noun and wish == value for wish, value in wanted)]


def judge(prompt: Prompt, blobs: Sequence[Blob], side: int) -> Verdict:
    """The verdict on the things of an image with a shorter side of `side` px. ValueError for a prompt without
    ground truth, or of another world."""
    if "tag" not in prompt.wants:
        raise ValueError("prompt has no ground truth: `things` needs captions of the embedded world of things")
    WORDS.check(prompt.wants, "things")
    offset = MIN_OFFSET * side / SIDE
    return judge_objects(prompt.wants, blobs, _checks, offset, lambda blob: f"{blob.colour}, {blob.style}")


class Things:
    """The verifier as a scorer. `grid` is the side of the region map; a cell holds the credit of the thing there."""

    names = ("strict", "partial")

    def __init__(self, grid: int = 8):
        self.grid = grid
        self.card = exact_card("things", grid)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        blobs_of, side = find_things(images.cpu().numpy()), min(images.shape[2:])
        rows = [self._score(prompt, blobs, side) for prompt, blobs in zip(prompts, blobs_of, strict=True)]
        return Scores.collect(self.names, rows, tuple(images.shape[2:]), self.grid)

    def _score(self, prompt: Prompt, blobs: list[Blob], side: int) -> ImageScores:
        try:
            verdict = judge(prompt, blobs, side)
        except ValueError as error:
            return ImageScores(failure=str(error))
        values = {"strict": verdict.strict, "partial": verdict.partial}
        return ImageScores(values, verdict.critique, regions=verdict.regions)
