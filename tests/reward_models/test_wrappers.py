"""Tests of the scorers that wrap another one, and of `likeness`."""

import re
from dataclasses import replace
from itertools import count

import httpx
import pytest
import torch
from services import drawings, running

from reward_models import Card, Prompt, Scores, load
from reward_models.images import png, to_pil
from reward_models.regions import Region
from reward_models.scorers import likeness, zoomed


class Mean:
    """The mean level of an image. `texts` are those of the prompts it got."""

    names, card = ("mean", "red"), Card("mean", low=0, high=1)

    def __init__(self):
        self.texts = []

    def __call__(self, images, prompts):
        self.texts += [prompt.text for prompt in prompts]
        return Scores(self.names, torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], 1))


class Dice:
    """Answers the numbers given, one after another; None is a failure."""

    names, card = ("share",), Card("dice", low=0, high=1)

    def __init__(self, *answers):
        self.answers, self.number = answers, count()

    def __call__(self, images, prompts):
        values = [self.answers[next(self.number) % len(self.answers)] for _ in prompts]
        return Scores(
            self.names,
            torch.tensor([[torch.nan if v is None else v] for v in values]),
            critiques=tuple(f"it is {v}" for v in values),
            failures={i: "no reply" for i, v in enumerate(values) if v is None},
        )


class Placing(Dice):
    """Two regions in each image."""

    def __call__(self, images, prompts):
        boxes = ((Region((0, 0, 4, 8), 1, "the left"), Region((4, 0, 8, 8), -1)),) * len(images)
        return replace(super().__call__(images, prompts), boxes=boxes)


def halves(*levels: tuple[float, float]) -> torch.Tensor:
    """Images of 8 x 8 pixels with these levels left and right."""
    images = torch.zeros(len(levels), 3, 8, 8)
    for image, (left, right) in zip(images, levels, strict=True):
        image[:, :, :4], image[:, :, 4:] = left, right
    return images


# ------------------------------------------------------------------------------------------------------- zoomed


@pytest.mark.parametrize("name", ["clip", "shapes", "jpeg_size", "image_stats"])
@pytest.mark.parametrize("value", ["mean", "min"])
def test_one_crop_of_the_whole_image_is_the_scorer(name, value):
    images, prompts = drawings(5)
    expected = load(name)(images, prompts)
    scores = load("zoomed", of=name, cells=1, value=value, span=[-1, 1])(images, prompts)
    assert scores.names == expected.names
    torch.testing.assert_close(scores.values, expected.values, rtol=0, atol=0, equal_nan=True)


def test_the_value_is_the_mean_or_the_least_of_the_whole_and_its_parts():
    images = halves((0.2, 0.6))
    parts = dict(of=Mean(), at=Placing(0.5), margin=0)
    mean, least = (load("zoomed", value=value, **parts)(images, [Prompt("a")]) for value in ("mean", "min"))
    # bicubic enlargement of an even half is that half, rounded to levels; the grey bars beside it count too
    left, right = (
        zoomed.resized(half, (8, 8), "longest", "bicubic", 0.5).mean() for half in (images[..., :4], images[..., 4:])
    )
    assert mean.values[0, 0] == pytest.approx(float(images.mean() + left + right) / 3, abs=1 / 255)
    assert least.values[0, 0] == pytest.approx(float(torch.stack([images.mean(), left, right]).min()), abs=1 / 255)


def test_a_part_is_scored_by_its_label_and_has_a_map():
    scorer = Mean()
    scores = load("zoomed", of=scorer, at=Placing(0.5), margin=0, grid=2)(halves((0, 1)), [Prompt("all of it")])
    assert scorer.texts == ["all of it", "the left", "all of it"]
    assert [region.label for region in scores.boxes[0]] == ["the left", ""]
    assert scores.regions[0, 0, 0] < 0 < scores.regions[0, 0, 1]


def test_a_grid_gives_a_map_to_a_scorer_without_one():
    images, prompts = drawings(3)
    scores = load("zoomed", of="clip", cells=2, grid=4)(images, prompts)
    assert scores.regions.shape == (3, 4, 4)
    assert not scores.regions.isnan().any()
    assert [region.label for region in scores.boxes[0]] == [f"row {y}, column {x}" for y in (1, 2) for x in (1, 2)]


def test_boxes_of_the_ground_truth_and_their_order_do_not_matter():
    boxes = [{"box": [0, 0, 0.5, 1], "label": "left"}, {"box": [0.5, 0, 1, 1], "label": "right"}]
    outside = [{"box": [0, 0, 2, 1], "label": ""}]
    prompts = [Prompt("a", {"boxes": wants}) for wants in (boxes, boxes[::-1], [], 3, outside)]
    scores = load("zoomed", of=Mean(), at="wants")(halves(*[(0.2, 0.6)] * 5), prompts)
    assert torch.allclose(scores.values[0], scores.values[1])
    assert torch.allclose(scores.values[2], torch.tensor([0.4, 0.4]), atol=1e-6)  # no regions: the whole
    assert scores.failures == {
        3: "boxes: a list of box and label is needed",
        4: "boxes: number 1 is not a box in [0, 1] and a label",
    }


def test_what_is_cut_out_has_a_margin_and_is_never_tiny():
    assert zoomed.grown((10, 10, 30, 20), (100, 100), 0, 0) == (10, 10, 30, 20)
    assert zoomed.grown((10, 10, 30, 20), (100, 100), 0.5, 0) == (0, 5, 40, 25)
    assert zoomed.grown((50, 50, 51, 51), (100, 100), 0, 0.25) == (38, 38, 63, 63)
    assert zoomed.grown((98, 0, 100, 100), (100, 100), 0.15, 0.25) == (75, 0, 100, 100)


