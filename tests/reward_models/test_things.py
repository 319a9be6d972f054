"""Tests of the verifier and the critic of the embedded world of things."""

import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from reward_models import Prompt, load
from reward_models.things_world import GROUNDS, TAGS, changed, draw, request, understood
from reward_models.worlds import caption, thing


def some(tag: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [request(tag, rng) for _ in range(count)]


def drawings(wants: list[dict], seed: int, side: int = 64) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw(w, rng, side) for w in wants]))


def prompts(wants: list[dict]) -> list[Prompt]:
    return [Prompt(caption(w), w, i) for i, w in enumerate(wants)]


ALL = [wants for tag in TAGS for wants in some(tag, 60, 1)]


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    return drawings(ALL, 2)


def strict(images: torch.Tensor, wants: list[dict]) -> torch.Tensor:
    return load("things")(images, prompts(wants)).column("strict")


def test_clean_drawings_are_right(clean):
    scores = load("things")(clean, prompts(ALL))
    right, partial = scores.column("strict"), scores.column("partial")
    assert right.mean() >= 0.995
    assert (partial[right == 1] == 1).all()
    assert partial.max() <= 1
    assert all(text == "right" for text, one in zip(scores.critiques, right, strict=True) if one)


def test_other_sizes_of_a_picture_are_read():
    assert strict(drawings(ALL[::7], 3, 96), ALL[::7]).mean() >= 0.98


def test_noise_and_blur_of_a_decoder_change_little(clean):
    rng = np.random.default_rng(4)
    noise = torch.from_numpy(rng.normal(0, 0.03, clean.shape).astype(np.float32))
    assert strict((clean + noise).clamp(0, 1), ALL).mean() >= 0.99
    blurred = torch.from_numpy(ndimage.gaussian_filter(clean.numpy(), (0, 0, 0.6, 0.6)))
    assert strict((blurred + noise).clamp(0, 1), ALL).mean() >= 0.97


@pytest.mark.parametrize("kind", ["object", "attribute", "relation", "count"])
def test_one_wrong_thing_is_wrong(kind):
    rng = np.random.default_rng(5)
    pairs = [(wants, other) for wants in ALL if (other := changed(wants, kind, rng))][:120]
    images = drawings([other for _, other in pairs], 6)
    scores = load("things")(images, prompts([wants for wants, _ in pairs]))
    assert (scores.column("strict") == 0).all()
    assert (scores.column("partial") < 1).all()


def test_missing_surplus_and_untinted_things_are_wrong():
    two, tinted = some("color_attr", 40, 7), some("colors", 60, 8)
    one = [{"tag": "colors", "include": wants["include"][:1]} for wants in two]
    natural = [{"tag": "one_object", "include": [thing(wants["include"][0]["class"])]} for wants in tinted]
    assert (strict(drawings(one, 9), two) == 0).all()
    assert (strict(drawings(two, 10), one) == 0).all()
    assert (strict(drawings(natural, 11), tinted) == 0).all()
    assert (strict(drawings(tinted, 12), natural) == 1).float().mean() >= 0.98, "a tint that was not asked for is free"


def test_nothing_noise_and_a_chequered_patch_are_no_things():
    wants = [some(tag, 1, 13)[0] for tag in TAGS]
    empty = torch.tensor(GROUNDS["aqua"])[:, None, None].repeat(len(wants), 1, 64, 64)
    assert (load("things")(empty, prompts(wants)).values == 0).all()
    noise = torch.rand(empty.shape, generator=torch.Generator().manual_seed(0))
    assert (load("things")(noise, prompts(wants)).values == 0).all()
    empty[:, :, 20:44, 20:44] = torch.eye(2).repeat(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    scores = load("things")(empty, prompts(wants))
    assert (scores.column("strict") == 0).all()
    assert all("blob" in scores.boxes[i][0].reason for i in range(len(wants)))


def test_each_image_is_judged_alone(clean):
    images, wants = clean[::30], ALL[::30]
    together = load("things")(images, prompts(wants))
    alone = [load("things")(images[i : i + 1], prompts(wants[i : i + 1])) for i in range(len(wants))]
    assert torch.equal(together.values, torch.cat([scores.values for scores in alone]))


def test_a_prompt_without_ground_truth_fails_alone(clean):
    requested = prompts(ALL[:3])
    requested[1] = Prompt("something nice")
    scores = load("things")(clean[:3], requested)
    assert list(scores.failures) == [1]
    assert "ground truth" in scores.failures[1]
    assert (scores.column("strict")[[0, 2]] == 1).all()


def test_regions_name_the_thing_with_its_credit():
    wants = {"tag": "color_attr", "include": [thing("cat", "red"), thing("boat", "blue")]}
    drawn = {"tag": "color_attr", "include": [thing("cat", "red"), thing("boat", "green")]}
    scores = load("things")(drawings([drawn], 14), prompts([wants]))
    assert {(region.label, region.credit, region.reason) for region in scores.boxes[0]} == {
        ("1 cat", 1, "red cat"),
        ("2 boat", 0, "green boat"),
    }
    assert scores.column("partial").item() == 0.75
    assert scores.critiques[0].startswith("the boat is green")


def test_the_critic_agrees_with_the_verifier_and_makes_a_relation_explicit(clean):
    images = torch.cat([clean, clean.roll(1, 0)])
    requested = [Prompt(caption(wants), {}, i) for i, wants in enumerate(ALL + ALL)]
    scores, exact = load("things_critic")(images, requested), strict(images, ALL + ALL)
    assert torch.equal(scores.values.nan_to_num(1).amin(1) == 1, exact == 1)
    assert not scores.failures
    for prompt, request_, right in zip(requested, scores.requests, exact, strict=True):
        two = understood(prompt.text)["tag"] in ("two_objects", "color_attr")
        assert bool(request_) == (two and not right)
        if request_:
            refined = understood(request_)
            assert refined["tag"] == "position"
            items = [{key: value for key, value in item.items() if key != "position"} for item in refined["include"]]
            assert items == understood(prompt.text)["include"]


def test_the_refined_request_keeps_the_thing_that_is_right():
    drawn = {"tag": "position", "include": [thing("cat") | {"position": ["right of", 1]}, thing("owl")]}
    wants = [Prompt("a cat and a boat"), Prompt("a boat and a cat")]
    scores = load("things_critic")(drawings([drawn, drawn], 15), wants)
    box = next(region.box for region in scores.boxes[0] if region.label == "1 cat")
    x, y = (box[0] + box[2]) / 2 - 32, (box[1] + box[3]) / 2 - 32
    assert abs(x) > abs(y)
    assert scores.requests == (
        ("a cat right of a boat", "a boat left of a cat")
        if x > 0
        else ("a cat left of a boat", "a boat right of a cat")
    )
