"""Prompts with one meaning, and the lists that must not share any."""

from pathlib import Path

import pytest

from mmalign.data import prompts as prompt_files
from reward_models import shapes_world, worlds
from reward_models.meaning import clusters, meaning

FOLDER = Path(__file__).parents[1] / "assets" / "prompts"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a circle and a square", "a square and a circle"),
        ("A circle  and the\tsquare ", "an square and circle"),
        ("a red cat, a dog and a bird", "A bird and a red cat, a dog"),
        ("a red circle left of a blue square", "a blue square right of a red circle"),
        ("a kite above a bench", "a bench below a kite"),
        ("a cat is to the left of a dog", "the dog on the right of the cat"),
        ("a cat and a bird above a dog", "a dog below a bird and a cat"),
        ("a photo of a cup and a red fork", "a photo of a red fork and a cup"),
        ("a picture of a cup left of a fork", "A picture of a fork right of a cup"),
        ('the text "O H"', 'text "O H"'),
    ],
)
def test_one_meaning(one, other):
    assert meaning(one) == meaning(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("a circle left of a square", "a square left of a circle"),
        ("a circle left of a square", "a circle above a square"),
        ("a kite above a bench", "a bench above a kite"),
        ("a circle", "two circles"),
        ("a photo of a cup", "a picture of a cup"),
        ("a cup left of a fork above a knife", "a fork right of a cup above a knife"),
        ('a sign that says "Fly a Kite"', 'a sign that says "Fly the Kite"'),
        ('a sign that says "A"', 'a sign that says "a"'),
        ('a sign that says "salt and oil and corn and rye"', 'a sign that says "salt and corn and oil and rye"'),
        ('a sign that says "a kite above a bench"', 'a sign that says "a bench below a kite"'),
    ],
)
def test_two_meanings(one, other):
    assert meaning(one) != meaning(other)


def test_the_meaning_of_a_text_is_that_of_the_world_s_request():
    """On every caption of the world text and ground truth divide the captions into the same meanings."""
    captions = [(worlds.caption(wants), worlds.meaning(wants)) for wants in shapes_world.requests()]
    assert len({(meaning(text), wants) for text, wants in captions}) == len({wants for _, wants in captions})
    assert len({meaning(text) for text, _ in captions}) == len({wants for _, wants in captions}) == 2086


def test_clusters_number_the_meanings():
    texts = ["a cup and a fork", "a cup", "a fork and a cup", "The cup"]
    assert clusters(texts).tolist() == [0, 1, 0, 1]
    assert clusters([]).tolist() == []


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("geneval_train", "geneval_held_out"),
        ("ocr_train", "ocr_held_out"),
        ("scenes_train", "scenes_held_out"),
    ],
)
def test_shipped_lists_share_no_meaning(names):
    means = [{meaning(p.text) for p in prompt_files.read(FOLDER / f"{name}.jsonl")} for name in names]
    for number, one in enumerate(means):
        assert not any(one & other for other in means[:number])
