"""Tests of reading a score: one number on its scale, in any wrapping; anything else is refused, and quickly."""

import contextlib
import math
import re
import time

import hypothesis
import pytest
from corpus.replies import ENDLESS, UNCLEAR, WRAPPINGS
from hypothesis import strategies as st
from judge_texts import READERS

from reward_models import limits
from reward_models.vlm import replies
from reward_models.vlm.scales import WORDS, Scale

FOUR = Scale(1, 4, optional=True)
OTHERS = "2. Visual Quality: 4\n3. Text Rendering: N/A\n4. Image Faithfulness: 1"
FORMS = [  # a reply with one score, the others fixed, and the end of its scale
    ("critique, headings", f"1. Text Faithfulness:\n## Score: {{}}\n{OTHERS}", 4),
    ("critique, inline", f"1. Text Faithfulness: {{}}\n{OTHERS}", 4),
    ("unified 1", "Final Score: {}", 5),
    ("critique, note", f"1. Text Faithfulness (1-4):\n## Score (1-4): {{}}\n{OTHERS}", 4),
    ("critique, next line", f"1. Text Faithfulness\n**Score**\n{{}}\n{OTHERS}", 4),
    ("critique, table", f"| Text Faithfulness | {{}} |\n{OTHERS}", 4),
    ("unified 2", "Alignment Score (1-5): {}\nCoherence: 4\nStyle: 2", 5),
    ("overall", "Score: {}\nReason: so", 1),
]


def first_score(name, text):
    result = READERS[name.partition(",")[0]](text)
    if name.startswith("critique"):
        return result.scores["faithfulness"]
    return result[0] if isinstance(result, tuple) else next(iter(result.values()))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("number", ["3.5", "1", "4", "2.25", "4.0", "3,5"])
def test_a_number_in_any_wrapping_is_itself(wrapping, number):
    assert FOUR.read(wrapping.format(n=number, high=4)) == float(number.replace(",", "."))


@pytest.mark.parametrize("wrapping", [item for item in WRAPPINGS if ": " not in item])
@pytest.mark.parametrize(("name", "form", "high"), FORMS)
def test_every_parser_reads_a_number_in_any_wrapping(wrapping, name, form, high):
    number = {1: "0.5", 4: "3.5", 5: "3.5"}[high]
    assert first_score(name, form.format(wrapping.format(n=number, high=high))) == float(number)


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_is_not_one_number_on_the_scale_is_refused(text):
    with pytest.raises(ValueError, match=r"the score is") as error:
        FOUR.read(text)
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError):  # noqa: PT011
        first_score("critique, headings", FORMS[0][1].format(text))
    with pytest.raises(ValueError):  # noqa: PT011
        first_score("critique, inline", FORMS[1][1].format(text))


@pytest.mark.parametrize("value", [True, False, [3], {"score": 3}, math.nan, math.inf, -math.inf, 0, 5, 10**30, 1e12])
def test_values_of_json_that_are_no_scores(value):
    with pytest.raises(ValueError, match="the score is"):
        FOUR.read(value)


def test_words_of_numbers_and_none_at_all():
    assert [FOUR.read(word) for word in ("one", "Two", "THREE.", "**four**")] == [1, 2, 3, 4]
    assert [FOUR.read(text) for text in ("N/A", "n/a", "NA", "N / A (no text)", "not applicable", "None.", None)] == [
        None
    ] * 7
    with pytest.raises(ValueError, match="a number from 1 to 4 is needed"):
        Scale(1, 4).read("N/A")


def test_half_a_point_beyond_is_clamped_where_a_scale_allows_it():
    wide = Scale(1, 4, beyond=0.5)
    assert [wide.read(text) for text in ("4.2", "0.8", 4.5)] == [4, 1, 4]
    for text in ("4.2", 0.8):
        with pytest.raises(ValueError, match="the scale is 1 to 4"):
            FOUR.read(text)
    with pytest.raises(ValueError, match=re.escape("the score is 4.6; the scale is 1 to 4")):
        wide.read("4.6")


@hypothesis.given(
    st.decimals(1, 4, places=2), st.sampled_from(WRAPPINGS), st.sampled_from(["", "**", "`", '"', "*"]), st.booleans()
)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_wrappings_of_wrappings(number, wrapping, mark, comma):
    written = str(number).replace(".", ",") if comma else str(number)
    assert FOUR.read(f"{mark}{wrapping.format(n=written, high=4)}{mark}") == float(number)


@hypothesis.given(st.text(max_size=30), st.text("0123456789.,-+/%~ ()[]oeTNA*", max_size=12))
@hypothesis.settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_a_score_that_is_read_stands_in_the_text(noise, figures):
    """Whatever is read is a number that the text spells out, digit for digit, or a word for one."""
    for text in (noise, figures, noise + figures):
        try:
            score = FOUR.read(text)
        except ValueError:
            continue
        plain = text.replace(",", ".").lower()
        spelt = [float(digits) for digits in re.findall(r"\d*\.?\d+", plain) if len(digits) < 20]
        assert score is None or score in spelt or any(word in plain for word in WORDS)


