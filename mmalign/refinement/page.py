"""A page of refined prompts with their rounds side by side. It links to the image files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.pages import render
from reward_models import files, pages
from reward_models.allowlist import inside

COMMAND = "mmalign refine"


def write(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], by: str, folder: Path, page: Path) -> None:
    """Write `page` from the `rows` and the `summary` of `mmalign.refinement.trace`; images lie below `folder`."""
    first, best = ("missing" if value is None else f"{value:.3f}" for value in (summary["first"], summary["best"]))
    table = {
        f"mean {by}, first image": first,
        f"mean {by}, best image": best,
        "prompts improved": f"{summary['gained']} of {summary['prompts']}",
        "images": summary["images"],
        "forward passes": summary["forwards"],
        "stopped": ", ".join(f"{reason} {count}" for reason, count in summary["stopped"].items()),
    }
    text = render(
        "refine.html",
        command=COMMAND,
        title=f"{summary['prompts']} prompts refined",
        table_rows=list(table.items()),
        by=by,
        rows=[{**row, "kinds": _kinds(row), "rounds": _rounds(row, folder, page)} for row in rows],
    )
    files.write(page, text)


def _kinds(row: Mapping[str, Any]) -> list[str]:
    """The filters of the page that show a row."""
    kinds = {"several": len(row["rounds"]) > 1, "improved": bool(row["best"]), "unsolved": row["stopped"] != "good"}
    return [kind for kind, holds in kinds.items() if holds]


def _rounds(row: Mapping[str, Any], folder: Path, page: Path) -> list[dict[str, Any]]:
    return [{**entry, "source": pages.relative_url(inside(folder, entry["image"]), page)} for entry in row["rounds"]]


def ours(text: str) -> bool:
    """Whether a text is a page that `write` wrote."""
    return pages.written_by(COMMAND, text)
