"""Tests of `ocr`: the text to be written, reading order, credit of words, and real pictures."""

import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from reward_models import Prompt
from reward_models.images import from_pil
from reward_models.scorers.ocr import Line, Ocr, credited, in_order, matched, wanted, words

WORDS = ["OPEN", "coffee", "Quartz", "river bank"]
GRID = 8


@pytest.fixture(scope="module")
def ocr():
    return Ocr(grid=GRID)


def page(*parts: tuple[str, int, int, int], side: int = 256) -> torch.Tensor:
    """A white page with black text; each part is a text, its left and top in px, and the size of the font."""
    image = Image.new("RGB", (side, side), "white")
    for text, left, top, size in parts:
        ImageDraw.Draw(image).text((left, top), text, fill="black", font=ImageFont.load_default(size=size))
    return from_pil([image])


def asks(text: str) -> Prompt:
    return Prompt(f'a shop sign that says "{text}", at night')


@pytest.mark.parametrize(
    ("text", "wants", "expected"),
    [
        ('a sign that says "Open 24h" and "never"', {}, "open24h"),
        ("a sign that says “Open 24h”", {}, "open24h"),
        ("ein Schild „Offen“ an der Tür", {}, "offen"),
        ('a sign that says "Open"', {"tag": "text", "text": "H O"}, "ho"),
        ("no quotes", {"text": "ＯＫ\tﬁne"}, "okfine"),
    ],
)
def test_what_should_be_written(text, wants, expected):
    assert "".join(wanted(Prompt(text, wants))) == expected


@pytest.mark.parametrize(
    ("text", "wants", "says"),
    [
        ("a red fox", {}, "the prompt requests no text"),
        ("the dog's 'bone'", {"tag": "text"}, "the prompt requests no text"),
        ('a single " mark', {}, "the prompt requests no text"),
        ('an empty "" sign, then "this"', {}, "the requested text is ''"),
        ("a sign", {"text": " \n"}, "at least one letter"),
        ("a sign", {"text": ["a", "b"]}, "at least one letter"),
    ],
)
def test_a_prompt_that_does_not_say(text, wants, says):
    with pytest.raises(ValueError, match=says):
        wanted(Prompt(text, wants))


@pytest.mark.parametrize(
    ("target", "read", "expected"),
    [
        ("open", "open", 1),
        ("open", "weareopentoday", 1),
        ("open", "opne", 0.5),
        ("open", "opan", 0.75),
        ("open", "opn", 0.75),
        ("open", "", 0),
        ("open", "somethingelseentirely", 0),  # 21 letters away, but never less than nothing
    ],
)
def test_match_of_known_strings(target, read, expected):
    assert matched(target, read) == expected


def test_reading_order_is_by_row_then_by_column():
    def line(text, left, middle):
        return Line(text, (left, middle - 10, left + 40, middle + 10))

    slanted = [line("d", 0, 80), line("b", 50, 22), line("e", 50, 71), line("c", 100, 28), line("a", 0, 20)]
    assert "".join(line.text for line in in_order(slanted)) == "abcde"
    assert in_order([]) == []


def test_words_share_a_box_by_their_letters():
    assert words(Line("ab  cde", (10, 0, 80, 5))) == [Line("ab", (10, 0, 30, 5)), Line("cde", (50, 0, 80, 5))]
    upright = (0, 0, 10, 90)
    assert words(Line("ab cde", upright)) == [Line("ab", upright), Line("cde", upright)]


def test_words_are_credited_by_their_letters_of_the_target():
    lines = [Line("BIG SALE", (0, 0, 80, 10)), Line("tooday xyz", (0, 20, 100, 30))]
    regions = credited(["sale", "today"], lines)
    assert {region.reason: region.credit for region in regions} == pytest.approx(
        {"BIG": -1, "SALE": 1, "tooday": 2 * 5 / 6 - 1, "xyz": -1}
    )
    assert [region.label for region in regions] == ["", "1 sale", "2 today", ""]
    assert credited(["sale"], []) == []


def test_rendered_words_are_read(ocr):
    pages = {(word, size): page((word, 12, 100, size)) for word in WORDS for size in (12, 20, 36)}
    scores = ocr(torch.cat(list(pages.values())), [asks(word) for word, _ in pages])
    assert not scores.failures
    assert scores.column("match").mean() >= 0.95
    assert scores.column("exact").mean() >= 0.9


