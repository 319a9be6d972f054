"""Tests of the score cache."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from reward_models import Card, Prompt, Scores, load
from reward_models.cache import Cached
from reward_models.shapes_world import caption, draw, requests

PROMPTS = [Prompt("a", {"n": 1}), Prompt("b"), Prompt("a", {"n": 1}, id=9)]


class Counting:
    """Counts what it is shown; fails on black images."""

    names = ("mean", "nothing")

    def __init__(self, **card):
        self.card, self.shown = Card("counting", **card), []

    def __call__(self, images, prompts):
        self.shown += [p.text for p in prompts]
        values = torch.stack([images.mean((1, 2, 3)) / 3, torch.full((len(images),), torch.nan)], 1)
        failures = {int(i): "black" for i in (values[:, 0] == 0).nonzero()[:, 0]}
        values[list(failures)] = torch.nan
        return Scores(self.names, values, tuple(p.text * 2 for p in prompts), images[:, 0, :2, :2], failures)


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


def same(one, two):
    assert one.names == two.names
    assert torch.equal(one.values.nan_to_num(9), two.values.nan_to_num(9))
    assert one.critiques == two.critiques
    assert (one.regions is None) == (two.regions is None)
    assert one.regions is None or torch.equal(one.regions.nan_to_num(9), two.regions.nan_to_num(9))
    assert one.failures == two.failures


def test_cached_scores_are_equal_to_the_bit(tmp_path, images):
    scorer = Cached(Counting(), tmp_path / "c.sqlite")
    first, again = scorer(images, PROMPTS), scorer(images, PROMPTS)
    same(first, Counting()(images, PROMPTS))
    same(first, again)
    assert scorer.scorer.shown == ["a", "b", "a"]
    assert (scorer.lookups, scorer.hits) == (6, 3)
    later = Cached(Counting(), tmp_path / "c.sqlite")
    same(later(images, PROMPTS), first)
    assert later.hits == 3


def test_twins_in_one_call_are_scored_once(tmp_path, images):
    scorer = Cached(Counting(), tmp_path / "c.sqlite")
    scores = scorer(images[[0, 1, 0, 0]], [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]])
    assert scorer.scorer.shown == ["a", "b", "b"]
    same(scores, Counting()(images[[0, 1, 0, 0]], [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]]))


def test_anything_that_changes_the_score_is_another_entry(tmp_path, images):
    def fresh(changed_images=images, prompts=PROMPTS, **card):
        scorer = Cached(Counting(**card), tmp_path / "c.sqlite")
        scorer(changed_images, prompts)
        return len(scorer.scorer.shown)

    assert fresh() == 3
    assert fresh() == 0
    assert fresh(checkpoint="other") == 3
    assert fresh(settings={"x": 1}) == 3
    brighter = images.clone()
    brighter[1, 0, 0, 0] += 1 / 255 if brighter[1, 0, 0, 0] < 0.5 else -1 / 255
    assert fresh(brighter) == 1
    assert fresh(images + 1e-4 / 255) == 0  # the same 256 levels
    assert fresh(images.transpose(2, 3)) == 3
    assert fresh(images.reshape(3, 3, 2, 8)) == 3  # the same bytes in another shape
    assert fresh(prompts=[replace(p, wants={"n": 2}) for p in PROMPTS]) == 3
    assert fresh(prompts=[replace(p, id=77) for p in PROMPTS]) == 0
    assert fresh(sees_prompt=False) == 3
    assert fresh(prompts=[Prompt("zzz")] * 3, sees_prompt=False) == 0


def test_failures_are_tried_again(tmp_path, images):
    images[1] = 0
    scorer = Cached(Counting(), tmp_path / "c.sqlite")
    for _ in range(2):
        scores = scorer(images, PROMPTS)
        assert scores.failures == {1: "black"}
        assert scores.values[1].isnan().all()
    assert scorer.scorer.shown == ["a", "b", "a", "b"]
    broken = images.clone()
    broken[2, 0, 0, 0] = torch.nan
    scores = Cached(load("image_stats"), tmp_path / "c.sqlite")(broken, PROMPTS)
    assert scores.failures == {2: "a pixel is not finite"}


def test_those_who_compare_images_are_always_asked(tmp_path, images):
    scorer = Cached(Counting(groupwise=True), tmp_path / "c.sqlite")
    scorer(images, PROMPTS)
    scorer(images, PROMPTS)
    assert len(scorer.scorer.shown) == 6


def test_a_real_scorer_with_regions_and_critiques(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    wants = [requests()[i] for i in rng.integers(len(requests()), size=6)]
    images = torch.from_numpy(np.stack([draw(w, rng) for w in wants]))
    prompts = [Prompt(caption(w), w, i) for i, w in enumerate(wants[1:] + wants[:1])]
    scorer = Cached(load("shapes"), tmp_path / "c.sqlite")
    expected = load("shapes")(images, prompts)
    same(scorer(images, prompts), expected)
    same(scorer(images.flip(0), prompts[::-1]), load("shapes")(images.flip(0), prompts[::-1]))
    assert scorer.hits == 6
    assert scorer(images[:0], []).values.shape == (0, 2)


WRITER = """
import sys, torch
from reward_models import Prompt, load
from reward_models.cache import Cached
scorer = Cached(load("image_stats"), sys.argv[1])
for i in range(40):
    image = torch.full((1, 3, 4, 4), (i if sys.argv[2] == "up" else 39 - i) / 255)
    value = scorer(image, [Prompt("")]).values[0, 0]
    assert abs(float(value) - float(image[0, 0, 0, 0])) < 1e-6
print(scorer.hits)
"""


def test_two_processes_share_a_file(tmp_path):
    path = str(tmp_path / "c.sqlite")
    command = [sys.executable, "-c", WRITER, path]
    two = [subprocess.Popen([*command, way], stdout=subprocess.PIPE, text=True) for way in ("up", "down")]
    assert [process.communicate()[0] and process.returncode for process in two] == [0, 0]
    again = subprocess.run([*command, "up"], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == "40"


def test_a_file_that_is_not_a_cache_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is not a database" * 100)
    for path, says in (("text", "not a database"), ("nowhere/c.sqlite", "unable to open")):
        with pytest.raises(ValueError, match=says):
            Cached(Counting(), tmp_path / path)
