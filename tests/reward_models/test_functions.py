"""A function as a scorer: what it gets, what may come back, what becomes of its errors."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models import Prompt, load
from reward_models.functions import FunctionScorer, is_function

IMAGES = torch.stack([torch.full((3, 4, 6), level / 255) for level in (0, 51, 255)])
PROMPTS = [Prompt("a", {"target": 1, "kind": "x"}), Prompt("b", {"target": 2}), Prompt("c", {"target": 3})]


def values(function, images=IMAGES, prompts=PROMPTS):
    scores = FunctionScorer(function)(images, prompts)
    return scores.values[:, 0].tolist(), dict(scores.failures)


def test_it_gets_pil_images_and_texts():
    def brightness(images, prompts):
        assert all(isinstance(image, Image.Image) and image.size == (6, 4) for image in images)
        assert prompts == ["a", "b", "c"]
        return [image.getpixel((0, 0))[0] for image in images]

    assert values(brightness) == ([0, 51, 255], {})


def test_it_gets_the_tensor_if_its_annotation_is_one():
    def brightness(images: Tensor, prompts):
        assert images.shape == (3, 3, 4, 6)
        assert images.dtype == torch.float32
        return images.mean((1, 2, 3))

    assert values(brightness)[0] == pytest.approx([0, 0.2, 1])


def test_columns_by_the_names_of_its_parameters():
    def one(images, prompts, target, missing=None):
        assert missing is None
        return target

    def all_of_them(images, prompts, **columns):
        assert columns == {"target": [1, 2, 3], "kind": ["x", None, None]}
        return columns["target"]

    assert values(one) == values(all_of_them) == ([1, 2, 3], {})


def test_a_column_that_no_prompt_has_is_named():
    def needs(images, prompts, answer):
        return answer

    with pytest.raises(ValueError, match=r"'needs' needs 'answer' of the prompts, and they have kind, target"):
        FunctionScorer(needs).check_columns({"target", "kind"})
    scored, failures = values(needs)
    assert all(map(math.isnan, scored))
    assert "needs 'answer'" in failures[0]


def test_none_is_no_opinion_and_has_no_reason():
    scored, failures = values(lambda images, prompts: [1, None, True])
    assert scored[0] == scored[2] == 1
    assert math.isnan(scored[1])
    assert failures == {}


@pytest.mark.parametrize(
    ("value", "says"),
    [(math.nan, "returned nan"), (math.inf, "returned inf"), (1e300, "returned 1e"), ("0.5", "'0.5'"), ({}, "'{}'")],
)
def test_other_values_fail_their_image_alone(value, says):
    scored, failures = values(lambda images, prompts: [1, value, np.float64(2)])
    assert scored[::2] == [1, 2]
    assert math.isnan(scored[1])
    assert failures.keys() == {1}
    assert says in failures[1]


def test_what_it_raises_is_a_failure_of_the_image_with_the_line():
    def picky(images, prompts):
        if "b" in prompts:
            raise KeyError("b is missing")
        return [1] * len(images)

    scored, failures = values(picky)
    assert scored[::2] == [1, 1]
    line = picky.__code__.co_firstlineno + 2
    assert failures == {1: f"KeyError: 'b is missing' (line {line} of picky)"}


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda n: [1] * (n + 1), "given 1 images, but returned 2 scores"),
        (lambda n: n, "returned int"),
        (lambda n: None, "returned NoneType"),
    ],
)
def test_anything_but_a_number_for_each_image_fails_them_all(returned, says):
    scored, failures = values(lambda images, prompts: returned(len(images)))
    assert all(map(math.isnan, scored))
    assert says in failures[0]


def test_a_change_of_its_source_changes_its_version():
    def one(images, prompts):
        return [1.0] * len(images)

    def other(images, prompts):
        return [2.0] * len(images)

    versions = {FunctionScorer(f, "same").card.version for f in (one, one, other)}
    assert len(versions) == 2


def test_what_is_a_function_of_images():
    assert is_function(lambda images, prompts: [])
    assert not is_function(lambda pictures, prompts: [])
    assert not is_function(FunctionScorer)
    assert not is_function(3)
    with pytest.raises(ValueError, match="must take images and prompts"):
        FunctionScorer(lambda pictures: [])


def test_a_config_names_it_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def red(images, prompts):\n    return [0.25] * len(images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMALIGN_ALLOW", "my_rewards")
    scorer = load("my_rewards:red")
    assert scorer.names == ("score",)
    assert scorer(IMAGES, PROMPTS).values[:, 0].tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="it takes no settings"):
        load("my_rewards:red", strength=2)