def test_misspelt_surplus_and_missing_text(ocr):
    images = torch.cat(
        [
            page(("COFFEE", 40, 100, 36)),
            page(("COFPEE", 40, 100, 36)),
            page(("COFFEE", 40, 40, 36), ("WAREHOUSE", 20, 180, 32)),
            page(),
        ]
    )
    scores = ocr(images, [asks("Coffee")] * 4)
    assert scores.column("match").tolist() == pytest.approx([1, 5 / 6, 1, 0])
    assert scores.column("exact").tolist() == [1, 0, 0, 0]
    assert scores.critiques == ("right", "reads 'COFPEE'", "reads 'COFFEE WAREHOUSE'", "nothing to read")
    assert not scores.failures
    assert scores.regions.shape == (4, GRID, GRID)
    right, _, surplus, blank = scores.regions
    assert set(right[right.isfinite()].tolist()) == {1}
    assert (surplus[: GRID // 2].nan_to_num() >= 0).all()
    assert surplus[1, 2] == 1
    assert surplus[6, 3] < -0.5
    assert blank.isnan().all()


def test_two_lines_are_read_top_to_bottom(ocr):
    scores = ocr(page(("GOOD", 60, 40, 40), ("NIGHT", 40, 150, 40)), [asks("good night")])
    assert scores.column("exact").tolist() == [1]


def test_each_image_is_scored_alone_and_in_order(ocr):
    images = torch.cat([page((word, 12, 90, 30)) for word in WORDS[:3]])
    prompts = [asks(word) for word in ("OPEN", "toffee", "Quarts")]
    together = ocr(images, prompts).values
    assert together[:, 0].tolist() == pytest.approx([1, 5 / 6, 5 / 6])
    torch.testing.assert_close(ocr(images[1:2], prompts[1:2]).values, together[1:2], rtol=0, atol=0)
    order = [2, 0, 1]
    assert torch.equal(ocr(images[order], [prompts[i] for i in order]).values, together[order])


def test_an_image_that_cannot_be_scored_fails_alone(ocr):
    images = page(("OPEN", 40, 100, 40)).repeat(3, 1, 1, 1)
    images[1, 0, 0, 0] = torch.nan
    scores = ocr(images, [asks("open"), asks("open"), Prompt("a red fox")])
    assert scores.column("match").nan_to_num(-1).tolist() == [1, -1, -1]
    assert list(scores.failures) == [1, 2]
    assert "the prompt requests no text" in scores.failures[2]


def test_an_engine_that_fails_is_a_failure_not_a_score():
    class Breaks(Exception):
        pass

    def breaks(image, **stages):
        raise Breaks("Traceback ...\nout of order")

    ocr = Ocr()
    ocr.engine = breaks
    scores = ocr(page(), [asks("open")])
    assert scores.values.isnan().all()
    assert scores.failures == {0: "the engine failed: out of order"}


def test_the_engine_sees_colours_as_opencv_has_them():
    class Sees:
        txts = None

        def __call__(self, image, **stages):
            self.image = image
            return self

    ocr = Ocr()
    ocr.engine = Sees()
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    assert ocr(red, [asks("open")]).column("match").item() == 0
    assert ocr.engine.image.dtype == np.uint8
    assert ocr.engine.image[3, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_of_any_shape_are_scored(ocr, level):
    scores = ocr(torch.full((1, 3, 24, 40), level), [asks("open")])
    assert scores.values.tolist() == [[0, 0]]
    assert not scores.failures


def test_text_below_the_confidence_is_not_read():
    image = page(("OPEN", 40, 100, 40))
    assert Ocr(confidence=1)(image, [asks("open")]).values.tolist() == [[0, 0]]


def test_it_is_quiet():
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("RapidOCR").addHandler(handler)
    try:
        Ocr().read(np.full((64, 64, 3), 255, np.uint8))
    finally:
        logging.getLogger("RapidOCR").removeHandler(handler)
    assert not logged


def test_the_card_names_the_models(ocr, tmp_path):
    import rapidocr

    models = [f"{rapidocr.__path__[0]}/models/{name}.onnx" for name in ocr.card.model.split()]
    same = Ocr(detector=models[0], reader=models[1])
    assert same.card.checkpoint == ocr.card.checkpoint
    assert len(ocr.card.checkpoint) == 64
    assert (ocr.card.low, ocr.card.high, ocr.card.comparable_across_prompts) == (0, 1, True)
    assert Ocr(confidence=0.6).card.version != ocr.card.version


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"confidence": 1.5}, "confidence is 0 to 1, not 1.5"),
        ({"reader": "nowhere.onnx"}, r"ocr: PP-OCRv6_det_small\.onnx and nowhere\.onnx could not be loaded"),
        ({"reader": __file__}, r"ocr: .*test_ocr\.py could not be loaded"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        Ocr(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_reported_with_its_remedy(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"ocr: .*{package}.*pip install 'mmalign\[ocr\]'"):
        Ocr()
