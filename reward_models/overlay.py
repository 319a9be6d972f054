"""Overlays: the map and the regions of a score over the image, a map as tinted cells and regions as outlines.

`record` is what a row of JSON stores of them. `rectangles` is what a page draws of a record (`pages/macros.html`),
`tinted` draws a map into the pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from reward_models.regions import Region

RIGHT, WRONG = "#1a9641", "#d7191c"
STRONGEST = 0.4  # opacity of full colour
Grid = Sequence[Sequence[int | float | None]]  # rows of a map; None where it has no opinion


@dataclass(frozen=True)
class Rectangle:
    """A rectangle over an image, in pixels of the image: filled with `opacity`, or with an outline of this width."""

    left: int | float
    top: int | float
    width: int | float
    height: int | float
    colour: str
    title: str
    opacity: float = 0.0
    outline: float = 0.0


def record(grid: Float[Tensor, "a b"] | None, boxes: Sequence[Region], size: tuple[int, int]) -> dict[str, Any]:
    """What a row of JSON stores of the map and the regions of an image of `size` (height, width); null in the map where
    it has no opinion."""
    values = None if grid is None else [[None if v != v else round(v, 3) for v in row] for row in grid.tolist()]
    regions = [
        {
            "box": [round(float(edge), 2) for edge in region.box],
            "credit": round(float(region.credit), 3),
            "label": region.label,
            "reason": region.reason,
        }
        for region in boxes
    ]
    return {"size": [*size], "map": values, "boxes": regions}


def records(
    maps: Float[Tensor, "N a b"] | None, boxes: Sequence[Sequence[Region]], size: tuple[int, int], count: int
) -> list[dict[str, Any] | None]:
    """`record` of each of `count` images; None for an image without regions whose map is missing or empty."""
    out: list[dict[str, Any] | None] = []
    for i in range(count):
        grid = None if maps is None or bool(maps[i].isnan().all()) else maps[i]
        regions = boxes[i] if boxes else ()
        out.append(record(grid, regions, size) if grid is not None or regions else None)
    return out


def cells(values: Grid, size: Sequence[int], scale: int | float = 1.0) -> list[Rectangle]:
    """The cells of a map over an image of `size` (height, width): green above 0 and red below, the closer to `scale`
    the stronger; none where there is no value."""
    height, width = size[0] / len(values), size[1] / len(values[0])
    return [
        Rectangle(
            left=x * width,
            top=y * height,
            width=width,
            height=height,
            colour=RIGHT if value > 0 else WRONG,
            opacity=STRONGEST * min(1.0, abs(value) / scale),
            title=f"{value:.3g}",
        )
        for y, row in enumerate(values)
        for x, value in enumerate(row)
        if value
    ]


def tinted(image: UInt8[np.ndarray, "H W 3"], values: Grid, scale: int | float = 1.0) -> UInt8[np.ndarray, "H W 3"]:
    """The image under the `cells` of a map, as pixels."""
    height, width = image.shape[:2]
    rows, columns = len(values), len(values[0])
    grid = np.array(values, float)[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    colours = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in (RIGHT, WRONG)])
    strength = STRONGEST * np.clip(np.nan_to_num(np.abs(grid)) / scale, 0, 1)[..., None]
    return ((1 - strength) * image + strength * colours[(grid < 0).astype(int)]).round().astype(np.uint8)


def outlines(boxes: Sequence[Mapping[str, Any]], size: Sequence[int]) -> list[Rectangle]:
    """The outlines of the regions' boxes; each title has the region's label, credit and reason."""
    line, rectangles = max(size) / 100, []
    for region in boxes:
        left, top, right, bottom = region["box"]
        rectangles.append(
            Rectangle(
                left=left,
                top=top,
                width=right - left,
                height=bottom - top,
                colour=RIGHT if region["credit"] > 0 else WRONG,
                outline=line,
                title=": ".join(filter(None, (region["label"], f"{region['credit']:.3g}", region["reason"]))),
            )
        )
    return rectangles


def rectangles(record: Mapping[str, Any], scale: int | float = 1.0) -> list[Rectangle]:
    """What is drawn of a `record`: the cells of its map, then the outlines of its boxes."""
    drawn = cells(record["map"], record["size"], scale) if record["map"] else []
    return drawn + outlines(record["boxes"], record["size"])
