"""`shapes`: the exact verifier of the embedded world (`reward_models.shapes_world`).

It uses pixels only: nearest palette colour, 8-connected components, shape or letter by overlap with templates, size and
centre from the bounding box. The request is read from `Prompt.wants`, never from the text.

Two scores per image, both in [0, 1], comparable across prompts:

- `strict`: 1 if all requested objects are present, no other objects are, and colours, sizes, relation and letters are
  right; else 0.
- `partial`: the mean over the requested objects of (present + each requested attribute right) / (1 + attributes), where
  the relation counts as one more object, times requested / present if there are surplus objects. Letters:
  1 - edit distance / length.

It ignores texture, background noise smaller than an object, and aesthetic quality.
Licence: this project's own.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from reward_models.regions import Region
from reward_models.scoring import each
from reward_models.shapes_world import (
    BACKGROUND,
    COLOURS,
    GLYPHS,
    LARGE_MIN,
    MIN_OFFSET,
    SHAPES,
    SMALL_MAX,
    WORDS,
    coverage,
)
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.verdicts import UNKNOWN, Blob, Verdict, exact_card, judge_objects, label

MIN_AREA = 14  # px; the smallest object the world draws covers about 20
MIN_OVERLAP = 0.62  # intersection over union with the best template, below which a blob is unknown
CANVAS = 12  # components are resampled to this many cells a side before they are compared


def _crops(labels: np.ndarray, ids, n, top, bottom, left, right) -> Float[np.ndarray, "M C C"]:
    """Each component's mask, stretched from its bounding box to CANVAS x CANVAS cells (nearest pixel)."""
    cells = (np.arange(CANVAS) + 0.5) / CANVAS
    rows = (top[:, None] + cells * (bottom - top)[:, None]).astype(int)
    cols = (left[:, None] + cells * (right - left)[:, None]).astype(int)
    return (labels[n[:, None, None], rows[:, :, None], cols[:, None, :]] == ids[:, None, None]).astype(np.float32)


