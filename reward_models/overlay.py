"""Where an image was judged, drawn over it: a map as tinted cells, regions as outlines. Inline SVG, in the image's own
pixels, so that both lie where they belong at any size on the page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from reward_models.regions import Region

RIGHT, WRONG = "#1a9641", "#d7191c"
STRONGEST = 0.4  # opacity of full colour
Rows = Sequence[Sequence[int | float | None]]


def record(places: Float[Tensor, "a b"] | None, boxes: Sequence[Region], size: tuple[int, int]) -> dict[str, Any]:
    """What a row of JSON keeps of the map and the regions of an image of `size` (height, width); null where the map has
    no opinion."""
    cells = None if places is None else [[None if v != v else round(v, 3) for v in row] for row in places.tolist()]
    regions = [
        {"box": [round(float(edge), 2) for edge in own.box], "credit": round(float(own.credit), 3)}
        | {"label": own.label, "reason": own.reason}
        for own in boxes
    ]
    return {"size": [*size], "map": cells, "boxes": regions}


def records(
    maps: Float[Tensor, "N a b"] | None, boxes: Sequence[Sequence[Region]], size: tuple[int, int], count: int
) -> list[dict[str, Any] | None]:
    """`record` of each of `count` images; None for one that nothing was said of."""
    out: list[dict[str, Any] | None] = []
    for i in range(count):
        cells = None if maps is None or bool(maps[i].isnan().all()) else maps[i]
        regions = boxes[i] if boxes else ()
        out.append(record(cells, regions, size) if cells is not None or regions else None)
    return out


def cells(rows: Rows, size: Sequence[int], scale: int | float = 1.0) -> str:
    """The cells of a map over an image of `size` (height, width): green above 0 and red below, the stronger the nearer
    the value is to `scale`; nothing where there is no value."""
    high, wide = size[0] / len(rows), size[1] / len(rows[0])
    out = []
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value:
                colour, strength = RIGHT if value > 0 else WRONG, min(1.0, abs(value) / scale)
                out.append(
                    f'<rect x="{x * wide:g}" y="{y * high:g}" width="{wide:g}" height="{high:g}" fill="{colour}" '
                    f'fill-opacity="{STRONGEST * strength:.3g}"><title>{value:.3g}</title></rect>'
                )
    return "".join(out)


def tinted(image: UInt8[np.ndarray, "H W 3"], rows: Rows, scale: int | float = 1.0) -> UInt8[np.ndarray, "H W 3"]:
    """The image under the `cells` of a map, as pixels."""
    height, width = image.shape[:2]
    values = np.array(rows, float)[np.arange(height) * len(rows) // height][:, np.arange(width) * len(rows[0]) // width]
    colours = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in (RIGHT, WRONG)])
    strength = STRONGEST * np.clip(np.nan_to_num(np.abs(values)) / scale, 0, 1)[..., None]
    return ((1 - strength) * image + strength * colours[(values < 0).astype(int)]).round().astype(np.uint8)


def outlines(boxes: Sequence[Mapping[str, Any]], size: Sequence[int]) -> str:
    """The regions' boxes, each saying what it is for, what it is worth and why when pointed at."""
    width = max(size) / 100
    out = []
    for own in boxes:
        left, top, right, bottom = own["box"]
        said = html.escape(": ".join(filter(None, (own["label"], f"{own['credit']:.3g}", own["reason"]))))
        out.append(
            f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" fill="none" '
            f'stroke="{RIGHT if own["credit"] > 0 else WRONG}" stroke-width="{width:g}" pointer-events="all">'
            f"<title>{said}</title></rect>"
        )
    return "".join(out)


def over(places: Mapping[str, Any], name: str = "") -> str:
    """An SVG of a `record`, to be laid over its image; `name` says whose it is. Both keep their proportions within a
    box of any shape, so that one lies exactly on the other."""
    height, width = places["size"]
    inner = cells(places["map"], places["size"]) if places["map"] else ""
    return (
        f'<svg class=heat data-scorer="{html.escape(name, quote=True)}" viewBox="0 0 {width:g} {height:g}" '
        f'preserveAspectRatio="xMidYMid meet">{inner}{outlines(places["boxes"], places["size"])}</svg>'
    )
