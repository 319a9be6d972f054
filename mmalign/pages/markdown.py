"""Markdown pages. Every value of a template is escaped: a prompt or a name stays text in a sentence and in a table."""

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MARKUP = re.compile(r"[&<>\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word marks nothing


def escaped(value: object) -> str:
    """A value as text of one line. Numeric references, unlike backslashes, mean the same to every reader, also in HTML,
    tables and formulas."""
    if isinstance(value, Markup):
        return value
    return MARKUP.sub(lambda mark: f"&#{ord(mark[0])};", " ".join(str(value).split()))


def fenced(text: str, language: str) -> Markup:
    """A block of code, which ends with a longer row of backticks than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def render(template: str, **values: object) -> str:
    """The text that a template of this package makes of `values`."""
    return TEMPLATES.get_template(template).render(values)


TEMPLATES = Environment(
    loader=PackageLoader("mmalign", "pages"),
    finalize=escaped,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"fenced": fenced}
