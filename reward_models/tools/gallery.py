"""A page of scored images, best first, that sorts by any score. It shows the files where they lie; those that a
browser would show otherwise than they were scored (animated, turned, in colours of print) it shows as small copies."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from reward_models import files, overlay as heat
from reward_models.images import for_page

MARK = "<meta name=generator content='mmalign score'>"
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:1.5em;color:#222} h1{font-size:1.3em}
table{border-collapse:collapse;margin:.6em 0 1.2em}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left} select{font:inherit}
#grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:12px}
figure{margin:0;background:#f6f6f6;border-radius:6px;padding:8px;font-size:12px;overflow-wrap:anywhere}
.picture{position:relative} .heat{position:absolute;inset:0;width:100%;height:100%;display:none}
img{width:100%;aspect-ratio:1;object-fit:contain;image-rendering:auto;background:#fff;display:block}
img.small{image-rendering:pixelated}
figcaption p{margin:.3em 0} .why{color:#b3261e} .said{color:#666;font-style:italic} code{font-size:11px;color:#666}
"""
SORT = """
const grid = document.getElementById('grid'), by = document.getElementById('by');
const value = (card) => { const v = JSON.parse(card.dataset.scores)[by.value]; return v === null ? -Infinity : v; };
by.onchange = () => grid.append(...[...grid.children].sort((a, b) => value(b) - value(a)));
const where = document.getElementById('where');
const show = () => document.querySelectorAll('.heat').forEach((own) => {
  own.style.display = own.dataset.scorer === where.value ? 'block' : 'none';
});
if (where) { where.onchange = show; show(); }
for (const img of document.images) img.onload = () => { if (img.naturalWidth < 128) img.className = 'small'; };
"""


def _card(row: Mapping[str, Any], where: Path, page: Path) -> str:
    picture = where / row["image"]
    name = os.path.relpath(picture, page.parent).encode("utf-8", "surrogateescape")
    source = for_page(picture) or quote(name)
    scores = "".join(
        f"<br>{html.escape(name)} {'none' if value is None else f'{value:.4g}'}"
        for name, value in row["scores"].items()
    )
    why = "".join(f"<p class=why>{html.escape(f'{name}: {reason}')}</p>" for name, reason in row["failures"].items())
    said = "".join(f"<p class=said>{html.escape(f'{name}: {text}')}</p>" for name, text in row["critiques"].items())
    said += "".join(
        f"<p class=said>{html.escape(f'{name} would ask for: {text}')}</p>"
        for name, text in row.get("requests", {}).items()
    )
    heats = "".join(heat.over(own, name) for name, own in row.get("places", {}).items())
    data = html.escape(json.dumps(row["scores"]), quote=True)
    return (
        f'<figure data-scores="{data}"><div class=picture><img loading=lazy src="{html.escape(source, quote=True)}" '
        f'alt="">{heats}</div>'
        f"<figcaption><p>{html.escape(row['prompt'] or '')}</p><code>{html.escape(row['image'])}{scores}</code>"
        f"{said}{why}</figcaption></figure>"
    )


def _table(summary: Mapping[str, Any]) -> str:
    columns = ("count", "missing", "mean", "std", "min", "max", "best", "agrees")
    used = [c for c in columns if any(c in own for own in summary["scores"].values())]
    head = "".join(f"<th>{name}</th>" for name in ("score", *used))
    body = ""
    for name, own in summary["scores"].items():
        cells = "".join(f"<td>{own[c]:.4g}</td>" if c in own else "<td></td>" for c in used)
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def write(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], where: Path, page: Path) -> None:
    """Write `page`. `where` is the folder that the rows' image names start from."""
    first = next(iter(summary["scores"]))

    def rank(row) -> float:
        return float("-inf") if row["scores"][first] is None else row["scores"][first]

    options = "".join(f"<option>{html.escape(name)}</option>" for name in summary["scores"])
    placed = dict.fromkeys(name for row in rows for name in row.get("places", {}))
    choice = "".join(f"<option>{html.escape(name)}</option>" for name in placed)
    where_select = f", show where: <select id=where>{choice}<option>none</option></select>" if placed else ""
    cards = "\n".join(_card(row, where, page) for row in sorted(rows, key=rank, reverse=True))
    files.write(
        page,
        f"<!doctype html><html lang=en><meta charset=utf-8>{MARK}<title>{len(rows)} images</title>"
        f"<style>{STYLE}</style>"
        f"<h1>{len(rows)} images, {summary['failed']} with a failure</h1>{_table(summary)}"
        f"<p>Best first by <select id=by>{options}</select>{where_select}</p>"
        f"<div id=grid>{cards}</div><script>{SORT}</script></html>",
    )


def ours(text: str) -> bool:
    """Whether a text is a page that `write` wrote."""
    return MARK in text[:200]
