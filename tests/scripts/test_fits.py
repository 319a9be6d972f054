"""The programs behind the figures of reward models: which pairs they fit to, and the table of heads for kinds."""

from collections import Counter
from dataclasses import replace

import compare_fits
import typed_fits
from drawn_pairs import drawn_pairs

from reward_models import load
from reward_models.shapes_world import KINDS
from reward_models.types import Prompt


def test_pairs_are_spread_evenly_over_captions():
    counts = {"a": 1, "b": 4, "c": 9, "d": 9}
    texts = [text for text, count in counts.items() for _ in range(count)]
    pairs = [replace(pair, prompt=Prompt(text)) for pair, text in zip(drawn_pairs(23), texts, strict=True)]
    chosen = compare_fits.even(pairs, 16)
    assert Counter(pair.prompt.text for pair in chosen) == {"a": 1, "b": 4, "c": 6, "d": 5}
    assert len({id(pair) for pair in chosen}) == 16
    assert chosen == compare_fits.even(pairs, 16)
    assert len(compare_fits.even(pairs, 100)) == 23


def test_the_table_has_the_accuracy_of_each_head_on_each_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(typed_fits, "RECIPES", {"linear": {"method": "clip_head", "epochs": 2}})
    typed_fits.main(tmp_path, pairs=10, measured=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 pairs to fit to, 40 of ")
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["head", "---"]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "`clip.cosine`.cosine",
        *(f"linear.{name}" for name in ("score", *KINDS)),
    ]
    assert all(0 <= float(cell) <= 1 for line in lines[4:] for cell in line.split("|")[2:-1])
    assert load("fitted", folder=str(tmp_path / "0")).names == ("score", *KINDS)
