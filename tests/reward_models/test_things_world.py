"""Tests of the embedded world of things: captions, parts and drawings."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reward_models import meaning as meanings
from reward_models.things_world import (
    FOLDER,
    NATURAL,
    NOUNS,
    SIDE,
    STYLES,
    TAGS,
    changed,
    draw,
    part,
    request,
    sprite,
    understood,
)
from reward_models.worlds import caption, meaning, plural, thing

PROMPTS = Path(__file__).parents[2] / "assets/prompts"
PARTS = ("train", "validation", "test")


def some(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [request(tag, rng) for tag in TAGS for _ in range(count)]


@pytest.mark.parametrize(
    ("tag", "include", "wording"),
    [
        ("one_object", [thing("owl")], "an owl"),
        ("colors", [thing("ant", "orange")], "an orange ant"),
        ("counting", [thing("butterfly", count=2)], "two butterflies"),
        ("counting", [thing("leaf", "red", 3)], "three red leaves"),
        ("style", [thing("umbrella", style="shaded")], "a shaded drawing of an umbrella"),
        ("two_objects", [thing("cat"), thing("boat")], "a cat and a boat"),
        ("position", [thing("cat") | {"position": ["below", 1]}, thing("apple")], "a cat below an apple"),
    ],
)
def test_captions_and_back(tag, include, wording):
    wants = {"tag": tag, "include": include}
    assert caption(wants) == wording
    assert understood(wording) == wants


def test_every_request_is_understood_from_its_caption():
    for wants in some(200, 0):
        assert understood(caption(wants)) == wants


@pytest.mark.parametrize(
    "text", ["", "a", "a unicorn", "an cat", "four cats", "a cat and a cat", "two cat", "a pink cat", "a cat by a pig"]
)
def test_other_texts_are_not(text):
    assert understood(text) == {}


def test_plurals_are_regular_or_listed():
    assert [plural(noun) for noun in ("cactus", "strawberry", "key", "fish", "snowman", "torch")] == [
        "cactuses", "strawberries", "keys", "fish", "snowmen", "torches",
    ]  # fmt: skip


def test_the_sheets_hold_what_the_index_names():
    index = json.loads((FOLDER / "index.json").read_text())
    assert tuple(index["nouns"]) == NOUNS
    assert len(set(NOUNS)) == len(NOUNS) == 70
    assert tuple(index["styles"]) == STYLES == ("flat", "shaded")
    assert {style["licence"] for style in index["styles"].values()} == {"MIT", "Apache-2.0"}
    rows = -(-len(NOUNS) // index["columns"])
    for style in STYLES:
        with Image.open(FOLDER / f"{style}.png") as picture:
            assert (picture.mode, picture.size) == ("RGBA", (index["columns"] * index["side"], rows * index["side"]))
    for name in ("LICENSE.fluent", "LICENSE.noto"):
        assert "License" in (FOLDER / name).read_text()
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 300_000


def test_a_sprite_fills_its_square_and_a_tint_has_one_hue():
    for noun in NOUNS[::9]:
        for style in STYLES:
            *_, alpha = sprite(noun, style, NATURAL, 20)
            rows, columns = np.flatnonzero((alpha > 0.05).any(1)), np.flatnonzero((alpha > 0.05).any(0))
            assert max(np.ptp(rows), np.ptp(columns)) >= 18
            red, green, blue, alpha = sprite(noun, style, "blue", 20)
            assert (blue[alpha > 0.9] > 2 * np.maximum(red, green)[alpha > 0.9]).all()


def test_drawing_depends_on_the_generator_alone():
    for wants in some(2, 1):
        one, two, other = (draw(wants, np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)
        assert one.shape == (3, SIDE, SIDE)
        assert one.dtype == np.float32
        assert one.min() >= 0
        assert one.max() <= 1
        assert draw(wants, np.random.default_rng(5), 96).shape == (3, 96, 96)


def test_a_changed_request_differs_in_one_thing():
    rng, kinds = np.random.default_rng(0), Counter()
    for wants in some(20, 2):
        for kind in ("object", "attribute", "relation", "count"):
            if (other := changed(wants, kind, rng)) is None:
                continue
            pairs = zip(wants["include"], other["include"], strict=True)
            differing = [name for item, new in pairs for name in item if item[name] != new[name]]
            assert len(differing) == 1
            kinds[kind, differing[0]] += 1
    names = {("object", "class"), ("attribute", "color"), ("attribute", "style"), ("relation", "position")}
    assert set(kinds) == names | {("count", "count")}


def test_parts_are_apart_by_meaning_and_pairs_of_nouns():
    pairs, means = ({name: set() for name in PARTS} for _ in range(2))
    for name in PARTS:
        rows = [json.loads(line) for line in (PROMPTS / f"things_{name}.jsonl").read_text().splitlines()]
        for row in rows:
            wants = {key: row[key] for key in ("tag", "include")}
            assert caption(wants) == row["prompt"]
            assert part(wants) == name
            if len(row["include"]) == 2:
                pairs[name].add(frozenset(item["class"] for item in row["include"]))
            means[name].add(meaning(wants))
            means[name].add(meanings.meaning(row["prompt"]))
        assert len(means[name]) == 2 * len(rows)
        assert {row["tag"] for row in rows} == set(TAGS)
    for groups in (pairs, means):
        assert not groups["train"] & (groups["validation"] | groups["test"])
        assert not groups["validation"] & groups["test"]
    assert len(pairs["validation"]) > 100


def test_a_tenth_is_held_out_for_each_list():
    shares = Counter(part(wants) for wants in some(500, 3) if len(wants["include"]) == 2)
    assert shares["validation"] / shares.total() == pytest.approx(0.1, abs=0.03)
    assert shares["test"] / shares.total() == pytest.approx(0.1, abs=0.03)
