"""What goes wrong without failing: told once, while the run goes on; and the KL budget, which ends it.

A row of `alarms.jsonl` has the `iteration`, the name of the `alarm` and its `text`. Alarms are functions of the rows of
`metrics.jsonl` and `evaluations.jsonl` so far, so that a resumed run raises those of one that was never interrupted.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from mmalign.config.schema import Config, component
from mmalign.runs import jsonl
from reward_models import files

IN_A_ROW = 5  # iterations: as many without gradient, or with a constant reward; means of diversity are over as many
DIVERSITY = 0.5  # share of its beginning below which it has collapsed
EVALUATIONS = 8  # evaluations between start and end, the last, in which hacking is looked for
TREND = 0.01  # p of Kendall's rank correlation with time, one-sided, that counts as a rise or a fall

Row = Mapping[str, Any]
Alarm = Callable[[Config, Sequence[Row], Sequence[Row]], str | None]  # (config, metrics, evaluations) -> what is wrong


def _zero_gradient(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """Dead groups and skipped steps have none either, and are told as such."""
    last = [row for row in metrics if row.get("dead_groups") != 1 and not row.get("skipped")][-IN_A_ROW:]
    if len(last) == IN_A_ROW and not any(row.get("grad_norm") for row in last):
        return f"no gradient in {IN_A_ROW} iterations in a row: nothing is learnt"
    return None


def _constant_reward(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    last = metrics[-IN_A_ROW:]
    if len(last) == IN_A_ROW and all(row.get("dead_groups") == 1 for row in last):
        return f"siblings got the same reward in every group of {IN_A_ROW} iterations in a row: nothing is learnt"
    return None


def _lost_diversity(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    first, last = _mean("diversity", metrics[:IN_A_ROW]), _mean("diversity", metrics[-IN_A_ROW:])
    if len(metrics) >= 2 * IN_A_ROW and last < DIVERSITY * first:
        return f"diversity is {last:.3g} and began with {first:.3g}: the model answers every seed alike"
    return None


def _hacking(c: Config, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str | None:
    """Only evaluations between start and end are of the same images."""
    between = [row for row in evaluations if row["name"] is None]
    ends = [0, *(row["iteration"] for row in between)][-EVALUATIONS - 1 :]
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


ALARMS: dict[str, Alarm] = {
    "zero_gradient": _zero_gradient,
    "constant_reward": _constant_reward,
    "lost_diversity": _lost_diversity,
    "hacking": _hacking,
}


def _mean(name: str, rows: Sequence[Row]) -> float:
    """NaN where no row has it."""
    own = [row[name] for row in rows if name in row]
    return sum(own) / len(own) if own else float("nan")


def _rises(values: Sequence[float]) -> bool:
    """False where one is NaN or there are too few to tell."""
    if len(set(values)) < 2:
        return False
    return bool(stats.kendalltau(range(len(values)), values, alternative="greater").pvalue < TREND)


class Watch:
    """Looks at a run's rows as they come, in its folder `out`, and tells what it finds by `say` and in `alarms.jsonl`.

    Of each iteration it keeps what alarms look at: less than a kilobyte. Of many processes one `tells`.
    """

    def __init__(self, c: Config, out: Path, say: Callable[[str], None], tells: bool = True):
        self.c, self.file, self.say, self.tells = c, out / "alarms.jsonl", say, tells
        self.metrics = [self._kept(row) for row in jsonl.rows(out / "metrics.jsonl")]
        self.evaluations = jsonl.rows(out / "evaluations.jsonl")
        self.told = {row["alarm"] for row in jsonl.rows(self.file)}

    def _kept(self, row: Row) -> Row:
        names = ("dead_groups", "skipped", "grad_norm", "diversity", "kl", *(f"part/{name}" for name in self.c.rewards))
        return {name: row[name] for name in names if name in row}

    @property
    def ended(self) -> bool:
        """Whether the KL budget is spent."""
        return self.c.max_kl is not None and self.metrics[-1:] != [] and self.metrics[-1].get("kl", 0) > self.c.max_kl

    def look(self, row: Row, skips: Sequence[str]) -> None:
        """At the row of an iteration and at what it left out."""
        self.metrics.append(self._kept(row))
        for why in skips:
            self._tell(row["iteration"], "skipped", why)
        for name, alarm in ALARMS.items():
            text = None if name in self.told else alarm(self.c, self.metrics, self.evaluations)
            if text:
                self._tell(row["iteration"], name, text)
        if self.ended:
            self._tell(row["iteration"], "max_kl", f"kl is {row['kl']:.3g}, above max_kl: the run ends here")

    def _tell(self, iteration: int, alarm: str, text: str) -> None:
        self.told.add(alarm)
        if not self.tells:
            return
        files.append(self.file, {"iteration": iteration, "alarm": alarm, "text": text})
        self.say(f"alarm after iteration {iteration}, {alarm}: {text}")