def test_a_failure_of_a_part_or_of_the_regions_is_a_reason():
    images, prompts = halves((0, 1)), [Prompt("a")]
    part = load("zoomed", of=Dice(0.5, None), at=Placing(0.5))(images, prompts)
    assert part.failures == {0: "the left: no reply"}
    assert load("zoomed", of=Mean(), at=Placing(None))(images, prompts).failures == {0: "no regions: no reply"}
    assert part.values.isnan().all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"of": "jpeg_size"}, "zoomed: jpeg_size has no bounds; give span, the scores that mean -1 and 1"),
        ({"of": "nothing"}, "zoomed: of: no scorer called 'nothing'"),
        ({"of": {"model": "x"}}, "zoomed: of: \"{'model': 'x'}\" is neither a scorer"),
        ({"of": "clip", "cells": 9}, "zoomed: value is mean or min"),
        ({"of": "clip", "at": {"scorer": "clip", "what": 1}}, "zoomed: at: scorer 'clip'"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(settings, reason):
    with pytest.raises(ValueError, match="^" + re.escape(reason)):
        load("zoomed", **settings)


# -------------------------------------------------------------------------------------------------------- voted


def test_a_judge_that_never_varies_has_no_error():
    images, prompts = drawings(3)
    scores = load("voted", of="clip", times=4)(images, prompts)
    torch.testing.assert_close(scores.column("cosine"), load("clip")(images, prompts).column("cosine"))
    assert scores.column("cosine_error").tolist() == [0, 0, 0]


def test_mean_and_standard_error_of_the_answers():
    scores = load("voted", of=Dice(1.0, 0.0, 1.0, 1.0, 0.0), times=5)(halves((0, 1)), [Prompt("a")])
    # the variance of three ones and two zeros is 1.2 / 4
    assert scores.values[0].tolist() == pytest.approx([0.6, (0.3 / 5) ** 0.5])
    assert scores.critiques == ("it is 1.0",)


def test_the_error_of_a_coin_is_that_of_its_mean():
    generator = torch.Generator().manual_seed(0)
    answers = torch.bernoulli(torch.full((2000,), 0.7), generator=generator).tolist()
    values = load("voted", of=Dice(*answers), times=5)(halves(*[(0, 1)] * 400), [Prompt("a")] * 400).values
    assert values[:, 0].mean() == pytest.approx(0.7, abs=0.03)
    assert (values[:, 1] ** 2).mean().sqrt() == pytest.approx(float(values[:, 0].std()), rel=0.1)


def test_too_few_answers_are_no_score():
    three, two = (
        load("voted", of=Dice(*answers), times=4, least=3)(halves((0, 1)), [Prompt("a")])
        for answers in ((1.0, None, 1.0, 0.4), (1.0, None, None, 0.4))
    )
    assert three.values[0, 0] == pytest.approx(0.8)
    assert not three.failures
    assert two.failures == {0: "2 of 4 answers, 3 needed: no reply"}
    assert two.values.isnan().all()


def test_a_comparison_of_siblings_cannot_be_asked_again():
    class Crowd(Mean):
        card = Card("crowd", groupwise=True)

    for wrapper in ("voted", "zoomed"):
        with pytest.raises(ValueError, match="compare"):
            load(wrapper, of=Crowd())


# ----------------------------------------------------------------------------------------------------- likeness


def test_a_picture_is_most_like_itself(tmp_path):
    images, prompts = drawings(4)
    to_pil(images[:1])[0].save(tmp_path / "reference.png")
    prompts = [replace(prompt, wants={"source": str(tmp_path / "reference.png")}) for prompt in prompts]
    values = load("likeness")(images, prompts).values
    assert values[0].tolist() == pytest.approx([1, 0, 1], abs=1e-5)
    assert (values[1:, :2] < values[0, :2] - 1e-3).all()
    assert (values[1:, 2] < 0.99).all()


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.6), (0.0, 1.0), (0.5, 0.5)])
def test_similarity_of_even_pictures_is_that_of_their_light(a, b):
    pictures = [torch.full((1, 3, 16, 16), level) for level in (a, b)]
    light = (2 * a * b + likeness.C1) / (a * a + b * b + likeness.C1)
    assert float(likeness.ssim(*pictures)) == pytest.approx(light, abs=1e-6)


def test_similarity_of_opposites_is_negative():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert likeness.ssim(noise, 1 - noise) < -0.9


def test_a_reference_that_cannot_be_compared_fails_alone(tmp_path):
    images, _ = drawings(3)
    to_pil(images[:1, :, :16])[0].save(tmp_path / "flat.png")
    wants = [{"reference": str(tmp_path / "flat.png")}, {}, {"reference": str(tmp_path / "missing.png")}]
    scores = load("likeness")(images, [Prompt("a", want, i) for i, want in enumerate(wants)])
    assert scores.values.isnan().all()
    assert scores.failures[0] == "the reference has 32 x 16 pixels, another shape than 32 x 32"
    assert scores.failures[1].startswith("the prompt names no picture: 'reference' or 'source'")
    assert scores.failures[2].startswith(f"reference {tmp_path}/missing.png: ")


def test_a_caller_of_a_service_opens_no_files_there(tmp_path):
    images, _ = drawings(1)
    pictures = to_pil(images)
    pictures[0].save(tmp_path / "secret.png")
    wants = {"reference": str(tmp_path / "secret.png")}
    ask = {"images": [png(pictures[0])], "prompts": [{"text": "a", "wants": wants}]}
    with running({"likeness": load("likeness")}) as url:
        answer = httpx.post(f"{url}/score", json=ask).json()
    assert answer["scores"] == [{"likeness.cosine": None, "likeness.pixels": None, "likeness.ssim": None}]
    assert "opens no files for its callers" in answer["failures"][0]["likeness"]
