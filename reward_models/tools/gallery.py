"""A gallery of scored images: one page, best first, that sorts by any score.

The page links to the image files. An image that a browser would show differently from what was scored (animated,
turned, in print colours) is embedded as a small copy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_models import files, pages
from reward_models.images import for_page

COMMAND = "mmalign score"
STATISTICS = ("count", "missing", "mean", "std", "min", "max", "best", "agrees")


def write(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], folder: Path, page: Path) -> None:
    """Write `page`. `folder` is the folder that the rows' image names start from."""
    scores = summary["scores"]
    first = next(iter(scores))
    rows = sorted(rows, key=lambda row: _rank(row["scores"][first]), reverse=True)
    used = [name for name in STATISTICS if any(name in row for row in scores.values())]
    text = pages.render(
        "gallery.html",
        command=COMMAND,
        title=f"{len(rows)} images, {summary['failed']} with failures",
        table_headings=["score", *used],
        table_rows=[[name, *(f"{row[c]:.4g}" if c in row else "" for c in used)] for name, row in scores.items()],
        scores=list(scores),
        scorers=list(dict.fromkeys(name for row in rows for name in row.get("places", {}))),
        rows=[{**row, "source": _source(folder / row["image"], page)} for row in rows],
    )
    files.write(page, text)


def _rank(value: float | None) -> float:
    return float("-inf") if value is None else value


def _source(image: Path, page: Path) -> str:
    return for_page(image) or pages.relative_url(image, page)


def ours(text: str) -> bool:
    """Whether a text is a page that `write` wrote."""
    return pages.written_by(COMMAND, text)