def seconds(read, text):
    """Of the processor."""
    began = time.process_time()
    with contextlib.suppress(ValueError):
        read(text)
    return time.process_time() - began


@pytest.mark.parametrize("piece", ENDLESS)
def test_no_reply_takes_a_reader_long(piece):
    """Four times the text may take eight times as long; a look at every pair of places would take sixteen. What is over
    in a tenth of a second is not compared."""
    for name, read in READERS.items():
        for prefix in ("", "1. Text Faithfulness:\n## Score: 3", '{"score": '):
            short, long = (prefix + piece * (size // len(piece)) for size in (limits.REPLY // 64, limits.REPLY // 16))
            if (taken := seconds(read, long)) > 0.1:
                least = min(seconds(read, long) for _ in range(3))
                assert least < 8 * min(seconds(read, short) for _ in range(3)), (name, prefix, taken)


def test_a_reply_beyond_the_limit_is_not_read():
    text = "Score: 0.5\n" + "x" * limits.REPLY
    for read in READERS.values():
        with pytest.raises(ValueError, match=f"the reply has {len(text)} characters; at most {limits.REPLY} are read"):
            read(text)


def test_half_a_surrogate_pair_is_replaced_where_a_reply_becomes_rows():
    assert replies.printable("a\ud800b") == "a?b"


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        # a heading without a score is not given the number of the next
        (
            "critique",
            "1. Text Faithfulness:\n## Score:\n2. Visual Quality:\n## Score: 3\n3. Image Faithfulness: 1\n4. Text Rendering: N/A",
        ),
        (
            "critique",
            "1. Text Faithfulness:\n## Score (1-10): 3\n2. Visual Quality: 4\n3. Image Faithfulness: 1\n4. Text Rendering: N/A",
        ),
        (
            "critique",
            "1. Text Faithfulness (%): 3\n2. Visual Quality: 4\n3. Image Faithfulness: 1\n4. Text Rendering: N/A",
        ),
        ("critique", '{"faithfulness": 3, "faithfulness": 4, "quality": 3, "preservation": 1, "text": null}'),
        (
            "critique",
            '{"faithfulness": 3, "quality": 3, "preservation": 1, "text": null} {"faithfulness": 4, "quality": 3, "preservation": 1, "text": null}',
        ),
        ("unified 2", "Alignment Score (1-10): 4\nCoherence Score (1-10): 4\nStyle Score (1-10): 4"),
        ("unified 1", "Final Score (percent): 4"),
        ("overall", '{"score": 0.1} {"score": 0.9}'),
        ("overall", '{"score": 0.1, "score": 0.9}'),
        ("overall", '{"score": 0.1, "reward": 0.9}'),
        ("overall", "Score - 0.3"),
        ("overall", "Score: 0.5²"),
        ("places", '[{"box": [0, 0, 4, 4], "score": 1}] [{"box": [0, 0, 4, 4], "score": -1}]'),
        ("places", "Region 1:\nBox: [1_0, 0, 2e1, 20]\nScore: 1"),
        ("places by number", '[{"region": 1, "score": 1}]'),
        ("places by number", '[{"region": 1, "score": 1}, {"region": 1, "score": -1}]'),
        ("discrepancies", '{"errors": []} {"errors": [{"severity": 3}]}'),
        ("verdicts", '{"1": 0.9, "2": true, "3": true}'),
        ("verdicts", '{"1": 1.5, "2": true, "3": true}'),
        ("verdicts", '{"1": "Yes, no", "2": true, "3": true}'),
        ("verdicts", '[{"id": true, "answer": true}, {"id": 2, "answer": true}, {"id": 3, "answer": true}]'),
        ("pair", "Answer: 1.5"),
        ("pair", "Answer: 1, 2"),
        ("pair", "Answer: Image 1 (no, Image 2)"),
        ("pair", "Answer: Image 1 and 2"),
    ],
)
def test_replies_that_are_unclear_elsewhere_than_in_a_number(reader, text):
    with pytest.raises(ValueError):  # noqa: PT011
        READERS[reader](text)


def test_the_same_answer_twice_is_one_answer():
    row = '{"faithfulness": 3, "quality": 3, "preservation": 1, "text": null}'
    assert READERS["critique"](f"{row}\n{row}").scores["quality"] == 3
    assert READERS["overall"]('{"score": 0.5, "reward": 0.5} {"score": 0.5}')[0] == 0.5
    assert READERS["overall"]("<score>0.5</score>")[0] == 0.5
    assert READERS["overall"]("| Score | 0.5 |")[0] == 0.5