def _boxes(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """ids, image, top, bottom, left, right of every component, each [M]."""
    components = [
        (i + 1, *(e for s in box for e in (s.start, s.stop)))
        for i, box in enumerate(ndimage.find_objects(labels))
        if box
    ]
    ids, n, _, *edges = np.array(components, int).reshape(-1, 7).T
    return ids, n, *edges


def _templates() -> tuple[list[str], Float[np.ndarray, "K C C"]]:
    """Every shape at the world's sizes and at several offsets from the pixel grid, because a circle of eight pixels is
    nearly a square; every letter at its one size. Names repeat."""
    y, x = np.mgrid[:24, :24] - 11.5
    drawn = [
        (name, r, r, dx, dy)
        for name in SHAPES
        for r in (4.2, 4.7, 5.3, 6.0, 6.7, 8.0, 9.5)
        for dx in (0, 0.25, 0.5, 0.75)
        for dy in (0, 0.25, 0.5, 0.75)
    ]
    drawn += [(name, 5.0, 7.0, 0, 0) for name in GLYPHS]
    masks = np.stack([coverage(name, rx, ry, x - dx, y - dy) > 0.5 for name, rx, ry, dx, dy in drawn])
    labels = masks * np.arange(1, len(masks) + 1)[:, None, None]
    return [name for name, *_ in drawn], _crops(labels, *_boxes(labels))


NAMES, TEMPLATES = _templates()


def _components(images: Float[np.ndarray, "N 3 H W"]) -> tuple[np.ndarray, np.ndarray]:
    """Label image [N, H, W] (0 = nothing) and the palette index [N, H, W] of each pixel.

    Neighbours of one colour form a component. Antialiasing leaves a thin fringe of mixed colours around it, which may
    look like a third colour: a fringe pixel is assigned to the object it touches if that covers at least half of it.
    """
    palette = np.array([*COLOURS.values(), BACKGROUND], np.float32)
    pixels = images.transpose(0, 2, 3, 1)[..., None, :]
    colour = ((pixels - palette) ** 2).sum(-1).argmin(-1)
    background = np.array(BACKGROUND, np.float32)
    from_background = np.sqrt(((images - background[:, None, None]) ** 2).sum(1))
    contrast = np.sqrt(((palette - background) ** 2).sum(1))
    foreground = (colour < len(COLOURS)) & (from_background > 0.25)
    by_colour = foreground[:, None] & (colour[:, None] == np.arange(len(COLOURS))[:, None, None])  # [N, C, H, W]
    within_plane = np.zeros((3, 3, 3, 3), bool)
    within_plane[1, 1] = True
    layered, count = ndimage.label(by_colour, within_plane)
    solid = layered * blocks(by_colour)  # a fringe holds no 2x2 block
    sturdy = np.bincount(solid.ravel(), minlength=count + 1) >= MIN_AREA / 2
    sturdy[0] = False
    labels = layered.max(1)  # colours exclude one another
    labels = labels * sturdy[labels]
    paint = np.zeros(count + 1)  # distance of each component's colour from the background
    paint[labels] = contrast[colour]
    touching = ndimage.maximum_filter(labels, size=(1, 3, 3))
    labels = np.where((labels == 0) & (from_background > 0.5 * paint[touching]), touching, labels)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    area[0] = 0
    return labels * (area >= MIN_AREA)[labels], colour


def blocks(mask: Bool[np.ndarray, "*N H W"]) -> Bool[np.ndarray, "*N H W"]:
    """The pixels that lie in a full block of 2 x 2: `scipy.ndimage.binary_opening`, five times as fast."""
    full = mask[..., 1:, 1:] & mask[..., 1:, :-1] & mask[..., :-1, 1:] & mask[..., :-1, :-1]
    result = np.zeros_like(mask)
    for rows in (slice(1, None), slice(None, -1)):
        for columns in (slice(1, None), slice(None, -1)):
            result[..., rows, columns] |= full
    return result


def find_blobs(images: Float[np.ndarray, "N 3 H W"]) -> list[list[Blob]]:
    """All objects in each image, in no particular order."""
    labels, colour = _components(images)
    blobs: list[list[Blob]] = [[] for _ in images]
    ids, n, top, bottom, left, right = _boxes(labels)
    masks = _crops(labels, ids, n, top, bottom, left, right)
    both = np.einsum("mij,kij->mk", masks, TEMPLATES)
    union = masks.sum((1, 2))[:, None] + TEMPLATES.sum((1, 2)) - both
    overlap = both / union
    best = overlap.argmax(1)
    height, width = bottom - top, right - left
    distorted = np.maximum(height, width) > 1.7 * np.minimum(height, width)
    names = list(COLOURS)
    for m in range(len(ids)):
        inside = colour[n[m], top[m] : bottom[m], left[m] : right[m]]
        inside_mask = labels[n[m], top[m] : bottom[m], left[m] : right[m]] == ids[m]
        votes = np.bincount(inside[inside_mask], minlength=len(names) + 1)[: len(names)]
        known = overlap[m, best[m]] >= MIN_OVERLAP and not distorted[m]
        name = NAMES[best[m]] if known else UNKNOWN
        blobs[n[m]].append(
            Blob(name, names[votes.argmax()], (int(left[m]), int(top[m]), int(right[m]), int(bottom[m])))
        )
    return blobs


def _checks(item: dict, blob: Blob) -> list[bool]:
    """[right kind of object, each requested attribute right]; attributes count only on the right kind."""
    right_kind = blob.name == item["class"]
    checks = [right_kind]
    if "color" in item:
        checks.append(right_kind and blob.colour == item["color"])
    if "size" in item:
        fits = {"small": blob.extent <= SMALL_MAX, "large": blob.extent >= LARGE_MIN}[item["size"]]
        checks.append(right_kind and fits)
    return checks


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, previous = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def judge_text(wanted: str, blobs: list[Blob]) -> Verdict:
    ordered = sorted(blobs, key=lambda blob: blob.centre[0])
    text = "".join(blob.name if blob.name in GLYPHS else "?" for blob in ordered)
    partial = max(0.0, 1 - edit_distance(text, wanted) / len(wanted))
    regions = tuple(
        Region(
            blob.box,
            1.0 if i < len(wanted) and blob.name == wanted[i] else -1.0,
            label(i, wanted[i : i + 1]),
            blob.name,
        )
        for i, blob in enumerate(ordered)
    )
    return Verdict(float(text == wanted), partial, "right" if text == wanted else f"reads {text!r}", regions)


def judge(prompt: Prompt, blobs: list[Blob]) -> Verdict:
    """The verdict on the objects of an image. ValueError for a prompt without ground truth, or of another
    world."""
    if "tag" not in prompt.wants:
        raise ValueError("prompt has no ground truth: `shapes` needs captions of the embedded world")
    WORDS.check(prompt.wants, "shapes")
    if prompt.wants["tag"] == "text":
        return judge_text(prompt.wants["text"], blobs)
    return judge_objects(prompt.wants, blobs, _checks, MIN_OFFSET, lambda blob: f"{blob.colour}, {blob.extent} px")


class Shapes:
    """The verifier as a scorer. `grid` is the side of the region map; a cell holds the credit of the object there."""

    names = ("strict", "partial")

    def __init__(self, grid: int = 8):
        self.grid = grid
        self.card = exact_card("shapes", grid)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        rows = [self._score(*pair) for pair in zip(prompts, find_blobs(images.cpu().numpy()), strict=True)]
        return Scores.collect(self.names, rows, tuple(images.shape[2:]), self.grid)

    def _score(self, prompt: Prompt, blobs: list[Blob]) -> ImageScores:
        try:
            verdict = judge(prompt, blobs)
        except ValueError as error:
            return ImageScores(failure=str(error))
        values = {"strict": verdict.strict, "partial": verdict.partial}
        return ImageScores(values, verdict.critique, regions=verdict.regions)
