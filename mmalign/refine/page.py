"""A page of refined prompts, their rounds side by side. It shows the files where they lie; it copies none."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from reward_models import files, overlay as heat
from reward_models.allowlist import inside

MARK = "<meta name=generator content='mmalign refine'>"
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:1.5em;color:#222} h1{font-size:1.3em} select,input{font:inherit}
table{border-collapse:collapse;margin:.6em 0 1.2em}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #eee}
section{border-top:1px solid #ddd;padding:10px 0} h2{font-size:1em;margin:0 0 .4em;font-weight:600}
h2 small{font-weight:400;color:#666} .rounds{display:flex;gap:12px;overflow-x:auto}
figure{margin:0;background:#f6f6f6;border-radius:6px;padding:8px;font-size:12px;width:176px;flex:none;
overflow-wrap:anywhere;border:2px solid transparent} figure.best{border-color:#1a9641;background:#eef7f0}
.picture{position:relative} .heat{position:absolute;inset:0;width:100%;height:100%} .bare .heat{display:none}
img{width:100%;aspect-ratio:1;object-fit:contain;background:#fff;display:block} img.small{image-rendering:pixelated}
figcaption p{margin:.3em 0} .why{color:#b3261e} .said{color:#666;font-style:italic} .move{font-weight:600}
"""
SCRIPT = """
for (const img of document.images) {
  const small = () => { if (img.naturalWidth && img.naturalWidth < 128) img.className = 'small'; };
  img.onload = small; small();
}
const which = document.getElementById('which'), boxes = document.getElementById('boxes');
const show = () => {
  document.body.classList.toggle('bare', !boxes.checked);
  for (const own of document.querySelectorAll('section'))
    own.hidden = which.value !== 'all' && !own.classList.contains(which.value);
};
which.onchange = boxes.onchange = show; show();
"""


def write(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], by: str, folder: Path, page: Path) -> None:
    """`rows` and `summary` are those of `mmalign.refine.trace`; the images lie below `folder`."""
    first, best = (f"{value:.3f}" if value is not None else "none" for value in (summary["first"], summary["best"]))
    table = {
        f"{by}, first image": first,
        f"{by}, image kept": best,
        "prompts with a better image": f"{summary['gained']} of {summary['prompts']}",
        "images": summary["images"],
        "network forwards": summary["forwards"],
        "ended": ", ".join(f"{why} {count}" for why, count in summary["stopped"].items()),
    }
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(own))}</td></tr>" for name, own in table.items()
    )
    sections = "".join(_section(row, by, folder, page) for row in rows)
    files.write(
        page,
        f"<!doctype html><meta charset=utf-8>{MARK}<title>refined</title><style>{STYLE}</style>"
        f"<h1>{summary['prompts']} prompts refined</h1><table>{cells}</table>"
        "<p>Show <select id=which><option value=more>prompts with several images</option><option value=gained>prompts "
        "with a better image</option><option value=lost>prompts that are not done</option><option value=all>all prompts"
        "</option></select> <label><input type=checkbox id=boxes checked> where</label></p>"
        f"{sections}<script>{SCRIPT}</script>",
    )


def ours(text: str) -> bool:
    """Whether a text is a page that `write` wrote."""
    return MARK in text[:200]


def _section(row: Mapping[str, Any], by: str, folder: Path, page: Path) -> str:
    kinds = ["more"] if len(row["rounds"]) > 1 else []
    kinds += ["gained"] if row["best"] else []
    kinds += ["lost"] if row["stopped"] != "good" else []
    figures = "".join(_figure(row, number, by, folder, page) for number in range(len(row["rounds"])))
    return (
        f'<section class="{" ".join(kinds)}"><h2>{html.escape(row["prompt"])} <small>{html.escape(row["stopped"])}, '
        f"{row['forwards']:g} forwards</small></h2><div class=rounds>{figures}</div></section>"
    )


def _figure(row: Mapping[str, Any], number: int, by: str, folder: Path, page: Path) -> str:
    own = row["rounds"][number]
    source = quote(os.path.relpath(inside(folder, own["image"]), page.parent).encode("utf-8", "surrogateescape"))
    overlay = heat.over(own["places"]) if own["places"]["boxes"] else ""
    attempt, value = own["attempt"], own["scores"][by]
    move = " + ".join(own["moves"]) if number else ("first image" if attempt else "as it was")
    asked = f"<p>{html.escape(attempt['request'])}</p>" if attempt and attempt["request"] != row["prompt"] else ""
    others = ", ".join(f"{name} {v:.2f}" for name, v in own["scores"].items() if v is not None and name != by)
    said = f"<p class=said>{html.escape(own['critique'])}</p>" if own["critique"] else ""
    why = f"<p class=why>{html.escape(own['failure'])}</p>" if own["failure"] else ""
    return (
        f"<figure{' class=best' if number == row['best'] else ''}><div class=picture>"
        f'<img loading=lazy src="{html.escape(source, quote=True)}" alt="">{overlay}</div><figcaption>'
        f"<p><span class=move>{html.escape(move)}</span></p>{asked}<p>{html.escape(by)} "
        f"{'none' if value is None else f'{value:.3g}'}<br>{html.escape(others)}</p>{said}{why}</figcaption></figure>"
    )
