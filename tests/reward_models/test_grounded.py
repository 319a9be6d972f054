"""Tests of `grounded`: assigning detections to phrases, missing and surplus objects, and the region map."""

import pytest
import torch
from tiny_scorers import geneval, grounded as tiny_grounded

from reward_models import Card, Prompt, load
from reward_models.detect import Detection
from reward_models.scorers.grounded import Grounded, judge, phrases, without_duplicates

IMAGES = torch.rand(2, 3, 40, 80, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
CAT, DOG, OTHER = (0, 0, 40, 40), (40, 0, 80, 20), (40, 20, 80, 40)


def test_phrases_of_wants():
    assert phrases({"phrases": ["a cat", "a dog"]}) == ["a cat", "a dog"]
    include = [{"class": "cat", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]
    assert phrases({"tag": "counting", "include": include}) == ["red cat", "red cat", "dog"]


@pytest.mark.parametrize(
    "wants", [{}, {"include": []}, {"phrases": []}, {"phrases": "cat"}, {"include": [{"count": 1}]}]
)
def test_nothing_to_detect_is_a_failure_with_a_reason(wants):
    with pytest.raises(ValueError, match="nothing to detect"):
        phrases(wants)


@pytest.mark.parametrize(
    "wants",
    [
        {"include": [{"class": "cat", "count": 10**9}]},
        {"include": [{"class": "dog", "count": -(10**9)}, {"class": "cat", "count": 10**9}]},
        {"phrases": ["cat"] * 101},
    ],
)
def test_more_objects_than_a_detector_finds_are_a_failure_at_once(wants):
    with pytest.raises(ValueError, match="are requested, more than 100"):
        phrases(wants)


@pytest.mark.parametrize(
    ("detections", "score", "critique", "credits"),
    [
        ([], 0.0, "no cat; no dog", {}),
        ([Detection("cat", 0.8, CAT)], 0.4, "no dog", {"1 cat": 0.8}),
        ([Detection("cat", 0.8, CAT), Detection("dog", 0.6, DOG)], 0.7, "all found", {"1 cat": 0.8, "2 dog": 0.6}),
        (
            [Detection("cat", 0.8, CAT), Detection("dog", 0.6, DOG), Detection("cat", 0.5, OTHER)],
            0.7 * 2 / 3,
            "a cat too many",
            {"1 cat": 0.8, "2 dog": 0.6, "": -0.5},
        ),
    ],
)
def test_verdicts(detections, score, critique, credits):
    row = judge(["cat", "dog"], detections)
    assert row.values["found"] == pytest.approx(score)
    assert row.critique == critique
    assert {region.label: region.credit for region in row.regions} == credits


def test_two_of_a_kind_need_two_detections():
    row = judge(["cat", "cat"], [Detection("cat", 0.9, CAT), Detection("cat", 0.7, DOG)])
    assert row.values["found"] == pytest.approx(0.8)
    assert row.critique == "all found"
    assert sorted(region.label for region in row.regions) == ["1 cat", "2 cat"]


def test_detections_of_one_thing_count_once():
    near = (1, 0, 40, 40)
    detections = [
        Detection("cat", 0.9, CAT),
        Detection("cat", 0.8, near),
        Detection("dog", 0.7, near),
        Detection("cat", 0.6, DOG),
    ]
    assert [(d.label, d.score) for d in without_duplicates(detections, 0.5)] == [
        ("cat", 0.9),
        ("cat", 0.6),
        ("dog", 0.7),
    ]
    assert without_duplicates([], 0.5) == []


class Finder:
    """A detector that reports the given detections and records the requested labels."""

    classes = None

    def __init__(self, *detections):
        self.detections, self.requested = detections, []

    def detect(self, images, labels):
        self.requested += labels
        return [[item for item in self.detections if item.label in of_image] for of_image in labels]


def test_the_map_of_credits():
    finder = Finder(Detection("cat", 0.8, CAT), Detection("dog", 0.6, DOG), Detection("dog", 0.5, OTHER))
    scorer = Grounded(finder, Card("grounded", has_map=True), grid=2)
    scores = scorer(IMAGES, [Prompt("", {"phrases": ["cat", "dog"]}), Prompt("free text")])
    assert list(scores.failures) == [1]
    assert scores.values[1].isnan().all()
    assert finder.requested == [["cat", "dog"]]
    torch.testing.assert_close(scores.regions[0], torch.tensor([[0.8, 0.6], [0.8, -0.5]]))
    assert scores.critiques[0] == "a dog too many"


def test_a_real_detector_end_to_end(tmp_path):
    scorer = load("grounded", **tiny_grounded(tmp_path))
    scores = scorer(IMAGES, [Prompt("", {"phrases": ["cat"]}), Prompt("", {"phrases": ["dog", "dog"]})])
    assert not scores.failures
    for regions, value in zip(scores.boxes, scores.values[:, 0].tolist(), strict=True):
        right = [region.credit for region in regions if region.label]
        assert (value > 0) == bool(right)
        assert all(region.credit < 0 for region in regions if not region.label)


def test_a_detector_with_fixed_classes_is_refused(tmp_path):
    geneval(tmp_path)
    with pytest.raises(ValueError, match="has fixed classes; a zero-shot detector is needed"):
        load("grounded", model=str(tmp_path))
    with pytest.raises(ValueError, match="confidence and overlap are 0 to 1, not 2"):
        load("grounded", model=str(tmp_path), confidence=2)
