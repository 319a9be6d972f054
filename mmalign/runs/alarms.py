"""Alarms: problems that do not end a run. Each is reported once. And the KL budget, which ends it.

A row of `alarms.jsonl` has the `iteration`, the name of the `alarm` and its `text`. Alarms are functions of the rows of
`metrics.jsonl` and `evaluations.jsonl` so far, so that a resumed run reports the same as an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

from mmalign.config.checks import component
from mmalign.config.schema import Config
from mmalign.runs import jsonl
from reward_models import files

IN_A_ROW = 5  # iterations without gradient, or with a constant reward; and those that means at the ends are over
DIVERSITY = 0.5  # ratio to its first values below which diversity has collapsed
GROWTH = 6.0  # ratio of the gradient's norm to its first values above which the adapter outgrows the model
EVALUATIONS = 8  # the number of last evaluations in which trends are tested for reward hacking
TREND = 0.01  # p, one-sided, of a rise or a fall: Kendall's correlation with time, of images' scores, or of two shares
FALL = 0.25  # of a watched score since the start, in standard deviations between images, before it is reported
DRIFT = 0.1  # by how much the agreement of a trained and a watched scorer falls before it is reported

Row = Mapping[str, Any]
Alarm = Callable[[Config, Sequence[Row], Sequence[Row]], str | None]  # (config, metrics, evaluations) -> the problem


def _zero_gradient(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """Iterations with dead groups alone or a skipped step have no gradient either, and are reported as such."""
    last = [row for row in metrics if row.get("dead_groups") != 1 and not row.get("skipped")][-IN_A_ROW:]
    if len(last) == IN_A_ROW and not any(row.get("grad_norm") for row in last):
        return f"no gradient in {IN_A_ROW} iterations in a row: nothing is trained"
    return None


def _constant_reward(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    last = metrics[-IN_A_ROW:]
    if len(last) == IN_A_ROW and all(row.get("dead_groups") == 1 for row in last):
        return f"siblings got the same reward in every group of {IN_A_ROW} iterations in a row: nothing is trained"
    return None


def _lost_diversity(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    first, last = (_mean("diversity", rows) for rows in _ends(metrics))
    if len(metrics) >= 2 * IN_A_ROW and last < DIVERSITY * first:
        return f"diversity is {last:.3g} and began with {first:.3g}: images of different seeds are nearly the same"
    return None


def _outgrown(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """An adapter that leaves what the model can represent meets ever larger gradients, on policy too."""
    first, last = (_mean("grad_norm", [row for row in rows if row.get("grad_norm")]) for rows in _ends(metrics))
    if len(metrics) >= 2 * IN_A_ROW and last > GROWTH * first:
        return (
            f"the gradient's norm is {last:.3g} and began with {first:.3g}: the adapter outgrows the model, and scores "
            "fall next; a larger pull or beta, a lag, or a lower learning_rate holds it"
        )
    return None


def _hacking(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """Only evaluations between start and end use the same prompts and seeds, and only those since the last refresh of a
    reward have its scores."""
    since = evaluations[-1].get("refresh", 0) if evaluations else 0
    between = [row for row in evaluations if row["name"] is None and row.get("refresh", 0) == since]
    ends = [since, *(row["iteration"] for row in between)][-EVALUATIONS - 1 :]
    watched = [name for name in (between[-1] if between else ()) if component(name)[0] in c.watch]
    for trained in c.rewards:
        training = [_mean(f"part/{trained}", metrics[start:end]) for start, end in pairwise(ends)]
        for name in (trained, *watched):
            held_out = [row.get(name, float("nan")) for row in between[-EVALUATIONS:]]
            if _rises(training) and _rises([-value for value in held_out]):
                return (
                    f"{trained} rises in training, from {training[0]:.3g} to {training[-1]:.3g}, while {name} falls on "
                    f"held-out prompts, from {held_out[0]:.3g} to {held_out[-1]:.3g}: the reward may be hacked"
                )
    return None


def _traded(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """A reward that was fitted again since the start has no comparable rise. Falls of little size happen in good runs,
    such as that of an image statistic of which more is not better."""
    last = evaluations[-1] if evaluations else {}
    risen = [name for name in c.rewards if not last.get("refresh") and _changes(last, name) > 0]
    names = [key.removeprefix("rise/") for key in last if key.startswith("rise/")]
    fallen = [name for name in names if component(name)[0] in c.watch and _changes(last, name) < 0]
    fallen = [name for name in fallen if last.get(f"size/{name}", 0.0) <= -FALL]
    for trained, name in ((trained, name) for trained in risen for name in fallen):
        return (
            f"since the start {trained} has risen by {last[f'rise/{trained}']:.3g} on held-out prompts, and {name} has "
            f"fallen by {-last[f'rise/{name}']:.3g}: the reward may be hacked"
        )
    return None


def _changes(row: Row, name: str) -> int:
    """1 where a component has risen since the start beyond chance, -1 where it has fallen, else 0."""
    rise = row.get(f"rise/{name}", 0.0)
    return (rise > 0) - (rise < 0) if row.get(f"p/{name}", 1.0) / 2 < TREND else 0


def _disagreement(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """A fall that other images of the same kind would hardly give either."""
    for name in (name for name in (evaluations[-1] if evaluations else ()) if name.startswith("agrees/")):
        pair = name.removeprefix("agrees/")
        rows = [row for row in evaluations if name in row]
        first, last, n, m = *(rows[i][name] for i in (0, -1)), *(rows[i][f"pairs/{pair}"] for i in (0, -1))
        pooled = (first * n + last * m) / (n + m)
        error = (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5
        if first - last >= DRIFT and (first - last) / error > NormalDist().inv_cdf(1 - TREND):
            one, other = pair.split("~")
            return (
                f"of two images of a prompt {one} and {other} prefer the same in {last:.0%} of pairs, {first:.0%} at "
                f"the start: what {one} rewards is no longer what {other} measures"
            )
    return None


ALARMS: dict[str, Alarm] = {
    "zero_gradient": _zero_gradient,
    "constant_reward": _constant_reward,
    "lost_diversity": _lost_diversity,
    "outgrown": _outgrown,
    "hacking": _hacking,
    "traded": _traded,
    "disagreement": _disagreement,
}


def _ends(metrics: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    return metrics[:IN_A_ROW], metrics[-IN_A_ROW:]


def _mean(name: str, rows: Sequence[Row]) -> float:
    """The mean over the rows that have the value, NaN where none has."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("nan")


