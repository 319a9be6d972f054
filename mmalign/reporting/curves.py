"""The curves of a report: numbers of a run against its iterations, as an SVG. matplotlib is imported here alone."""

import io
from collections.abc import Callable
from functools import partial
from statistics import stdev
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmalign.config.checks import component
from mmalign.runs.reader import Row, RunRecord

CLIPPED = ("clipped_low", "clipped_high")
DISTANCES = ("kl", "drift")  # metrics of how far the model is from the one without adapter
INK = "#010203"  # stands for the colour of the page's text in figures
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")


@matplotlib.rc_context(dict.fromkeys(INKED, INK) | {"legend.framealpha": 0.0})
def curves(record: RunRecord) -> str:
    """Training reward, diversity, each held-out score, what the reward costs, clipping and gradient norm against
    iterations, as an SVG."""
    metrics, evaluations = record.metrics, record.evaluations
    skip = {"iteration", "name", "images", "seconds", "diversity"}
    first = evaluations[0] if evaluations else {}
    names = [name for name in first if name not in skip and not name.startswith("pairs/")]
    panels = {
        "training reward": partial(_smoothed, metrics, "reward"),
        "diversity": partial(_diversities, metrics, evaluations),
        **{f"held-out {name}": partial(_marked, evaluations, name) for name in names},
        **cost(record),
        "clipped share": partial(_clipped, metrics),
        "gradient norm": partial(_line, metrics, "grad_norm"),
    }
    measured = {name for row in (*metrics, *evaluations) for name in row}
    if "diversity" not in measured:
        del panels["diversity"]
    if not {*CLIPPED} & measured:
        del panels["clipped share"]
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 2.9 * lines))
    axes = figure.subplots(lines, 3, squeeze=False)
    for axis, (title, draw) in zip(axes.flat, panels.items(), strict=False):
        draw(axis)
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.grid(alpha=0.15)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG whose lines and words have the colour of the page's text, on the page's background."""
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def cost(record: RunRecord) -> dict[str, Callable[[Axes], None]]:
    """The panel that shows the trained rewards, the watched scores and the distance to the base together, where a run
    has a trained reward and one of the others. Scores are rises of held-out means in units of the spread between
    images before training, which makes scores of any range comparable."""
    if record.config is None or not record.evaluations:
        return {}
    before, spread = record.evaluations[0], {}
    for name in before:
        values = [row["scores"].get(name) for row in record.scores["before"]]
        values = [value for value in values if value is not None]
        if len(values) > 1 and (deviation := stdev(values)) > 0:
            spread[name] = deviation
    trained = [name for name in spread if name in record.config.rewards]
    others = [name for name in spread if name not in trained]
    watched = [name for name in others if component(name)[0] in record.config.watch]
    distances = [name for name in DISTANCES if any(name in row for row in record.metrics)]
    if not trained or not (watched or distances):
        return {}

    def draw(axis: Axes) -> None:
        for name in (*trained, *watched):
            rows = [row for row in record.evaluations if name in row]
            rises = [{**row, name: (row[name] - before[name]) / spread[name]} for row in rows]
            look = "-" if name in trained else "--"
            _marked(rises, name, axis, ls=look, label=f"{name}, {'trained' if name in trained else 'watched'}")
        for name in distances:
            beside = axis.twinx()
            _line(record.metrics, name, beside, alpha=0.5, color=INK, ls=":")
            axis.plot([], [], color=INK, ls=":", label=f"{name}, right")
        axis.legend(fontsize=7)

    return {"rise in spreads, and distance" if distances else "rise in spreads": draw}


def _line(rows: list[Row], name: str, axis: Axes, **look: Any) -> None:
    """A number against the iteration, of the rows that have it."""
    rows = [row for row in rows if name in row]
    axis.plot([row["iteration"] for row in rows], [row[name] for row in rows], **look)


def _marked(evaluations: list[Row], name: str, axis: Axes, **look: Any) -> None:
    """A number of the evaluations, with a mark at each."""
    _line(evaluations, name, axis, marker="o", ms=3, **look)


def _smoothed(metrics: list[Row], name: str, axis: Axes, **look: Any) -> None:
    """A number of the iterations, and its moving average in front of it."""
    _line(metrics, name, axis, alpha=0.5)
    rows = [row for row in metrics if name in row]
    averages = _smooth([row[name] for row in rows])
    axis.plot([row["iteration"] for row in rows], averages, **look)


def _diversities(metrics: list[Row], evaluations: list[Row], axis: Axes) -> None:
    """From 0, so that the height of a fall is its share."""
    _smoothed(metrics, "diversity", axis, label="training batches")
    _marked(evaluations, "diversity", axis, label="held-out prompts")
    axis.set_ylim(bottom=0)
    axis.legend()


def _clipped(metrics: list[Row], axis: Axes) -> None:
    for name in CLIPPED:
        _line(metrics, name, axis, label=name)
    axis.legend()


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average; a value that is NaN leaves it unchanged."""
    out: list[float] = []
    for value in values:
        before = out[-1] if out else value
        out.append(keep * before + (1 - keep) * value if value == value else before)
    return out
