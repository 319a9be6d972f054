"""Tests of the embedded world: captions, the split and drawings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reward_models import load
from reward_models.shapes_world import KINDS, TAGS, changed, draw, requests, split
from reward_models.types import Prompt
from reward_models.worlds import caption, meaning, phrase, thing

HELD_OUT = {
    "one_object": 3,
    "two_objects": 50,
    "colors": 30,
    "counting": 36,
    "position": 90,
    "color_attr": 80,
    "text": 24,
}
PROMPTS = Path(__file__).parents[2] / "assets" / "prompts"


@pytest.mark.parametrize(
    ("item", "wording"),
    [
        (thing("circle"), "a circle"),
        (thing("square", "orange"), "an orange square"),
        (thing("cross", "green", 3), "three green crosses"),
        (thing("circle", "red", size="small"), "a small red circle"),
    ],
)
def test_phrases(item, wording):
    assert phrase(item) == wording


def test_every_request_has_a_caption_of_its_own():
    captions = [caption(wants) for wants in requests()]
    assert len(set(captions)) == len(captions)


def test_captions_with_one_meaning_are_recognised():
    left = {"tag": "position", "include": [thing("circle") | {"position": ["left of", 1]}, thing("square")]}
    right = {"tag": "position", "include": [thing("square") | {"position": ["right of", 1]}, thing("circle")]}
    other = {"tag": "position", "include": [thing("square") | {"position": ["left of", 1]}, thing("circle")]}
    assert meaning(left) == meaning(right) != meaning(other)


def test_split_keeps_held_out_meanings_out_of_training():
    train, held_out = split(HELD_OUT)
    assert len({p.text for p in held_out}) == len(held_out) >= 300
    assert {p.wants["tag"] for p in held_out} == {p.wants["tag"] for p in train} == set(TAGS)
    assert not {meaning(p.wants) for p in train} & {meaning(p.wants) for p in held_out}
    assert len({p.id for p in train + held_out}) == len(train) + len(held_out)


def test_shipped_prompts_are_split_by_meaning():
    means = {}
    for name in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
        assert all(caption(row) == row["prompt"] for row in rows)
        means[name] = {meaning(row) for row in rows}
    assert not means["train"] & (means["validation"] | means["test"])
    assert not means["validation"] & means["test"]


def test_drawing_depends_on_the_generator_alone():
    for wants in requests()[::97]:
        one, two, other = (draw(wants, np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)
        assert one.shape == (3, 32, 32)
        assert one.dtype == np.float32
        assert one.min() >= 0
        assert one.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_request_differs_in_one_thing_and_its_picture_is_wrong(kind):
    rng = np.random.default_rng(0)
    all_wants = [wants for wants in requests() if wants["include"]]
    pictures, prompts = [], []
    for i in rng.permutation(len(all_wants)):
        wants, other = all_wants[i], changed(all_wants[i], kind, rng)
        if other is None:
            continue
        items = zip(wants["include"], other["include"], strict=True)
        differing = [(name, item[name], new[name]) for item, new in items for name in item if item[name] != new[name]]
        name = {"object": "class", "relation": "position", "count": "count"}.get(kind)
        assert [one[0] for one in differing] == [name or differing[0][0]]
        assert name or differing[0][0] in ("color", "size")
        pictures += [draw(wants, rng), draw(other, rng)]
        prompts += 2 * [Prompt(caption(wants), wants)]
        if len(prompts) == 40:
            break
    strict = load("shapes")(torch.from_numpy(np.stack(pictures)), prompts).column("strict")
    assert strict.tolist() == 20 * [1.0, 0.0]


def test_a_request_without_a_kind_cannot_be_changed_in_it():
    rng = np.random.default_rng(0)
    wants = {"tag": "one_object", "include": [thing("circle")]}
    assert changed(wants, "object", rng)["include"][0]["class"] != "circle"
    assert [changed(wants, kind, rng) for kind in ("attribute", "relation", "count")] == [None] * 3
    small = {"tag": "counting", "include": [thing("circle", count=4, size="small")]}
    assert changed(small, "attribute", rng) is None
