"""Replies that judges have written, and ways to fool a parser, each with its expected result. A parser reads it, or
raises ValueError, and does nothing else on any input."""

import contextlib

import hypothesis
import pytest
from hypothesis import strategies as st
from judge_texts import EDIT, FULL, IMAGE, READERS

from reward_models.scorers import checklist, pairwise, unified, visual_erm
from reward_models.vlm import critiques

A, B = {"faithfulness": 3.5, "quality": 3.0}, "a large red circle on a plain ground"


def aspects(text):
    """The scores given, without what does not apply, and the request."""
    critique = critiques.read(text, IMAGE)
    return {name: score for name, score in critique.scores.items() if score is not None}, critique.request


RATIONAL = [
    (FULL, A, B),
    (FULL.replace("3.5", "**3.5**").replace("## Score: 3\n", "## Score: **3**\n"), A, B),
    (FULL.replace("3.5", "3.5/4").replace("## Score: 3\n", "## Score: 3 / 4\n"), A, B),
    (FULL.replace("3.5", "3,5"), A, B),
    (FULL.replace("3.5", "3.5 out of 4"), A, B),
    (FULL.replace("## Score: 3\n", "## Score: 3 (Full)\n"), A, B),
    (FULL.replace("## ", "").replace("# ", ""), A, B),
    (FULL.replace("## Score", "**Score**").replace("1. Text Faithfulness:", "**1. Text Faithfulness**"), A, B),
    (FULL.replace("## Score:", "- Score -- :".replace(" -- ", "")), A, B),
    (FULL.replace("Judgement", "Judgment"), A, B),
    (FULL.replace("1. ", "").replace("2. ", "").replace("3. ", ""), A, B),
    (FULL.replace("Physical and Visual Quality", "Physical & Visual Quality"), A, B),
    (FULL.replace("Physical and Visual Quality", "physical quality"), A, B),
    (FULL.replace("Text Faithfulness:", "Text Faithfulness (1-4):"), A, B),
    (f"<think>Score: 1, or 2? # Summary</think>\n{FULL}", A, B),
    (f"<think>{FULL.replace('3.5', '1')}</think>{FULL}", A, B),
    (f"thinking without a beginning</think>{FULL}", A, B),
    (f"```markdown\n{FULL}```", A, B),
    (FULL + "\nI hope this helps! Score: 1", A, B),
    (FULL.replace("# Summary: good", "# Summary: Score: 1"), A, B),
    (FULL.replace("## Justification: Slight fringe.\n## Score: 3", "## Score: 3\n## Justification: Slight fringe."), A, B),
    (FULL.replace("\n", "\r\n"), A, B),
    (FULL.split("# Summary")[0], A, ""),
    (FULL.replace("N/A", "4"), A | {"text": 4.0}, B),
    (FULL.replace("N/A", "not applicable"), A, B),
    (FULL.replace("3.5", "4.2"), A | {"faithfulness": 4.0}, B),
    (FULL.replace("3.5", "0.8"), A | {"faithfulness": 1.0}, B),
    (FULL.replace(B, f'"{B}"'), A, B),
    (FULL.replace(B, f"**{B}**"), A, B),
    (FULL.replace(f" {B}", f"\n{B}"), A, B),
    (FULL.replace(B, "None"), A, ""),
    (FULL.replace(B, "No change."), A, ""),
    (FULL.replace(B, "<the request, in one line>"), A, ""),
    ("1. Text Faithfulness: 3.5/4\n2. Physical Quality: 3/4\n3. Text Rendering: N/A", A, ""),
    ("3. Physical Quality:\nScore: 3\n1. Text Faithfulness:\nScore: 3.5\n2. Text Rendering: N/A", A, ""),
    ('{"faithfulness": {"justification": "x", "score": 3.5}, "quality": {"score": 3}, "text": {"score": null}}', A, ""),
    ('```json\n{"Text Faithfulness": 3.5, "Visual Quality": "3/4", "Text Rendering": null, "refined_request": "b"}\n```', A, "b"),
    ('Sure:\n{"aspects": [{"name": "Text Faithfulness", "score": 3.5}, {"aspect": "2. Visual Quality", "score": "3"}, {"name": "Text Rendering", "score": "N/A"}]}', A, ""),
    # words in the picture, quoted in a justification, are not a score
    (FULL.replace("Slight fringe.", 'The caption in the picture says "Score: 4".'), A, B),
    (FULL.replace("Slight fringe.", "It reads: score 4."), A, B),
    (FULL.replace("A red circle.", "1. Text Faithfulness: the request says Score: 4"), A, B),
]  # fmt: skip


@pytest.mark.parametrize(("text", "scores", "request_"), RATIONAL, ids=range(len(RATIONAL)))
def test_critiques(text, scores, request_):
    assert aspects(text) == (scores, request_)


