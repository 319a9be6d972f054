"""Tests of the sanity checks of scorers: each fault is reported, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from scripted import judged
from typer.testing import CliRunner

from mmalign.cli.app import app
from mmalign.errors import BadInput
from reward_models import Card, Prompt, Scores, load
from reward_models.scoring import each
from reward_models.tools import examine as health

IMAGES, PROMPTS, PAIRS = health.material(Path("assets/pictures"), 16)
ALL = ("answers", "spread", "repeats", "neighbours", "blank", "noise", "prompt as text", "sees the prompt")


class Judge:
    """`shapes`, changed by `twist(values, call)`."""

    names = ("partial",)

    def __init__(self, twist, sees_prompt=True):
        self.inner, self.twist, self.calls = load("shapes"), twist, 0
        self.card = Card("twisted", low=0, high=1, sees_prompt=sees_prompt)

    def __call__(self, images, prompts):
        self.calls += 1
        scores = self.inner(images, prompts)
        return Scores(self.names, self.twist(scores.values[:, 1:], images, prompts, self.calls))


def bad(scorer, choices=None):
    return {
        check.check.removeprefix("sees the image: ")
        for check in health.examine(scorer, IMAGES, PROMPTS, choices)
        if check.good is False
    }


def test_a_good_judge_has_nothing_wrong_with_it():
    rows = health.examine(load("shapes"), IMAGES, PROMPTS)
    assert [row.check.removeprefix("sees the image: ") for row in rows] == [*ALL]
    assert all(check.good for check in rows)


@pytest.mark.parametrize(
    ("twist", "wrong"),
    [
        (lambda v, i, p, call: v + torch.randn(v.shape, generator=torch.Generator().manual_seed(call)), "repeats"),
        (lambda v, i, p, call: v + len(v) % 3, "neighbours"),
        (lambda v, i, p, call: torch.zeros_like(v), "spread"),
        (lambda v, i, p, call: torch.full_like(v, torch.nan), "answers"),
        (lambda v, i, p, call: i.std((1, 2, 3))[:, None], "noise"),
        (lambda v, i, p, call: -i.std((1, 2, 3))[:, None], "blank"),
        (lambda v, i, p, call: i.mean((1, 2, 3))[:, None], "prompt as text"),
        (lambda v, i, p, call: i[:, 0].std((1, 2))[:, None], "sees the prompt"),
    ],
)  # fmt: skip
def test_each_fault_is_found(twist, wrong):
    assert wrong in bad(Judge(twist))


def test_a_few_failures_are_said_with_their_reason():
    def look(images, prompts):
        return Scores(("one",), torch.full((len(images), 1), torch.nan), failures={0: "the server is away"})

    class Away:
        names, card = ("one",), Card("away")

        def __call__(self, images, prompts):
            return each(images, prompts, self.names, look, batch=1)

    row = next(check for check in health.examine(Away(), IMAGES, PROMPTS) if check.check == "answers")
    assert row.result == "100% without a score; the server is away"


def brightest(question):
    one, two = (float(part.std()) for part in question.parts if not isinstance(part, str))
    return f"<answer>Image {1 if one < two else 2} is better</answer>"


def test_a_judge_of_pairs_is_asked_from_both_sides():
    fair, _ = judged("pairwise", brightest)
    assert bad(fair) == set()
    assert fair.orders == "random"
    first, _ = judged("pairwise", lambda question: "<answer>Image 1 is better</answer>")
    assert "sides" in bad(first)
    silent, _ = judged("pairwise", lambda question: "hm")
    assert "answers" in bad(silent)


def test_choices_are_scored_or_played():
    pairs = [(torch.full((1, 3, 8, 8), 0.9), torch.full((1, 3, 8, 8), 0.1), Prompt("x", {}, k)) for k in range(3)]
    bright = Judge(lambda v, i, p, call: i.mean((1, 2, 3))[:, None])
    bright.inner = lambda images, prompts: Scores(("a", "b"), torch.zeros(len(images), 2))
    assert health.chosen(bright, pairs)[:, 0].tolist() == pytest.approx([0.9] * 3)
    assert health.chosen(bright, []) is None
    assert "choices" in bad(load("shapes"), torch.tensor([[0.1, 0.9]] * 4))
    assert "choices" not in bad(load("shapes"), torch.tensor([[0.9, 0.1]] * 4))


def test_the_prompt_as_text_can_be_read_and_fits():
    picture = health.text_image("a red circle above a blue square and some more words", 64, 96)
    assert picture.shape == (1, 3, 64, 96)
    assert picture.min() < 0.2
    assert (picture > 0.9).float().mean() > 0.5


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_on_the_command_line(tmp_path):
    good = invoke("--rewards", "shapes", "--json")
    assert good.exit_code == 0
    assert len(json.loads(good.stdout)["shapes"]) == 8
    sick = invoke("assets/pictures/pairs.jsonl", "--rewards", "jpeg_size,clip", "--out", tmp_path / "report.md")
    assert sick.exit_code == 1
    page = (tmp_path / "report.md").read_text()
    assert page.count("**bad**") == 2
    assert "## clip" in page
    wrong = invoke("--rewards", "shape")
    assert isinstance(wrong.exception, BadInput)
    assert isinstance(invoke("assets/figures", "--rewards", "shapes").exception, BadInput)
