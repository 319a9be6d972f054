"""Tests of the parsers of judges' replies: good, odd and broken ones."""

import contextlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from reward_models.regions import Region
from reward_models.vlm import replies

SIZE = (100, 200)  # height, width
GIVEN = [(0, 0, 50, 50), (50, 0, 100, 100), (0, 50, 200, 100)]
ONE = '{"box": [10, 20, 30, 40], "label": "1 cat", "score": 0.5, "reason": "well made"}'
CAT = Region((10, 20, 30, 40), 0.5, "1 cat", "well made")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 0.5, "reason": "so"}', (0.5, "so")),
        ('{"reason": "so", "score": -1}', (-1.0, "so")),
        ('```json\n{"score": 0.25, "reason": "so"}\n```', (0.25, "so")),
        ('Here it is: {"score": 0.25} I hope it helps.', (0.25, "")),
        ('{"Score": "0.5", "Reason": "so"}', (0.5, "so")),
        ('{"**Score**": "+0.5/1"}', (0.5, "")),
        ('[1, 2] {"score": 0}', (0.0, "")),
        ('{"note": 3} {"score": 1}', (1.0, "")),
        ('{"score": 0.5, "reason": null}', (0.5, "")),
        ("Score: 0.7\nReason: well placed", (0.7, "well placed")),
        ("Reason: well placed\nScore: 0.7", (0.7, "well placed")),
        ("**Score:** **0.7**\n**Reason:** well placed", (0.7, "well placed")),
        ("## Score: 0.7/1", (0.7, "")),
        ("Score: 0.7 / 1.0", (0.7, "")),
        ("Score = −0.3", (-0.3, "")),
        ("score: –.5", (-0.5, "")),
        ("Score: +1", (1.0, "")),
        ('<think>Score: 0.9, or {"score": 1}?</think>\nScore: 0.1', (0.1, "")),
        ("<think>a</think><think>b</think>Score: 0.2", (0.2, "")),
        ("thinking without an opening </think> Score: 0.3", (0.3, "")),
        ("The score is good.\nScore: 0.4", (0.4, "")),
    ],
)
def test_scores_of_the_image(reply, expected):
    assert replies.overall(reply) == expected


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("", "the score is missing"),
        ("I cannot judge this image.", "the score is missing"),
        ("<think>Score: 0.9", "ends within its thinking part"),
        ("Score: 3.5", "the score is 3.5; the scale is -1 to 1"),
        ("Score: 3/4", "the score is 3 out of 4; the scale is -1 to 1"),
        ('{"score": 85}', "the score is 85;"),
        ('{"score": NaN}', "the score is nan;"),
        ('{"score": "good"}', "the score is 'good';"),
        ('{"score": true}', "the score is True;"),
        ('{"score": [0.5]}', "the score is [0.5];"),
        ('{"score": ' + "9" * 400 + "}", "the score is "),
    ],
)
def test_scores_that_are_none(reply, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        replies.overall(reply)


@pytest.mark.parametrize(
    "reply",
    [
        f"[{ONE}]",
        ONE,
        f'{{"regions": [{ONE}]}}',
        f'{{"vlm_rewards": [{ONE}], "comment": "one"}}',
        f"```json\n[{ONE}]\n```",
        f"<think>perhaps [] or [{{}}]</think>The regions are:\n[{ONE}]\nThat is all.",
        ONE.replace('"box"', '"bbox_2d"').replace('"score"', '"credit"').replace('"label"', '"object"'),
        ONE.replace('"box"', '"BBox"').replace('"label"', '"Identified Object"').replace('"score"', '"Score"'),
        ONE.replace("0.5", '"0.5/1"'),
        ONE[:-1] + ', "image_size": [200, 100]}',
        "Region 1:\nBox: [10, 20, 30, 40]\nIdentified Object: 1 cat\nScore: 0.5\nReason: well made",
        "**Region 7**\n- **Label:** 1 cat\n- **Score:** 0.5\n- **Box:** (10, 20, 30, 40)\n- **Reason:** well made",
    ],
)
def test_a_region_in_many_dresses(reply):
    assert replies.read_regions(reply, SIZE) == [CAT]


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n-----\n", "\n***\n\n"])
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_regions_by_number_however_they_are_divided(between, order):
    """Also with the dashed lines of the example in SRUM's prompt."""
    scores = {1: 0.8, 2: -0.4, 3: 0.0}
    reply = between.join(f"Region {k}:\nIdentified Object: thing {k}\nScore: {scores[k]}" for k in order)
    regions = replies.read_regions(reply, SIZE, proposed=GIVEN)
    assert regions == [Region(GIVEN[k - 1], scores[k], f"thing {k}") for k in order]


def test_json_regions_by_number():
    reply = '[{"region": 2, "score": 1, "label": ""}, {"id": 1, "score": -1}]'
    assert replies.read_regions(reply, SIZE, proposed=GIVEN[:2]) == [Region(GIVEN[1], 1.0), Region(GIVEN[0], -1.0)]
    with pytest.raises(ValueError, match=re.escape("scores the regions [1, 2]; each of 3 once is needed")):
        replies.read_regions(reply, SIZE, proposed=GIVEN)


def test_no_regions_is_an_answer():
    assert replies.read_regions("[]", SIZE) == replies.read_regions('{"regions": []}', SIZE) == []


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [("pixels", [20, 50, 100, 100]), ("thousand", [100, 500, 500, 1000]), ("unit", [0.1, 0.5, 0.5, 1])],
)
def test_what_boxes_count_in(coordinates, box):
    (region,) = replies.read_regions(f'[{{"box": {box}, "score": 1}}]', SIZE, coordinates)
    assert region.box == pytest.approx((20, 50, 100, 100))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("There is a cat.", "the reply names no regions"),
        ("[1, 2]", "the reply names no regions"),
        ('{"comment": "none"}', "the reply names no regions"),
        ("<think>[]", "ends within its thinking part"),
        (f"[{ONE[:-8]}", "names no regions"),  # cut off
        ('[{"box": [30, 20, 10, 40], "score": 1}]', "region 1: box (30.0, 20.0, 10.0, 40.0) is empty"),
        ('[{"box": [10, 20, 10, 40], "score": 1}]', "region 1: box (10.0, 20.0, 10.0, 40.0) is empty"),
        (f'[{ONE}, {{"box": [0, 0, 300, 40], "score": 1}}]', "region 2: box (0.0, 0.0, 300.0, 40.0) lies outside"),
        ('[{"box": [-5, 0, 30, 40], "score": 1}]', "lies outside the image of 200 x 100 pixels"),
        ('[{"box": [NaN, 0, 30, 40], "score": 1}]', "is not four numbers"),
        ('[{"box": [0, 30, 40], "score": 1}]', "box [0, 30, 40] is not four numbers"),
        ('[{"box": ["a", 0, 30, 40], "score": 1}]', "is not four numbers"),
        ('[{"score": 1}]', "region 1: box None is not four numbers"),
        ('[{"box": [0, 0, 30, 40]}]', "region 1: the score is missing"),
        ('[{"box": [0, 0, 30, 40], "score": 4}]', "region 1: the score is 4;"),
        (f'[{ONE[:-1]}, "size": [64, 64]}}]', "its box refers to an image of [64, 64] pixels, this one is [200, 100]"),
        ("Region 1:\nScore: 0.5", "region 1: box None is not four numbers"),
        ("Region 1:\nBox: [a, 2, 3, 4]\nScore: 0.5", "is not four numbers"),
    ],
)
def test_regions_that_are_none(reply, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        replies.read_regions(reply, SIZE)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["4", '"two"', "null"])
def test_a_number_that_was_not_given_is_refused(number):
    with pytest.raises(ValueError, match=r"there is no region .*; there are 3"):
        replies.read_regions(f'[{{"region": {number}, "score": 1}}]', SIZE, proposed=GIVEN)


pieces = st.sampled_from(
    ["Region 1", "Region", "Score:", "score", "0.5", "-", "{", "}", "[", "]", '"box"', '"score"', ":", ",", "1e999",
     "NaN", "[1,2,3,4]", "<think>", "</think>", "```", "\n", "**", '"', "9" * 30, "null", "\\u0000", "Reason:", "−",
     "/"]
)  # fmt: skip


@hypothesis.given(st.one_of(st.text(max_size=60), st.lists(pieces, max_size=40).map("".join)))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_nothing_but_a_value_error_comes_of_any_reply(reply):
    for read in (
        replies.overall,
        lambda r: replies.read_regions(r, SIZE),
        lambda r: replies.read_regions(r, SIZE, "unit", GIVEN),
    ):
        with contextlib.suppress(ValueError):
            read(reply)


def test_unknown_coordinates_are_refused():
    with pytest.raises(ValueError, match="no coordinates called 'percent'; known: pixels, thousand, unit"):
        replies.read_regions("[]", SIZE, "percent")
