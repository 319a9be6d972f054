"""The pairwise judge that compares each aspect."""

import pytest
import torch
from scripted import judged

from reward_models import Prompt
from reward_models.scorers.pairwise import read_aspects

PROMPTS = [Prompt("a red circle", {}, 1)] * 4
GREY = torch.linspace(0.1, 0.9, 4)[:, None, None, None].expand(4, 3, 32, 48).mul(255).round() / 255


def block(title, a, b, winner):
    return f"{title}:\n## Justification: x\n## Score A: {a}\n## Score B: {b}\n## Winner: {winner}\n"


def form(faithfulness, quality, text=("N/A", "N/A", "N/A")):
    return (
        "# Detailed Judgement\n"
        + block("1. Text Faithfulness", *faithfulness)
        + block("**2. Physical and Visual Quality**", *quality)
        + block("3. Text Rendering", *text)
        + "# Summary: Score A: 1\n"
    )


A, B, TIE = (3, 2, "Image A"), (2, 3.5, "Image B"), (3, 3, "tie")


@pytest.mark.parametrize(
    ("reply", "winners"),
    [
        (form(A, A), {"wins": 0, "faithfulness": 0, "quality": 0}),
        (form(A, B), {"wins": 1, "faithfulness": 0, "quality": 1}),
        (form(TIE, TIE), {"wins": None, "faithfulness": None, "quality": None}),
        (form((3, 3, "Image B"), A), {"wins": 0, "faithfulness": 1, "quality": 0}),
        (form(A, (2, 3, "Image B")), {"wins": None, "faithfulness": 0, "quality": 1}),
        (form(TIE, TIE, A), {"wins": 0, "faithfulness": None, "quality": None, "text": 0}),
        (form(("**3**", "2/4", "**Image A** (closer)"), TIE), {"wins": 0, "faithfulness": 0, "quality": None}),
    ],
)
def test_winners_are_read(reply, winners):
    assert read_aspects(reply) == winners


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("Image A is better", "no score a for faithfulness"),
        (form(A, A).partition("3.")[0], "no score a for text"),
        (form((2, 3, "Image A"), A), "faithfulness is not the picture with the higher score"),
        (form((2, 3, "tie"), A), "faithfulness is not the picture with the higher score"),
        (form((3, 2, "Image A or Image B"), A), "picture 1, picture 2 or tie is needed"),
        (form((7, 2, "Image A"), A), "score a of faithfulness is 7"),
        (form(("N/A", 2, "Image A"), A), "faithfulness is N/A in part"),
        (form(("N/A", "N/A", "N/A"), A), "faithfulness is N/A, but it applies"),
        (form(A, A, (3, 2, "N/A")), "text is N/A in part"),
        (form(A, A).replace("Score A: 3", "Score A: 3\nScore A: 4", 1), "two different values of score a"),
        ("Score A: 3\n" + form(A, A), "before the name of an aspect"),
    ],
)
def test_a_reply_that_is_not_clear_is_refused(reply, says):
    with pytest.raises(ValueError, match=says):
        read_aspects(reply)


def brighter_and_darker(question):
    """The brighter picture is more faithful, by 2; the darker one looks better, by 1."""
    one, two = (float(part.mean()) for part in question.parts if not isinstance(part, str))
    faithful, clean = (4, 2, "Image A"), (2, 3, "Image B")
    swapped = [(b, a, f"Image {'BA'[winner == 'Image B']}") for a, b, winner in (faithful, clean)]
    return form(*((faithful, clean) if one > two else swapped))


@pytest.mark.parametrize("orders", ["random", "both"])
def test_each_aspect_has_its_wins(orders):
    made, judge = judged("pairwise", brighter_and_darker, orders=orders, aspects=True)
    scores = made(GREY, PROMPTS)
    assert scores.names == ("wins", "faithfulness", "quality", "text")
    assert scores.column("wins").tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scores.column("faithfulness").tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scores.column("quality").tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert scores.column("text").isnan().all()
    assert not scores.failures
    assert made.swaps == ([0, 6] if orders == "both" else [0, 0])
    assert all("Image A: " in question.text for question in judge.questions)


def test_a_side_that_always_wins_wins_nothing_in_both_orders():
    made, _ = judged("pairwise", lambda question: form(A, A), orders="both", aspects=True)
    scores = made(GREY, PROMPTS)
    assert scores.values[:, :3].eq(0.5).all()
    assert made.swaps == [6, 6]


def test_a_failed_comparison_has_no_aspect():
    made, _ = judged("pairwise", lambda question: "hm", aspects=True)
    scores = made(GREY[:2], PROMPTS[:2])
    assert scores.values.isnan().all()
    assert "no score a for faithfulness; the reply begins 'hm'" in scores.failures[0]
