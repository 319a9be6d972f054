"""`report.html`: one self-contained page of a run. Images are chosen by position, not by score.

Missing or damaged files are listed on the page; the rest is shown.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config.schema import TRAINING
from mmalign.evaluation import layouts
from mmalign.evaluation.comparison import cells, rises
from mmalign.evaluation.evaluate import STRIP
from mmalign.pages import render
from mmalign.runs import reader
from mmalign.runs.alarms import IN_A_ROW
from mmalign.runs.reader import SIDES, Row, RunRecord
from reward_models import files
from reward_models.allowlist import inside
from reward_models.images import SHOWN, embedded, size_of
from reward_models.meaning import clusters

Source = Callable[[Path], str]  # the address of an image, for its `src`

COMMAND = "mmalign report"
BY_STEP = (
    "std", "gain", "gain_std", "balance", "ratio", "clipped_low", "clipped_high", "divergence", "kl"
)  # fmt: skip
CARDS = 20  # held-out prompts shown
SMALL = 128  # pixels a side below which an image is enlarged without smoothing
COLUMNS = 8  # evaluations shown of the same prompts
LOSS = 0.1  # share by which diversity may fall before the page points it out


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
    files.write(page, render("report.html", command=COMMAND, title=run.name, largest=SHOWN, **_values(run, embedded)))
    return page


def content(run: Path, source: Source) -> str:
    """The content of the report so far, as an HTML fragment."""
    return render("run.html", **_values(run, source))


def _values(run: Path, source: Source) -> dict[str, Any]:
    """The values of the template `run.html`."""
    record = reader.read(run)
    images, compared = comparison(record.scores)
    trained = any(row["name"] == "after" for row in record.evaluations)
    strip, problems = _strip(run, record, source)
    values = {
        "missing": record.lacking + problems,
        "alarms": [(row["alarm"], row["iteration"], row["text"]) for row in record.alarms],
        "images": images,
        "rises": [(name, *cells(row)) for name, row in compared.items()],
        "diversity": _diversity(record),
        "front": _front(record.evaluations),
        "tags": _by_tag(record.scores),
        "strip": strip,
        "cards": pairs(run, record.scores, source) if trained else [],
        "overlays": any(row.get("places") for row in record.scores["after"]),
        "sheet": _sheet(run, record.evaluations[-1], source) if record.evaluations and not trained else None,
        "credit": _credit(run, record.credit, source),
        "config": record.text,
        "on_training_prompts": f"held_out: {TRAINING}" in files.lines(record.text),
        "last": None,
    }
    if not record.metrics:
        return values
    from mmalign.reporting import curves  # and matplotlib, which few users of this module need

    last = record.metrics[-1]
    return values | {
        "curves": curves.curves(record),
        "steps": _by_step(record.metrics),
        "last": {
            "iteration": last["iteration"],
            "rows": [(name, f"{value:.6g}") for name, value in last.items() if name != "iteration"],
        },
        "work": _work(record.metrics, record.evaluations),
    }


def _diversity(record: RunRecord) -> dict[str, Any] | None:
    """Diversity at both ends, of held-out prompts, or of training batches until the last evaluation: means of
    `IN_A_ROW` iterations that do not overlap. `lost` is the share by which it fell if that is above `LOSS`, else None.
    """
    ends = {row["name"]: row["diversity"] for row in record.evaluations if row["name"] and "diversity" in row}
    of, first, last = "held_out", ends.get("before"), ends.get("after")
    if first is None or last is None:
        values = [row["diversity"] for row in record.metrics if "diversity" in row]
        if len(values) < 2 * IN_A_ROW:
            return None
        of, first, last = "training", fmean(values[:IN_A_ROW]), fmean(values[-IN_A_ROW:])
    fall = 1 - last / first if first > 0 else 0.0
    return {
        "of": of,
        "first": first,
        "last": last,
        "iterations": IN_A_ROW,
        "most": LOSS,
        "lost": fall if fall > LOSS else None,
    }


def _front(evaluations: list[Row]) -> dict[str, Any] | None:
    """The means of the last evaluation that measured directions (`combine: directed`), a row for each, below those
    before training; None where none did."""
    directions = defaultdict(dict)
    last = next((row for row in reversed(evaluations) if any(key.startswith("fan/") for key in row)), {})
    for key, mean in last.items():
        prefix, direction, part = (*key.split("/", 2), "", "")[:3]
        if prefix == "fan":
            directions[direction][part] = mean
    if not directions:
        return None
    parts = [*dict.fromkeys(part for means in directions.values() for part in means)]
    before = next((row for row in evaluations if row["name"] == "before"), {})
    rows = [("before", before), *((name, directions[name]) for name in sorted(directions, reverse=True))]
    return {
        "iteration": last["iteration"],
        "headings": ["direction", *parts],
        "rows": [[name, *(f"{means[part]:.3f}" if part in means else "" for part in parts)] for name, means in rows],
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


def _scored(folder: Path, source: Source, caption: str, row: Row) -> Picture:
    frame = {1.0: "good", 0.0: "bad"}.get(_first(row), "")  # only 1 and 0 are verdicts
    overlay = next(iter(row.get("places", {}).values()), None)
    return _picture(inside(folder, row["image"]), source, caption, frame=frame, overlay=overlay)


def _picture(path: Path, source: Source, caption: str, **more: Any) -> Picture:
    try:
        return Picture(caption, source(path), size_of(path), **more)
    except (OSError, ValueError):
        return Picture(caption, problem=f"{path.name} is {'damaged' if path.exists() else 'missing'}")


def _strip(run: Path, record: RunRecord, source: Source) -> tuple[dict[str, Any] | None, list[str]]:
    """The same prompts and seeds at each evaluation, at most `COLUMNS` of these, and a line for each file of which
    something was left out. None where no evaluation between start and end has written images."""
    names = [row["name"] or f"{row['iteration']:06d}" for row in record.evaluations]
    names = [name for name in dict.fromkeys(names) if name in SIDES or (run / reader.scores_of(name)).is_file()]
    last, count = len(names) - 1, min(COLUMNS, len(names))
    shown = [names[round(k * last / max(1, count - 1))] for k in range(count)]
    read = {name: (record.scores[name], []) if name in SIDES else reader.scored(run, name) for name in shown}
    scored = {name: {row["image"]: row for row in rows} for name, (rows, _) in read.items()}
    images = {image: row for name in shown if name not in SIDES for image, row in scored[name].items()}
    cards = [
        {
            "prompt": images[image]["prompt"],
            "pictures": [_at(run, source, name, image, scored[name].get(image)) for name in shown],
        }
        for image in list(images)[:STRIP]
    ]
    problems = [problem for _, each in read.values() for problem in each]
    return {"cards": cards, "shown": count, "evaluations": len(names)} if cards else None, problems


def _at(run: Path, source: Source, name: str, image: str, row: Row | None) -> Picture:
    """An image at the evaluation `name`, by its row."""
    caption = name if name in SIDES else f"iteration {int(name)}"
    return _scored(run / "images" / name, source, caption, row) if row else Picture(caption, problem=f"no {image}")


def _sheet(run: Path, last: Row, source: Source) -> dict[str, Any]:
    """The contact sheet of the newest evaluation."""
    path = inside(run / "images", f"{last['name'] or format(last['iteration'], '06d')}.png")
    return {"iteration": last["iteration"], "picture": _picture(path, source, "")}


def _credit(run: Path, rows: list[Row], source: Source) -> dict[str, Any] | None:
    """The images of the last iteration that saved any: each with the map of its regions and the advantage at each step
    over it."""
    rows = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
    if not any(row["advantage"] or row["map"] for row in rows):
        return None
    scale, cards = credit_scale(rows), []
    for row in rows:
        plain = _picture(inside(run, row["image"]), source, "")
        grids = [("map", row["map"], 1.0)] if any(v is not None for line in row["map"] or () for v in line) else []
        grids += [(f"credit of step {step}", grid, scale) for step, grid in row["advantage"].items()]
        over = [
            replace(plain, caption=caption, overlay={"size": plain.size, "map": grid, "boxes": []}, scale=full)
            for caption, grid, full in grids
        ]
        maps = [] if plain.problem else over
        cards.append({"prompt": row["prompt"], "reward": row["reward"], "image": plain, "maps": maps})
    mapped = any(card["maps"] for card in cards)
    return {"iteration": rows[-1]["iteration"], "scale": scale, "cards": cards, "mapped": mapped}


def credit_scale(rows: Iterable[Row]) -> float:
    """The largest absolute credit in rows of `credit.jsonl`, which full colour stands for."""
    values = (abs(v) for row in rows for grid in row["advantage"].values() for line in grid for v in line if v)
    return max(values, default=0.0) or 1e-6


def _by_step(metrics: list[Row]) -> dict[str, Any] | None:
    """Means over the last quarter of the iterations, a row per stochastic step; None without such metrics."""
    last = metrics[-max(1, len(metrics) // 4) :]
    keys = {key for row in last for key in row if key.rpartition("/")[2].isdigit()}
    steps = sorted({int(key.rpartition("/")[2]) for key in keys})
    names = [name for name in BY_STEP if any(f"{name}/{k}" in keys for k in steps)]

    if not names:
        return None

    def mean(key: str) -> str:
        values = [row[key] for row in last if key in row]
        return f"{sum(values) / len(values):.3g}" if values else ""

    return {
        "iterations": len(last),
        "headings": ["step", *(name.replace("_", " ") for name in names)],
        "rows": [[k, *(mean(f"{name}/{k}") for name in names)] for k in steps],
    }


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
