"""Tests of the verifier of the embedded world: correct drawings pass, and each kind of error fails."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from reward_models.scorers.shapes import Shapes, blocks, edit_distance
from reward_models.shapes_world import (
    BACKGROUND,
    COLOURS,
    GLYPHS,
    SHAPES,
    TAGS,
    caption,
    draw,
    requests,
    thing,
)
from reward_models.types import Prompt
from reward_models.worlds import OPPOSITE

BY_TAG = {tag: [wants for wants in requests() if wants["tag"] == tag] for tag in TAGS}
OBJECTS = [wants for wants in requests() if wants["tag"] != "text"]


def drawings(wants: list[dict], seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw(w, rng) for w in wants]))


def prompts(wants: list[dict]) -> list[Prompt]:
    return [Prompt(caption(w), w, i) for i, w in enumerate(wants)]


def other(known, used: set, rng) -> str:
    return str(rng.choice([name for name in known if name not in used]))


def used(wants: dict, key: str) -> set:
    return {item.get(key) for item in wants["include"]}


def changed(wants: dict, **new) -> dict:
    first, *rest = wants["include"]
    return wants | {"include": [first | new, *rest]}


def replaced_letter(wants: dict, rng) -> dict:
    return wants | {"text": other(GLYPHS, set(wants["text"]), rng) + wants["text"][1:]}


def plus_one(wants: dict, rng) -> dict:
    extra = thing(other(SHAPES, used(wants, "class"), rng), other(COLOURS, used(wants, "color"), rng))
    return {
        "tag": "two_objects",
        "include": [{k: v for k, v in i.items() if k != "position"} for i in wants["include"]] + [extra],
    }


def counted(wants: dict, step: int) -> dict:
    return changed(wants, count=wants["include"][0]["count"] + step)


PAIRS = BY_TAG["two_objects"] + BY_TAG["color_attr"]
UP_TO_THREE = [w for w in BY_TAG["counting"] if w["include"][0]["count"] < 4]
COLOURED = [w for w in OBJECTS if "color" in w["include"][0]]
SIZED = [w for w in OBJECTS if "size" in w["include"][0]]
MISTAKES = {  # what is wrong -> requests, and what is drawn instead of one of them
    "colour": (COLOURED, lambda w, rng: changed(w, color=other(COLOURS, used(w, "color"), rng))),
    "shape": (OBJECTS, lambda w, rng: changed(w, **{"class": other(SHAPES, used(w, "class"), rng)})),
    "one fewer": (BY_TAG["counting"], lambda w, rng: counted(w, -1)),
    "one more": (UP_TO_THREE, lambda w, rng: counted(w, +1)),
    "relation": (BY_TAG["position"], lambda w, rng: changed(w, position=[OPPOSITE[w["include"][0]["position"][0]], 1])),
    "letter": (BY_TAG["text"], replaced_letter),
    "size": (SIZED, lambda w, rng: changed(w, size={"small": "large", "large": "small"}[w["include"][0]["size"]])),
    "missing": (PAIRS, lambda w, rng: {"tag": "one_object", "include": w["include"][:1]}),
    "surplus": (
        [w for w in PAIRS + BY_TAG["colors"] if w not in SIZED],
        plus_one,
    ),  # a large one leaves no room
}


@pytest.mark.parametrize("tag", TAGS)
def test_clean_drawings_are_right(tag):
    rng = np.random.default_rng(1)
    wants = [BY_TAG[tag][i] for i in rng.integers(len(BY_TAG[tag]), size=200)]
    scores = Shapes()(drawings(wants, 2), prompts(wants))
    strict, partial = scores.column("strict"), scores.column("partial")
    assert strict.mean() >= 0.995
    assert (partial[strict == 1] == 1).all()
    assert partial.max() <= 1
    assert all(c == "right" for c, s in zip(scores.critiques, strict, strict=True) if s == 1)


@pytest.mark.parametrize("kind", MISTAKES)
def test_one_wrong_thing_is_wrong(kind):
    rng = np.random.default_rng(3)
    known, mistake = MISTAKES[kind]
    wants = [known[i] for i in rng.integers(len(known), size=100)]
    scores = Shapes()(drawings([mistake(w, rng) for w in wants], 4), prompts(wants))
    strict, partial = scores.column("strict"), scores.column("partial")
    assert (strict == 0).all()
    assert (partial >= 0).all()
    assert (partial < 1).all()
    assert "right" not in scores.critiques


def test_nothing_and_noise_score_zero():
    wants = [BY_TAG[tag][0] for tag in TAGS]
    empty = torch.tensor(BACKGROUND)[:, None, None].expand(len(wants), 3, 32, 32)
    scores = Shapes()(empty, prompts(wants))
    assert (scores.values == 0).all()
    assert scores.regions.isnan().all()
    noise = torch.rand(len(wants), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (Shapes()(noise, prompts(wants)).column("strict") == 0).all()


def test_a_prompt_without_ground_truth_fails_alone():
    wants = BY_TAG["colors"][:3]
    requested = prompts(wants)
    requested[1] = Prompt("something nice")
    scores = Shapes()(drawings(wants, 5), requested)
    assert scores.values.isnan().any(1).tolist() == [False, True, False]
    assert list(scores.failures) == [1]
    assert "ground truth" in scores.failures[1]
    assert (scores.column("strict")[[0, 2]] == 1).all()


def test_each_image_is_judged_alone():
    wants = requests()[::150]
    images, requested = drawings(wants[::-1], 6), prompts(wants)
    together = Shapes()(images, requested)
    alone = [Shapes()(images[i : i + 1], requested[i : i + 1]) for i in range(len(requested))]
    assert torch.equal(together.values, torch.cat([s.values for s in alone]))
    torch.testing.assert_close(together.regions, torch.cat([s.regions for s in alone]), equal_nan=True, rtol=0, atol=0)
    order = torch.randperm(len(requested), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Shapes()(images[order], [requested[i] for i in order]).values, together.values[order])


@pytest.mark.parametrize("grid", [4, 8])
def test_regions_cover_the_object_with_its_credit(grid):
    red, blue = ({"tag": "colors", "include": [thing("circle", c)]} for c in ("red", "blue"))
    images = drawings([red] * 20, 7)
    cell = 32 // grid
    painted = (images - torch.tensor(BACKGROUND)[:, None, None]).norm(dim=1) > 0.8
    painted = painted.unflatten(1, (grid, cell)).unflatten(3, (grid, cell)).any(4).any(2)
    for requested, lowest, highest in ((red, 1, 1), (blue, -1, 0.99)):
        regions = Shapes(grid)(images, prompts([requested] * 20)).regions
        assert regions.shape == (20, grid, grid)
        assert ((regions >= lowest) & (regions <= highest))[painted].all()
        assert (regions.isnan() | (regions.abs() <= 1)).all()
        assert regions.isnan().any()


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("OH", "OH", 0), ("OH", "HO", 2), ("OH", "O", 1), ("", "CE", 2), ("kitten", "sitting", 3)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_blocks_are_those_of_an_opening(share):
    mask = np.random.default_rng(0).random((3, 8, 32, 33)) < share
    assert np.array_equal(blocks(mask), ndimage.binary_opening(mask, np.ones((1, 1, 2, 2), bool)))
