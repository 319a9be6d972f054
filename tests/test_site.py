"""The site: built without a warning and without the network, it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT / "docs") for path in ROOT.glob("docs/**/*.md"))
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nothing answers there


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | NO_NETWORK | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, re.findall(r"^(?:WARNING|ERROR).*", ended.stderr, re.MULTILINE)) == (0, [])
    return folder


def test_every_page_is_there_with_its_title(site):
    for page in PAGES:
        built = site / str(page).replace("README.md", "index.md").replace(".md", ".html")
        title = re.match(r"# (.+)", (ROOT / "docs" / page).read_text(encoding="utf-8"))[1]
        assert title in re.sub(r"<[^>]+>", "", built.read_text(encoding="utf-8")), page


class Loads(HTMLParser):
    """The addresses that a page loads by itself, as opposed to links that a reader may follow."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data") or (name == "href" and tag == "link"):
                self.addresses.append(value or "")


def test_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Loads(path.read_text(encoding="utf-8")).addresses for path in site.rglob("*.html")}
    assert [(path.name, address) for path in pages for address in pages[path] if "//" in address] == []
    local = [(path, address.partition("?")[0]) for path in pages for address in pages[path] if path.name != "404.html"]
    assert [(path.name, address) for path, address in local if not (path.parent / address).is_file()] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"@import|url\(\"?(?:https?:)?//[^)]*", styles) == []


def test_public_names_have_their_docstrings(site):
    page = (site / "api/reward_models.html").read_text(encoding="utf-8")
    assert all(f'id="reward_models.{name}"' in page for name in ("load", "Prompt", "RewardModel", "Scores", "Card"))
    assert "A request for an image." in page


def test_the_search_has_the_pages_and_needs_no_server(site):
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index")
    assert '"location":"methods/flow_grpo.html"' in index
    assert "javascripts/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_what_a_block_needs_is_its_title(site):
    assert ">needs a GPU</span>" in (site / "gpu.html").read_text(encoding="utf-8")
