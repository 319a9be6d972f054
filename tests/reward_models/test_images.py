import pytest
import torch
from PIL import Image

from reward_models.images import from_pil, to_pil, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = levels.float() / 255
    assert torch.equal(to_uint8(images), levels)
    assert torch.equal(from_pil(to_pil(images)), images)


def test_rounds_to_nearest_and_clips():
    values = torch.tensor([0.4, 0.6, 254.4, 254.6, -9.0, 300.0]) / 255
    assert to_uint8(values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6))[0, 0, 0].tolist() == [0, 1, 254, 255, 0, 255]


def test_channels_and_axes_keep_their_order():
    images = torch.zeros(1, 3, 2, 5)
    images[0, 0, 1, 4] = 1  # red, bottom right
    (picture,) = to_pil(images)
    assert picture.size == (5, 2)
    assert picture.mode == "RGB"
    assert picture.getpixel((4, 1)) == (255, 0, 0)


def test_other_modes_become_rgb():
    assert torch.equal(from_pil([Image.new("L", (3, 2), 51)]), torch.full((1, 3, 2, 3), 0.2))


@pytest.mark.parametrize("sizes", [[(3, 2), (2, 3)], []])
def test_one_size_is_required(sizes):
    with pytest.raises(ValueError, match="one size"):
        from_pil([Image.new("RGB", size) for size in sizes])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))
