"""Agreement with preferences, against counts by hand."""

from dataclasses import replace

import pytest
import torch
from drawn_pairs import drawn_pairs

from reward_models import Card, Scores, load
from reward_models.training import evaluate, page


class Level:
    """A scorer that gives each image the number in its name; `groupwise` ones note what they compare."""

    names = ("level",)

    def __init__(self, levels, groupwise=False):
        self.levels, self.calls = levels, []
        self.card = Card("level", groupwise=groupwise)

    def __call__(self, images, prompts):
        self.calls.append([prompt.id for prompt in prompts])
        values = [self.levels[round(float(image.mean()), 4)] for image in images]
        return Scores(self.names, torch.tensor(values)[:, None])


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs(6)


def levels(pairs, of_a, of_b):
    sides = [
        (side.read(), value)
        for pair, a, b in zip(pairs, of_a, of_b, strict=True)
        for side, value in ((pair.a, a), (pair.b, b))
    ]
    return {round(float(image.mean()), 4): float(value) for image, value in sides}


def test_accuracy_by_hand(pairs):
    """Preferences are a, b, a, b, a, b; the last is made a tie. Right: 1, 2, 4; equal scores: 3; wrong: 5."""
    some = [*pairs[:5], replace(pairs[5], preference=0.5)]
    some[0], some[1] = replace(some[0], aspect="count"), replace(some[1], aspect="count")
    scorer = Level(levels(pairs, [2, 0, 1, 0, 0, 9], [1, 1, 1, 1, 1, 1]))
    other = Level(levels(pairs, [0, 2, 2, 0, 1, 9], [1, 1, 1, 1, 0, 1]))
    result = evaluate(some, {"one": scorer, "two": other})
    row = result["rewards"]["one.level"]
    assert (result["pairs"], result["ties"]) == (6, 1)
    assert (row["accuracy"]["mean"], row["accuracy"]["pairs"]) == (0.75, 4)
    assert (row["with_ties"]["mean"], row["with_ties"]["pairs"]) == (pytest.approx(4 / 6), 6)
    assert row["by_aspect"]["count"]["accuracy"]["mean"] == 1
    assert sum(part["with_ties"]["pairs"] for part in row["by_tag"].values()) == 6
    assert result["compared"]["one.level ~ two.level"] == {"pairs": 4, "only_one": 2, "only_other": 1, "p": 1.0}
    assert "calibration" not in row


def test_an_image_is_scored_once_for_each_prompt(pairs):
    """Three images of one prompt give three pairs."""
    p = pairs[0].prompt
    a, b, c = pairs[0].a, pairs[0].b, pairs[1].a
    ranking = [replace(pairs[0], a=one, b=two, prompt=p) for one, two in ((a, b), (a, c), (b, c))]
    known = {round(float(side.read().mean()), 4): float(k) for k, side in enumerate((a, b, c))}
    alone, together = Level(known), Level(known, groupwise=True)
    evaluate(ranking, {"alone": alone})
    assert sum(map(len, alone.calls)) == 3
    evaluate(ranking, {"together": together}, batch=3)
    assert sorted(number for call in together.calls for number in call) == [0, 0, 1, 1, 2, 2]
    assert all(call.count(number) == 2 for call in together.calls for number in call)


class FirstWins(Level):
    """A judge that prefers the image that it is shown first, unless the other has level 9."""

    def __call__(self, images, prompts):
        levels = super().__call__(images, prompts).values[:, 0]
        first = torch.arange(len(images)) % 2 == 0
        return Scores(self.names, torch.where(levels == 9, 2.0, first.float())[:, None])


def test_swap_consistency_of_a_judge_that_prefers_the_first_image(pairs):
    """Levels of 9 are in two pairs of six; in the others the verdict follows the order."""
    judge = FirstWins(levels(pairs, [9, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0]), groupwise=True)
    result = evaluate(pairs, {"judge": judge, "clip": load("clip")}, batch=2, swap=True)
    assert result["rewards"]["judge.level"]["swapped"]["mean"] == pytest.approx(2 / 6)
    assert "swapped" not in result["rewards"]["clip.cosine"]
    tables, _ = page.of_evaluation(result)
    assert ["judge.level", "0.333"] in [list(row[:2]) for table in tables for row in table.rows]
    assert len(judge.calls) == 12
    assert "swapped" not in evaluate(pairs, {"judge": judge}, batch=2)["rewards"]["judge.level"]


class Doubtful(Level):
    names = ("level", "spread")

    def __call__(self, images, prompts):
        level = torch.tensor([self.levels[round(float(image.mean()), 4)] for image in images])
        return Scores(self.names, torch.stack([level.sign(), level.abs()], 1))


def test_accuracy_by_the_spread_of_an_ensemble(pairs):
    """Preferences are a, b, a, b, a, b; the two pairs with the largest spread are wrong."""
    scorer = Doubtful(levels(pairs, [1, -1, 2, -2, -3, 3], [-1, 1, -2, 2, 3, -3]))
    parts = evaluate(pairs, {"heads": scorer})["rewards"]["heads.level"]["by_spread"]
    assert {name: row["accuracy"]["mean"] for name, row in parts.items()} == {"low": 1, "middle": 1, "high": 0}


def test_a_picture_that_cannot_be_read_is_counted_as_missing(pairs):
    broken = replace(pairs[0], a=replace(pairs[0].a, data=b"no picture"))
    row = evaluate([broken, *pairs[1:]], {"clip": load("clip")})["rewards"]["clip.cosine"]
    assert (row["missing"], row["with_ties"]["pairs"]) == (1, 5)
    assert sum(row["failures"].values()) == 1


def test_the_page_shows_the_figures_and_nothing_runs_in_it(pairs, tmp_path):
    named = [replace(pair, aspect="<script>") for pair in pairs]
    tables, charts = page.of_evaluation(evaluate(named, {"clip": load("clip")}))
    charts = [
        *charts,
        *page.of_training(
            [{"member": 0, "epoch": k, "train_loss": 1 / k, "stop_loss": 1.0, "stop_accuracy": None} for k in (1, 2)]
        ),
    ]
    page.write(tmp_path / "page.html", "pairs", tables, charts)
    text = (tmp_path / "page.html").read_text()
    assert page.ours(text)
    assert "clip.cosine, &lt;script&gt;" in text
    assert "<script>" not in text
    assert '<polyline points="0.0,0.0 320.0,180.0"' in text