BROKEN = [
    ("", "no aspect has a score"),
    ("I cannot help with that.", "no aspect has a score"),
    ("Score: 4", "no aspect has a score"),
    ("<think>" + FULL, "ends within its thinking part"),
    (FULL.split("## Score")[0], "no aspect has a score"),
    (FULL.replace("3.5", "excellent").replace("## Score: 3\n", "## Score: high\n"), "the score of faithfulness is 'excellent'"),
    # the mean over the other aspects would be another number
    (FULL.split("3. Text Rendering")[0], "there is no score for text"),
    (FULL.split("2. Physical")[0], "there is no score for quality, text"),
    (FULL.replace("## Score: N/A\n", ""), "there is no score for text"),
    ("3. Physical Quality: Score: 3\n1. Text Faithfulness:\nScore: 3.5\n2. Text Rendering: N/A", "no score for quality"),
    ('{"Text Faithfulness": 3.5, "Visual Quality": "3/4"}', "there is no score for text"),
    ('{"faithfulness": {"justification": "x"}, "quality": 3, "text": null}', "the score of faithfulness is ''"),
    (FULL.replace("3.5", "9"), "the score of faithfulness is 9; the scale is 1 to 4"),
    (FULL.replace("3.5", "-3"), "the scale is 1 to 4"),
    (FULL.replace("3.5", "4/5"), "is 4 out of 5; the scale is 1 to 4"),
    (FULL.replace("3.5", "85/100"), "is 85 out of 100"),
    (FULL.replace("Slight fringe.", "\nScore: 4"), "quality has two scores, [34] and [34]"),
    (FULL.replace("# Summary", "1. Text Faithfulness:\n## Score: 4\n# Summary"), "faithfulness has two scores, 3.5 and 4"),
    ('{"faithfulness": "superb"}', "a number from 1 to 4 or N/A is needed"),
    ('{"faithfulness": 7}', "the scale is 1 to 4"),
    ('{"faithfulness": [3]}', "a number from 1 to 4"),
    ('{"faithfulness": 1e999}', "a number from 1 to 4|the scale is"),
    ('{"faithfulness": NaN}', "a number from 1 to 4"),
    ('{"faithfulness": true}', "a number from 1 to 4"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_a_critique_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        aspects(text)


def test_the_reward_is_the_mean_over_the_aspects_that_apply():
    assert critiques.read(FULL, IMAGE).overall == pytest.approx(((3.5 + 3) / 2 - 1) / 3)
    assert critiques.read(FULL.replace("N/A", "4"), IMAGE).overall == pytest.approx(((3.5 + 3 + 4) / 3 - 1) / 3)


def test_an_edit_has_one_aspect_more():
    text = FULL.replace("2. Physical", "2. Image Faithfulness:\n## Score: 2\n3. Physical").replace(
        "3. Text R", "4. Text R"
    )
    assert critiques.read(text, EDIT).scores == {"faithfulness": 3.5, "preservation": 2.0, "quality": 3.0, "text": None}


UNIFIED = [
    (2, "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 2", {"alignment": 4, "coherence": 3.5, "style": 2}),
    (2, "**Alignment:** 4/5\n**Style:** 2/5\n**Coherence** - 3", {"alignment": 4, "coherence": 3, "style": 2}),
    (2, "1. Alignment Score: 4.0\n2. Coherence: 5\n3. Style:\nfour\nwords", {"alignment": 4, "coherence": 5, "style": 4}),
    (1, "It fits.\nFinal Score: 3.5", {"score": 3.5}),
    (1, "**Final Score:** **4**/5", {"score": 4}),
    (1, "<think>Final Score: 1</think>Final Score: 4", {"score": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("version", "text", "scores"), UNIFIED)
def test_unified(version, text, scores):
    assert unified.read(text, version) == scores


@pytest.mark.parametrize(
    ("version", "text", "says"),
    [
        (1, "Final Score: 7", "the scale is 1 to 5"),
        (1, "Final Score: 4\nFinal Score: 5", "score is given twice: 4.0 and 5.0"),
        (1, "Final Score: 9/10", "9 out of 10"),
        (1, "good", "score is missing"),
        (2, "Score: 4", "alignment is missing"),
        (2, "Alignment: 4\nStyle: 2", "coherence is missing"),
    ],
)
def test_unified_refuses(version, text, says):
    with pytest.raises(ValueError, match=says):
        unified.read(text, version)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("<answer>Image 1 is better</answer>", 0),
        ("first ... <answer>Image 2 is better</answer>", 1),
        ("<answer>tie</answer>", None),
        ("<think>Image 2 is better, no.</think><answer>image 1</answer>", 0),
        ('{"categories": [], "winner": "Image 2"}', 1),
        ('```json\n{"winner": "tie"}\n```', None),
        ("**Winner:** Image A", 0),
        ("Answer: 2", 1),
        ("The first is red.\nImage 2 is better.", 1),
        ("Winner: a tie", None),
        ("<answer>\\boxed{2}</answer>", 1),
        ("**Answer** - the second image, since the first is blurred", 1),
    ],
)
def test_pairs(text, winner):
    assert pairwise.read(text) == winner


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Both are fine.", "no winner"),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", "two winners"),
        ("<answer>Image 3 is better</answer>", "picture 1, picture 2 or tie"),
        ("<answer></answer>", "is needed"),
        ("<answer>Image 1 or Image 2</answer>", "is needed"),
        ("Winner: 1/2", "is needed"),
        ("Winner: 1-2", "is needed"),
        ('{"winner": "Image 1"} but <answer>Image 2</answer>', "two winners"),
    ],
)
def test_pairs_refuse(text, says):
    with pytest.raises(ValueError, match=says):
        pairwise.read(text)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ('{"verdicts": [{"id": 1, "answer": true}, {"id": 2, "answer": false}]}', [True, False]),
        ('```json\n[{"id": 2, "answer": "Yes"}, {"id": 1, "answer": "no"}]\n```', [False, True]),
        ('{"1": true, "2": "no"}', [True, False]),
        ("1. Yes, it is.\n2. **No**", [True, False]),
        ("1: yes\n2) `no` - it is blue", [True, False]),
    ],
)
def test_verdicts(text, answers):
    assert [verdict.answer for verdict in checklist.read(text, 2, (32, 48))] == answers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("yes", "answers no criterion"),
        ("1: yes", "criterion 2 has no answer"),
        ("1: yes or no\n2: yes", "criterion 1: the answer is 'yes or no'"),
        ("1: yes/no\n2: yes", "criterion 1: the answer is 'yes/no'"),
        ('[{"id": 3, "answer": true}]', "there is no criterion 3; there are 2"),
        ('[{"id": 1, "answer": "maybe"}]', "yes or no is needed"),
        ('[{"id": 1, "answer": true}, {"id": 1, "answer": false}]', "criterion 1 has two answers"),
        ('[{"id": 1, "answer": true, "box": [9, 9, 2, 2]}]', "criterion 1: box .* is empty"),
        ('[{"id": 1, "answer": true, "box": [0, 0, 99, 9]}]', "criterion 1: box .* lies outside"),
    ],
)
def test_verdicts_refuse(text, says):
    with pytest.raises(ValueError, match=says):
        checklist.read(text, 2, (32, 48))


