"""Tests of the registry of scorers."""

import subprocess
import sys

import pytest
from tiny_scorers import settings

from reward_models import load
from reward_models.registry import SCORERS

MODULE = """
from reward_models import Card


class Mine:
    card = Card("mine")
    names = ("mine",)

    def __init__(self, weight, power=1):
        self.weight = weight

    def __call__(self, images, prompts):
        return None


def refuses():
    raise ValueError("not today")
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    (tmp_path / "own_scorers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMALIGN_ALLOW", "own_scorers, no_such_module")


@pytest.mark.parametrize("name", SCORERS)
def test_every_entry_loads_and_says_what_it_is(name, tmp_path):
    card = load(name, **settings(name, tmp_path)).card
    assert card.scorer == name
    assert str(card).startswith(f"{name}: ")
    assert "\n" not in str(card)


def test_settings_are_passed_on(my_module):
    assert load("jpeg_size", quality=50, direction="larger").quality == 50
    assert load("own_scorers:Mine", weight=3).weight == 3


def test_a_scorer_may_be_had_twice_under_other_names():
    rough = load("rough", scorer="jpeg_size", quality=20)
    assert (rough.quality, rough.card.scorer) == (20, "jpeg_size")


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("shape", {}, "near names: shapes"),
        ("qqq", {}, "near names: shapes, jpeg_size, clip"),
        ("jpeg_size", {"qualty": 3}, "'jpeg_size'.*'qualty'.*takes quality, direction"),
        ("jpeg_size", {"direction": "sideways"}, "'sideways'"),
        ("jpeg_size", {"quality": "high"}, "'jpeg_size': not with these quality: "),
        ("remote", {"url": "http://127.0.0.1:1", "scorers": "things"}, r"scorers is a list, \[things\], not 'things'"),
        ("vqa", {"model": "none", "answers": "No"}, r"answers is a list, \[No\], not 'No'"),
        ("clip", {"device": "abacus"}, "clip: .* could not be loaded: .* device string: abacus"),
        ("own_scorers:Mine", {}, "'own_scorers:Mine'.*'weight'"),
        ("own_scorers:Yours", {}, "'own_scorers:Yours'.*has no attribute 'Yours'"),
        ("own_scorers:refuses", {}, "not today"),
        ("no_such_module:Mine", {}, "no module named 'no_such_module'"),
    ],
)
def test_a_mistake_is_explained_in_one_line(my_module, name, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        load(name, **settings)
    assert "\n" not in str(error.value)


def test_importing_the_package_loads_no_scorer():
    heavy = "open_clip", "scipy", "PIL", "reward_models.scorers"
    code = f"import reward_models, sys; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
