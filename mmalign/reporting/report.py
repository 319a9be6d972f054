"""`report.html`: one self-contained page of what a run did. Pictures are chosen by position, not by score.

What a run's folder lacks, or what in it is damaged, is said on the page; the rest is shown.
"""

import base64
import html
import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from mmalign.evaluation.evaluate import paired
from mmalign.runs import reader as written
from mmalign.runs.reader import SIDES, Row, RunRecord
from reward_models import files, overlay as heat
from reward_models.allowlist import within
from reward_models.images import size_of

Source = Callable[[Path], str]  # the address of an image, for its `src`

BY_STEP = (
    "std", "gain", "gain_std", "balance", "ratio", "clipped_low", "clipped_high", "divergence", "kl"
)  # fmt: skip
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em} h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse} td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left} pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:13px}
svg{max-width:100%;height:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px}
.card{background:#f6f6f6;padding:8px;border-radius:6px;font-size:13px} .card p{margin:0 0 6px;min-height:2.6em}
.pair{display:flex;gap:6px} figure{margin:0;text-align:center;font-size:12px;color:#555}
.pair img{width:82px;height:82px;image-rendering:pixelated;border:3px solid #bbb;border-radius:3px}
.picture{position:relative} .heat{position:absolute;inset:3px;width:calc(100% - 6px);height:calc(100% - 6px)}
.sheet{max-width:100%}
.plain .heat{display:none} .walk{display:flex;gap:10px;flex-wrap:wrap} .walk figure{width:118px}
.walk img{width:112px;height:112px;image-rendering:pixelated;border:3px solid #bbb;border-radius:3px}
img{background:#fff}
.walk .picture{width:118px;height:118px}
.pair .picture{width:88px;height:88px} .pair img.good{border-color:#2a9d4a} .pair img.bad{border-color:#d1495b}
"""
SWITCH = """<p><label><input type=checkbox checked onchange="document.body.classList.toggle('plain', !this.checked)">
show where it was judged right or wrong</label></p>"""


def summary(run: Path) -> dict:
    """Before, after, mean rise and paired p-value of every score on the held-out prompts; and the alarms."""
    own = written.read(run)
    images, rises = _compared(own)
    return {"run": str(run), "images": images, "rises": rises, "alarms": own.alarms}


def _compared(own: RunRecord) -> tuple[int, dict[str, dict[str, float]]]:
    """How many images are scored on both sides, and by score what the sides have."""
    before, after = ({row["image"]: row for row in own.scores[side]} for side in SIDES)
    shown, rises = [image for image in before if image in after], {}
    for name in before[shown[0]]["scores"] if shown else ():
        a, b = (
            torch.tensor([float("nan") if (value := side[i]["scores"].get(name)) is None else value for i in shown])
            for side in (before, after)
        )
        rise, p = paired(a, b, torch.tensor([before[image]["id"] for image in shown]))
        rises[name] = {"before": float(a.nanmean()), "after": float(b.nanmean()), "rise": rise, "p": p}
    return len(shown), rises


def write(run: Path) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    page = run / "report.html"
    files.write(page, document(run.name, content(run, embedded)))
    return page


def document(title: str, inner: str, script: str = "") -> str:
    """A whole page around `inner`, with the title as its heading."""
    title = html.escape(title)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><body>"
        f"<h1>{title}</h1>{inner}{script and f'<script>{script}</script>'}</body></html>"
    )


def embedded(path: Path) -> str:
    """The image itself, as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def content(run: Path, source: Source) -> str:
    """What there is to show of a run so far, as HTML."""
    own = written.read(run)
    parts = [
        _lacking(own.lacking),
        _alarms(own.alarms),
        _summary_table(*_compared(own)),
        _by_tag(own.scores),
        _held_out(run, own, source),
        _credit(run, own.credit, source),
        "<h2>Curves</h2>",
        _curves(own.metrics, own.evaluations) if own.metrics else "<p>No iteration yet.</p>",
        "<h2>Step by step</h2>" + _by_step(own.metrics) if own.metrics else "",
        _last(own.metrics[-1]) if own.metrics else "",
        "<h2>Time and work</h2>" + _work(own.metrics, own.evaluations) if own.metrics else "",
        "<h2>Config</h2>",
        f"<pre>{html.escape(own.text)}</pre>",
    ]
    return "\n".join(parts)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _lacking(lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>Missing or damaged</h2><ul>{items}</ul>" if lines else ""


def _alarms(rows: list[Row]) -> str:
    table = _table(["alarm", "after iteration", ""], [[r["alarm"], str(r["iteration"]), r["text"]] for r in rows])
    return f"<h2>Alarms</h2>{table}" if rows else ""


def _summary_table(images: int, rises: dict[str, dict[str, float]]) -> str:
    if not rises:
        return "<p>No held-out evaluation after training yet.</p>"
    rows = [
        [name, f"{r['before']:.3f}", f"{r['after']:.3f}", f"{r['rise']:+.3f}", f"{r['p']:.2g}"]
        for name, r in rises.items()
    ]
    note = f"<p>{images} held-out images a side, same seeds, plain ODE sampling with the averaged adapter; "
    return note + "p: paired t-test over prompts.</p>" + _table(["score", "before", "after", "rise", "p"], rows)


def _by_tag(scores: dict[str, list[Row]]) -> str:
    sides = {side: defaultdict(list) for side in SIDES}
    for side, own in scores.items():
        for row in own:
            first = next(iter(row["scores"].values()))
            if first is not None:
                sides[side][str(row.get("tag", "all"))].append(first)
    if not sides["after"]:
        return ""
    rows = [
        [
            tag,
            str(len(values)),
            f"{sum(values) / len(values):.3f}",
            f"{sum(sides['after'][tag]) / max(1, len(sides['after'][tag])):.3f}",
        ]
        for tag, values in sides["before"].items()
    ]
    return "<h2>First score by kind of prompt</h2>" + _table(["kind", "images", "before", "after"], rows)


def _held_out(run: Path, own: RunRecord, source: Source) -> str:
    """Images of the held-out prompts before and after, or while there are none after, the newest there are."""
    if any(row["name"] == "after" for row in own.evaluations):
        note = (
            "Held-out prompts, same seed on both sides, evenly spaced through the file. "
            "A frame is green where every check of the first score passes."
        )
        switch = SWITCH if any(row.get("places") for row in own.scores["after"]) else ""
        return f"<h2>Before and after</h2><p>{note}</p>{switch}{_pairs(run, own.scores, source)}"
    if not own.evaluations:
        return ""
    last = own.evaluations[-1]
    sheet = within(run / "images", f"{last['name'] or format(last['iteration'], '06d')}.png")
    picture = _absent(sheet) or f'<img class=sheet src="{source(sheet)}" alt="">'
    return f"<h2>Held-out prompts after {last['iteration']} iterations</h2>{picture}"


def _pairs(run: Path, scores: dict[str, list[Row]], source: Source, count: int = 20) -> str:
    after = {row["image"]: row for row in scores["after"]}
    before = [row for row in scores["before"] if row["image"] in after]
    cards = []
    for row in before[:: max(1, len(before) // count)][:count]:
        figures = "".join(
            _figure(within(run / "images" / side, row["image"]), source, side, own)
            for side, own in (("before", row), ("after", after[row["image"]]))
        )
        cards.append(f"<div class=card><p>{html.escape(row['prompt'])}</p><div class=pair>{figures}</div></div>")
    return f"<div class=grid>{''.join(cards)}</div>"


def _figure(path: Path, source: Source, caption: str, row: Row) -> str:
    first = next(iter(row["scores"].values()))
    frame = "" if first is None else "good" if first >= 1 else "bad"
    over = "".join(heat.over(own, name) for name, own in [*row.get("places", {}).items()][:1])
    return f"<figure>{_absent(path) or _picture(source(path), frame, over)}{caption}</figure>"


def _absent(path: Path) -> str:
    """What stands in the place of a picture that cannot be shown; nothing where it can."""
    try:
        size_of(path)
    except ValueError:
        why = "damaged" if path.exists() else "missing"
        return f"<div class=picture>{html.escape(path.name)} is {why}</div>"
    return ""


def _picture(src: str, frame: str = "", over: str = "") -> str:
    return f'<div class=picture><img class="{frame}" src="{src}" alt="">{over}</div>'


def _credit(run: Path, kept: list[Row], source: Source) -> str:
    """The images kept of the last iteration that has any: map of the regions, and the advantage at each step."""
    kept = [row for row in kept if row["iteration"] == kept[-1]["iteration"]]
    if not any(row["advantage"] or row["map"] for row in kept):
        return ""
    scale, out = credit_scale(kept), []
    for row in kept:
        path = within(run, row["image"])
        if absent := _absent(path):
            out.append(f"<p>{html.escape(row['prompt'])}</p>{absent}")
            continue
        src, size = source(path), size_of(path)
        figures = [("image", _picture(src))]
        if row["map"] and any(value is not None for line in row["map"] for value in line):
            figures.append(("map", _picture(src, over=heat.over({"size": size, "map": row["map"], "boxes": []}))))
        for step, grid in row["advantage"].items():
            own = f"<svg class=heat viewBox='0 0 {size[1]} {size[0]}'>{heat.cells(grid, size, scale)}</svg>"
            figures.append((f"credit of step {html.escape(step)}", _picture(src, over=own)))
        shown = "".join(f"<figure>{picture}{caption}</figure>" for caption, picture in figures)
        reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.3g}"
        out.append(f"<p>{html.escape(row['prompt'])}: {reward}</p><div class=walk>{shown}</div>")
    note = (
        f"<p>Images of iteration {html.escape(str(kept[-1]['iteration']))}, evenly spaced through its batch. "
        "Green: right, or more of it; red: wrong, or less of it; "
        f"full colour is {scale:.3g} for credit and 1 for maps.</p>"
    )
    return f"<h2>Credit</h2>{note}{''.join(out)}"


def credit_scale(kept: list[Row]) -> float:
    """The largest credit among rows of `credit.jsonl`: what full colour stands for."""
    values = (abs(v) for row in kept for grid in row["advantage"].values() for line in grid for v in line if v)
    return max(values, default=0.0) or 1e-6


def _svg(figure) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curves(metrics: list[Row], evaluations: list[Row]) -> str:
    """Training reward, each held-out score, and diversity, side by side against iterations."""
    skip = {"iteration", "name", "images", "seconds"}
    names = [name for name in (evaluations[0] if evaluations else {}) if name not in skip]
    panels = ["training reward", *names, "ratio and clipping", "gradient norm"]
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 2.9 * rows), squeeze=False)
    x = [row["iteration"] for row in metrics]
    flat = list(axes.flat)
    flat[0].plot(x, [row["reward"] for row in metrics], alpha=0.4)
    flat[0].plot(x, _smooth([row["reward"] for row in metrics]))
    for axis, name in zip(flat[1:], names, strict=False):
        kept = [row for row in evaluations if name in row]
        axis.plot([row["iteration"] for row in kept], [row[name] for row in kept], marker="o", ms=3)
    for key in ("clipped_low", "clipped_high"):
        flat[len(names) + 1].plot(x, [row.get(key, 0.0) for row in metrics], label=key)
    flat[len(names) + 1].legend()
    flat[len(names) + 2].plot(x, [row.get("grad_norm", 0.0) for row in metrics])
    for axis, title in zip(flat, panels, strict=False):
        axis.set_title(title if title not in names else f"held-out {title}", fontsize=10, parse_math=False)
        axis.grid(alpha=0.3)
    for axis in flat[len(panels) :]:
        axis.axis("off")
    return _svg(figure)


def _by_step(metrics: list[Row]) -> str:
    """Means over the last quarter of the iterations, a row per stochastic step."""
    last = metrics[-max(1, len(metrics) // 4) :]
    keys = {key for row in last for key in row if key.rpartition("/")[2].isdigit()}
    steps = sorted({int(key.rpartition("/")[2]) for key in keys})
    names = [name for name in BY_STEP if any(f"{name}/{k}" in keys for k in steps)]

    def mean(key: str) -> str:
        values = [row[key] for row in last if key in row]
        return f"{sum(values) / len(values):.3g}" if values else ""

    rows = [[str(k), *(mean(f"{name}/{k}") for name in names)] for k in steps]
    note = f"<p>Means over the last {len(last)} iterations; docs/metrics.md has the formulas.</p>"
    return note + _table(["step", *(name.replace("_", " ") for name in names)], rows)


def _last(row: Row) -> str:
    """Every number of one iteration, folded."""
    values = [[name, f"{value:.6g}"] for name, value in row.items() if name != "iteration"]
    heading = f"Every number of iteration {row['iteration']}"
    return f"<details><summary>{heading}</summary>{_table(['number', 'value'], values)}</details>"


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    out: list[float] = []
    for value in values:
        before = out[-1] if out else value
        out.append(keep * before + (1 - keep) * value if value == value else before)
    return out


def _work(metrics: list[Row], evaluations: list[Row]) -> str:
    keys = ("rollout", "decode", "reward", "learn", "io")
    seconds = {key: sum(row.get(f"seconds/{key}", 0.0) for row in metrics) for key in keys}
    whole = sum(seconds.values())
    rows = [[key, f"{value:.1f} s", f"{value / (whole or 1):.0%}"] for key, value in seconds.items()]
    rows.append(["evaluation", f"{sum(row['seconds'] for row in evaluations):.1f} s", ""])
    counts = {key: sum(row[key] for row in metrics) for key in ("forwards", "replay_forwards", "decodes", "rewards")}
    text = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
    rate = (counts["forwards"] + counts["replay_forwards"]) / (seconds["rollout"] + seconds["learn"] or float("nan"))
    return _table(["part", "time", "share"], rows) + f"<p>{len(metrics)} iterations: {text}; {rate:.0f} forwards/s.</p>"
