"""Tests of overlays: what is drawn, and that it lies in the right position over the image."""

import json
import re
import xml.etree.ElementTree as xml

import pytest
import torch

from reward_models import Card, Prompt, Scores, overlay, pages
from reward_models.regions import Region
from reward_models.scoring import score_pictures
from reward_models.tools import gallery

nan = torch.nan


def svg_of(record, scorer: str = "") -> str:
    macros = pages.environment("reward_models").get_template("macros.html")
    return macros.module.overlay(record, scorer)


def drawn(svg: str) -> list[dict[str, str]]:
    """The rectangles of an overlay, with their titles."""
    return [rectangle.attrib | {"title": rectangle[0].text} for rectangle in xml.fromstring(svg)]


def test_cells_and_boxes_in_the_pixels_of_the_image():
    record = overlay.record(
        torch.tensor([[1.0, nan, 0.0], [nan, -0.5, nan]]), [Region((3, 1, 9, 4), -1.0, "dog")], (8, 12)
    )
    svg = svg_of(record, "shapes")
    assert 'viewBox="0 0 12 8"' in svg
    assert 'preserveAspectRatio="xMidYMid meet"' in svg  # as `object-fit: contain` places the picture
    right, wrong, box = drawn(svg)
    assert [right[key] for key in ("x", "y", "width", "height", "fill")] == ["0", "0", "4", "4", overlay.RIGHT]
    assert [wrong[key] for key in ("x", "y", "width", "height", "fill")] == ["4", "4", "4", "4", overlay.WRONG]
    assert float(right["fill-opacity"]) == pytest.approx(2 * float(wrong["fill-opacity"]))
    assert [box[key] for key in ("x", "y", "width", "height", "stroke")] == ["3", "1", "6", "3", overlay.WRONG]
    assert box["title"] == "dog: -1"


def test_labels_and_reasons_cannot_become_markup():
    region = Region((0, 0, 1, 1), 1.0, '<b>"', "a & b</title>")
    svg = svg_of(overlay.record(None, [region], (2, 2)), '"><script>')
    assert "<b>" not in svg
    assert "<script>" not in svg
    (box,) = drawn(svg)
    assert box["title"] == '<b>": 1: a & b</title>'


def test_an_image_without_map_and_regions_has_no_record():
    maps = torch.tensor([[[nan, nan]], [[nan, 0.25]]])
    assert overlay.records(maps, (), (4, 8), 2) == [None, {"size": [4, 8], "map": [[None, 0.25]], "boxes": []}]
    assert overlay.records(None, (), (4, 8), 2) == [None, None]
    assert drawn(svg_of(overlay.record(None, [], (4, 8)))) == []


class Left:
    """Says that the left half is right."""

    names, card = ("value",), Card("left", has_map=True)

    def __call__(self, images, prompts):
        high, wide = images.shape[2:]
        regions = torch.tensor([[1.0, nan]]).expand(len(images), 1, 2)
        boxes = ((Region((0, 0, wide / 2, high), 1.0, "left"),),) * len(images)
        return Scores(self.names, torch.ones(len(images), 1), regions=regions, boxes=boxes)


def test_rows_hold_what_the_page_shows(tmp_path):
    pictures = [torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 20, 10), "cannot be read"]
    rows = score_pictures(pictures, [Prompt("a")] * 3, {"left": Left()})
    assert [row["places"].get("left", {}).get("size") for row in rows] == [[8, 12], [20, 10], None]
    rows = [row | {"image": f"{i}.png", "prompt": "a", "id": 0} for i, row in enumerate(rows)]
    rows.append({key: value for key, value in rows[0].items() if key != "places"})  # a row of an earlier version
    rows = json.loads(json.dumps(rows))
    gallery.write(rows, {"failed": 1, "scores": {"left.value": {"count": 3}}}, tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<svg class="overlay" data-scorer="left"') == 2
    assert re.findall(r'<option value="(.*)">', page) == ["left.value", "", "left"]  # no overlay at first
