"""`report.html`: one self-contained page of a run. Images are chosen by position, not by score.

Missing or damaged files are listed on the page; the rest is shown.
"""

import base64
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from mmalign.data.meaning import clusters
from mmalign.evaluation import layouts
from mmalign.evaluation.comparison import cells, rises
from mmalign.pages import render
from mmalign.runs import reader
from mmalign.runs.reader import SIDES, Row
from reward_models import files
from reward_models.allowlist import inside
from reward_models.images import size_of

Source = Callable[[Path], str]  # the address of an image, for its `src`

COMMAND = "mmalign report"
BY_STEP = (
    "std", "gain", "gain_std", "balance", "ratio", "clipped_low", "clipped_high", "divergence", "kl"
)  # fmt: skip
CARDS = 20  # held-out prompts shown
SMALL = 128  # pixels a side below which an image is enlarged without smoothing


@dataclass(frozen=True)
class Picture:
    """An image of the page: its address and `size` (height, width), or the `problem` if it cannot be shown.

    `overlay` is a record of `reward_models.overlay`; full colour in it stands for `scale`.
    """

    caption: str
    source: str = ""
    size: tuple[int, int] | None = None
    problem: str = ""
    frame: str = ""
    overlay: Mapping[str, Any] | None = None
    scale: int | float = 1.0

    @property
    def small(self) -> bool:
        return self.size is not None and max(self.size) < SMALL


def summary(run: Path) -> dict[str, Any]:
    """Before, after and the rise of every score on the held-out prompts, as `mmalign.evaluation.comparison.rises` gives
    them; and the alarms."""
    record = reader.read(run)
    images, compared = comparison(record.scores)
    return {"run": str(run), "images": images, "rises": compared, "alarms": record.alarms}


def comparison(scores: Mapping[str, list[Row]]) -> tuple[int, dict[str, dict[str, float]]]:
    """The number of images scored on both sides, and the comparison of each score."""
    before, after = ({row["image"]: row for row in scores[side]} for side in SIDES)
    both = [image for image in before if image in after]
    names = before[both[0]]["scores"] if both else ()
    parts = ({name: _values_of(name, [side[image] for image in both]) for name in names} for side in (before, after))
    return len(both), rises(*parts, clusters(before[image]["prompt"] for image in both), layouts.ROUNDING)


def _values_of(name: str, rows: list[Row]) -> Float[Tensor, "N"]:
    values = (row["scores"].get(name) for row in rows)
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def write(run: Path) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    page = run / "report.html"
    files.write(page, render("report.html", command=COMMAND, title=run.name, **_values(run, embedded)))
    return page


def content(run: Path, source: Source) -> str:
    """The content of the report so far, as an HTML fragment."""
    return render("run.html", **_values(run, source))


