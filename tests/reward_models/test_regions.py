"""Tests of painting regions onto a grid."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from reward_models.regions import Region, blend, box_shares, covered, inside, mask_shares, paint, resampled

nan = torch.nan


def test_a_box_on_whole_cells_fills_them_and_no_other():
    grid = paint([Region((8, 0, 16, 4), -0.5)], (8, 32), (2, 8))
    expected = torch.full((2, 8), nan)
    expected[0, 2:4] = -0.5
    torch.testing.assert_close(grid, expected, equal_nan=True)


def test_where_boxes_overlap_their_mean_by_area_holds():
    grid = paint([Region((0, 0, 4, 4), 1.0), Region((2, 0, 4, 4), -1.0), Region((0, 0, 1, 4), 0.0)], (4, 4), (1, 1))
    assert grid.item() == pytest.approx((1.0 * 16 - 1.0 * 8) / (16 + 8 + 4))
    assert paint([], (4, 4), (2, 2)).isnan().all()


def test_rules_where_regions_overlap():
    regions = [Region((0, 0, 4, 4), 0.5), Region((2, 0, 4, 4), -1.0), Region((3, 0, 4, 4), 0.25)]
    grid = {rule: paint(regions, (4, 8), (1, 8), rule)[0].tolist()[:4] for rule in ("max", "min", "last", "mean")}
    assert grid["max"] == [0.5, 0.5, 0.5, 0.5]
    assert grid["min"] == [0.5, 0.5, -1, -1]
    assert grid["last"] == [0.5, 0.5, -1, 0.25]
    assert grid["mean"] == pytest.approx([0.5, 0.5, -0.25, -1 / 12])
    for rule in grid:
        assert paint(regions, (4, 8), (1, 8), rule)[0, 4:].isnan().all()
        assert paint([], (4, 8), (2, 2), rule).isnan().all()
    with pytest.raises(ValueError, match="no overlap rule called 'sum'; known: mean, max, min, last"):
        paint(regions, (4, 8), (1, 8), "sum")


def test_a_mask_covers_what_its_box_would():
    mask = torch.zeros(1, 12, 18, dtype=torch.bool)
    mask[0, 3:9, 4:13] = True
    box = box_shares([Region((4, 3, 13, 9), 1.0)], (12, 18), (4, 6))
    torch.testing.assert_close(mask_shares(mask, (4, 6)), box)
    grid = blend(mask_shares(mask, (4, 6)), torch.tensor([-0.5]))
    assert torch.equal(grid.isnan(), box[0] == 0)
    assert grid[box[0] > 0].eq(-0.5).all()


@pytest.mark.parametrize("box", [(-1, 0, 3, 3), (0, -0.5, 3, 3), (0, 0, 9, 3), (0, 0, 3, 5)])
def test_a_box_outside_its_image_is_named(box):
    with pytest.raises(ValueError, match=r"box .* lies outside the image of 8 x 4 pixels"):
        inside([Region((0, 0, 8, 4), 1.0), Region(box, 1.0)], (4, 8))


@pytest.mark.parametrize("box", [(4, 0, 2, 3), (0, 3, 4, 3), (nan, 0, 2, 3), (0, 0, 2, nan)])
def test_boxes_that_are_none_are_refused(box):
    with pytest.raises(ValueError, match=r"is empty; \(left, top, right, bottom\)"):
        Region(box, 1.0)


def test_credit_lies_within_one():
    for credit in (1.1, -1.1, nan):
        with pytest.raises(ValueError, match="outside"):
            Region((0, 0, 1, 1), credit)


sides = st.integers(1, 67)


@hypothesis.given(sides, sides, sides, sides, st.data())
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_box_comes_back_at_the_cells_it_touches(high, wide, rows, columns, data):
    """For odd sizes, images that are not square and any grid: row 0 at the top, a cell is credited if and only if the
    box covers some of it."""
    left, right = sorted(
        data.draw(st.tuples(st.integers(0, wide), st.integers(0, wide)).filter(lambda e: e[0] != e[1]))
    )
    top, bottom = sorted(
        data.draw(st.tuples(st.integers(0, high), st.integers(0, high)).filter(lambda e: e[0] != e[1]))
    )
    grid = paint([Region((left, top, right, bottom), 0.25)], (high, wide), (rows, columns))
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    touches = (y * high < bottom * rows) & ((y + 1) * high > top * rows)
    touches = touches & (x * wide < right * columns) & ((x + 1) * wide > left * columns)
    assert torch.equal(~grid.isnan(), touches)
    torch.testing.assert_close(grid[touches], torch.full((int(touches.sum()),), 0.25))


@hypothesis.given(sides, sides, sides)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_shares_of_cells_add_up_to_the_stretch(start, length, cells):
    shares = covered(start, start + length, cells, 140)
    assert (shares >= 0).all()
    assert (shares <= 1 + 1e-9).all()
    assert shares.sum() * 140 / cells == pytest.approx(min(140, start + length) - start)


def test_resampling_keeps_the_mean_and_what_is_already_there():
    maps = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resampled(maps, (6, 5)), maps)
    for grid in ((3, 5), (12, 10), (7, 3), (1, 1)):
        torch.testing.assert_close(resampled(maps, grid).mean((1, 2)), maps.mean((1, 2)))
    torch.testing.assert_close(resampled(resampled(maps, (12, 10)), (6, 5)), maps)


def test_resampling_leaves_out_what_has_no_opinion():
    maps = torch.tensor([[[1.0, nan, nan, nan]]])
    torch.testing.assert_close(resampled(maps, (1, 2)), torch.tensor([[[1.0, nan]]]), equal_nan=True)
    torch.testing.assert_close(resampled(maps, (1, 1)), torch.tensor([[[1.0]]]))


@hypothesis.given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3]), st.data())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_painting_fine_and_resampling_is_painting(rows, columns, factor, data):
    box = data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(21, 40), st.integers(21, 40)))
    region, size = Region(box, -0.75), (41, 43)
    fine = paint([region], size, (rows * factor, columns * factor))
    direct = paint([region], size, (rows, columns))
    torch.testing.assert_close(resampled(fine[None], (rows, columns))[0], direct, equal_nan=True)
