"""HTML pages: Jinja2 templates around one base page and one style sheet. Every value is escaped."""

import os
from pathlib import Path
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from reward_models import overlay


def environment(*packages: str) -> Environment:
    """The templates in the `pages` folders of these packages; of equal names, the first."""
    result = Environment(
        loader=ChoiceLoader([PackageLoader(package, "pages") for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters |= {"rectangles": overlay.rectangles}
    return result


def render(template: str, **values: object) -> str:
    """The page that a template of this package makes of `values`."""
    return TEMPLATES.get_template(template).render(values)


def url(path: str | Path) -> str:
    """A relative path, quoted as a URL. Bytes that are not UTF-8 keep their value."""
    return quote(str(path).encode("utf-8", "surrogateescape"))


def relative_url(file: Path, page: Path) -> str:
    """The address of a file in a page that lies at `page`."""
    return url(os.path.relpath(file, page.parent))


def written_by(command: str, text: str) -> bool:
    """Whether a text is a page that this command wrote, according to the `generator` in its head."""
    return f"<meta name=generator content='{command}'>" in text[:200]


TEMPLATES = environment("reward_models")