def embedded(path: Path) -> str:
    """The image itself, as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _values(run: Path, source: Source) -> dict[str, Any]:
    """The values of the template `run.html`."""
    record = reader.read(run)
    images, compared = comparison(record.scores)
    trained = any(row["name"] == "after" for row in record.evaluations)
    values = {
        "missing": record.lacking,
        "alarms": [(row["alarm"], row["iteration"], row["text"]) for row in record.alarms],
        "images": images,
        "rises": [(name, *cells(row)) for name, row in compared.items()],
        "tags": _by_tag(record.scores),
        "cards": pairs(run, record.scores, source) if trained else [],
        "overlays": any(row.get("places") for row in record.scores["after"]),
        "sheet": _sheet(run, record.evaluations[-1], source) if record.evaluations and not trained else None,
        "credit": _credit(run, record.credit, source),
        "config": record.text,
        "last": None,
    }
    if not record.metrics:
        return values
    last = record.metrics[-1]
    return values | {
        "curves": _curves(record.metrics, record.evaluations),
        "steps": _by_step(record.metrics),
        "last": {
            "iteration": last["iteration"],
            "rows": [(name, f"{value:.6g}") for name, value in last.items() if name != "iteration"],
        },
        "work": _work(record.metrics, record.evaluations),
    }


def _by_tag(scores: Mapping[str, list[Row]]) -> list[tuple[str, int, str, str]]:
    """Mean of the first score of the prompts of each tag, before and after."""
    sides = {side: defaultdict(list) for side in SIDES}
    for side, rows in scores.items():
        for row in rows:
            first = _first(row)
            if first is not None:
                sides[side][str(row.get("tag", "all"))].append(first)
    before, after = (sides[side] for side in SIDES)
    if not after:
        return []
    return [
        (tag, len(values), f"{fmean(values):.3f}", f"{fmean(after[tag]):.3f}" if tag in after else "")
        for tag, values in before.items()
    ]


def _first(row: Row) -> float | None:
    return next(iter(row["scores"].values()))


def pairs(run: Path, scores: Mapping[str, list[Row]], source: Source, most: int = CARDS) -> list[dict[str, Any]]:
    """Images of the same prompt and seed before and after training: the `prompt`, the `seed` of the noise (None: older
    runs do not record it), and the two `pictures`. At most so many, evenly spaced through the held-out prompts."""
    after = {row["image"]: row for row in scores["after"]}
    before = [row for row in scores["before"] if row["image"] in after]
    return [
        {
            "prompt": row["prompt"],
            "seed": row.get("noise_seed"),
            "pictures": [
                _scored(run / "images" / side, source, side, scored)
                for side, scored in (("before", row), ("after", after[row["image"]]))
            ],
        }
        for row in before[:: max(1, len(before) // most)][:most]
    ]


def _scored(folder: Path, source: Source, side: str, row: Row) -> Picture:
    first = _first(row)
    frame = "" if first is None else "good" if first >= 1 else "bad"
    overlay = next(iter(row.get("places", {}).values()), None)
    return _picture(inside(folder, row["image"]), source, side, frame=frame, overlay=overlay)


def _picture(path: Path, source: Source, caption: str, **more: Any) -> Picture:
    try:
        size = size_of(path)
    except ValueError:
        return Picture(caption, problem=f"{path.name} is {'damaged' if path.exists() else 'missing'}")
    return Picture(caption, source(path), size, **more)


def _sheet(run: Path, last: Row, source: Source) -> dict[str, Any]:
    """The contact sheet of the newest evaluation."""
    path = inside(run / "images", f"{last['name'] or format(last['iteration'], '06d')}.png")
    return {"iteration": last["iteration"], "picture": _picture(path, source, "")}


def _credit(run: Path, rows: list[Row], source: Source) -> dict[str, Any] | None:
    """The images of the last iteration that saved any: map of the regions, and the advantage at each step."""
    rows = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
    if not any(row["advantage"] or row["map"] for row in rows):
        return None
    scale, cards = credit_scale(rows), []
    for row in rows:
        plain = _picture(inside(run, row["image"]), source, "image")
        grids = [("map", row["map"], 1.0)] if any(v is not None for line in row["map"] or () for v in line) else []
        grids += [(f"credit of step {step}", grid, scale) for step, grid in row["advantage"].items()]
        over = [
            replace(plain, caption=caption, overlay={"size": plain.size, "map": grid, "boxes": []}, scale=full)
            for caption, grid, full in grids
        ]
        pictures = [plain] if plain.problem else [plain, *over]
        cards.append({"prompt": row["prompt"], "reward": row["reward"], "pictures": pictures})
    return {"iteration": rows[-1]["iteration"], "scale": scale, "cards": cards}


def credit_scale(rows: Iterable[Row]) -> float:
    """The largest absolute credit in rows of `credit.jsonl`, which full colour stands for."""
    values = (abs(v) for row in rows for grid in row["advantage"].values() for line in grid for v in line if v)
    return max(values, default=0.0) or 1e-6


def _svg(figure: Figure) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curves(metrics: list[Row], evaluations: list[Row]) -> str:
    """Training reward, each held-out score, clipping and gradient norm against iterations, as an SVG."""
    skip = {"iteration", "name", "images", "seconds"}
    names = [name for name in (evaluations[0] if evaluations else {}) if name not in skip]
    panels = ["training reward", *names, "clipped share", "gradient norm"]
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 2.9 * lines), squeeze=False)
    x = [row["iteration"] for row in metrics]
    flat = list(axes.flat)
    flat[0].plot(x, [row["reward"] for row in metrics], alpha=0.4)
    flat[0].plot(x, _smooth([row["reward"] for row in metrics]))
    for axis, name in zip(flat[1:], names, strict=False):
        rows = [row for row in evaluations if name in row]
        axis.plot([row["iteration"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
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


def _by_step(metrics: list[Row]) -> dict[str, Any]:
    """Means over the last quarter of the iterations, a row per stochastic step."""
    last = metrics[-max(1, len(metrics) // 4) :]
    keys = {key for row in last for key in row if key.rpartition("/")[2].isdigit()}
    steps = sorted({int(key.rpartition("/")[2]) for key in keys})
    names = [name for name in BY_STEP if any(f"{name}/{k}" in keys for k in steps)]

    def mean(key: str) -> str:
        values = [row[key] for row in last if key in row]
        return f"{sum(values) / len(values):.3g}" if values else ""

    return {
        "iterations": len(last),
        "headings": ["step", *(name.replace("_", " ") for name in names)],
        "rows": [[k, *(mean(f"{name}/{k}") for name in names)] for k in steps],
    }


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average; a value that is NaN leaves it unchanged."""
    out: list[float] = []
    for value in values:
        before = out[-1] if out else value
        out.append(keep * before + (1 - keep) * value if value == value else before)
    return out


def _work(metrics: list[Row], evaluations: list[Row]) -> dict[str, Any]:
    """Seconds by phase, and the counts of forward passes, decoded images and rewards."""
    phases = ("rollout", "decode", "reward", "learn", "io")
    seconds = {phase: sum(row.get(f"seconds/{phase}", 0.0) for row in metrics) for phase in phases}
    total = sum(seconds.values()) or 1
    rows = [(phase, f"{value:.1f} s", f"{value / total:.0%}") for phase, value in seconds.items()]
    counts = {key: sum(row[key] for row in metrics) for key in ("forwards", "replay_forwards", "decodes", "rewards")}
    rate = (counts["forwards"] + counts["replay_forwards"]) / (seconds["rollout"] + seconds["learn"] or math.nan)
    return {
        "rows": [*rows, ("evaluation", f"{sum(row['seconds'] for row in evaluations):.1f} s", "")],
        "counts": [
            ("iterations", len(metrics)),
            *((key.replace("_", " "), f"{value:,}") for key, value in counts.items()),
            ("forwards per second", f"{rate:.0f}" if rate == rate else ""),
        ],
    }
