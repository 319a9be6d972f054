"""Overlays: what is drawn, and that it lies where it belongs."""

import json
import xml.etree.ElementTree as xml

import pytest
import torch

from reward_models import Card, Prompt, Scores, overlay as heat
from reward_models.regions import Region
from reward_models.scoring import score_pictures
from reward_models.tools import gallery

nan = torch.nan


def drawn(svg: str) -> list[dict[str, str]]:
    """The rectangles of an overlay, with their titles."""
    text = svg.replace("class=heat", 'class="heat"')
    return [own.attrib | {"title": own[0].text} for own in xml.fromstring(text)]


def test_cells_and_boxes_in_the_pixels_of_the_image():
    places = heat.record(
        torch.tensor([[1.0, nan, 0.0], [nan, -0.5, nan]]), [Region((3, 1, 9, 4), -1.0, "dog")], (8, 12)
    )
    svg = heat.over(places, "shapes")
    assert 'viewBox="0 0 12 8"' in svg
    assert 'preserveAspectRatio="xMidYMid meet"' in svg  # as `object-fit: contain` places the picture
    right, wrong, box = drawn(svg)
    assert [right[key] for key in ("x", "y", "width", "height", "fill")] == ["0", "0", "4", "4", heat.RIGHT]
    assert [wrong[key] for key in ("x", "y", "width", "height", "fill")] == ["4", "4", "4", "4", heat.WRONG]
    assert float(right["fill-opacity"]) == pytest.approx(2 * float(wrong["fill-opacity"]))
    assert [box[key] for key in ("x", "y", "width", "height", "stroke")] == ["3", "1", "6", "3", heat.WRONG]
    assert box["title"] == "dog: -1"


def test_what_people_wrote_cannot_become_markup():
    region = Region((0, 0, 1, 1), 1.0, '<b>"', "a & b</title>")
    svg = heat.over(heat.record(None, [region], (2, 2)), '"><script>')
    assert "<b>" not in svg
    assert "<script>" not in svg
    (box,) = drawn(svg)
    assert box["title"] == '<b>": 1: a & b</title>'


def test_nothing_said_nothing_kept():
    maps = torch.tensor([[[nan, nan]], [[nan, 0.25]]])
    assert heat.records(maps, (), (4, 8), 2) == [None, {"size": [4, 8], "map": [[None, 0.25]], "boxes": []}]
    assert heat.records(None, (), (4, 8), 2) == [None, None]
    assert heat.over(heat.record(None, [], (4, 8))).endswith('meet"></svg>')


class Left:
    """Says that the left half is right."""

    names, card = ("value",), Card("left", has_map=True)

    def __call__(self, images, prompts):
        high, wide = images.shape[2:]
        regions = torch.tensor([[1.0, nan]]).expand(len(images), 1, 2)
        boxes = ((Region((0, 0, wide / 2, high), 1.0, "left"),),) * len(images)
        return Scores(self.names, torch.ones(len(images), 1), regions=regions, boxes=boxes)


def test_rows_carry_what_the_page_shows(tmp_path):
    pictures = [torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 20, 10), "cannot be read"]
    rows = score_pictures(pictures, [Prompt("a")] * 3, {"left": Left()})
    assert [row["places"].get("left", {}).get("size") for row in rows] == [[8, 12], [20, 10], None]
    rows = [row | {"image": f"{i}.png", "prompt": "a", "id": 0} for i, row in enumerate(rows)]
    rows.append({key: value for key, value in rows[0].items() if key != "places"})  # a row of an earlier version
    rows = json.loads(json.dumps(rows))
    gallery.write(rows, {"failed": 1, "scores": {"left.value": {"count": 3}}}, tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg class=heat") == 2
    assert "<select id=where><option>left</option><option>none</option></select>" in page