@pytest.mark.parametrize(
    ("text", "closeness", "boxes"),
    [
        ('{"errors": []}', 1.0, 0),
        ('{"shape_error_count": 1, "errors": [{"category": "shape", "severity": 3}]}', 0.7, 0),
        ('```json\n[{"category": "text", "severity": "2", "box": [0, 0, 4, 4]}]\n```', 0.8, 1),
        ('{"errors": [' + ", ".join(['{"severity": 3}'] * 5) + "]}", 0.0, 0),
    ],
)
def test_discrepancies(text, closeness, boxes):
    row = visual_erm.read(text, (32, 48), 10)
    assert row.values["closeness"] == pytest.approx(closeness)
    assert len(row.regions) == boxes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("The same.", "lists no errors"),
        ('{"errors": "none"}', "lists no errors"),
        ('{"errors": [{"severity": 4}]}', "error 1: severity is 4;"),
        ('{"errors": [{"severity": true}]}', "error 1: severity is True;"),
        ('{"errors": [{"severity": 1, "box": [0, 0, 99, 4]}]}', "error 1: box .* lies outside"),
    ],
)
def test_discrepancies_refuse(text, says):
    with pytest.raises(ValueError, match=says):
        visual_erm.read(text, (32, 48), 10)


pieces = st.sampled_from(
    [*FULL.splitlines(keepends=True), "Score:", "score", "1.", "4", "-", "{", "}", "[", "]", '"id"', '"answer"', ":", ",",
     "1e999", "NaN", "null", "true", "<think>", "</think>", "```", "\n", "**", '"', "9" * 400, "\\u0000", "−", "/", "N/A",
     "<answer>", "</answer>", "Image 1", "tie", "errors", '"severity"', '"box"', "[1,2,3,4]", "Alignment", '"question"',
     '"criteria"', "(", ")", "Text Faithfulness", "quality", "Final Score"]
)  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@hypothesis.given(text=st.one_of(st.text(max_size=60), st.lists(pieces, max_size=40).map("".join)))
@hypothesis.settings(max_examples=250, deadline=None, derandomize=True, database=None)
def test_no_reply_makes_a_parser_do_anything_but_read_or_refuse(reader, text):
    with contextlib.suppress(ValueError):
        READERS[reader](text)
