"""`zoomed`: another scorer shown parts of the image besides the whole, so that small things count.

Each region is cut out with a margin, enlarged to the size of the image and scored with its own label as the prompt, or
with the whole prompt if it has none. `at` says where regions come from:

- `grid`: `cells` x `cells` equal cells, each with the whole prompt. This gives a map to scorers that have none.
- `wants`: the prompt's ground truth, `wants["boxes"]`: a list of `box`, left, top, right, bottom as shares of the image
  in [0, 1], and `label`.
- a scorer that reports regions (`places`, `geneval`, `grounded`, `shapes_critic`), by name or with its settings.

The components are those of the scorer: of the whole image and its regions the `mean`, or with `value=min` the least. An
image without regions has the scores of the whole. The credit of a region is its first component, with the ends of
`span`, by default the bounds on the scorer's card, at -1 and 1. Cost: 1 + regions scores for each image. After the
zoom-in checks of visual judges; the rule is ours. Licence: the scorer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, isfinite, isnan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.images import resized
from reward_models.regions import Region
from reward_models.registry import given
from reward_models.scoring import check, each, score_isolated
from reward_models.types import Differentiable, Images, ImageScores, Prompt, RewardModel, Scores

MOST = 32  # regions of an image
AT_ONCE = 64  # crops scored in one call
GREY = 0.5  # beside a crop that is not as wide or as high as the image

Box = tuple[int | float, int | float, int | float, int | float]


@dataclass(frozen=True)
class Part:
    """A region of an image, in pixels: `label` names it, `text` is what it is scored by ("": the whole prompt)."""

    box: Box
    label: str
    text: str = ""


def grown(box: Box, size: tuple[int, int], margin: int | float, least: int | float) -> tuple[int, int, int, int]:
    """The box in whole pixels with `margin` times its sides around it, at least `least` of each side of an image of
    `size` (height, width), and inside the image."""
    ends: list[tuple[int, int]] = []
    for start, stop, side in ((box[0], box[2], size[1]), (box[1], box[3], size[0])):
        length = min(side, max((stop - start) * (1 + 2 * margin), least * side))
        first = min(max(0, (start + stop - length) / 2), side - length)
        ends.append((floor(first), ceil(first + length)))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def cells(count: int, size: tuple[int, int]) -> list[Part]:
    """`count` x `count` equal parts of an image of `size` (height, width), row by row."""
    high, wide = size[0] / count, size[1] / count
    return [
        Part((x * wide, y * high, (x + 1) * wide, (y + 1) * high), f"row {y + 1}, column {x + 1}")
        for y in range(count)
        for x in range(count)
    ]


def wanted(prompt: Prompt, size: tuple[int, int]) -> list[Part]:
    """The regions in the ground truth, in pixels of an image of `size`. ValueError, in one line, for invalid ones."""
    rows = prompt.wants.get("boxes", [])
    if not isinstance(rows, list):
        raise ValueError("boxes: a list of box and label is needed")
    parts = []
    for number, row in enumerate(rows, 1):
        box, label = (row.get("box"), row.get("label", "")) if isinstance(row, Mapping) else (None, "")
        numbers = isinstance(box, list | tuple) and len(box) == 4 and all(type(v) in (int, float) for v in box)
        if not numbers or not isinstance(label, str) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"boxes: number {number} is not a box in [0, 1] and a label")
        pixels = (box[0] * size[1], box[1] * size[0], box[2] * size[1], box[3] * size[0])
        parts.append(Part(pixels, label, label))
    return parts


class Zoomed:
    """The scorer. `of` and, if it is one, `at` are a scorer, its name, or {"scorer": name, setting: value}. `margin`:
    what is cut out around a region, as a share of its sides. `least`: the least side of what is cut out, as a share of
    the image's. `grid`: the side of the map. ValueError for a scorer that compares images, or an invalid setting."""

    def __init__(
        self,
        of: str | Mapping[str, Any] | RewardModel,
        at: str | Mapping[str, Any] | RewardModel = "grid",
        cells: int = 2,
        value: str = "mean",
        margin: int | float = 0.15,
        least: int | float = 0.25,
        span: Sequence[int | float] | None = None,
        grid: int = 8,
    ):
        self.scorer = given(of, "zoomed: of")
        self.placing = None if at in ("grid", "wants") else given(at, "zoomed: at")
        if value not in ("mean", "min") or not 1 <= cells * cells <= MOST or margin < 0 or not 0 < least <= 1:
            raise ValueError(f"zoomed: value is mean or min, cells² 1 to {MOST}, margin at least 0, least in (0, 1]")
        if self.scorer.card.groupwise or (self.placing and self.placing.card.groupwise):
            raise ValueError("zoomed: a scorer that compares the images of a prompt cannot be shown parts of one")
        card = self.scorer.card
        self.low, self.high = (card.low, card.high) if span is None else span
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise ValueError(f"zoomed: {card.scorer} has no bounds; give span, the scores that mean -1 and 1")
        self.at, self.cells, self.value, self.margin, self.least, self.grid = at, cells, value, margin, least, grid
        self.names = self.scorer.names
        if at == "grid" and isinstance(self.scorer, Differentiable):
            self.in_graph = self._in_graph
        placed = at if self.placing is None else self.placing.card.version
        self.card = replace(
            card,
            scorer="zoomed",
            has_map=True,
            settings={
                "of": card.version, "at": placed, "cells": cells, "value": value, "margin": margin, "least": least,
                "span": [self.low, self.high], "grid": grid,
            },
        )  # fmt: skip

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size = tuple(images.shape[2:])
        parts = self._parts(images, prompts)
        whole = score_isolated(self.scorer, images, prompts)
        shown = [(i, part) for i, of_image in enumerate(parts) if not isinstance(of_image, str) for part in of_image]
        rows: list[list[tuple[Part, list[float], str]]] = [[] for _ in prompts]
        for start in range(0, len(shown), AT_ONCE):
            some = shown[start : start + AT_ONCE]
            crops = torch.cat([self._crop(images[i : i + 1], part.box) for i, part in some])
            texts = [Prompt(part.text, {}, prompts[i].id) if part.text else prompts[i] for i, part in some]
            scores = score_isolated(self.scorer, crops, texts)
            for k, (i, part) in enumerate(some):
                rows[i].append((part, scores.values[k].tolist(), scores.failures.get(k, "")))
        results = []
        for i, of_image in enumerate(parts):
            failure = of_image if isinstance(of_image, str) else whole.failures.get(i, "")
            row = self._combined(whole.values[i].tolist(), rows[i], failure)
            critique, request, reply = (
                texts[i] if texts else "" for texts in (whole.critiques, whole.requests, whole.replies)
            )
            results.append(replace(row, critique=critique, request=request, reply=reply))
        return Scores.collect(self.names, results, size, self.grid)

    def _in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        boxes = [part.box for part in cells(self.cells, tuple(images.shape[2:]))]
        views = [images, *(torch.cat([self._crop(image[None], box) for image in images]) for box in boxes)]
        scores = torch.stack([self.scorer.in_graph(view, prompts) for view in views])
        return scores.amin(0) if self.value == "min" else scores.mean(0)

    def _combined(
        self, whole: list[float], parts: Sequence[tuple[Part, list[float], str]], failure: str
    ) -> ImageScores:
        for part, _, reason in parts:
            failure = failure or (reason and f"{part.label or part.box}: {reason}")
        if failure:
            return ImageScores(failure=failure)
        columns = zip(whole, *(values for _, values, _ in parts), strict=True)
        least = lambda column: min(column, key=lambda v: (not isnan(v), v))  # noqa: E731 - NaN if any is missing
        mean = lambda column: sum(column) / len(column)  # noqa: E731
        rule = least if self.value == "min" else mean
        regions = tuple(
            Region(part.box, self._credit(values[0]), part.label, f"{values[0]:.3g}")
            for part, values, _ in parts
            if not isnan(values[0])
        )
        return ImageScores(dict(zip(self.names, map(rule, columns), strict=True)), regions=regions)

    def _credit(self, value: float) -> float:
        return min(1.0, max(-1.0, 2 * (value - self.low) / (self.high - self.low) - 1))

    def _parts(self, images: Images, prompts: Sequence[Prompt]) -> list[list[Part] | str]:
        """The regions of each image, or the reason why they are missing."""
        size = tuple(images.shape[2:])
        if self.at == "grid":
            return [cells(self.cells, size)] * len(images)
        results: list[list[Part] | str] = []
        scores = score_isolated(self.placing, images, prompts) if self.placing else None
        for i, prompt in enumerate(prompts):
            try:
                if scores is None:
                    parts = wanted(prompt, size)
                elif i in scores.failures:
                    raise ValueError(f"no regions: {scores.failures[i]}")
                else:
                    parts = [Part(r.box, r.label, r.label) for r in (scores.boxes[i] if scores.boxes else ())]
                if len(parts) > MOST:
                    raise ValueError(f"{len(parts)} regions; at most {MOST} are scored")
                results.append(parts)
            except ValueError as error:
                results.append(str(error))
        return results

    def _crop(self, image: Images, box: Box) -> Images:
        """The part of one image, enlarged to its size; what covers the whole image is the image itself."""
        size = tuple(image.shape[2:])
        left, top, right, bottom = grown(box, size, self.margin, self.least)
        if (left, top, right, bottom) == (0, 0, size[1], size[0]):
            return image
        return resized(image[:, :, top:bottom, left:right], size, "longest", "bicubic", GREY)
