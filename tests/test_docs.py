"""The pages: their links and file names lead to files, and the indexes list every page, module and paper."""

import re
from pathlib import Path

import config_page
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/*/README.md")])
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")  # arXiv
CODE = re.compile(r"`((?:mmalign|reward_models|scripts|tests|configs|assets|docs)/[\w./*-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    assert [name for name in CODE.findall(text) if not list(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize("folder", ["docs", "docs/api", "docs/methods"])
def test_the_index_lists_every_page(folder):
    index = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    pages = sorted(page.name for page in (ROOT / folder).glob("*.md") if page.name != "README.md")
    assert [page for page in pages if f"({page})" not in index] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_paper_is_in_the_index_of_papers():
    index = PAPER.findall((ROOT / "docs/papers.md").read_text(encoding="utf-8"))
    roots = ("mmalign/**/*.py", "reward_models/**/*.py", "configs/*.yaml", "docs/**/*.md", "*.md")
    texts = [path.read_text(encoding="utf-8") for root in roots for path in ROOT.glob(root)]
    assert sorted({paper for text in texts for paper in PAPER.findall(text)} - {*index}) == []


def test_every_paper_says_what_was_measured():
    """A figure with a link to the page that has it, or that there is none."""
    text = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    tables = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in tables if row[0] != "paper"]
    assert {row[-1] for row in tables if row[0] == "paper"} == {"measured"}
    assert len(rows) > 70
    assert [row[0] for row in rows if len(row) != 6 or not (row[5] == "not run" or "](" in row[5])] == []


def test_the_figures_of_papers_are_on_the_pages_that_they_link_to():
    text = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    for line in filter(lambda line: line.startswith("| "), text.splitlines()):
        for words, page in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)", line.split("|")[-2]):
            there = (ROOT / "docs" / page).read_text(encoding="utf-8")
            assert [number for number in re.findall(r"\d\.\d+", words) if number not in there] == [], words


def test_the_layout_lists_every_module_and_package():
    page = (ROOT / "docs/code.md").read_text(encoding="utf-8")
    tree = re.search(r"^## Layout\n\n```text\n(.*?)```", page, re.M | re.S)
    listed, package = set(), ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        package = package if line.startswith("  ") else name
        listed.add(package + name if line.startswith("  ") else name)
    assert [name for name in sorted(listed) if not (ROOT / name).exists()] == []
    modules = {
        str(path.relative_to(ROOT)) for root in ("mmalign", "reward_models") for path in (ROOT / root).glob("*.py")
    }
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for root in ("mmalign", "reward_models")
        for path in (ROOT / root).glob("*/*.py")
    }
    assert sorted(name for name in modules | packages if "__" not in name and name not in listed) == []


def test_the_page_of_settings_is_that_of_the_code():
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == config_page.page()
