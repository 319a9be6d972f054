"""What the scorers of the embedded worlds say of requests that are malformed or of another world: a reason, at once."""

import pytest
import torch

from reward_models import Prompt, load
from reward_models.worlds import MOST

SHAPES, THINGS = ("shapes", "shapes_critic", "shapes_classifier"), ("things", "things_critic", "things_classifier")
ONE = {"class": "circle", "count": 1}
CAT = {"class": "cat", "count": 1}
TWO = [ONE | {"position": ["above", 1]}, {"class": "cross", "count": 1}]


def reason(scorer: str, wants: dict) -> str:
    """Of an image with this request. Another image of the batch is scored as alone."""
    score, images = load(scorer), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fine = Prompt(
        "", {"tag": "one_object", "include": [{"class": "circle" if scorer in SHAPES else "cat", "count": 1}]}
    )
    scores = score(images, [Prompt("", wants), fine])
    assert scores.values[0].isnan().all()
    torch.testing.assert_close(scores.values[1:], score(images[1:], [fine]).values, equal_nan=True)
    assert [*scores.failures] == [0]
    return scores.failures[0]


@pytest.mark.parametrize("scorer", SHAPES)
@pytest.mark.parametrize(
    ("wants", "wrong"),
    [
        ({"tag": "one_object"}, "wants: it has the tag 'one_object' but no `include`"),
        ({"tag": "text", "include": [ONE]}, "wants: it has the tag 'text' but no `text`"),
        ({"tag": "text", "text": "H" * (MOST + 1)}, "wants.text: String should have at most 16 characters"),
        ({"tag": "one_object", "include": "circle"}, "wants.include: Input should be a valid list"),
        ({"tag": "one_object", "include": [{"class": "circle"}]}, "wants.include.0.count: Field required"),
        (
            {"tag": "counting", "include": [ONE | {"count": "two"}]},
            "wants.include.0.count: Input should be",
        ),
        (
            {"tag": "counting", "include": [ONE | {"count": 10**9}]},
            "wants: 1000000000 things are requested",
        ),
        ({"tag": "one_object", "include": [ONE] * (MOST + 1)}, "wants: 17 things are requested, more than 16"),
        ({"tag": "one_object", "include": [ONE | {"material": "wood"}]}, "wants.include.0.material: Extra inputs are"),
        ({"tag": "position", "include": [ONE, ONE]}, "wants: `position` belongs to the first entry"),
        (
            {"tag": "two_objects", "include": TWO},
            "wants: `position` belongs to the first entry",
        ),
        ({"tag": "position", "include": [*TWO, ONE]}, "wants: a relation is one of two single things"),
        (
            {"tag": "position", "include": [ONE | {"position": ["near", 1]}, ONE]},
            "wants.include.0.position.0: Input",
        ),
    ],
)
def test_a_malformed_request_has_no_score(scorer, wants, wrong):
    assert reason(scorer, wants).startswith(wrong)


@pytest.mark.parametrize(
    ("scorers", "wants", "word"),
    [
        (SHAPES, {"tag": "one_object", "include": [CAT]}, "cat"),
        (SHAPES, {"tag": "colors", "include": [ONE | {"color": "natural"}]}, "natural"),
        (SHAPES, {"tag": "colors", "include": [ONE | {"color": "small"}]}, "small"),  # a size
        (SHAPES, {"tag": "style", "include": [ONE | {"style": "flat"}]}, "flat"),
        (SHAPES, {"tag": "text", "text": "HA"}, "A"),
        (THINGS, {"tag": "one_object", "include": [ONE]}, "circle"),
        (THINGS, {"tag": "colors", "include": [CAT | {"color": "cyan"}]}, "cyan"),
        (THINGS, {"tag": "colors", "include": [CAT | {"color": "shaded"}]}, "shaded"),  # a style
        (THINGS, {"tag": "colors", "include": [CAT | {"size": "large"}]}, "large"),
        (THINGS, {"tag": "text", "text": "HO"}, "H"),
    ],
)
def test_a_request_of_another_world_has_no_score(scorers, wants, word):
    critic = {"shapes_critic": "shapes", "things_critic": "things"}  # a critic is its verifier, with words
    for scorer in scorers:
        assert (
            reason(scorer, wants) == f"the prompt asks for '{word}', which `{critic.get(scorer, scorer)}` does not know"
        )


@pytest.mark.parametrize("scorer", ["shapes_classifier", "things_classifier"])
def test_a_classifier_cannot_tell_two_of_a_kind_apart(scorer):
    noun = "circle" if scorer in SHAPES else "cat"
    twice = [{"class": noun, "count": 1, "color": colour} for colour in ("red", "blue")]
    assert "twice" in reason(scorer, {"tag": "color_attr", "include": twice})


@pytest.mark.parametrize("scorer", [*SHAPES, *THINGS])
def test_what_is_there_for_another_scorer_changes_nothing(scorer):
    """As a text that a reader of letters looks for, longer than a world's."""
    wants = {"tag": "one_object", "include": [ONE if scorer in SHAPES else CAT]}
    images, score = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), load(scorer)
    alone, beside = (score(images, [Prompt("", w)]) for w in (wants, wants | {"text": "the longest words", "more": 1}))
    assert beside.failures == {}
    assert torch.equal(alone.values.nan_to_num(7.0), beside.values.nan_to_num(7.0))
