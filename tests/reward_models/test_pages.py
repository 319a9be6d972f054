"""Tests of HTML pages: values are escaped, addresses are quoted, and nothing is silently empty."""

import os
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from mmalign import pages as run_pages
from reward_models import pages
from reward_models.tools import gallery

FOLDERS = [Path(package.__file__).parent for package in (pages, run_pages)]


def test_only_the_curves_are_inserted_without_escaping():
    """They are an SVG from matplotlib. A constant such as "<br>" is not a value."""
    templates = [path.read_text() for folder in FOLDERS for path in folder.glob("*.html")]
    assert templates
    unescaped = re.findall(r"(\S+) *\| *safe", "".join(templates))
    assert [value for value in unescaped if not value.startswith('"')] == ["curves"]
    assert not [text for text in templates if "autoescape" in text]


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        pages.render("base.html", command="mmalign score")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("a b.png", "a%20b.png"),
        ("a#b?c%d.png", "a%23b%3Fc%25d.png"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("\"'><b>.png", "%22%27%3E%3Cb%3E.png"),
        ("猫.png", "%E7%8C%AB.png"),
        (os.fsdecode(b"\xff.png"), "%FF.png"),
        ("below/a.png", "below/a.png"),
    ],
)
def test_addresses_are_quoted(tmp_path, name, address):
    assert pages.url(name) == address
    assert pages.relative_url(tmp_path / name, tmp_path / "page.html") == address
    assert pages.relative_url(tmp_path / name, tmp_path / "pages" / "page.html") == f"../{address}"


def test_a_page_names_the_command_that_wrote_it(tmp_path):
    summary = {"failed": 0, "scores": {"a": {"count": 0}}}
    gallery.write([], summary, tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert gallery.ours(text)
    assert pages.written_by("mmalign score", text)
    assert not pages.written_by("mmalign refine", text)
    assert not gallery.ours("<p>" * 100 + text)  # a page that quotes one of ours
