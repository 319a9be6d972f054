"""The teacher of the embedded world: its notes, and that it keeps the pairs whose images differ."""

import numpy as np
from drawn_pairs import drawn_pairs
from parrot_world import described, notes, serving

from reward_models import Prompt, load
from reward_models.files import parsed
from reward_models.scorers.shapes import find_blobs
from reward_models.shapes_world import draw
from reward_models.training import parrot
from reward_models.training.parrot import samples
from reward_models.verdicts import Blob
from reward_models.worlds import caption, thing


def test_objects_are_described_from_left_to_right():
    blobs = [Blob("circle", "red", (20, 4, 30, 14)), Blob("cross", "blue", (2, 16, 18, 32))]
    assert described(blobs) == "large blue cross at 2 6; small red circle at 6 2"
    assert described([]) == "nothing"


def test_notes_are_those_of_the_verifier():
    wants = {"tag": "color_attr", "include": [thing("circle", "red"), thing("cross", "blue")]}
    drawn = draw(wants | {"include": [thing("circle", "red"), thing("square", "green")]}, np.random.default_rng(0))
    written = notes(Prompt(caption(wants), wants), find_blobs(drawn[None])[0])
    assert written["faithfulness"]["score"] == 2.5, "one of two objects is right"
    assert "no cross" in written["faithfulness"]["justification"]
    assert written["quality"]["score"] == 4
    assert written["text"]["score"] is None


def test_the_teacher_explains_pairs_over_http(tmp_path):
    pairs, shapes = drawn_pairs(6), load("shapes")
    with serving() as url:
        by = parrot.teacher("verifier", url, candidates=1, concurrency=2)
        summary = parrot.rationalise(pairs, by, tmp_path)
    rows = [parsed(line) for line in (tmp_path / "rationales.jsonl").read_text().splitlines()]
    for row, pair in zip(rows, pairs, strict=True):
        a, b = (shapes(side.read(), [pair.prompt]).column("partial").item() for side in (pair.a, pair.b))
        assert row["kept"] == ((a > b) == (pair.preference > 0.5) and a != b)
    assert summary["kept"] == len(samples.read(tmp_path)) / 2 == 6
