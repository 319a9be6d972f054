"""The page on how gameable a reward is: the best of n images by it, and the course of a training run.

In the charts a score is shown as its change in standard deviations of its values for the images of the model without
training, because scores have different units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mmalign.config.checks import component
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.evaluation.comparison import cells
from mmalign.evaluation.gaming import Gaming, divergence
from mmalign.reporting.report import comparison
from mmalign.runs import reader
from mmalign.runs.reader import Row, RunRecord
from reward_models.training.page import Chart, Points, Table


@dataclass(frozen=True)
class Course:
    """The held-out means of a run's components over its evaluations; `trained` are those with a weight in the reward.
    `points` are (iteration, mean), `kl` (iteration, divergence) where it was measured; `rises` compares the images
    before and after, as `mmalign.evaluation.comparison.rises`; `spread` is the standard deviation before."""

    trained: list[str]
    points: dict[str, Points]
    kl: Points
    rises: dict[str, dict[str, float]]
    spread: dict[str, float]

    def verdict(self, name: str) -> str:
        """One line on a component: its rise over the run, and where it was highest."""
        best, highest = max(self.points[name], key=lambda point: point[1])
        last = self.points[name][-1][0]
        row = self.rises.get(name)
        change = f"{self.points[name][-1][1] - self.points[name][0][1]:+.3f}" if row is None else cells(row)[2]
        interval = "" if row is None else f" ({cells(row)[3]})"
        turn = "highest at the end" if best == last else f"highest at iteration {best:g} of {last:g}, {highest:.3f}"
        return f"{change}{interval}; {turn}"

    def record(self) -> dict[str, Any]:
        """As JSON has it; a value that is not finite becomes None."""
        rises = {n: {k: v if isfinite(v) else None for k, v in row.items()} for n, row in self.rises.items()}
        of_name = {n: {"trained": n in self.trained, "points": p, "verdict": self.verdict(n)} for n, p in
                   self.points.items()}  # fmt: skip
        return {"scores": of_name, "kl": self.kl, "rises": rises}


def course(run: Path) -> Course:
    """The course of the run in a folder. BadInput without a readable config, or without two evaluations."""
    record = reader.read(run)
    if record.config is None:
        raise BadInput(f"{run}: not the folder of a run: {record.lacking[0]}")
    trained = [*record.config.rewards]
    points = {name: _points(record, name) for name in _components(record, record.config)}
    points = {name: some for name, some in points.items() if len(some) > 1}
    if not points:
        raise BadInput(f"{run}: the course of a run needs at least two evaluations with scores")
    _, rises = comparison(record.scores)
    kl = [(row["iteration"], row["kl"]) for row in record.metrics if _is_number(row.get("kl"))]
    spread = {name: _spread(record.scores["before"], name) for name in points}
    return Course(trained, points, kl, rises, spread)


def _components(record: RunRecord, c: Config) -> list[str]:
    """The components in the evaluations: those of the reward before the others."""
    names = dict.fromkeys(name for row in record.evaluations for name in row if "." in name)
    scorers = {*c.trained, *c.watch}
    return sorted((name for name in names if component(name)[0] in scorers), key=lambda name: name not in c.rewards)


def _points(record: RunRecord, name: str) -> list[tuple[int, float]]:
    by_iteration = {row["iteration"]: row[name] for row in record.evaluations if _is_number(row.get(name))}
    return sorted(by_iteration.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _spread(rows: Sequence[Row], name: str) -> float:
    values = [value for row in rows if _is_number(value := row["scores"].get(name))]
    return stdev(values) if len(values) > 1 else 0.0


def of_course(result: Course) -> tuple[list[Table], list[Chart]]:
    """The table and the charts of a run."""
    rows = [
        [name, "trained" if name in result.trained else "watched", f"{points[0][1]:.3f}", f"{points[-1][1]:.3f}",
         result.verdict(name)]
        for name, points in result.points.items()
    ]  # fmt: skip
    table = Table("Along the training run", ["score", "", "before", "after", "verdict"], rows)
    lines = {
        f"{name}, {'trained' if name in result.trained else 'watched'}": _changes(points, result.spread[name])
        for name, points in result.points.items()
    }
    charts = [Chart("Trained and watched scores: change in standard deviations", "iteration", lines)]
    return [table], [*charts, Chart("Divergence from the model without adapter", "iteration", {"kl": result.kl})]


def _changes(points: Points, spread: float) -> Points:
    unit = spread or fmean(abs(y) for _, y in points) or 1.0
    return [(x, (y - points[0][1]) / unit) for x, y in points]


def of_best(result: Gaming) -> tuple[list[Table], list[Chart]]:
    """The tables and the chart of the best of n."""
    verdicts = []
    for name, one in result.curves.items():
        rise, fall = one.change
        after = "" if one.peak == one.sizes[-1] else fall
        verdicts.append([name, "the reward" if name == result.by else "watched", one.shape, str(one.peak), rise, after])
    sizes = next(iter(result.curves.values())).sizes
    rows = [
        [str(n), f"{divergence(n):.2f}", *(f"{one.means[k]:.3f}" for one in result.curves.values())]
        for k, n in enumerate(sizes)
    ]
    title = f"Best of n by {result.by}"
    tables = [
        Table(
            f"{title}, {result.prompts} prompts",
            ["score", "", "verdict", "highest at n", "over n = 1", f"from there to n = {sizes[-1]}"],
            verdicts,
        ),
        Table(f"{title}: means", ["n", "divergence", *result.curves], rows),
    ]
    lines = {
        name: _changes([(divergence(n), mean) for n, mean in zip(one.sizes, one.means, strict=True)], one.spread)
        for name, one in result.curves.items()
    }
    return tables, [Chart(f"{title}: change in standard deviations", "divergence, nats", lines)]


def records(best: Gaming | None, run: Course | None) -> Mapping[str, Any]:
    """Both as JSON has them."""
    return ({"best_of_n": best.record()} if best else {}) | ({"run": run.record()} if run else {})
