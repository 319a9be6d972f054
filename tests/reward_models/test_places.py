"""Tests of `places`: its questions, its scores from replies, and its failures."""

import json
import re

import pytest
import tiny_vlm
import torch
from scripted import judged
from tiny_scorers import REPLY, geneval, places

from reward_models import Prompt, load

IMAGES = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
PROMPTS = [Prompt("a cat"), Prompt("a dog {regions} {coordinates} {prompt}"), Prompt("a bird")]
WHOLE = '{"score": 0.5, "reason": "well laid out"}'


@pytest.fixture
def judge():
    """The scorer with a judge whose reply is a function of the question's text, and that judge."""

    def made(replies, **settings):
        return judged("places", lambda question: replies(question_text(question)), **settings)

    return made


def question_text(question):
    return f"{question.system}\n{question.text}"


def is_whole(text):
    return "as a whole" in text


def test_scores_map_and_reason(judge):
    local = '[{"box": [0, 0, 24, 32], "score": 1, "label": "1 cat"}, {"box": [24, 0, 48, 16], "score": -0.5}]'
    scorer, judge_model = judge(lambda text: WHOLE if is_whole(text) else local, grid=2)
    scores = scorer(IMAGES, PROMPTS)
    assert not scores.failures
    assert scores.values[0].tolist() == pytest.approx([0.5, (768 * 1 - 384 * 0.5) / (768 + 384)])
    nan = torch.nan
    torch.testing.assert_close(scores.regions[0], torch.tensor([[1, -0.5], [1, nan]]), equal_nan=True)
    assert [box.label for box in scores.boxes[0]] == ["1 cat", ""]
    assert scores.critiques[0] == "well laid out"
    texts = [question_text(question) for question in judge_model.questions]
    assert len(texts) == 6
    assert sum(map(is_whole, texts)) == 3
    assert all("pixels of the picture" in text for text in texts if not is_whole(text))
    assert len(scores.replies) == 3
    assert WHOLE in scores.replies[0]


def test_a_prompt_cannot_change_the_question(judge):
    scorer, judge_model = judge(lambda text: WHOLE if is_whole(text) else "[]")
    scorer(IMAGES, PROMPTS)
    assert sum('"a dog {regions} {coordinates} {prompt}"' in question.text for question in judge_model.questions) == 2


def test_no_region_is_no_opinion(judge):
    scorer, _ = judge(lambda text: WHOLE if is_whole(text) else "[]")
    scores = scorer(IMAGES, PROMPTS)
    assert not scores.failures
    assert scores.values[:, 0].eq(0.5).all()
    assert scores.values[:, 1].isnan().all()
    assert scores.regions.isnan().all()


def test_a_bad_reply_fails_its_image_alone_and_is_never_nought(judge):
    bad = '[{"box": [0, 0, 99, 9], "score": 1}]'
    scorer, _ = judge(lambda text: WHOLE if is_whole(text) else bad if "dog" in text else "[]")
    scores = scorer(IMAGES, PROMPTS)
    assert list(scores.failures) == [1]
    assert scores.failures[1].startswith(
        "region 1: box (0.0, 0.0, 99.0, 9.0) lies outside the image of 48 x 32 pixels; "
    )
    assert scores.failures[1].endswith(f"the reply begins {bad!r}")
    assert scores.values[1].isnan().all()
    assert scores.values[[0, 2], 0].eq(0.5).all()


def test_proposed_regions_are_put_to_the_judge_by_number(judge, tmp_path):
    detr = geneval(tmp_path / "detr")["model"]

    def reply(text):
        if is_whole(text):
            return WHOLE
        return json.dumps(
            [{"region": k + 1, "score": 1} for k in range(len(re.findall(r"^\d+: \[", text, re.MULTILINE)))]
        )

    scorer, judge_model = judge(reply, proposals=detr, confidence=0.05)
    scores = scorer(IMAGES, PROMPTS)
    assert not scores.failures
    assert any(scores.boxes)
    for boxes in scores.boxes:
        areas = [(box.box[2] - box.box[0]) * (box.box[3] - box.box[1]) for box in boxes]
        assert areas == sorted(areas, reverse=True)
        assert len(boxes) <= 10
    assert all("{regions}" not in question.text or "dog" in question.text for question in judge_model.questions)


def test_a_real_model_that_babbles_fails_honestly(tmp_path):
    scores = load("places", model=str(tiny_vlm.folder_of(tmp_path)), tokens=12)(IMAGES, PROMPTS)
    assert sorted(scores.failures) == [0, 1, 2]
    assert all("the reply (it ran out of tokens) begins " in reason for reason in scores.failures.values())
    assert all(scores.replies)
    assert scores.values.isnan().all()


def test_a_real_model_writes_through_its_own_generate(tmp_path):
    scores = load("places", **places(tmp_path))(IMAGES, PROMPTS)
    reply = json.loads(REPLY)
    assert scores.column("overall").eq(reply["score"]).all()
    assert scores.boxes[0][0].box == tuple(reply["regions"][0]["box"])
    assert scores.column("local").eq(reply["regions"][0]["score"]).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coordinates": "percent"}, "coordinates is one of pixels, thousand, unit, not 'percent'"),
        ({"overlap": "sum"}, "no overlap rule called 'sum'"),
        ({"whole": "nowhere.txt"}, r"nowhere.txt: No such file"),
        ({"proposals": "nowhere"}, "nowhere"),
    ],
)
def test_settings_are_checked(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        load("places", **places(tmp_path) | settings)


def test_an_instruction_of_ones_own_changes_the_version(tmp_path):
    (tmp_path / "own.txt").write_text("{image} How is it laid out, for {prompt}?")
    plain = load("places", **places(tmp_path / "vlm"))
    reworded = load("places", **places(tmp_path / "vlm") | {"whole": str(tmp_path / "own.txt")})
    assert plain.card.version != reworded.card.version
    (tmp_path / "own.txt").write_text("{image} How is it laid out?")
    with pytest.raises(ValueError, match=r"does not contain \{prompt\}"):
        load("places", model=str(tmp_path / "vlm"), whole=str(tmp_path / "own.txt"))
