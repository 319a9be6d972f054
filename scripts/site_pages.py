"""A hook of MkDocs: the site is `docs/` and a few files of the repository's root, at the same relative places.

A link from a page of `docs/` to the root loses one `../`, one from the root into `docs/` loses `docs/`. What a block of
code needs (`<!-- needs: ... -->`) becomes its title.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "assets/*/README.md", "assets/figures/*.png")
NEEDS = re.compile(r"^( *)<!-- needs: (.+?) -->\n\1```(\w*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    for pattern in OF_THE_ROOT:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    path = Path(page.file.abs_src_path)
    if path.is_relative_to(config.docs_dir):
        up = "../" * len(path.relative_to(config.docs_dir).parents)
        markdown = markdown.replace(f"]({up}", f"]({up.removeprefix('../')}")
    else:
        markdown = markdown.replace("](docs/", "](")  # from the root; no card of assets/ has such a link
    return NEEDS.sub(r'\1```\3 title="needs \2"', markdown)