def _rises(values: Sequence[float]) -> bool:
    """Whether the values have a significant upward trend; False where one is NaN or there are too few."""
    if len(set(values)) < 2:
        return False
    from scipy import stats

    return bool(stats.kendalltau(range(len(values)), values, alternative="greater").pvalue < TREND)


class Watch:
    """Checks each new row of the run in the folder `out`, and reports alarms by `say` and in `alarms.jsonl`.

    It stores the columns that alarms read, less than a kilobyte an iteration. Only the main process `reports`.
    """

    def __init__(self, c: Config, out: Path, say: Callable[[str], None], reports: bool = True):
        self.c, self.file, self.say, self.reports = c, out / "alarms.jsonl", say, reports
        self.metrics = [self._columns(row) for row in jsonl.rows(out / "metrics.jsonl")]
        self.evaluations = jsonl.rows(out / "evaluations.jsonl")
        self.reported = {row["alarm"] for row in jsonl.rows(self.file)}

    def _columns(self, row: Row) -> Row:
        names = ["dead_groups", "skipped", "grad_norm", "diversity", "kl"]
        names += [f"part/{name}" for name in self.c.rewards]
        return {name: row[name] for name in names if name in row}

    @property
    def ended(self) -> bool:
        """Whether the KL budget is used up."""
        return self.c.max_kl is not None and self.metrics[-1:] != [] and self.metrics[-1].get("kl", 0) > self.c.max_kl

    def look(self, row: Row, skips: Sequence[str]) -> None:
        """Check the row of an iteration, and report its skipped optimiser steps, with the reasons `skips`."""
        self.metrics.append(self._columns(row))
        for reason in skips:
            self._report(row["iteration"], "skipped", reason)
        for name, alarm in ALARMS.items():
            text = None if name in self.reported else alarm(self.c, self.metrics, self.evaluations)
            if text:
                self._report(row["iteration"], name, text)
        if self.ended:
            self._report(row["iteration"], "max_kl", f"kl is {row['kl']:.3g}, above max_kl: the run ends here")

    def _report(self, iteration: int, alarm: str, text: str) -> None:
        self.reported.add(alarm)
        if not self.reports:
            return
        files.append(self.file, {"iteration": iteration, "alarm": alarm, "text": text})
        self.say(f"alarm after iteration {iteration}, {alarm}: {text}")
